#!/usr/bin/env bash
# Triton 3.9.0: the interpreter refuses a store whose mask combines a block of booleans with a scalar boolean.
#
# Expected:   `(block < 4) & (program_id == 0)` is a block of booleans, in the interpreter as in compiled code.
# Observed:   In the interpreter the result has the numpy dtype int32. tl.store then raises a ValueError about its mask, while
#             the same kernel compiles for sm_90. Comparing the combined mask with 0, or an `if` around the store, works in both.
# Affected:   Anyone who tests kernels on a machine without a GPU and lets one program of several store a shared result.
# Workaround: Put the scalar condition into an `if`, or write `(mask & scalar) != 0`.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernels.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def combined(target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, at * 0 + 1, mask=(at < 4) & (tl.program_id(0) == 0))


@triton.jit
def compared(target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, at * 0 + 1, mask=((at < 4) & (tl.program_id(0) == 0)) != 0)


@triton.jit
def branched(target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if tl.program_id(0) == 0:
        tl.store(target + at, at * 0 + 1, mask=at < 4)
PYTHON
cat > "$folder/interpret.py" <<'PYTHON'
import torch

import kernels

for name in ("combined", "compared", "branched"):
    found = torch.zeros(8, dtype=torch.int32)
    try:
        getattr(kernels, name)[(2,)](found, SIZE=8)
        print(name, "interpreted:", found.tolist())
    except Exception as error:
        print(name, "interpreted:", type(error.__cause__ or error).__name__)
PYTHON
cat > "$folder/compile.py" <<'PYTHON'
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels

for name in ("combined", "compared", "branched"):
    source = ASTSource(getattr(kernels, name), {"target": "*i32", "SIZE": "constexpr"}, {(1,): 8})
    print(name, "compiled:", "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm)
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 triton==3.9.0 numpy==2.4.6
export TRITON_CACHE_DIR="$folder/cache"
{
  TRITON_INTERPRET=1 "$folder/env/bin/python" "$folder/interpret.py"
  "$folder/env/bin/python" "$folder/compile.py"
} | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
combined interpreted: ValueError
compared interpreted: [1, 1, 1, 1, 0, 0, 0, 0]
branched interpreted: [1, 1, 1, 1, 0, 0, 0, 0]
combined compiled: True
compared compiled: True
branched compiled: True
EXPECTED
