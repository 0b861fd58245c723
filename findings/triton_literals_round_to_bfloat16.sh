#!/usr/bin/env bash
# Triton 3.9.0: a literal or constexpr factor is rounded to the tensor's bfloat16, and 0.999 becomes 1; an argument is not.
#
# Expected:   values * 0.999, with values in bfloat16, is computed as in torch: the factor keeps its precision and only the result
#             is rounded. A literal, a tl.constexpr and a float argument of the kernel give the same product.
# Observed:   A literal and a constexpr take the tensor's dtype first. In bfloat16, 0.999 is 1, the multiplication disappears from
#             the intermediate code, and the stored float32 is unchanged. 0.1 is off by 0.1 %. A float argument of the kernel
#             promotes the product to float32 instead, so that moving a factor from an argument to a constexpr changes results.
# Affected:   Kernels for moving averages, weight decay, loss scales or dropout on bfloat16 tensors: a decay of 0.999 has no effect.
# Workaround: Convert the tensor first: values.to(tl.float32) * 0.999.
#
# Requires python3 with venv, and pip; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def literal(x, y):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at) * 0.999)


@triton.jit
def tenth(x, y):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at) * 0.1)


@triton.jit
def constant(x, y, FACTOR: tl.constexpr):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at) * FACTOR)


@triton.jit
def argument(x, y, factor):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at) * factor)


@triton.jit
def converted(x, y):
    at = tl.arange(0, 64)
    tl.store(y + at, tl.load(x + at).to(tl.float32) * 0.999)


pointers = {"x": "*bf16", "y": "*fp32"}
for kernel, extra, values in (
    (literal, {}, {}),
    (constant, {"FACTOR": "constexpr"}, {"FACTOR": 0.999}),
    (tenth, {}, {}),
    (argument, {"factor": "fp32"}, {}),
    (converted, {}, {}),
):
    compiled = triton.compile(ASTSource(kernel, pointers | extra, values), target=GPUTarget("cuda", 90, 32))
    code = compiled.asm["ttir"]
    products = re.findall(r"arith\.mulf .*tensor<64x(\w+)>", code)
    factors = re.findall(r"dense<([\d.e+-]+)> : tensor<64x[bf]+\d+>", code)
    print(f"{kernel.__name__}: multiplications in {products}, constant factors {[float(factor) for factor in factors]}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0
TRITON_CACHE_DIR=$folder/cache TRITON_DEFAULT_FP_FUSION=1 "$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
literal: multiplications in [], constant factors []
constant: multiplications in [], constant factors []
tenth: multiplications in ['bf16'], constant factors [0.100098]
argument: multiplications in ['f32'], constant factors []
converted: multiplications in ['f32'], constant factors [0.999]
EXPECTED
