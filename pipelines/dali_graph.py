"""Views by a graph of DALI's own operators, the same on a CPU and on a GPU.

ReMixMatch (ICLR 2020), sections 3.2 and 3.2.2. The graph has no branches and no Python nodes: every operator processes
every view, with per-view arguments that are neutral where a view does not use it. The weak augmentation comes first:

    pad        reflect the border: slices, flips and concatenations
    crop       cut out the shifted window
    flip       mirror it

Then, once for each of a view's two transformations:

    warp       rotation, shears, translations, and rescale by NEAREST or BOX: one nearest-neighbor `fn.warp_affine`
    statistics luma, its mean, and each channel's extremes: `fn.reductions`
    filter     blur, smooth and sharpness: one `fn.filter` with the view's own taps
    equalize   `fn.equalize`
    blend      one interpolation between the view and the image that its transformation names, chosen by bit masks
    bits       posterize and solarize
    erase      cutout
    resize     rescale by the other filters

All but two transformations equal PIL byte for byte. Equalize is OpenCV's, and rescale is DALI's `fn.resize`, which
repeats the border where PIL renormalizes the taps, does not round between its two passes, and has no HAMMING filter
(the triangular one takes its place). `docs/views.md` has the differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from pipelines import ctaugment, geometric
from pipelines.dali import fill_queue
from pipelines.images import ImageStore
from pipelines.packed_buffer import Layout
from pipelines.plan import OPS_PER_VIEW, ViewPlan
from pipelines.views import MAX_GRAPH_SIDE, Views, plain_views

_NAMES = ctaugment.NAMES
_ENHANCED = ("brightness", "color", "contrast", "sharpness")  # ImageEnhance: from the named image towards the view.
_SMOOTHED = ("sharpness", "smooth")
# The image that a transformation blends with; brightness blends with black, which has no mask.
_BLENDED = ("autocontrast", "blur", "color", "contrast", "equalize", "invert", "smooth", "sharpness", "brightness")


def _mask(*names: str) -> np.ndarray:
    """Return 255 for each transformation with one of the names and 0 for the others: (T,) uint8."""
    return np.where(np.isin(_NAMES, names), 255, 0).astype(np.uint8)


# Per-view bit masks, looked up by the transformation's index.
_MASKS = {
    "keep": ~_mask(*_BLENDED),
    "gray": _mask("color"),
    "mean": _mask("contrast"),
    "stretched": _mask("autocontrast"),
    "equalized": _mask("equalize"),
    "inverted": _mask("invert"),
    "smooth": _mask(*_SMOOTHED),
    "blur": _mask("blur"),
    "enhanced": _mask(*_ENHANCED),
}
_CODE = {name: code for code, name in enumerate(_NAMES)}
_IS_BLENDED, _IS_ENHANCED = np.isin(_NAMES, _BLENDED), np.isin(_NAMES, _ENHANCED)

_UNCHANGED, _BLUR, _SMOOTH = np.zeros((3, 5, 5), np.float32)
_UNCHANGED[2, 2] = 1
_BLUR[:] = 1
_BLUR[1:4, 1:4] = 0
_SMOOTH[1:4, 1:4] = 1
_SMOOTH[2, 2] = 5
_TAPS = np.stack([_BLUR if n == "blur" else _SMOOTH if n in _SMOOTHED else _UNCHANGED for n in _NAMES])
_TAP_SCALES = np.float32(1) / _TAPS.sum(axis=(1, 2))

# PIL's NEAREST, BOX, BILINEAR, HAMMING, BICUBIC and LANCZOS; the first two are a warp.
_INTERPOLATIONS = np.array(
    [
        types.INTERP_NN,
        types.INTERP_NN,
        types.INTERP_LINEAR,
        types.INTERP_LINEAR,
        types.INTERP_CUBIC,
        types.INTERP_LANCZOS3,
    ],
    dtype=np.int32,
)
_LUMA = np.array([[[19595, 38470, 7471]]], np.int32)  # PIL's weights of mode L, in units of 2^-16.

# Inputs of a stage by the names of their external sources without the stage's number: arguments that DALI reads on the
# host, and operands on the graph's device.
STAGE_ARGUMENTS = ("matrix", "hole", "hole_size", "roi_start", "roi_end", "interpolation")
STAGE_OPERANDS = (*_MASKS, "share", "tap_scale", "bits", "threshold", "taps")


def arguments(
    views: ViewPlan, height: int, width: int, max_shift: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the graph's inputs for V views of H x W images, all but the images.

    Args:
        views: The plan of the views.
        height: H.
        width: W.
        max_shift: Padding of each side in pixels.

    Returns:
        The arguments that DALI reads on the host, and the operands on the graph's device: arrays whose first dimension
        is V, by the names of the graph's external sources.
    """
    on_host: dict[str, np.ndarray] = {"corner": max_shift - views.shift, "flip": views.flip}
    if not max_shift:
        del on_host["corner"]
    operands: dict[str, np.ndarray] = {}
    affine = geometric.op_parameters(views.ops, views.levels, views.center, height, width)
    sides = np.array([height, width], np.float64)
    for stage in range(OPS_PER_VIEW):
        ops = views.ops[:, stage]
        level, second = views.levels[:, stage].astype(np.float64).T
        per_view = {name: table.take(ops) for name, table in _MASKS.items()}
        shares = np.where(_IS_ENHANCED[ops], 0.1 + 1.9 * level, np.where(_IS_BLENDED[ops], level, 0.0))
        kept_bits = 0xFF << (7 - (7.999 * level).astype(np.int64))
        per_view |= {
            "share": shares.astype(np.float32),
            "tap_scale": _TAP_SCALES.take(ops),
            "bits": np.where(ops == _CODE["posterize"], kept_bits, 255).astype(np.uint8),
            "threshold": np.where(ops == _CODE["solarize"], (255.999 * level).astype(np.int32), 256).astype(np.int32),
        }
        # Shaped to broadcast over an image.
        operands |= {f"{name}{stage}": array[:, None, None, None] for name, array in per_view.items()}
        operands[f"taps{stage}"] = _TAPS.take(ops, axis=0)

        matrix = np.where(geometric.IS_GEOMETRIC[ops][:, None], affine[:, stage], geometric.IDENTITY_MATRIX)
        rescaled = ops == _CODE["rescale"]
        chosen = (len(_INTERPOLATIONS) * second).astype(np.int64)
        cut = np.where(rescaled, 0.25 * level, 0.0)[:, None] * sides
        by_warp = rescaled & (chosen < 2)
        start, end = cut.astype(np.float32), (sides - cut).astype(np.float32)
        scale = (end - start) / sides
        matrix[by_warp] = 0
        matrix[by_warp, 0], matrix[by_warp, 2] = scale[by_warp, 1], start[by_warp, 1]
        matrix[by_warp, 4], matrix[by_warp, 5] = scale[by_warp, 0], start[by_warp, 0]
        resized = (rescaled & ~by_warp)[:, None]
        cutout = np.where(ops == _CODE["cutout"], 1 + np.floor(0.499 * level * sides.min()), 0.0)[:, None]
        stage_arguments = {
            "matrix": matrix.astype(np.float32).reshape(-1, 2, 3),
            "hole": np.floor(views.center[:, stage].astype(np.float64) * sides) - np.floor(cutout / 2),
            "hole_size": np.broadcast_to(cutout, (len(ops), 2)),
            "roi_start": np.where(resized, start, 0.0),
            "roi_end": np.where(resized, end, sides),
            "interpolation": np.where(resized[:, 0], _INTERPOLATIONS.take(chosen), _INTERPOLATIONS[0]),
        }
        on_host |= {f"{name}{stage}": _in_single_precision(array) for name, array in stage_arguments.items()}
    return on_host, operands


