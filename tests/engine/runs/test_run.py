"""Whole runs: the files they write, and resuming. Fault injection is in tests/faults."""

import dataclasses
import json
import logging
import os
import shutil
import stat
import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from engine import run
from engine.commands import main as cli
from engine.config.config import load_config
from engine.config.methods import with_method
from engine.errors import UserError
from engine.method.registry import make_targets
from engine.runs import checkpoint
from engine.runs.folder import CHECKPOINTS
from engine.runs.progress import ProgressLine, read_metrics
from engine.runs.setup import setup_run
from engine.training.cuda_graph import make_step
from engine.training.execution import Execution
from engine.training.feed import Feed
from pipelines import files
from tests.processes import final_state, finish, repeatable_metrics, start

TINY_FLAGS = [
    *("--batch", "8", "--width", "8", "--device", "cpu", "--quiet"),
    *("--eval-every", "5", "--log-every", "1", "--checkpoint-every", "3"),
]


SUMMARY = {"preset": "digits-40", "seed": 0, "test_accuracy": 9.0, "median_last_20": 9.0, "train_seconds": 1.0}


def assert_same(a, b, path=""):
    """Assert that nested containers are bit-identical, except for times."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("train_seconds", "cpu_seconds"):
                assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """An undisturbed run of 24 steps in its own process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(
        [start(folder.with_name("log"), "train", "digits-40", "--steps", 24, "--out", folder, *TINY_FLAGS)]
    ) == [0]
    return folder


