"""Resizing of images in an exported model, as `pipelines.data.pixels` resizes files with Pillow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RULE = (
    "resize the shorter side to {side} pixels and the longer one in proportion, floor(x + 0.5), with Pillow's "
    "antialiased bicubic filter; then crop the center, {side}x{side}"
)

_UNITS = 2.0**22  # Pillow rounds a pixel's share to whole units of 1 / 2^22.


class Resize(nn.Module):
    """Resize and center-crop: (N, H, W, 3) uint8 images of any size to (N, 3, side, side) float32, integers 0..255.

    The filter's passes over rows and over columns are matrix products that only make the pixels inside the crop. Each
    rounds to integers from 0 to 255, so that their order matters; Pillow 13 starts with the rows of tall images. Sizes
    are tensors, so that an exported program takes images of any size.

    Args:
        side: Side of the result, in pixels.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        sides = [torch.arange(n, dtype=torch.float64, device=images.device) for n in images.shape[1:3]]
        shorter = torch.minimum(sides[0][-1], sides[1][-1]) + 1
        (rows, fewer_rows), (columns, fewer_columns) = (self._weights(positions, shorter) for positions in sides)
        pixels = images.permute(0, 3, 1, 2).double()
        rows_first = _rounded(_rounded(rows @ pixels) @ columns.T)
        columns_first = _rounded(rows @ _rounded(pixels @ columns.T))
        return torch.where(fewer_rows > 2 * fewer_columns.clamp(min=0), rows_first, columns_first).float()

    def _weights(self, positions: Tensor, shorter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the filter along one dimension, for positions 0..n - 1, and by how many pixels it shortens an image.

        Returns:
            Each pixel's share of each pixel in the crop, (side, n) float64; and the difference, () float64.
        """
        length = positions[-1] + 1
        resized = torch.floor(length * self.side / shorter + 0.5)
        first = torch.floor((resized - self.side + 1) / 2)
        scale = length / resized
        centers = (first + torch.arange(self.side, dtype=torch.float64, device=positions.device) + 0.5) * scale
        # Reducing widens the filter (antialiasing).
        distance = (positions + 0.5 - centers[:, None]).abs() / scale.clamp(min=1.0)
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        shares = weights / weights.sum(1, keepdim=True)
        return torch.floor(shares.abs() * _UNITS + 0.5) * shares.sign() / _UNITS, length - resized


def _rounded(pixels: Tensor) -> Tensor:
    return torch.floor(pixels + 0.5).clamp(0, 255)
