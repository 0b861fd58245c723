"""`guess_labels`: the float64 formulas, the reference implementation, the kernel and the operator agree."""

from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.guess import guess_labels, guess_labels_reference, launch_config, launch_guess_labels

HISTORY = 128
CLASSES = (2, 3, 10, 17, 100, 1000)
BATCHES = (1, 3, 64, 65)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=["reference", "triton"])
def implementation(request, interpreter):
    """Return the reference implementation, or the Triton kernel in the interpreter."""
    return guess_labels_reference if request.param == "reference" else partial(interpreter, launch_guess_labels)


def problem(batch, classes, scale=3.0, dtype=torch.float32, device="cpu", seed=0) -> Problem:
    """Draw the first four arguments. With `scale` 0 softmax is uniform, with 50 it is peaked."""
    generator = torch.Generator().manual_seed(seed + 1000 * batch + classes)
    logits = (scale * torch.randn(batch, classes, generator=generator)).to(dtype)
    p_model_history = torch.randn(HISTORY, classes, generator=generator).softmax(1)
    label_marginal = torch.randn(classes, generator=generator).softmax(0)
    slot = torch.randint(HISTORY, (), generator=generator)
    return logits.to(device), p_model_history.to(device), slot.to(device), label_marginal.to(device)


def guess_in_float64(logits, p_model_history, slot, label_marginal, temperature, align=True):
    """Compute targets and the new history directly with the formulas, not in log space."""
    logits = logits.double().numpy()
    p_model_history = p_model_history.double().numpy()
    p = label_marginal.double().numpy()
    p_tilde = p_model_history.mean(axis=0)
    targets = []
    marginal = np.zeros(len(p))
    for row in logits:
        q = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        marginal += q / len(logits)
        q_tilde = q * (p + 1e-6) / (p_tilde + 1e-6) if align else q
        q_tilde = q_tilde / q_tilde.sum()
        power = q_tilde ** (1 / temperature)
        targets.append(power / power.sum())
    new_history = p_model_history.copy()
    new_history[int(slot)] = marginal
    return np.stack(targets), new_history


def assert_guesses_match(got, expected):
    """Compare (targets, p_model_history) pairs of float32 arithmetic.

    The logarithm of a target above 1e-9 is a sum of terms up to about 30, doubled by the sharpening. Its float32 error,
    30 * 2 * 2**-24 = 4e-6, is the relative error of the target. The sums and the logarithm of the alignment add as much
    again. Targets below 1e-9 only have to be below 1e-9. The history contains means of q.
    """
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(got[1], expected[1], rtol=5e-6, atol=1e-9)


