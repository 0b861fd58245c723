#!/usr/bin/env bash
# DALI 2.4.0: big-endian numpy arrays are read as if they were little-endian, without an error.
#
# Expected:   external_source, feed_input and the dynamic mode convert arrays of dtype '>i4', '>u2' or '>f4', or refuse them, as
#             torch.from_numpy and DALI's own Constant do.
# Observed:   The bytes are taken as they are: 1, 2, 300 as '>i4' become 16777216, 33554432, 738263040, and floats become numbers
#             near 0. The result has the native dtype, so that nothing downstream can notice. A requested dtype converts the wrong
#             values.
# Affected:   Pipelines fed with arrays from np.frombuffer on IDX (labels as '>i4'), 16-bit PGM ('>u2') or FITS files ('>f4'),
#             or from np.load on files that were written so.
# Workaround: Convert first: array.astype(array.dtype.newbyteorder("=")).
#
# Requires python3 with venv, pip, and 1 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
import nvidia.dali.experimental.dynamic as ndd
from nvidia.dali import Pipeline, fn, types


def run(make_output, feed=None):
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(make_output())
    if feed is not None:
        pipeline.feed_input("array", [feed])
    return pipeline.run()[0].as_array()[0]


for dtype in (">i4", ">u2"):
    array = np.array([1, 2, 300], dtype=dtype)
    native = array.astype(array.dtype.newbyteorder("="))
    print(f"{dtype} {array.tolist()}")
    print("  source:", run(lambda: fn.external_source(source=lambda info: array, batch=False)).tolist())
    print("  feed_input:", run(lambda: fn.external_source(name="array"), feed=array).tolist())
    print("  dynamic:", np.asarray(ndd.as_tensor(array)).tolist(), "copied:", np.asarray(ndd.tensor(array)).tolist())
    try:
        print("  Constant:", run(lambda: types.Constant(array) + 0).tolist())
    except TypeError as error:
        print("  Constant:", type(error).__name__)
    print("  converted first:", run(lambda: fn.external_source(name="array"), feed=native).tolist())
floats = np.array([1.0, 300.0], dtype=">f4")
print(">f4 [1.0, 300.0]: below 1e-30:", bool((np.asarray(ndd.as_tensor(floats)) < 1e-30).all()))
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check nvidia-dali-cuda130==2.4.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
>i4 [1, 2, 300]
  source: [16777216, 33554432, 738263040]
  feed_input: [16777216, 33554432, 738263040]
  dynamic: [16777216, 33554432, 738263040] copied: [16777216, 33554432, 738263040]
  Constant: TypeError
  converted first: [1, 2, 300]
>u2 [1, 2, 300]
  source: [256, 512, 11265]
  feed_input: [256, 512, 11265]
  dynamic: [256, 512, 11265] copied: [256, 512, 11265]
  Constant: TypeError
  converted first: [1, 2, 300]
>f4 [1.0, 300.0]: below 1e-30: True
EXPECTED
