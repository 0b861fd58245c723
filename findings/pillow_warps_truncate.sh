#!/usr/bin/env bash
# Pillow 13.0.0: bilinear and bicubic rotate() and transform() cut off fractions, which darkens an image by half a level each time.
#
# Expected:   Interpolated values of 8-bit images are rounded to the nearest level, as resize() and torchvision's tensors do.
# Observed:   rotate() and transform() with BILINEAR or BICUBIC store the integer part: the mean falls by 0.5 per warp of a
#             gradient. Shifting an image by 0.3 pixels there and back five times makes it 5 levels darker; in mode "F", the mean
#             stays. NEAREST, the default, is exact.
# Affected:   Augmentations that chain warps on images (RandAugment, AugMix), tests that compare Pillow with another
#             implementation, and ports that take differences of one level on half of the pixels for rounding.
# Workaround: Combine the warps into one matrix, or warp in mode "F" and round once.
#
# Requires python3 with venv, and pip. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import numpy as np
from PIL import Image


def shift(image, by, resample):
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, by, 0, 1, 0), resample)


def mean_inside(image):
    return np.asarray(image, np.float64)[24:40, 24:40].mean()


image = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
exact = image.convert("F")
for name, resample in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
    rotated = mean_inside(image.rotate(17, resample)) - mean_inside(exact.rotate(17, resample))
    half = image.size[0], image.size[1] + 7
    resized = np.asarray(image.resize(half, resample), np.float64) - np.asarray(exact.resize(half, resample))
    print(f"{name}: rotate {rotated:+.1f}, resize {resized.mean():+.1f}")
for mode, shifted in (("L", image), ("F", exact)):
    for count in range(10):
        shifted = shift(shifted, 0.3 if count % 2 else -0.3, Image.Resampling.BILINEAR)
    print(f"ten shifts in mode {mode}: {mean_inside(shifted) - mean_inside(image):+.1f}")
PYTHON
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
"$folder/env/bin/python" "$folder/probe.py" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
bilinear: rotate -0.5, resize +0.0
bicubic: rotate -0.5, resize +0.0
ten shifts in mode L: -5.0
ten shifts in mode F: +0.0
EXPECTED
