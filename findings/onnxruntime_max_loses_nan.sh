#!/usr/bin/env bash
# onnxruntime 1.32.0: whether ReduceMax and ArgMax see a NaN depends on its position, and MaxPool replaces it by -3.4e38.
#
# Expected:   As in NumPy and torch, the maximum of values with a NaN is NaN, and argmax gives its position.
# Observed:   ReduceMax of [NaN, 3, 1] is NaN; ReduceMax of [1, NaN, 2] is 2. ArgMax ignores the NaN after the first
#             position. MaxPool of three NaN is -3.4e38, a finite number. Max, Relu and TopK keep NaN.
# Affected:   Anyone who exports a confidence (`probabilities.max()`), or watches a served model for NaN by its outputs: a model
#             whose activations hold NaN answers with ordinary classes and finite scores.
# Workaround: Export the check: IsNaN and ReduceSum on the logits, before any maximum.
#
# Requires python3 with venv, and pip. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def run(kind, values, output_type, **attributes):
    shape = [1, 1, len(values)]
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"], **attributes)], "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", output_type, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array(values, np.float32).reshape(shape)})[0].item()


nan = float("nan")
for values in ([1, 2, 3], [nan, 3, 1], [1, nan, 2], [3, nan, 1], [nan, nan, nan]):
    print(
        f"{values}: NumPy max {np.max(values):g} argmax {np.argmax(values)};",
        f"ReduceMax {run('ReduceMax', values, TensorProto.FLOAT, axes=[2], keepdims=0):g}",
        f"ArgMax {run('ArgMax', values, TensorProto.INT64, axis=2, keepdims=0)}",
        f"MaxPool {run('MaxPool', values, TensorProto.FLOAT, kernel_shape=[3]):.2g}",
    )
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
[1, 2, 3]: NumPy max 3 argmax 2; ReduceMax 3 ArgMax 2 MaxPool 3
[nan, 3, 1]: NumPy max nan argmax 0; ReduceMax nan ArgMax 0 MaxPool 3
[1, nan, 2]: NumPy max nan argmax 1; ReduceMax 2 ArgMax 2 MaxPool 2
[3, nan, 1]: NumPy max nan argmax 1; ReduceMax 3 ArgMax 0 MaxPool 3
[nan, nan, nan]: NumPy max nan argmax 0; ReduceMax nan ArgMax 0 MaxPool -3.4e+38
EXPECTED
