#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy writes the wrong values for arrays that are not C-contiguous, without an error.
#
# Expected:   save_file() stores what the array holds, whatever its strides, as np.save() does; or it refuses, as
#             safetensors.torch does for tensors that are not contiguous.
# Observed:   0.7.0 stores a transposed, sliced, reversed or broadcast array correctly. 0.8.0 stores the file without an error
#             or a warning, with the right shape and dtype, and reads back other values.
#             The documentation asks for contiguous arrays, and nothing checks for them.
# Affected:   Anyone who converts weights or data sets with NumPy: transposed kernels (HWIO to OIHW), columns of a table, every
#             second sample, arrays in Fortran order. Code that was right with 0.7.0 writes wrong weights after an upgrade.
# Workaround: Pass np.ascontiguousarray(array), and compare one loaded file with what was saved.
#
# Requires python3 with venv, and pip. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

path = sys.argv[1] + "/weights.safetensors"
array = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
cases = {
    "contiguous": array,
    "transposed": array.T,
    "Fortran order": np.asfortranarray(array),
    "every second column": array[:, ::2],
    "reversed": array[::-1],
    "broadcast": np.broadcast_to(array[:1], (2, 3)),
    "transposed, made contiguous": np.ascontiguousarray(array.T),
}
for name, value in cases.items():
    save_file({"w": value}, path)
    loaded = load_file(path)["w"]
    same = loaded.shape == value.shape and loaded.dtype == value.dtype
    right = np.array_equal(loaded, value)
    print(f"{safetensors.__version__} {name}: same shape and dtype {same}, same values {right}")
PYTHON
python3 -m venv "$folder/env"
for version in 0.7.0 0.8.0; do
  "$folder/env/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
  "$folder/env/bin/python" "$folder/probe.py" "$folder" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
0.7.0 contiguous: same shape and dtype True, same values True
0.7.0 transposed: same shape and dtype True, same values True
0.7.0 Fortran order: same shape and dtype True, same values True
0.7.0 every second column: same shape and dtype True, same values True
0.7.0 reversed: same shape and dtype True, same values True
0.7.0 broadcast: same shape and dtype True, same values True
0.7.0 transposed, made contiguous: same shape and dtype True, same values True
0.8.0 contiguous: same shape and dtype True, same values True
0.8.0 transposed: same shape and dtype True, same values False
0.8.0 Fortran order: same shape and dtype True, same values False
0.8.0 every second column: same shape and dtype True, same values False
0.8.0 reversed: same shape and dtype True, same values False
0.8.0 broadcast: same shape and dtype True, same values False
0.8.0 transposed, made contiguous: same shape and dtype True, same values True
EXPECTED
