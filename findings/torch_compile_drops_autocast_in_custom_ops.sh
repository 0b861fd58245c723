#!/usr/bin/env bash
# torch 2.15.0: autocast is on inside a custom operator in eager mode, and off inside the same operator under torch.compile.
#
# Expected:   A custom operator is opaque. Its implementation runs with the same autocast state, and so in the same precision,
#             whether its caller is compiled or not.
# Observed:   Under autocast, eager mode runs the implementation with autocast on: a product of float32 matrices inside it is
#             computed in bfloat16. torch.compile applies autocast while it traces, and runs the operator with autocast off:
#             the same product is computed in float32. It makes no difference whether the autocast block is inside or outside
#             the compiled function. No warning is printed; dtypes of inputs and outputs are the same.
# Affected:   Anyone who wraps a loss, a normalization or a kernel in torch.library.custom_op and trains with mixed precision:
#             speed, memory and rounding differ between eager and compiled runs.
# Workaround: Decide inside the operator: wrap its body in `with torch.autocast(device_type, enabled=False)` and cast explicitly.
#             For one dtype in both modes, cast the inputs before the call.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch

seen = []


@torch.library.custom_op("findings::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result = a @ b
    seen.append((torch.is_autocast_enabled("cpu"), result.dtype))
    return result.float()


@product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("findings::fixed", mutates_args=())
def fixed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        result = a @ b
        seen.append((torch.is_autocast_enabled("cpu"), result.dtype))
    return result.float()


@fixed.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


def outside(operator, a):
    return operator(a, a)


def inside(operator, a):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return operator(a, a)


a = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
exact = a @ a
for label, operator in (("product", product), ("fixed", fixed)):
    for function in (outside, inside):
        for name, run in (("eager", function), ("compiled", torch.compile(function))):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=function is outside):
                result = run(operator, a)
            on, dtype = seen[-1]
            error = "below 1e-5" if (result - exact).abs().max() < 1e-5 else "above 1e-5"
            print(f"{label}, autocast {function.__name__}, {name}: on={on}, {dtype}, error {error}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/env/bin/python" "$folder/probe.py" 2> "$folder/log" | tee "$folder/seen" ||
  { cat "$folder/log" >&2; exit 1; }
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
product, autocast outside, eager: on=True, torch.bfloat16, error above 1e-5
product, autocast outside, compiled: on=False, torch.float32, error below 1e-5
product, autocast inside, eager: on=True, torch.bfloat16, error above 1e-5
product, autocast inside, compiled: on=False, torch.float32, error below 1e-5
fixed, autocast outside, eager: on=False, torch.float32, error below 1e-5
fixed, autocast outside, compiled: on=False, torch.float32, error below 1e-5
fixed, autocast inside, eager: on=False, torch.float32, error below 1e-5
fixed, autocast inside, compiled: on=False, torch.float32, error below 1e-5
EXPECTED
