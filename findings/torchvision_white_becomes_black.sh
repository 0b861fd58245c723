#!/usr/bin/env bash
# torchvision 0.29.2: to_dtype(scale=True) turns white into black, from float32 to uint16 and from float16 or bfloat16 to uint8.
#
# Expected:   1.0 becomes the largest integer, 255 or 65535, as from float32 to uint8; or the conversion is refused, as from
#             float32 to int32, since float32 cannot hold all results.
# Observed:   The image is multiplied by the largest integer + 0.999. In float32, 65535.999 is 65536, and in float16 and
#             bfloat16, 255.999 is 256, so that 1.0 wraps around to 0. A uint16 image that goes to float32 and back loses its
#             brightest value: 65535 becomes 0, and 65408 to 65534 rise by one. convert_image_dtype of the first version does
#             the same. No error or warning.
# Affected:   Augmentation in float between 16-bit images (medical, depth, astronomy) and pictures of half-precision images:
#             saturated areas become black, which looks like noise in the data. Images without pure white pass every test.
# Workaround: From half precision, convert to float32 first. To uint16, use
#             image.mul(65535).round().to(torch.int32).to(torch.uint16).
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
from torchvision.transforms import functional as first
from torchvision.transforms.v2 import functional

for source, target in (
    (torch.float32, torch.uint8),
    (torch.float16, torch.uint8),
    (torch.bfloat16, torch.uint8),
    (torch.float32, torch.uint16),
    (torch.float32, torch.int32),
):
    image = torch.tensor([0.0, 0.5, 0.99, 1.0], dtype=source).view(1, 1, 4)
    try:
        results = [convert(image) for convert in (
            lambda image: functional.to_dtype(image, target, scale=True),
            lambda image: first.convert_image_dtype(image, target),
        )]
        print(source, "to", target, results[0].flatten().tolist(), "both versions:", torch.equal(*results))
    except RuntimeError as error:
        print(source, "to", target, "RuntimeError:", error)

levels = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(1, 256, 256)
floats = functional.to_dtype(levels, torch.float32, scale=True)
back = functional.to_dtype(floats, torch.uint16, scale=True)
changed = (back.int() != levels.int()).flatten().nonzero().flatten().tolist()
print("changed by float32 and back:", changed[0], "to", changed[-1], "in all", len(changed))
print("among them:", {value: back.flatten()[value].item() for value in (65408, 65534, 65535)})
rounded = floats.mul(65535).round().to(torch.int32).to(torch.uint16)
print("rounded:", torch.equal(rounded.int(), levels.int()))
white = torch.ones(1, 1, 1, dtype=torch.float16)
print("float32 first:", functional.to_dtype(white.float(), torch.uint8, scale=True).item())
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
torch.float32 to torch.uint8 [0, 127, 253, 255] both versions: True
torch.float16 to torch.uint8 [0, 128, 253, 0] both versions: True
torch.bfloat16 to torch.uint8 [0, 128, 253, 0] both versions: True
torch.float32 to torch.uint16 [0, 32768, 64880, 0] both versions: True
torch.float32 to torch.int32 RuntimeError: The conversion from torch.float32 to torch.int32 cannot be performed safely.
changed by float32 and back: 65408 to 65535 in all 128
among them: {65408: 65409, 65534: 65535, 65535: 0}
rounded: True
float32 first: 255
EXPECTED
