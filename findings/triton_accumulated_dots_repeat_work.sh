#!/usr/bin/env bash
# Triton 3.9.0: dot products that accumulate into one tile are computed by several warps at once if the tile has few rows.
#
# Expected:   total = tl.dot(x1, y1, total) followed by total = tl.dot(x2, y2, total) needs as many matrix instructions as one
#             tl.dot over both halves, whatever the number of warps.
# Observed:   On sm_80, a single tl.dot divides its tile among the warps in both directions. As soon as a second tl.dot depends on
#             the first, warps divide only the rows, 16 each. With 32 rows, 4 warps issue twice the needed matrix instructions and
#             8 warps four times; with 64 rows, 8 warps issue twice as many. Results are correct.
# Affected:   Kernels with unrolled accumulation over few rows: convolutions tap by tap, weight gradients of small layers, attention
#             over few queries, and wherever matrix instructions of a warp are used (also on sm_90 below 64 rows).
# Workaround: Use at most one warp per 16 rows, or stack several products along the rows. Count the matrix instructions in the
#             machine code.
#
# Requires python3 with venv, and pip; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import re
import subprocess
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def one_dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 2 * K)
    x = tl.load(a + m[:, None] * (2 * K) + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))


@triton.jit
def two_dots(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for half in tl.static_range(2):
        x = tl.load(a + m[:, None] * (2 * K) + half * K + k[None, :])
        y = tl.load(b + (half * K + k[:, None]) * N + n[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * N + n[None, :], total)


tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
for kernel in (one_dot, two_dots):
    for m in (32, 64):
        issued = []
        for warps in (1, 2, 4, 8):
            sizes = {"M": m, "N": 32, "K": 32}
            source = ASTSource(kernel, signature | dict.fromkeys(sizes, "constexpr"), sizes)
            compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps, "num_stages": 1})
            binary = Path(__file__).with_name("kernel.cubin")
            binary.write_bytes(compiled.asm["cubin"])
            code = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
            issued.append(warps * len(re.findall(r"\bHMMA\.16816", code)))
        print(f"{kernel.__name__}, {m} x 32: {m // 16 * 4 * 4} needed; 1, 2, 4, 8 warps issue {issued}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0
TRITON_CACHE_DIR=$folder/cache TRITON_DEFAULT_FP_FUSION=1 "$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
one_dot, 32 x 32: 32 needed; 1, 2, 4, 8 warps issue [32, 32, 32, 32]
one_dot, 64 x 32: 64 needed; 1, 2, 4, 8 warps issue [64, 64, 64, 64]
two_dots, 32 x 32: 32 needed; 1, 2, 4, 8 warps issue [32, 32, 64, 128]
two_dots, 64 x 32: 64 needed; 1, 2, 4, 8 warps issue [64, 64, 64, 128]
EXPECTED