def test_a_run_writes_all_files(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "config.json", "split.json", "metrics.jsonl", "tensorboard", "logged.json", "checkpoints", "summary.json",
        "curves.png", "views.png", "ema.safetensors", "history.jsonl", "results.npz",
    }  # fmt: skip
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["preset"] == "digits-40" and summary["seed"] == 0 and summary["labels"] == 40
    assert summary["k"] == 2 and summary["steps"] == 24 and 0 <= summary["test_accuracy"] <= 100
    assert summary["train_seconds"] > 0 and summary["images_per_second"] > 0
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0] and summary["device"].startswith("CPU")
    metrics = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 25))
    accuracies = [row["test_accuracy"] for row in metrics if "test_accuracy" in row]
    assert len(accuracies) == 5 and accuracies[-1] == summary["test_accuracy"]
    assert summary["median_last_20"] == sorted(accuracies)[2]
    split = json.loads((undisturbed / "split.json").read_text())
    assert len(split["train_rows"]) == 40 and sorted(split["classes"]) == sorted("0123456789" * 4)
    assert len(checkpoint.list_checkpoints(undisturbed / CHECKPOINTS)) == 3
    for picture in ("curves.png", "views.png"):
        assert (undisturbed / picture).read_bytes().startswith(b"\x89PNG")
    assert any((undisturbed / "tensorboard").iterdir())
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in undisturbed.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_speed_excludes_compile_time(tiny, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    order, start = [], ProgressLine.start

    def made(config, state, rows, execution, example):
        order.append("made")
        return make_step(config, state, rows, dataclasses.replace(execution, mode="eager"), example)

    monkeypatch.setattr("engine.training.trainer.make_step", made)
    monkeypatch.setattr(ProgressLine, "start", lambda self, *given: order.append("start") or start(self, *given))
    run.train(setup_run(tiny(), tmp_path / "eager"))
    assert "compiling" not in caplog.text
    run.train(setup_run(tiny(mode="compile"), tmp_path / "compiled"))
    assert "compiling the step" in caplog.text and order == ["made", "start"] * 2


def test_a_run_with_fused_views_never_imports_dali(tiny, tmp_path, monkeypatch):
    """views.png shows the fused views, which equal DALI's except at edges."""
    run.train(setup_run(tiny(views="dali"), tmp_path / "dali"), quiet=True)
    monkeypatch.setitem(sys.modules, "pipelines.dali", None)  # as if it could not be imported
    run.train(setup_run(tiny(views="fused"), tmp_path / "fused"), quiet=True)
    expected, made = (np.load(tmp_path / name / "results.npz")["views"] for name in ("dali", "fused"))
    assert made.shape == expected.shape and np.isclose(made, expected, atol=2).mean() > 0.9


def test_a_run_with_the_dali_graph_resumes_bit_identically(tiny, tmp_path):
    config = tiny(views="dali-graph", steps=6, checkpoint_every=3)
    run.train(setup_run(config, tmp_path / "whole"), quiet=True)
    run.train(setup_run(dataclasses.replace(config, steps=3), tmp_path / "resumed"), quiet=True)
    run.train(setup_run(config, tmp_path / "resumed", resume=True), quiet=True)
    whole, resumed = (repeatable_metrics(tmp_path / name) for name in ("whole", "resumed"))
    assert whole[-2:] == resumed[-2:] and [row["step"] for row in whole[-2:]] == [6, 6]


@pytest.mark.parametrize("method", ["flexmatch", "dash", "freematch", "softmatch"])
def test_a_run_of_a_method_with_a_state_resumes_bit_identically_from_any_step(tiny, tmp_path, method):
    # Dash's first ten epochs, of a step each, train on labeled images alone.
    config = dataclasses.replace(
        with_method(tiny(), method), mu=2, k=2, steps=14, log_every=1, checkpoint_every=20, dash_epoch_kimg=1 / 1024
    )
    killed = int(np.random.default_rng().integers(1, 14))
    for name, steps in (("whole", 14), ("resumed", killed), ("resumed", 14)):
        config = dataclasses.replace(config, steps=steps)
        run.train(setup_run(config, tmp_path / name, resume=name == "resumed"), quiet=True)
    (_, whole), (_, resumed) = (final_state(tmp_path / name) for name in ("whole", "resumed"))
    for name, value in whole["state"].items():
        assert_same(value, resumed["state"][name], f"{name}, killed after step {killed}")
    state, start = whole["state"], make_targets(config, 10, 1437).state_dict()
    changed = {"flexmatch": "p_model_history", "dash": "rho_hat", "freematch": "threshold", "softmatch": "class_means"}
    assert not torch.equal(state[changed[method]], start[changed[method]])


def test_a_dali_that_cannot_run_is_one_line(tiny, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError(
            "[/opt/dali/file.cc:1] Assert on something failed\nCUDA driver version is insufficient\n\n"
            "Current pipeline object is no longer valid."
        )

    monkeypatch.setattr("pipelines.dali_graph.view_graph", broken)
    reason = "CUDA driver version is insufficient"
    message = f"--views dali-graph: DALI cannot run its graph here ({reason}); use --views dali"
    with pytest.raises(UserError) as error:
        run.train(setup_run(tiny(views="dali-graph"), tmp_path / "run"), quiet=True)
    assert str(error.value) == message


def test_a_run_with_a_summary_has_all_other_files(undisturbed, tmp_path, monkeypatch):
    """The summary marks a run as complete: after any interruption, resuming writes the missing files."""
    config = dataclasses.replace(load_config(undisturbed / "config.json"), steps=6)

    def full_disk(*_):
        raise OSError(28, "No space left on device", "results.npz")

    with monkeypatch.context() as broken:
        broken.setattr(run.history, "save_results", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            run.train(setup_run(config, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "summary.json").exists()
    summary = run.train(setup_run(config, tmp_path / "run", resume=True), quiet=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert summary["steps"] == 6


@pytest.mark.parametrize("name", ["ema.safetensors", "curves.png", "views.png", "results.npz", "summary.json"])
def test_a_full_disk_at_the_end_leaves_existing_files(undisturbed, tmp_path, monkeypatch, name):
    """Resuming a finished run writes these files again."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    config, before = load_config(folder / "config.json"), (folder / name).read_bytes()
    write = files._File.write

    def full_disk(self, data):
        if name in str(self.name):
            write(self, bytes(data)[:100])
            raise OSError(28, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as broken:
        broken.setattr(files._File, "write", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            run.train(setup_run(config, folder, resume=True), quiet=True)
    assert (folder / name).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_a_finished_run_can_be_resumed_with_more_steps(undisturbed, tmp_path, tiny):
    config = dataclasses.replace(load_config(undisturbed / "config.json"), steps=6)
    run.train(setup_run(config, tmp_path / "run"), quiet=True)
    run.train(setup_run(dataclasses.replace(config, steps=12), tmp_path / "run", resume=True), quiet=True)
    run.train(setup_run(dataclasses.replace(config, steps=12), tmp_path / "straight"), quiet=True)
    one, two = final_state(tmp_path / "run")[1], final_state(tmp_path / "straight")[1]
    assert_same(one["state"], two["state"])  # evaluations differ: step 6 was the last step
    assert_same(one["policy"], two["policy"])


@pytest.mark.parametrize("changes", [dict(view_steps=1, prefetch=2), dict(view_steps=5, prefetch=1, view_threads=2)])
def test_prefetching_does_not_change_results(undisturbed, tmp_path, changes):
    config = dataclasses.replace(load_config(undisturbed / "config.json"), **changes)
    run.train(setup_run(config, tmp_path / "run"), quiet=True)
    assert_same(final_state(undisturbed), final_state(tmp_path / "run"))


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    before = final_state(undisturbed)
    run.train(setup_run(load_config(undisturbed / "config.json"), undisturbed, resume=True), quiet=True)
    assert_same(before, final_state(undisturbed))


def test_a_truncated_checkpoint_falls_back_to_the_previous_one(undisturbed, tmp_path, caplog):
    config = dataclasses.replace(load_config(undisturbed / "config.json"), steps=9)
    run.train(setup_run(config, tmp_path / "run"), quiet=True)
    newest = checkpoint.list_checkpoints(tmp_path / "run" / CHECKPOINTS)[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    run.train(setup_run(dataclasses.replace(config, steps=24), tmp_path / "run", resume=True))
    assert "step-00000009.pt cannot be read" in caplog.text
    assert_same(final_state(undisturbed)[1]["state"], final_state(tmp_path / "run")[1]["state"])


def test_a_folder_with_another_run_or_configuration(undisturbed, tiny):
    config = load_config(undisturbed / "config.json")
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    with pytest.raises(UserError, match="already contains a run"):
        run.train(setup_run(config, undisturbed), quiet=True)
    with pytest.raises(UserError, match=r"another configuration: k 2 -> 3; lr 0.002 -> 0.1"):
        run.train(setup_run(dataclasses.replace(config, k=3, lr=0.1), undisturbed, resume=True), quiet=True)
    with pytest.raises(UserError, match="can be increased, but not reduced to 5"):
        run.train(setup_run(dataclasses.replace(config, steps=5), undisturbed, resume=True), quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


@pytest.mark.usefixtures("unwarned")
def test_a_non_finite_loss_stops_the_run_and_names_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    config = tiny(steps=9, checkpoint_every=2)
    original = Feed.put

    def poisoned(self, output):
        if self._training.step == 5:
            output.metrics[:2] = float("nan")
        original(self, output)

    monkeypatch.setattr(Feed, "put", poisoned)
    with pytest.raises(UserError, match=r"diverged at step 5: the loss is not finite \(loss nan, loss_x nan") as error:
        run.train(setup_run(config, tmp_path / "run"), quiet=True)
    assert "step-00000004.pt" in str(error.value)
    assert checkpoint.load_newest(tmp_path / "run" / CHECKPOINTS).step == 4


@pytest.mark.usefixtures("unwarned")
def test_non_finite_parameters_are_never_saved(tiny, tmp_path):
    """A learning rate that really overflows the parameters, without patching."""
    with pytest.raises(UserError, match="training diverged at step"):
        run.train(setup_run(tiny(steps=40, lr=1e38, checkpoint_every=1), tmp_path / "run"), quiet=True)
    found = checkpoint.load_newest(tmp_path / "run" / CHECKPOINTS)
    if found:
        assert all(p.isfinite().all() for p in found.content["state"]["network"].values())


def out_of_memory(*arguments, **options):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize(
    ("place", "changes", "flags"),
    [
        ("engine.training.trainer.Trainer.advance", {}, "--micro-batches 2 or --batch less than 8"),
        ("engine.training.trainer.make_state", dict(micro_batches=4), "--micro-batches 8 or --batch less than 8"),
        ("engine.training.trainer.evaluate", dict(bn="sync"), "--batch less than 8"),
        ("pipelines.dali.DaliViews.collect", dict(batch=9), "--micro-batches 3 or --batch less than 9"),
        ("engine.runs.pictures.make_views", dict(micro_batches=8), "--batch less than 8"),
    ],
)
def test_too_little_memory_is_one_line_with_the_flags_that_help(tiny, tmp_path, monkeypatch, place, changes, flags):
    monkeypatch.setattr(place, out_of_memory)
    with pytest.raises(UserError) as error:
        run.train(setup_run(tiny(steps=2, **changes), tmp_path / "run"), quiet=True)
    assert str(error.value) == (
        "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes); saved files are "
        f"intact; start a new run with {flags}"
    )


def test_images_move_to_the_host_if_a_gpu_is_too_small(tiny):
    on_device = Execution(torch.device("cuda"), torch.float32, "graph", "fused", resident=True)
    for execution, more in ((on_device, " or --resident host"), (dataclasses.replace(on_device, resident=False), "")):
        said = run.less_memory(tiny(batch=4), execution)
        assert said.endswith(f"start a new run with --micro-batches 2{more} or --batch less than 4")


def test_a_failed_checkpoint_is_retried_before_the_next_one_is_due(tiny, tmp_path, monkeypatch, caplog):
    tried, save = [], checkpoint.save

    def full_at_first(folder, step, *others):
        tried.append(step)
        if step == 2:
            raise OSError(28, "No space left on device")
        return save(folder, step, *others)

    monkeypatch.setattr(checkpoint, "save", full_at_first)
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)
    run.train(setup_run(tiny(steps=6, checkpoint_every=2), tmp_path / "run"), quiet=True)
    assert tried == [2, 3, 4, 6]
    assert "checkpoints can be written again; saved step 3" in caplog.messages


@pytest.mark.parametrize("client", ["wandb", "trackio"])
def test_only_the_flag_sends_metrics_of_a_resumed_run_to_a_server(undisturbed, tmp_path, monkeypatch, capsys, client):
    """A config.json may be a copy from another user."""
    folder, chosen = shutil.copytree(undisturbed, tmp_path / "run"), []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"log": client}))
    installed = ModuleSpec(client, None, origin=client)
    monkeypatch.setattr("engine.config.checks.importlib.util.find_spec", lambda name: installed)
    monkeypatch.setattr(run, "train", lambda setup, *others: chosen.append(setup.config.log) or SUMMARY)
    words = ["train", "digits-40", "--out", str(folder), "--resume"]
    for flags in ([], ["--log", client], ["--log", "none"]):
        cli.main([*words, *flags])
    assert chosen == ["tensorboard", client, "none"]
    said = f"remixmatch: {folder} was logged to {client}; to continue there, add --log {client}"
    assert capsys.readouterr().err.splitlines().count(said) == 2