def _in_single_precision(array: np.ndarray) -> np.ndarray:
    """Return a contiguous array, float32 instead of float64."""
    return np.ascontiguousarray(array, np.float32 if array.dtype == np.float64 else array.dtype)


def _frame(height: int, width: int, border: int) -> np.ndarray:
    """Return 255 inside an image's border and 0 on it: (H, W, 1) uint8."""
    frame = np.zeros((height, width, 1), np.uint8)
    frame[border : height - border, border : width - border] = 255
    return frame


def _reflected(images: Any, axis: int, length: int, margin: int) -> Any:
    """Reflect the border along one axis, as `numpy.pad(mode="reflect")` does."""
    turn: Any = {"horizontal": axis, "vertical": 1 - axis}
    first = fn.flip(fn.slice(images, start=[1], shape=[margin], axes=[axis]), **turn)
    last = fn.flip(fn.slice(images, start=[length - 1 - margin], shape=[margin], axes=[axis]), **turn)
    return fn.cat(first, images, last, axis=axis)


def _whole(image: Any) -> Any:
    """Round floats down to bytes; the cast saturates."""
    return fn.cast(dali_math.floor(image), dtype=types.UINT8)


def _transformed(view: Any, given: Mapping[str, Any], device: str, height: int, width: int) -> Any:
    """Apply one transformation to each view: (H, W, 3) uint8 to the same.

    Args:
        view: The views.
        given: The stage's arguments, see `arguments`.
        device: "cpu" or "gpu".
        height: H.
        width: W.
    """
    view = fn.warp_affine(view, matrix=given["matrix"], fill_value=0, interp_type=types.INTERP_NN)

    luma = fn.reductions.sum(view * types.Constant(_LUMA, device=device), axes=[2], keep_dims=True, dtype=types.INT32)
    gray = (luma + 32768) >> 16
    total = fn.reductions.sum(gray, axes=[0, 1], keep_dims=True, dtype=types.INT32)
    mean = (total + height * width // 2) // (height * width)

    low, high = (
        fn.cast(reduce(view, axes=[0, 1], keep_dims=True), dtype=types.FLOAT64)
        for reduce in (fn.reductions.min, fn.reductions.max)
    )
    flat = fn.cast(high <= low, dtype=types.FLOAT64)  # A channel with a single value is unchanged.
    scale = 255.0 * (1.0 - flat) / dali_math.max(high - low, 1.0) + flat
    stretched = _whole(view * scale + -low * scale * (1.0 - flat))

    sums = fn.filter(view, given["taps"], dtype=types.FLOAT, border="reflect_101")
    filtered = _whole(sums * given["tap_scale"] + 0.5)
    # PIL leaves a filter's border unfiltered.
    inside = given["smooth"] & types.Constant(_frame(height, width, 1), device=device)
    inside = inside | (given["blur"] & types.Constant(_frame(height, width, 2), device=device))
    border = (given["smooth"] | given["blur"]) ^ inside

    named = (
        (view & (given["keep"] | border))
        | (filtered & inside)
        | (gray & given["gray"])
        | (mean & given["mean"])
        | (stretched & given["stretched"])
        | (fn.equalize(view) & given["equalized"])
        | ((view ^ 255) & given["inverted"])
    )
    # PIL's blend of a and b by v: a + v (b - a) in single precision.
    change = (view ^ named) & given["enhanced"]
    start, end = (fn.cast(image ^ change, dtype=types.FLOAT) for image in (view, named))
    view = _whole((end - start) * given["share"] + start)

    view = view & given["bits"]
    view = fn.cast(view ^ ((view >= given["threshold"]) * 255), dtype=types.UINT8)
    view = fn.reshape(view, layout="HWC")
    view = fn.erase(view, anchor=given["hole"], shape=given["hole_size"], axes=[0, 1], fill_value=127)
    return fn.resize(
        view,
        size=[height, width],
        roi_start=given["roi_start"],
        roi_end=given["roi_end"],
        interp_type=fn.reinterpret(given["interpolation"], dtype=types.INTERP_TYPE),
        antialias=False,
    )


@pipeline_def
def view_graph(device: str, height: int, width: int, max_shift: int) -> Any:
    """Define the graph.

    Args:
        device: "cpu" or "gpu", where the images are and the views are made.
        height: H.
        width: W.
        max_shift: Largest shift of the weak augmentation in pixels.

    Returns:
        The views, (H, W, 3) uint8 each.
    """
    view = fn.external_source(name="images", device=device, layout="HWC")
    if max_shift:
        view = _reflected(view, 1, width, max_shift)
        view = _reflected(view, 0, height, max_shift)
        view = fn.slice(view, start=fn.external_source(name="corner"), shape=[height, width], axes=[0, 1])
    view = fn.flip(view, horizontal=fn.external_source(name="flip"))
    for stage in range(OPS_PER_VIEW):
        given = {name: fn.external_source(name=f"{name}{stage}") for name in STAGE_ARGUMENTS}
        given |= {name: fn.external_source(name=f"{name}{stage}", device=device) for name in STAGE_OPERANDS}
        view = _transformed(view, given, device, height, width)
    return view


@dataclass(frozen=True)
class _Prepared:
    """Inputs of the graph for one batch.

    Attributes:
        host: Arguments that DALI reads on the host, by name.
        operands: The operands, packed, with the positions of the images.
        images: Images that the positions refer to, unless all are resident.
    """

    host: dict[str, np.ndarray]
    operands: torch.Tensor
    images: torch.Tensor | None


class DaliGraphViews(Views):
    """View pipeline that runs a graph of DALI's own operators on a GPU or a CPU.

    On a GPU, operands and images are copied and gathered on a stream of the pipeline's own, and views are handed over
    by DLPack on torch's current stream: neither `submit` nor `collect` waits for the device.

    Args:
        device_id: Index of the GPU.
        threads: Number of DALI's CPU threads.
        resident: Keep all images on the device; if False, `prepare` gathers each batch's images on the host.
    """

    def __init__(
        self,
        images: np.ndarray,
        labeled: np.ndarray,
        unlabeled: np.ndarray | None,
        batch_size: int,
        max_shift: int,
        device: str = "gpu",
        device_id: int = 0,
        threads: int = 1,
        prefetch: int = 2,
        resident: bool = True,
    ) -> None:
        super().__init__(images, labeled, unlabeled, batch_size, max_shift, device, prefetch)
        if max(self.height, self.width) > MAX_GRAPH_SIDE:
            raise ValueError(
                f"the DALI graph supports images of up to {MAX_GRAPH_SIDE}x{MAX_GRAPH_SIDE} pixels, got "
                f"{self.height}x{self.width}"
            )
        self._store = ImageStore(self._images, device, device_id, resident)
        example = plain_views(batch_size)
        _, operands = self._arguments(example)
        operands["image"] = example.image
        self._layout = Layout((n, torch.from_numpy(a).dtype, a.shape) for n, a in operands.items())
        self._pipeline: Any = view_graph(
            device,
            self.height,
            self.width,
            max_shift,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id if device == "gpu" else None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,  # Outputs stay valid as long as they are referenced.
        )
        fill_queue(self._pipeline, lambda: self._feed(self._prepare(example)), prefetch)

    def _arguments(self, views: ViewPlan) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return arguments(views, self.height, self.width, self.max_shift)

    def _prepare(self, views: ViewPlan) -> _Prepared:
        """Pack the operands into one buffer and gather images that are not resident."""
        host, operands = self._arguments(views)
        operands["image"], images = self._store.prepare(self._image_indices(views))
        buffer = self._layout.allocate(pinned=self.device == "gpu")
        for name, array in self._layout.arrays(buffer).items():
            array[:] = operands[name]
        return _Prepared(host, buffer, images)

    def _feed(self, prepared: _Prepared) -> None:
        stream = self._store.stream
        for name, array in prepared.host.items():
            self._pipeline.feed_input(name, array)
        with self._store.on_stream():
            operands = self._layout.tensors(prepared.operands.to(self._store.device, non_blocking=True))
            positions = operands.pop("image")
            operands["images"] = self._store.on_device(prepared.images)[positions]
            for name, operand in operands.items():
                # For torch tensors, even on a CPU, DALI asks torch for the current CUDA stream.
                self._pipeline.feed_input(name, operand if stream else operand.numpy(), cuda_stream=stream)

    def _begin(self, prepared: _Prepared) -> None:
        self._feed(prepared)
        self._pipeline.schedule_run()

    def _finish(self) -> torch.Tensor:
        stream = torch.cuda.current_stream(self._store.device) if self._store.stream else None
        (views,) = self._pipeline.outputs(cuda_stream=stream)
        return torch.from_dlpack(views.as_tensor())

    def _release(self) -> None:
        self._store.release()
        self._pipeline = None
