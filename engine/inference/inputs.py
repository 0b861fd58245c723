"""Images in any form: files, folders, contents of files, PIL images, arrays and tensors."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.errors import UserError
from engine.inference.predict import Source, find_images
from pipelines.files import first_line

_ACCEPTED = (
    "a path of an image or a folder, the content of an image file (bytes or a file open in binary mode), a PIL image, "
    "a uint8 array, a uint8 tensor, or an iterable of these"
)
_CHANNELS = (1, 3, 4)  # Gray, RGB, RGBA.


def each_image(images: Any) -> Iterator[Source]:
    """Yield every image, in order; the images of a folder are sorted by their relative paths.

    Args:
        images: Any form that `engine.api.Model.predict` accepts.

    Raises:
        TypeError: The type is not accepted.
        ValueError: An array or a tensor has a shape or a dtype that is not accepted.
        UserError: A folder has no images, or a folder or an open file cannot be read.
    """
    images = _without_array(images)
    for each in images if _is_list(images) else [images]:
        yield from _one_or_more(_without_array(each))


def _without_array(images: Any) -> Any:
    """Return the element of an array without dimensions, such as a path; anything else unchanged."""
    return images.item() if isinstance(images, np.ndarray) and images.ndim == 0 else images


def _is_list(images: Any) -> bool:
    """Return whether these are several inputs; the elements of an array of objects or strings are inputs, too."""
    # Strings of numpy are str or bytes, and have __array__.
    if isinstance(images, (str, bytes, bytearray, memoryview, Image.Image, torch.Tensor, Mapping, Set)):
        return False
    if hasattr(images, "__array__"):
        return np.asarray(images).dtype.kind in "OSTU"
    return isinstance(images, Iterable) and not hasattr(images, "read")


def _one_or_more(images: Any) -> Iterator[Source]:
    if isinstance(images, (str, os.PathLike)):
        if not os.fspath(images):
            raise ValueError("the path of an image is empty")
        yield from find_images([Path(images)])
    elif isinstance(images, (bytes, bytearray, memoryview)):
        yield bytes(images)
    elif isinstance(images, Image.Image):
        if not all(images.size):
            raise ValueError(f"images have no pixels, got {images.size}")
        yield images
    elif isinstance(images, torch.Tensor):
        yield from _from_tensor(images)
    elif hasattr(images, "__array__") and not _is_list(images):
        yield from _from_array(np.asarray(images))
    elif hasattr(images, "read"):
        yield _content(images)
    else:
        raise TypeError(f"images must be {_ACCEPTED}; got {type(images).__name__}")


def _content(file: Any) -> bytes:
    """Return what remains to be read of an open file."""
    if getattr(file, "closed", False):
        raise UserError("an image file is closed; give its path, or close the file later")
    try:
        content = file.read()
    except (UnicodeDecodeError, io.UnsupportedOperation):
        content = ""  # It is open as text, or for writing.
    except (OSError, ValueError) as error:
        raise UserError(f"an open image file cannot be read ({first_line(error, 100)})") from None
    if not isinstance(content, bytes):
        raise TypeError("an image file must be open in binary mode: open(path, 'rb')")
    return content


def _from_array(array: np.ndarray) -> Iterator[Source]:
    _check_dtype(str(array.dtype))
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in _CHANNELS:
        raise ValueError(
            "an array must be (H, W), (H, W, C) or (N, H, W, C) with C = 1, 3 or 4 channels (gray, RGB or RGBA), "
            f"got {array.shape}; for N gray images, pass images[..., None]"
        )
    for image in array if array.ndim == 4 else array[None]:
        if not image.size:
            raise ValueError(f"images have no pixels, got {array.shape}")
        yield Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _from_tensor(tensor: torch.Tensor) -> Iterator[Source]:
    _check_dtype(str(tensor.dtype).removeprefix("torch."))
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim not in (3, 4) or tensor.shape[-3] not in _CHANNELS:
        raise ValueError(
            "a tensor must be (H, W), (C, H, W) or (N, C, H, W) with C = 1, 3 or 4 channels (gray, RGB or RGBA), "
            f"got {tuple(tensor.shape)}; if channels come last, pass an array: tensor.numpy()"
        )
    yield from _from_array(tensor.detach().movedim(-3, -1).cpu().numpy())


def _check_dtype(dtype: str) -> None:
    if dtype != "uint8":
        scaled = "; if they are from 0 to 1, convert them to pixels: (255 * images).round(), as uint8"
        raise ValueError(f"images must be uint8, from 0 to 255, got {dtype}{scaled if 'float' in dtype else ''}")