def run(function, logits, p_model_history, slot, label_marginal, temperature=0.5, align=True):
    """Call `function` with a copy of the history. Return the targets and the changed history as arrays."""
    p_model_history = p_model_history.clone()
    targets = function(logits, p_model_history, slot, label_marginal, temperature, align)
    assert targets.shape == logits.shape and targets.dtype == torch.float32
    return targets.cpu().numpy(), p_model_history.cpu().numpy()


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(classes, torch.float32) for classes in CLASSES]
    + [(10, torch.bfloat16), (10, torch.float16), (100, torch.bfloat16), (100, torch.float16)],
    ids=str,
)
def test_formulas(implementation, classes, dtype):
    for batch in BATCHES if classes < 1000 else (1, 65):  # The interpreter is slow.
        for scale in (0.0, 3.0, 50.0):
            case = problem(batch, classes, scale, dtype)
            got = run(implementation, *case)
            assert_guesses_match(got, guess_in_float64(*case, 0.5))
            np.testing.assert_allclose(got[0].sum(axis=1), 1, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("align", [True, False])
def test_temperature_and_alignment(implementation, align, temperature):
    case = problem(65, 10)
    got = run(implementation, *case, temperature, align)
    assert_guesses_match(got, guess_in_float64(*case, temperature, align))
    if not align and temperature == 1:
        np.testing.assert_allclose(got[0], case[0].double().softmax(1).numpy(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(("batch", "classes"), [(64, 10), (700, 17), (40, 1000)])
def test_history(implementation, batch, classes):
    """Only row `slot` changes, to the batch mean of q, after the history is read."""
    assert (launch_config(batch, classes, HISTORY)["PROGRAMS"] == 1) == (batch == 64)  # Both code paths.
    logits, p_model_history, _, label_marginal = problem(batch, classes)
    p_model_history[:] = 1e-9 + 1.0 / classes  # The updated row is far from this.
    targets, _ = guess_in_float64(logits, p_model_history, torch.tensor(0), label_marginal, 0.5)
    mean = logits.double().softmax(1).mean(0).numpy()
    for slot in (torch.tensor(0), torch.tensor([5]), torch.tensor(127)):
        got_targets, got_history = run(implementation, logits, p_model_history, slot, label_marginal)
        np.testing.assert_allclose(got_targets, targets, rtol=2e-5, atol=1e-9)
        np.testing.assert_allclose(got_history[int(slot)], mean, rtol=5e-6, atol=1e-9)
        others = np.delete(got_history, int(slot), axis=0)
        np.testing.assert_array_equal(others, np.delete(p_model_history.numpy(), int(slot), axis=0))


@pytest.mark.parametrize("batch", [3, 700])
@pytest.mark.parametrize("slot", [-1, HISTORY, 2**40])
def test_slot_out_of_range(batch, slot, interpreter):
    case = problem(batch, 17)
    _, p_model_history = run(partial(interpreter, launch_guess_labels), case[0], case[1], torch.tensor(slot), case[3])
    np.testing.assert_array_equal(p_model_history, case[1].numpy())
    with pytest.raises(IndexError):
        guess_labels(case[0], case[1], torch.tensor(slot), case[3], 0.5)


def test_strided_logits(implementation):
    """The logits are a slice of a larger tensor, which is not read outside the slice."""
    logits, p_model_history, slot, label_marginal = problem(20, 10)
    wide = torch.full((40, 16), float("nan"))
    wide[10:30, 3:13] = logits
    got = run(implementation, wide[10:30, 3:13], p_model_history, slot, label_marginal)
    assert_guesses_match(got, guess_in_float64(logits, p_model_history, slot, label_marginal, 0.5))


def test_unseen_class(implementation):
    """Targets are finite for a class that was never predicted or labeled, and for a logit of -inf."""
    logits, p_model_history, slot, label_marginal = problem(8, 10)
    p_model_history[:, 3] = 0
    label_marginal[3] = 0
    logits[:, 7] = -float("inf")
    got = run(implementation, logits, p_model_history, slot, label_marginal)
    assert_guesses_match(got, guess_in_float64(logits, p_model_history, slot, label_marginal, 0.5))
    assert (got[0][:, 7] == 0).all()


def test_operator_is_the_reference_on_a_cpu():
    case = problem(64, 10)
    for got, expected in zip(run(guess_labels, *case), run(guess_labels_reference, *case), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_no_gradient():
    case = problem(4, 10)
    case[0].requires_grad_()
    assert not guess_labels(*case, 0.5).requires_grad


def test_operator_registration():
    for slot_shape in ((), (1,)):
        logits, p_model_history, slot, label_marginal = problem(6, 10)
        torch.library.opcheck(
            torch.ops.remixmatch.guess_labels.default,
            (logits, p_model_history, slot.reshape(slot_shape), label_marginal, 0.5, True),
        )


def test_compiled():
    def step(logits, p_model_history, slot, label_marginal):
        return guess_labels(logits, p_model_history, slot, label_marginal, 0.5), p_model_history.sum()

    case = problem(64, 10)
    eager_history, compiled_history = case[1].clone(), case[1].clone()
    eager = step(case[0], eager_history, *case[2:])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(case[0], compiled_history, *case[2:])
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close(compiled_history, eager_history, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [64, 700])
def test_traced_for_a_gpu(batch):
    """torch.compile traces the operator with fake CUDA tensors."""
    with FakeTensorMode():
        logits = torch.empty(batch, 10, dtype=torch.bfloat16, device="cuda")
        p_model_history = torch.empty(HISTORY, 10, device="cuda")
        slot = torch.empty((), dtype=torch.int64, device="cuda")
        label_marginal = torch.empty(10, device="cuda")
        targets = guess_labels(logits, p_model_history, slot, label_marginal, 0.5)
    assert targets.shape == (batch, 10) and targets.dtype == torch.float32 and targets.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(10)}, r"logits must be \(B >= 1, L >= 2\), got \(10,\)"),
        ({"logits": torch.zeros(4, 1)}, r"got \(4, 1\)"),
        ({"logits": torch.zeros(0, 10)}, r"got \(0, 10\)"),
        ({"logits": torch.zeros(4, 10).double()}, "got torch.float64"),
        ({"logits": torch.zeros(10, 4).T}, r"stride\(1\) == 1"),
        ({"p_model_history": torch.zeros(HISTORY, 9)}, r"p_model_history must be \(R, 10\)"),
        ({"p_model_history": torch.zeros(HISTORY, 10).half()}, "got .* torch.float16"),
        ({"p_model_history": torch.zeros(10, HISTORY).T}, "p_model_history must be .* contiguous"),
        ({"slot": torch.zeros(2, dtype=torch.int64)}, r"slot must be an int64 tensor .* got \(2,\)"),
        ({"slot": torch.zeros(())}, "slot must be an int64 tensor .* torch.float32"),
        ({"label_marginal": torch.zeros(9)}, r"label_marginal must be \(10,\)"),
        ({"label_marginal": torch.zeros(10, device="meta")}, "on the same device, got cpu, cpu, cpu and meta"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be greater than 0, got nan"),
    ],
)
def test_errors(change, message):
    logits, p_model_history, slot, label_marginal = problem(4, 10)
    arguments = {"logits": logits, "p_model_history": p_model_history, "slot": slot, "label_marginal": label_marginal}
    with pytest.raises(ValueError, match=message):
        guess_labels(**(arguments | {"temperature": 0.5} | change))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_gpu(classes, dtype):
    for batch in (*BATCHES, 2000):
        for scale in (0.0, 3.0, 50.0):
            case = problem(batch, classes, scale, dtype)
            on_gpu = problem(batch, classes, scale, dtype, device="cuda")
            got = run(guess_labels, *on_gpu)
            assert_guesses_match(got, guess_in_float64(*case, 0.5))
            assert_guesses_match(got, run(guess_labels_reference, *case))
            for again, first in zip(run(guess_labels, *on_gpu), got, strict=True):
                np.testing.assert_array_equal(again, first)


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
@pytest.mark.parametrize(("batch", "classes"), [(64, 10), (700, 17), (64, 1000)])
def test_gpu_graph(batch, classes):
    """A graph is captured once and replayed with other logits and slots. Each replay resets the counter."""
    logits, p_model_history, slot, label_marginal = problem(batch, classes, device="cuda")
    expected_history = p_model_history.cpu()
    before = p_model_history.clone()
    guess_labels(logits, p_model_history, slot, label_marginal, 0.5)  # Compiles the kernel before the capture.
    p_model_history.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        targets = guess_labels(logits, p_model_history, slot, label_marginal, 0.5)
    for step in range(5):
        fresh = problem(batch, classes, seed=step)[0]
        logits.copy_(fresh)
        slot.fill_(step)
        graph.replay()
        expected = guess_labels_reference(fresh, expected_history, torch.tensor(step), label_marginal.cpu(), 0.5)
        assert_guesses_match((targets.cpu(), p_model_history.cpu()), (expected, expected_history))


@pytest.mark.gpu
@pytest.mark.hardware
@needs_gpu
def test_gpu_compiled():
    case = problem(64, 10, device="cuda")
    eager_history, compiled_history = case[1].clone(), case[1].clone()
    eager = guess_labels(case[0], eager_history, *case[2:], 0.5)
    compiled = torch.compile(guess_labels, fullgraph=True)(case[0], compiled_history, *case[2:], 0.5)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close(compiled_history, eager_history, rtol=0, atol=0)
