#!/usr/bin/env bash
# Triton 3.9.0: one NaN makes tl.sort and tl.topk lose other values and repeat some; the NaN itself may vanish.
#
# Expected:   As in torch and numpy, a NaN goes to one end, and the result is a permutation of the input.
# Observed:   Both partners of an exchange decide on their own with `x > y`. If one is NaN, neither comparison holds, so both take the
#             same value. Depending on its place, one NaN is replaced by a copy of another value, takes the place of all others, or
#             removes one of them: [3, 2, 1, NaN] becomes [2, 3, 2, 3]. tl.topk(2) of rows with a NaN has none. Code for sm_90 has the
#             same ordered comparisons (ogt).
# Affected:   Medians, quantiles, top-k routing and sampling in kernels: a NaN is not found by a check of the result.
# Workaround: Replace NaN by infinity before sorting, and count them apart: tl.where(x == x, x, float("inf")).
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernels.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def ascending(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.sort(tl.load(source + at)))


@triton.jit
def largest(source, target, SIZE: tl.constexpr):
    tl.store(target + tl.arange(0, 2), tl.topk(tl.load(source + tl.arange(0, SIZE)), 2))


@triton.jit
def replaced(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(source + at)
    tl.store(target + at, tl.sort(tl.where(values == values, values, float("inf"))))
PYTHON
cat > "$folder/interpret.py" <<'PYTHON'
import torch

import kernels

nan = float("nan")
for row in ([1.0, nan, 3.0, 2.0], [nan, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, nan]):
    source = torch.tensor(row)
    results = [f"torch {source.sort().values.tolist()}"]
    for kernel, count in ((kernels.ascending, 4), (kernels.largest, 2), (kernels.replaced, 4)):
        target = torch.zeros(count)
        kernel[(1,)](source, target, SIZE=4)
        results.append(f"{kernel.__name__} {target.tolist()}")
    print(f"{row}: {', '.join(results)}")
PYTHON
cat > "$folder/compile.py" <<'PYTHON'
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

source = ASTSource(kernels.ascending, {"source": "*fp32", "target": "*fp32", "SIZE": "constexpr"}, {(2,): 4})
code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
print("comparisons for sm_90:", sorted(set(re.findall(r"arith\.cmpf (\w+)", code))))
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 triton==3.9.0 numpy==2.4.6
export TRITON_CACHE_DIR="$folder/cache" TRITON_DEFAULT_FP_FUSION=1
{
  TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/interpret.py"
  "$folder/env/bin/python" "$folder/compile.py"
} | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
[1.0, nan, 3.0, 2.0]: torch [1.0, 2.0, 3.0, nan], ascending [1.0, 1.0, 2.0, 3.0], largest [3.0, 2.0], replaced [1.0, 2.0, 3.0, inf]
[nan, 1.0, 2.0, 3.0]: torch [1.0, 2.0, 3.0, nan], ascending [nan, nan, nan, nan], largest [3.0, 2.0], replaced [1.0, 2.0, 3.0, inf]
[3.0, 2.0, 1.0, nan]: torch [1.0, 2.0, 3.0, nan], ascending [2.0, 3.0, 2.0, 3.0], largest [3.0, 2.0], replaced [1.0, 2.0, 3.0, inf]
comparisons for sm_90: ['ogt']
EXPECTED
