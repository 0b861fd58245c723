#!/usr/bin/env bash
# Triton 3.9.0: the interpreter converts float32 to bfloat16 by dropping bits, while GPUs round to nearest.
#
# Expected:   With TRITON_INTERPRET=1, x.to(tl.bfloat16) rounds to nearest even, like the compiled kernel and like torch.
# Observed:   It truncates: 1.0041 becomes 1.0 instead of 1.0078, and -0.3 moves toward zero. float16 is rounded correctly.
# Affected:   Anyone who tests bfloat16 kernels in the interpreter. Errors are twice as large and biased, so that sums over many
#             values drift, and a tolerance that passes there hides errors on a GPU.
# Workaround: Test in float16 or float32, and use bfloat16 there only with wide tolerances.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def round_trip(source, target, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + at).to(DTYPE).to(tl.float32))


values = torch.tensor([1 + 2**-8 + 2**-12, 1 + 3 * 2**-8, 0.3, -0.3])
for name, dtype, exact in (("bfloat16", tl.bfloat16, torch.bfloat16), ("float16", tl.float16, torch.float16)):
    found = torch.empty_like(values)
    round_trip[(1,)](values, found, SIZE=4, DTYPE=dtype)
    print(name, "torch", values.to(exact).float().tolist())
    print(name, "interpreter", found.tolist())
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 triton==3.9.0 numpy==2.4.6
TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
bfloat16 torch [1.0078125, 1.015625, 0.30078125, -0.30078125]
bfloat16 interpreter [1.0, 1.0078125, 0.298828125, -0.298828125]
float16 torch [1.00390625, 1.01171875, 0.300048828125, -0.300048828125]
float16 interpreter [1.00390625, 1.01171875, 0.300048828125, -0.300048828125]
EXPECTED
