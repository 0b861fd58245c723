"""Guess labels in one kernel: softmax, distribution alignment, sharpening and the history of p~(y).

ReMixMatch (arXiv 1911.09785), section 3.1; sharpening is from MixMatch (arXiv 1905.02249, section 3.2).
"""

from typing import Any

import torch
import triton
import triton.language as tl

EPSILON = 1e-6  # Keeps the ratio of the marginals finite for classes that were never seen or predicted.

_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 8192  # Elements of (samples, classes) that one program keeps in registers: 32 per thread with 8 warps.


def guess_labels(
    logits: torch.Tensor,
    p_model_history: torch.Tensor,
    slot: torch.Tensor,
    label_marginal: torch.Tensor,
    temperature: float,
    align: bool = True,
) -> torch.Tensor:
    """Guess a soft label for every unlabeled image and record the batch's marginal (paper, section 3.1).

    With q = softmax(logits), p = `label_marginal` and p~ = the mean over the rows of `p_model_history`:
    `q~ = Normalize(q * (p + 1e-6) / (p~ + 1e-6))`, `targets = Normalize(q~ ** (1 / temperature))`.
    After the history is read, its row `slot` is replaced by the mean of q over the batch, before alignment.
    For a marginal over all ranks, pass the logits of all ranks.

    The operator has no gradient, and results are bitwise deterministic. It does not synchronize with the host and can
    be captured in a CUDA graph.

    Args:
        logits: (B, L) float32, bfloat16 or float16, B >= 1, L >= 2, stride 1 along L.
        p_model_history: (R, L) float32 contiguous, marginals of the last R (128) steps, updated in place.
        slot: () or (1,) int64 in 0..R-1, on the device of the logits. If out of range, a CPU raises IndexError; a GPU,
            where checking would need a synchronization, leaves the history unchanged.
        label_marginal: (L,) float32 contiguous, p(y) of the labeled examples.
        temperature: Sharpening temperature T > 0 (0.5 in the paper); 1 disables sharpening.
        align: If False, skip the alignment (q~ = q). The history is still updated.

    Returns:
        targets: (B, L) float32, each row a distribution.

    Raises:
        ValueError: A shape, dtype, layout, device or temperature differs from the above.
    """
    if logits.dim() != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (B >= 1, L >= 2), got {tuple(logits.shape)}")
    if logits.dtype not in _LOGIT_DTYPES or logits.stride(1) != 1:
        raise ValueError(
            "logits must be float32, bfloat16 or float16 with stride(1) == 1, "
            f"got {logits.dtype} with strides {tuple(logits.stride())}"
        )
    classes = logits.shape[1]
    if (
        p_model_history.dim() != 2
        or p_model_history.shape[1] != classes
        or p_model_history.dtype != torch.float32
        or not p_model_history.is_contiguous()
    ):
        raise ValueError(
            f"p_model_history must be (R, {classes}) float32 contiguous, "
            f"got {tuple(p_model_history.shape)} {p_model_history.dtype}"
        )
    if slot.numel() != 1 or slot.dtype != torch.int64:
        raise ValueError(f"slot must be an int64 tensor with one element, got {tuple(slot.shape)} {slot.dtype}")
    if (
        label_marginal.shape != (classes,)
        or label_marginal.dtype != torch.float32
        or not label_marginal.is_contiguous()
    ):
        raise ValueError(
            f"label_marginal must be ({classes},) float32 contiguous, "
            f"got {tuple(label_marginal.shape)} {label_marginal.dtype}"
        )
    if not (logits.device == p_model_history.device == slot.device == label_marginal.device):
        raise ValueError(
            "logits, p_model_history, slot and label_marginal must be on the same device, "
            f"got {logits.device}, {p_model_history.device}, {slot.device} and {label_marginal.device}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    return torch.ops.remixmatch.guess_labels(logits.detach(), p_model_history, slot, label_marginal, temperature, align)


def guess_labels_reference(
    logits: torch.Tensor,
    p_model_history: torch.Tensor,
    slot: torch.Tensor,
    label_marginal: torch.Tensor,
    temperature: float,
    align: bool = True,
) -> torch.Tensor:
    """Compute `guess_labels` in plain PyTorch on any device, as its reference implementation."""
    # Log space avoids underflow of peaked logits, and a single softmax then does both normalizations.
    log_q = logits.float().log_softmax(dim=1)  # (B, L)
    marginal = log_q.exp().mean(dim=0, keepdim=True)  # (1, L)
    if align:
        log_q = log_q + ((label_marginal + EPSILON) / (p_model_history.mean(dim=0) + EPSILON)).log()
    p_model_history.index_copy_(0, slot.reshape(1), marginal)
    return (log_q / temperature).softmax(dim=1)


@triton.jit
def _guess_kernel(
    logits,  # (B, L), row_stride apart
    p_model_history,  # (HISTORY, L)
    slot,  # (1,)
    label_marginal,  # (L,)
    targets,  # (B, L)
    partial,  # (PROGRAMS, L): each program's sum of q
    finished,  # (1,): number of programs that have stored their sums; 0 at launch
    batch,
    row_stride,
    inverse_temperature,
    ALIGN: tl.constexpr,
    EPSILON: tl.constexpr,
    CLASSES: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.arange(0, BLOCK_L)
    block_rows = tl.arange(0, BLOCK_R)
    in_batch = rows < batch
    is_class = classes < CLASSES
    inside = in_batch[:, None] & is_class[None, :]

    wide_rows = rows[:, None].to(tl.int64)
    x = tl.load(logits + wide_rows * row_stride + classes[None, :], mask=inside, other=0.0)
    x = tl.where(is_class[None, :], x.to(tl.float32), -float("inf"))
    x = x - tl.max(x, axis=1)[:, None]
    e = tl.exp(x)
    total = tl.sum(e, axis=1)
    q_sum = tl.sum(tl.where(in_batch[:, None], e / total[:, None], 0.0), axis=0)  # (BLOCK_L,)

    # log q = x - log(total). The last normalization removes this constant of each row, so it is left out.
    if ALIGN:
        history_sum = tl.full([BLOCK_L], 0.0, tl.float32)
        for start in range(0, HISTORY, BLOCK_R):
            r = start + block_rows
            history_sum += tl.sum(
                tl.load(
                    p_model_history + r[:, None] * CLASSES + classes[None, :],
                    mask=(r < HISTORY)[:, None] & is_class[None, :],
                    other=0.0,
                ),
                axis=0,
            )
        p = tl.load(label_marginal + classes, mask=is_class, other=0.0)
        x += tl.log((p + EPSILON) / (history_sum / HISTORY + EPSILON))[None, :]
    x = x * inverse_temperature
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    target = e / tl.sum(e, axis=1)[:, None]
    tl.store(targets + wide_rows * CLASSES + classes[None, :], target, mask=inside)

    where = tl.load(slot)
    history_row = p_model_history + where * CLASSES + classes
    writable = classes < tl.where((where >= 0) & (where < HISTORY), CLASSES, 0)
    if PROGRAMS == 1:
        tl.debug_barrier()  # Every warp has read the history before any warp writes it.
        tl.store(history_row, q_sum / batch, mask=writable)
    else:
        # The last program to finish adds up all sums in a fixed order, without float atomics. The barrier orders this
        # program's loads of the history and stores of sums before the count; the count's release and acquire order
        # them before the last program's work.
        tl.store(partial + tl.program_id(0) * CLASSES + classes, q_sum, mask=is_class)
        tl.debug_barrier()
        if tl.atomic_add(finished, 1, sem="acq_rel") == PROGRAMS - 1:
            batch_sum = tl.full([BLOCK_L], 0.0, tl.float32)
            for start in range(0, PROGRAMS, BLOCK_R):
                r = start + block_rows
                batch_sum += tl.sum(
                    tl.load(
                        partial + r[:, None] * CLASSES + classes[None, :],
                        mask=(r < PROGRAMS)[:, None] & is_class[None, :],
                        other=0.0,
                        cache_modifier=".cg",  # Other multiprocessors wrote it: read L2, not L1.
                    ),
                    axis=0,
                )
            tl.store(history_row, batch_sum / batch, mask=writable)


def launch_config(batch: int, classes: int, history_rows: int) -> dict[str, Any]:
    """Return the compile-time sizes and the number of warps for `batch` samples of `classes` logits."""
    block_l = max(triton.next_power_of_2(classes), 16)
    # Use one program if all samples fit (as 64 samples of 128 classes do): it needs no scratch memory and no counter.
    block_b = min(triton.next_power_of_2(batch), max(_TILE // block_l, 1))
    block_r = min(triton.next_power_of_2(history_rows), max(_TILE // block_l, 1))
    return {
        "CLASSES": classes,
        "HISTORY": history_rows,
        "BLOCK_B": block_b,
        "BLOCK_L": block_l,
        "BLOCK_R": block_r,
        "PROGRAMS": triton.cdiv(batch, block_b),
        "num_warps": 8 if max(block_b, block_r) * block_l > _TILE // 4 else 4,
        "enable_fp_fusion": True,  # Triton 3.9's default, which 3.10 changes, and thereby results.
    }


def launch_guess_labels(
    logits: torch.Tensor,
    p_model_history: torch.Tensor,
    slot: torch.Tensor,
    label_marginal: torch.Tensor,
    temperature: float,
    align: bool = True,
) -> torch.Tensor:
    """Launch the Triton kernel. Like `guess_labels`, without checking the arguments."""
    batch, classes = logits.shape
    config = launch_config(batch, classes, p_model_history.shape[0])
    programs = config["PROGRAMS"]
    targets = _empty_targets(logits, p_model_history, slot, label_marginal, temperature, align)
    # A single program uses neither tensor: pass placeholders instead of allocating.
    partial, finished = targets, slot
    if programs > 1:
        partial = logits.new_empty((programs, classes), dtype=torch.float32)
        finished = logits.new_zeros(1, dtype=torch.int32)
    _guess_kernel[(programs,)](
        logits,
        p_model_history,
        slot,
        label_marginal,
        targets,
        partial,
        finished,
        batch,
        logits.stride(0),
        1.0 / temperature,
        ALIGN=align,
        EPSILON=EPSILON,
        **config,
    )
    return targets


def _empty_targets(
    logits: torch.Tensor,
    p_model_history: torch.Tensor,
    slot: torch.Tensor,
    label_marginal: torch.Tensor,
    temperature: float,
    align: bool = True,
) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


# See kernels/assemble.py for why this does not use `triton_op`.
torch.library.define(
    "remixmatch::guess_labels", torch.library.infer_schema(launch_guess_labels, mutates_args={"p_model_history"})
)
torch.library.impl("remixmatch::guess_labels", "cuda", launch_guess_labels)
torch.library.impl("remixmatch::guess_labels", "cpu", guess_labels_reference)
torch.library.register_fake("remixmatch::guess_labels", _empty_targets)
