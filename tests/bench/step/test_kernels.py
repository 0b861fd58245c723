"""The kernels bench: cases, counts of bytes, records."""

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


def test_moved_bytes_are_the_size_of_arguments_and_result():
    guess = kernels.guess_case(TINY, CPU)
    logits, p_model_history, slot, marginal, temperature = guess.arguments()
    result = guess.operation(logits, p_model_history, slot, marginal, temperature)
    assert guess.moved == size_of(logits, p_model_history, p_model_history[0], marginal, result)
    assemble = kernels.assemble_case(TINY, CPU)
    arguments = assemble.arguments()
    assert assemble.moved == size_of(*arguments, assemble.operation(*arguments))


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_every_kernel_has_a_step_and_a_large_size_and_matches_its_reference(kernel):
    make_case, sizes = kernels.KERNELS[kernel]
    for device in ("cuda", "cpu"):
        assert {"step", "large"} <= sizes[device].keys() <= kernels.BATCH_SIZES[device].keys()
    case = make_case(TINY, CPU)
    torch.testing.assert_close(case.operation(*case.arguments()), case.reference(*case.arguments()))


def test_records_contain_time_bytes_and_share(tmp_path, known_ceilings, capsys):
    out = tmp_path / "kernels.jsonl"
    kernels.main(kernels.KernelsOptions(out=out, repeats=2, providers=("triton", "eager"), sizes=("step",)))
    written = records.read(out)
    output = capsys.readouterr().out
    assert [(r["kernel"], r["provider"], r["size"]) for r in written] == [(k, "eager", "step") for k in kernels.KERNELS]
    assert output.startswith("CPU") and "triton: skipped, needs a GPU" in output and known_ceilings.text() in output
    for record in written:
        assert record["share_of_copy"] == pytest.approx(record["gigabytes_per_second"] / 10)
        assert record["floor_microseconds"] == pytest.approx(record["bytes"] / 1e10 * 1e6)
        assert (
            record["bytes_formula"]
            and record["microseconds_low"] <= record["microseconds"] <= record["microseconds_high"]
        )


def test_a_failed_provider_is_listed_and_the_others_are_timed(tmp_path, known_ceilings, monkeypatch, capsys):
    case = kernels.guess_case(TINY, CPU)
    calls = []

    def correct_only_once(*arguments):
        calls.append(arguments)
        return case.reference(*arguments) + (len(calls) > 1)

    broken = dataclasses.replace(case, reference=correct_only_once)
    monkeypatch.setitem(kernels.KERNELS, "broken", (lambda size, device: broken, kernels.GUESS_SIZES))
    out = tmp_path / "kernels.jsonl"
    options = kernels.KernelsOptions(
        out=out, repeats=1, kernels=("broken", "guess_labels"), providers=("eager",), sizes=("step",)
    )
    with pytest.raises(SystemExit, match="failed: guess_labels eager"):
        kernels.main(options)
    assert [record["kernel"] for record in records.read(out)] == ["guess_labels"]
    assert "AssertionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": ("gues",)}, "--kernels: unknown kernel 'gues'; choose from guess_labels"),
        ({"providers": ("jax",)}, "--providers: unknown provider 'jax'"),
        ({"providers": ("triton",)}, "--providers triton needs a GPU"),
        ({"sizes": ("huge",)}, "--sizes: unknown size 'huge'"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
    ],
)
def test_invalid_options(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        kernels.main(kernels.KernelsOptions(out=tmp_path / "records.jsonl", **options))
