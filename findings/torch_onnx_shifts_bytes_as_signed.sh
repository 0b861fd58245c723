#!/usr/bin/env bash
# torch 2.15.0: a right shift of uint8 values becomes int8 in an ONNX export, and a left shift after it gives negative values.
#
# Expected:   (x >> 4) << 4, which keeps the upper four bits, gives the same uint8 values in torch and in the exported model.
# Observed:   The exporter expresses >> of uint8 with the type int8. The exported model returns int8, and values from 128 on are
#             negative: 240 becomes -16. After conversion to float and division by 255, a white pixel is -0.06 and not 0.94.
#             The export, the checker and the runtime report nothing; the result of the right shift alone has the right values.
# Affected:   Anyone who exports posterization, bit packing or other uint8 preprocessing with a model. Dark test images pass.
# Workaround: Write masks and integer division: x & 0xF0, or x // 16 * 16. Both are exported as uint8.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import onnxruntime
import torch


class Shift(torch.nn.Module):
    def forward(self, x):
        return (x >> 4) << 4


class Scaled(torch.nn.Module):
    def forward(self, x):
        return ((x >> 4) << 4).float() / 255


class Mask(torch.nn.Module):
    def forward(self, x):
        return x & 0xF0


class Division(torch.nn.Module):
    def forward(self, x):
        return x // 16 * 16


x = torch.tensor([0, 100, 127, 128, 255], dtype=torch.uint8)
for module in (Shift(), Scaled(), Mask(), Division()):
    graph = torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    exported = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    right = module(x).numpy()
    for side, values in (("torch", right), ("exported", exported)):
        print(f"{type(module).__name__}, {side}: {values.dtype} {[round(value, 2) for value in values.tolist()]}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.15.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" 2> "$folder/log" | tee "$folder/seen" || { cat "$folder/log" >&2; exit 1; }
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
Shift, torch: uint8 [0, 96, 112, 128, 240]
Shift, exported: int8 [0, 96, 112, -128, -16]
Scaled, torch: float32 [0.0, 0.38, 0.44, 0.5, 0.94]
Scaled, exported: float32 [0.0, 0.38, 0.44, -0.5, -0.06]
Mask, torch: uint8 [0, 96, 112, 128, 240]
Mask, exported: uint8 [0, 96, 112, 128, 240]
Division, torch: uint8 [0, 96, 112, 128, 240]
Division, exported: uint8 [0, 96, 112, 128, 240]
EXPECTED
