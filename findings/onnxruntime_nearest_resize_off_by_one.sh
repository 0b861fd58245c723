#!/usr/bin/env bash
# onnxruntime 1.32.0: Resize with "nearest" takes the pixel before the right one where a position is a whole number.
#
# Expected:   With asymmetric coordinates and "floor", output pixel i of a resize from 40 to 24 is input pixel
#             floor(i * 40 / 24), as in torch.nn.functional.interpolate(mode="nearest"). Pixel 9 is input pixel 15.
# Observed:   The runtime divides i by 24 / 40 rounded to float32, which is slightly above 0.6, and gets 14.999999: pixel 14.
#             Some output columns and rows are copies of their neighbor for 40 to 24, 100 to 30 and 500 to 224; other sizes are
#             right, so that a test with one size says little.
# Affected:   Exported preprocessing and segmentation: label maps, masks and pseudo-label maps shift by a pixel in some columns,
#             and disagree with torch and with the images they belong to.
# Workaround: Give "scales" as a factor whose inverse is exact, resize by indexing (Gather with computed indices), or export
#             "nearest-exact", which takes positions in the middle of pixels. Test with the sizes that are used.
#
# Requires python3 with venv, and pip. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def resized(before, after):
    node = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"],
        mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )
    graph = helper.make_graph(
        [node], "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 1, before])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 1, after])],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, 1, after])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.arange(before, dtype=np.float32).reshape(1, 1, 1, before)
    return session.run(None, {"x": x})[0].ravel().astype(int)


for before, after in ((40, 24), (100, 30), (500, 224), (64, 32), (300, 224), (14, 224)):
    right = np.arange(after) * before // after
    found = resized(before, after)
    wrong = np.flatnonzero(found != right)
    cases = ", ".join(f"pixel {i} is {found[i]} instead of {right[i]}" for i in wrong)
    print(f"{before} to {after}: {len(wrong)} wrong; {cases}" if len(wrong) else f"{before} to {after}: right")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
40 to 24: 3 wrong; pixel 9 is 14 instead of 15, pixel 15 is 24 instead of 25, pixel 18 is 29 instead of 30
100 to 30: 3 wrong; pixel 9 is 29 instead of 30, pixel 15 is 49 instead of 50, pixel 18 is 59 instead of 60
500 to 224: 2 wrong; pixel 56 is 124 instead of 125, pixel 112 is 249 instead of 250
64 to 32: right
300 to 224: right
14 to 224: right
EXPECTED
