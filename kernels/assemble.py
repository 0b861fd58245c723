"""Assemble the network's input: mixup, rotation, normalization, cast and layout in one pass over the views.

ReMixMatch (arXiv 1911.09785), section 3.3; mixup is from MixMatch (arXiv 1905.02249, section 3.3).
"""

from typing import Any

import torch
import triton
import triton.language as tl

_BATCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assemble_batch(
    views: torch.Tensor,
    source: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    rotations: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    channels: int = 3,
) -> torch.Tensor:
    """Assemble the network's input batch from stored views (paper, section 3.3: mixup and rotations).

    Sample n is `rot90(lam[n] * norm(views[source[n]]) + (1 - lam[n]) * norm(views[partner[n]]), rotations[n])` with
    `norm(x) = (x - mean) / std` per channel. Rotations are counterclockwise, as in `numpy.rot90(image_hwc, k)`.
    If lam = 1 or partner = source, the sample is the rotated source itself and its partner is not read.

    Args:
        views: (P, H, W, 3) uint8 contiguous.
        source: (N,) int64 contiguous, indices into `views` (0..P-1), N >= 1.
        partner: (N,) int64 contiguous, indices into `views`. Indices outside 0..P-1 raise IndexError on a CPU; a GPU
            does not check them.
        lam: (N,) float32 contiguous, weight of the source, 0..1.
        rotations: (N,) int64 contiguous, multiples of 90 degrees, 0..3. Values 1 and 3 require H == W. If H != W, a
            CPU raises ValueError for them; a GPU and a compiled graph, where checking would need a synchronization,
            treat 1 as 0 and 3 as 2.
        mean: (3,) float32 contiguous, in gray levels (0..255).
        std: (3,) float32 contiguous, in gray levels.
        dtype: Dtype of the result: float32, bfloat16 or float16. The arithmetic is float32.
        channels: Channels of the result, 3 or 8. Channels after the third are zero padding, which can align
            convolutions.

    Returns:
        batch: (N, channels, H, W) `dtype` in torch.channels_last, which is (N, H, W, channels) in memory.

    Raises:
        ValueError: A shape, dtype, layout or device differs from the above, or a rotation requires H == W.
    """
    if views.dim() != 4 or views.shape[3] != 3 or views.numel() == 0:
        raise ValueError(f"views must be (P, H, W, 3) and not empty, got {tuple(views.shape)}")
    if views.dtype != torch.uint8 or not views.is_contiguous():
        raise ValueError(f"views must be uint8 and contiguous, got {views.dtype} with strides {tuple(views.stride())}")
    if source.dim() != 1 or source.shape[0] < 1:
        raise ValueError(f"source must be (N >= 1,), got {tuple(source.shape)}")
    for name, tensor, shape, expected in (
        ("source", source, source.shape, torch.int64),
        ("partner", partner, source.shape, torch.int64),
        ("lam", lam, source.shape, torch.float32),
        ("rotations", rotations, source.shape, torch.int64),
        ("mean", mean, (3,), torch.float32),
        ("std", std, (3,), torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != expected or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {tuple(shape)} {expected} contiguous, "
                f"got {tuple(tensor.shape)} {tensor.dtype} with strides {tuple(tensor.stride())}"
            )
        if tensor.device != views.device:
            raise ValueError(f"{name} must be on {views.device} like views, got {tensor.device}")
    if dtype not in _BATCH_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if channels not in (3, 8):
        raise ValueError(f"channels must be 3 or 8, got {channels}")
    return torch.ops.remixmatch.assemble_batch(views, source, partner, lam, rotations, mean, std, dtype, channels)


def assemble_batch_reference(
    views: torch.Tensor,
    source: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    rotations: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    channels: int = 3,
) -> torch.Tensor:
    """Compute `assemble_batch` in plain PyTorch on any device, as its reference implementation."""
    height, width = views.shape[1:3]
    if height != width and bool((rotations % 2 != 0).any()):
        raise ValueError(
            f"rotations by 90 degrees require square images, got {height} x {width}; use rotations 0 and 2 only"
        )
    # Copying bytes of whole images, and arithmetic in place, take half as long on a CPU.
    own, other = (views.flatten(1).index_select(0, index).float() for index in (source, partner))  # (N, H * W * 3)
    lam = lam[:, None]
    mixed = own.mul_(lam).add_(other.mul_(1 - lam))
    # norm is affine and the weights sum to 1, so mixing first and normalizing once gives the same result. Mean and std
    # are repeated for every pixel, since a CPU is slow at broadcasting vectors of three elements.
    pixels = height * width
    batch = mixed.sub_(mean.repeat(pixels)).div_(std.repeat(pixels)).reshape(-1, height, width, 3)
    for quarters in range(1, 4):
        (rotated,) = (rotations == quarters).nonzero(as_tuple=True)
        if len(rotated):
            batch[rotated] = batch[rotated].rot90(quarters, (1, 2))
    if channels > 3:
        batch = torch.nn.functional.pad(batch, (0, channels - 3))
    return batch.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@triton.jit
def _write(a, b, weight, mean, std, to, at, inside, CHANNELS: tl.constexpr):
    """Mix the gray levels `a` and `b`, normalize the result and store it at the elements `at` of `to`."""
    scale_0 = 1.0 / tl.load(std)
    scale_1 = 1.0 / tl.load(std + 1)
    scale_2 = 1.0 / tl.load(std + 2)
    shift_0 = tl.load(mean) * scale_0
    shift_1 = tl.load(mean + 1) * scale_1
    shift_2 = tl.load(mean + 2) * scale_2
    channel = at.to(tl.uint32) % CHANNELS
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    mixed = weight * a.to(tl.float32) + (1.0 - weight) * b.to(tl.float32)
    value = mixed * scale - shift
    if CHANNELS > 3:
        value = tl.where(channel < 3, value, 0.0)
    tl.store(to + at, value.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _load(view, at, size, CHANNELS: tl.constexpr):
    """Load a stored view (3 channels) at the elements `at` < `size` of the written image (CHANNELS channels)."""
    if CHANNELS == 3:
        value = tl.load(view + at, mask=at < size, other=0)
    else:
        stored = at // CHANNELS * 3 + at % CHANNELS
        value = tl.load(view + stored, mask=(at < size) & (at % CHANNELS < 3), other=0)
    return value


@triton.jit
def _assemble_kernel(
    views,  # (P, H, W, 3)
    source,  # (N,)
    partner,  # (N,)
    lam,  # (N,)
    rotations,  # (N,)
    mean,  # (3,)
    std,  # (3,)
    batch,  # (N, H, W, CHANNELS) in memory
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program writes one chunk of one image. Chunks of an image are adjacent in launch order, so that memory sectors
    # that the gather of a rotated image reads more than once are still in L2.
    SIZE: tl.constexpr = H * W * 3
    SIZE_WRITTEN: tl.constexpr = H * W * CHANNELS
    n = (tl.program_id(0) // CHUNKS).to(tl.int64)
    start = tl.program_id(0) % CHUNKS * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < SIZE_WRITTEN

    source_index = tl.load(source + n)
    partner_index = tl.load(partner + n)
    weight = tl.load(lam + n)
    rotation = tl.load(rotations + n) & 3
    if H != W:
        rotation = rotation & 2  # A rotation by 90 degrees would read outside the image.
    mixes = (weight != 1.0) & (source_index != partner_index)
    weight = tl.where(mixes, weight, 1.0)
    partner_size = tl.where(mixes, SIZE_WRITTEN, 0)  # A partner of weight 0 is not read.

    # Offsets are int64: 2 ** 31 bytes hold only 14 266 views of 224 x 224.
    a_view = views + source_index * SIZE
    b_view = views + partner_index * SIZE
    to = batch + n * SIZE_WRITTEN
    if rotation == 0:
        # With 3 channels the loads are contiguous: one 128-bit load per thread and view.
        a = _load(a_view, at, SIZE_WRITTEN, CHANNELS)
        b = _load(b_view, at, partner_size, CHANNELS)
        _write(a, b, weight, mean, std, to, at, inside, CHANNELS)
    else:
        # Pixel (i, j) of the rotated image is pixel first + i * down + j * right of the stored image.
        first = tl.where(rotation == 1, W - 1, tl.where(rotation == 2, H * W - 1, (H - 1) * W))
        down = tl.where(rotation == 1, -1, tl.where(rotation == 2, -W, 1))
        right = tl.where(rotation == 1, W, tl.where(rotation == 2, -1, -W))
        # This shape makes adjacent lanes, instead of the registers of one lane, gather adjacent bytes: one request
        # loads all three channels of a pixel. The wide store then needs an exchange between lanes, which is cheaper
        # than three requests.
        lane_at = start + tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
        pixel = lane_at // CHANNELS
        stored = (first + pixel // W * down + pixel % W * right) * 3 + lane_at % CHANNELS
        in_a, in_b = lane_at < SIZE_WRITTEN, lane_at < partner_size
        if CHANNELS > 3:
            in_a, in_b = in_a & (lane_at % CHANNELS < 3), in_b & (lane_at % CHANNELS < 3)
        a = tl.reshape(tl.load(a_view + stored, mask=in_a, other=0), [BLOCK])
        b = tl.reshape(tl.load(b_view + stored, mask=in_b, other=0), [BLOCK])
        _write(a, b, weight, mean, std, to, at, inside, CHANNELS)


def launch_config(height: int, width: int, channels: int = 3) -> dict[str, Any]:
    """Return the compile-time sizes and the number of warps for images of `height` x `width`."""
    size = height * width * channels
    # Each thread handles 16 elements: one 128-bit load from each of the two views. Small images use small blocks:
    # three of them are exactly one 32 x 32 image. Large images use large blocks, which load the sample's parameters
    # less often.
    block = 1024 if size <= 4096 else 2048
    return {
        "H": height,
        "W": width,
        "CHANNELS": channels,
        "CHUNKS": triton.cdiv(size, block),
        "BLOCK": block,
        "num_warps": block // 512,
        "enable_fp_fusion": True,  # Triton 3.9's default, which 3.10 changes, and thereby results.
    }


def launch_assemble_batch(
    views: torch.Tensor,
    source: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    rotations: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    channels: int = 3,
) -> torch.Tensor:
    """Launch the Triton kernel. Like `assemble_batch`, without checking the arguments."""
    config = launch_config(views.shape[1], views.shape[2], channels)
    batch = _empty_batch(views, source, partner, lam, rotations, mean, std, dtype, channels)
    _assemble_kernel[(source.shape[0] * config["CHUNKS"],)](
        views, source, partner, lam, rotations, mean, std, batch, **config
    )
    return batch


def _empty_batch(
    views: torch.Tensor,
    source: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    rotations: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    channels: int = 3,
) -> torch.Tensor:
    shape = (source.shape[0], channels, *views.shape[1:3])
    return torch.empty(shape, dtype=dtype, device=views.device, memory_format=torch.channels_last)


# For torch.compile this is a single opaque operator; there is nothing to fuse it with. `define` and `impl` register it
# because `triton_op` and `custom_op` import the compiler, which takes two seconds even if nothing is compiled.
torch.library.define("remixmatch::assemble_batch", torch.library.infer_schema(launch_assemble_batch, mutates_args=()))
torch.library.impl("remixmatch::assemble_batch", "cuda", launch_assemble_batch)
torch.library.impl("remixmatch::assemble_batch", "cpu", assemble_batch_reference)
torch.library.register_fake("remixmatch::assemble_batch", _empty_batch)
