#!/usr/bin/env bash
# torch 2.15.0, torchvision 0.29.2: inside an autocast block, images are rotated and warped with bfloat16 positions.
#
# Expected:   Autocast runs grid_sample in float32, and affine_grid of float32 parameters is not on any of its lists. So the
#             positions are float32, and rotating an image inside the block gives the same pixels as outside.
# Observed:   affine_grid multiplies matrices, which autocast computes in bfloat16. The grid is bfloat16, with 8 bits per
#             position: 512 columns have 386 distinct positions, up to half a pixel off, and the *identity* changes 44 % of
#             the pixels. grid_sample then converts it to float32, so that neither a dtype nor a warning tells. torchvision's
#             rotate, affine and perspective of tensors compute their grids in the same way: more than a tenth of the pixels
#             of a 224x224 image differ, and a uint8 image stays uint8.
# Affected:   Augmentation on the device within the training step, spatial transformers, and test-time augmentation, whenever
#             they are called inside `with torch.autocast(...)`: warped images lose resolution as they get larger.
# Workaround: Warp outside the block, or inside `with torch.autocast(device_type, enabled=False)`.
#
# Requires python3 with venv, pip, and 6 GB of disk; no GPU. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as V


def warped(image, enabled):
    """Return the grid of the identity, and the image sampled at its positions."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        grid = F.affine_grid(torch.eye(2, 3)[None], image.shape, align_corners=False)
        return grid, F.grid_sample(image, grid, mode="nearest", align_corners=False)


def changed(first, second):
    return float((first != second).float().mean())


generator = torch.Generator().manual_seed(0)
for side in (224, 512):
    image = torch.rand(1, 1, side, side, generator=generator)
    (exact, same), (coarse, other) = warped(image, False), warped(image, True)
    assert torch.equal(same, image) and other.dtype == torch.float32
    off = float((exact - coarse.float()).abs().max()) * side / 2
    print(
        f"identity of {side} columns: {coarse.dtype}, {coarse[0, 0, :, 0].unique().numel()} distinct positions, "
        f"off by up to {off:.2f} pixels, {changed(other, image):.0%} of the pixels changed"
    )

image = torch.randint(256, (3, 224, 224), generator=generator, dtype=torch.uint8)
corners = [[0, 0], [223, 0], [223, 223], [0, 223]]
moved = [[10, 5], [220, 0], [215, 220], [3, 210]]
for name, warp in {
    "rotate": lambda image: V.rotate(image, 30),
    "affine": lambda image: V.affine(image, angle=10, translate=[5, 0], scale=1.1, shear=[5.0]),
    "perspective": lambda image: V.perspective(image, corners, moved),
}.items():
    exact = warp(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = warp(image)
        with torch.autocast("cpu", enabled=False):
            repaired = warp(image)
    assert torch.equal(exact, repaired)
    print(f"{name}: {coarse.dtype}, more than a tenth of the pixels differ: {changed(exact, coarse) > 0.1}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
identity of 224 columns: torch.bfloat16, 224 distinct positions, off by up to 0.19 pixels, 0% of the pixels changed
identity of 512 columns: torch.bfloat16, 386 distinct positions, off by up to 0.50 pixels, 44% of the pixels changed
rotate: torch.uint8, more than a tenth of the pixels differ: True
affine: torch.uint8, more than a tenth of the pixels differ: True
perspective: torch.uint8, more than a tenth of the pixels differ: True
EXPECTED
