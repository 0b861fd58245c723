"""The kernels bench: its table of cases, its count of bytes, its rows."""

import dataclasses

import pytest
import torch

from bench.step import kernels
from engine.errors import UserError
from engine.measuring import records

CPU = torch.device("cpu")
TINY = kernels.Size(batch=4, k=1, side=8)


def size_of(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def test_moved_bytes_are_those_of_arguments_and_result():
    guess = kernels.guess_case(TINY, CPU)
    logits, p_model_history, slot, marginal, temperature = guess.arguments()
    result = guess.operation(logits, p_model_history, slot, marginal, temperature)
    assert guess.moved == size_of(logits, p_model_history, p_model_history[0], marginal, result)
    assemble = kernels.assemble_case(TINY, CPU)
    arguments = assemble.arguments()
    assert assemble.moved == size_of(*arguments, assemble.operation(*arguments))


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_every_kernel_has_a_steps_and_a_large_size_on_every_device_and_agrees_with_its_twin(kernel):
    case_of, sizes = kernels.KERNELS[kernel]
    for device in ("cuda", "cpu"):
        assert {"step", "large"} <= sizes[device].keys() <= kernels.BATCHES[device].keys()
    case = case_of(TINY, CPU)
    torch.testing.assert_close(case.operation(*case.arguments()), case.twin(*case.arguments()))


def test_rows_hold_time_bytes_and_share(tmp_path, known_ceilings, capsys):
    out = tmp_path / "kernels.jsonl"
    kernels.main(kernels.KernelsOptions(out=out, repeats=2, providers=("triton", "eager"), sizes=("step",)))
    rows = records.read(out)
    printed = capsys.readouterr().out
    assert [(r["kernel"], r["provider"], r["size"]) for r in rows] == [(k, "eager", "step") for k in kernels.KERNELS]
    assert printed.startswith("CPU") and "triton: needs a GPU" in printed and known_ceilings.text() in printed
    for row in rows:
        assert row["share_of_copy"] == pytest.approx(row["gigabytes_per_second"] / 10)
        assert row["floor_microseconds"] == pytest.approx(row["bytes"] / 1e10 * 1e6)
        assert row["bytes_formula"] and row["microseconds_low"] <= row["microseconds"] <= row["microseconds_high"]


def test_a_provider_that_fails_is_named_and_the_others_are_timed(tmp_path, known_ceilings, monkeypatch, capsys):
    case = kernels.guess_case(TINY, CPU)
    calls = []

    def wrong_but_once(*arguments):
        calls.append(arguments)
        return case.twin(*arguments) + (len(calls) > 1)

    broken = dataclasses.replace(case, twin=wrong_but_once)
    monkeypatch.setitem(kernels.KERNELS, "broken", (lambda size, device: broken, kernels.GUESSES))
    out = tmp_path / "kernels.jsonl"
    options = kernels.KernelsOptions(
        out=out, repeats=1, kernels=("broken", "guess_labels"), providers=("eager",), sizes=("step",)
    )
    with pytest.raises(SystemExit, match="failed: guess_labels eager"):
        kernels.main(options)
    assert [row["kernel"] for row in records.read(out)] == ["guess_labels"]
    assert "AssertionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": ("gues",)}, "--kernels: unknown 'gues'; choose from guess_labels"),
        ({"providers": ("jax",)}, "--providers: unknown 'jax'"),
        ({"providers": ("triton",)}, "there is no GPU here"),
        ({"sizes": ("huge",)}, "--sizes: unknown 'huge'"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_mistakes(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        kernels.main(kernels.KernelsOptions(out=tmp_path / "rows.jsonl", **options))
