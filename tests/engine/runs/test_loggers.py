"""Loggers: the metrics that TensorBoard, wandb and trackio receive, and clients that fail without affecting training.

The tests run the real clients, offline, in their own processes. `make test` does not install trackio.
"""

import importlib.util
import io
import json
import os
import signal
import struct
import sys
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import pytest

from engine import run
from engine.commands import main as cli
from engine.commands.output import messages_on_stderr
from engine.config.checks import validate
from engine.errors import UserError
from engine.runs import checkpoint, loggers
from engine.runs.folder import CHECKPOINTS
from engine.runs.loggers import Row
from engine.runs.progress import MetricsLog, read_metrics
from engine.runs.setup import setup_run
from tests.engine.runs.test_progress import board
from tests.engine.runs.test_run import TINY_FLAGS, assert_same
from tests.logs import no_warnings
from tests.processes import call, final_state, finish, start

CLIENTS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"needs {name}: pip install 'remixmatch-engine[{name}]'"
        ),
    )
    for name in ("wandb", "trackio")
]


@pytest.fixture
def alone(tmp_path):
    """Environment of a process whose clients use no network and write only to the test's folder."""
    names = ("HOME", "TRACKIO_DIR", "HF_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC")
    return {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"} | {name: tmp_path / "home" / name for name in names}


def received(client, folder, alone):
    """Return what a client received from a folder: for each run its configuration, and (step, values) in order."""
    if client == "wandb":
        return read_wandb(folder)
    found = folder.with_name("trackio.json")
    assert call(folder.with_name("log"), read_trackio, found, folder.name, **alone) == 0
    return {name: (config, [tuple(row) for row in rows]) for name, (config, rows) in json.loads(found.read_text())}


def read_trackio(out, prefix):
    """Write what trackio's dashboard would show of the runs whose name starts with `prefix`."""
    from trackio.sqlite_storage import SQLiteStorage

    runs = [name for name in SQLiteStorage.get_runs("remixmatch") if name.startswith(prefix)]
    out.write_text(
        json.dumps(
            [
                (
                    name,
                    (
                        SQLiteStorage.get_run_config("remixmatch", name),
                        [
                            (row.pop("step"), {key: value for key, value in row.items() if key != "timestamp"})
                            for row in SQLiteStorage.get_logs("remixmatch", name)
                        ],
                    ),
                )
                for name in runs
            ]
        )
    )


def read_wandb(folder):
    """Return the same from wandb's offline files, in the order in which `wandb sync` would send them."""
    from wandb.proto import wandb_internal_pb2

    found = defaultdict(lambda: ({}, []))
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        config, rows = found[path.stem.removeprefix("run-")]
        for content in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            for item in record.run.config.update:
                config[item.key or item.nested_key[0]] = json.loads(item.value_json)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                assert values.pop("_step") == record.history.step.num
                rows.append((record.history.step.num, {k: v for k, v in values.items() if not k.startswith("_")}))
    return dict(found)


def leveldb_records(data):
    """Yield the records of a LevelDB log without its 7-byte header, which is part of the first block."""
    at, record = 0, b""
    while at + 7 <= len(data):
        if (left := 32768 - (at + 7) % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def merged(folder):
    """Return the metrics of metrics.jsonl, merged by step."""
    steps = defaultdict(dict)
    for row in read_metrics(folder / "metrics.jsonl"):
        steps[row["step"]] |= {name: value for name, value in row.items() if name != "step"}
    return sorted(steps.items())


def log_rows(folder, client, resumed, steps, kill=False):
    """Log steps of a run resumed at step `resumed`, then close or kill it."""
    with no_warnings():
        log = MetricsLog(folder, resumed, client, {"k": 8, "class_distribution": (0.5, 0.5)})
        for step in steps:
            log.add(step, loss=0.5 * step)
            if step % 2 == 0:
                log.add(step, test_accuracy=90.0 + step)
        if kill:
            log._flush()
            while log._logger._queue.qsize() or not loggers._logged(folder, client).get("step"):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        log.close()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_receives_every_step_exactly_once(tmp_path, alone, client):
    """Although steps 4 and 5 are trained twice. A folder is one run; another folder of the same name is another run."""
    log = tmp_path / "log"
    for name in ("a", "b"):
        folder = tmp_path / name / "run"
        assert call(log, log_rows, folder, client, 0, [1, 2, 3, 4, 5], **alone) == 0, log.read_text()
        assert call(log, log_rows, folder, client, 3, [4, 5, 6, 7], **alone) == 0, log.read_text()
        found = received(client, folder, alone)
        mine = next(
            run for run in found if run.endswith(json.loads((folder / "logged.json").read_text())[client]["run"])
        )
        config, rows = found[mine]
        assert rows == merged(folder) and [step for step, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
        assert rows[1] == (2, {"loss": 1.0, "test_accuracy": 92.0})
        assert config["k"] == 8 and config["class_distribution"] == [0.5, 0.5]
    # wandb stores runs in their folder, trackio in a shared project.
    assert len(found) == {"wandb": 1, "trackio": 2}[client]
    assert log.read_text() == "", "clients must not print"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_receives_no_step_twice_after_a_kill(tmp_path, alone, client):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert call(log, log_rows, folder, client, 0, range(1, 21), True, **alone) == -signal.SIGKILL, log.read_text()
    assert json.loads((folder / "logged.json").read_text())[client]["step"] == 19, (
        "the newest step may get more metrics"
    )
    assert call(log, log_rows, folder, client, 10, range(11, 31), **alone) == 0, log.read_text()
    ((_, rows),) = received(client, folder, alone).values()
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps)) and steps[-11:] == list(range(20, 31))
    assert set(dict(merged(folder))) == set(range(1, 31))


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_added_on_resume_receives_all_metrics(tmp_path, alone, client):
    """On the command line, without output of the client on stdout."""
    log, folder = tmp_path / "log", tmp_path / "run"
    train = ["train", "digits-40", "--out", folder, *TINY_FLAGS]
    assert finish([start(log, *train, "--steps", 6, "--log", "none", **alone)]) == [0], log.read_text()
    assert not (folder / "logged.json").exists()
    assert finish([start(log, *train, "--steps", 9, "--log", client, "--resume", **alone)]) == [0], log.read_text()
    ((config, rows),) = received(client, folder, alone).values()
    assert rows == merged(folder) and rows[-1][0] == 9 and rows[-1][1].keys() >= {"loss", "test_accuracy"}
    assert config["steps"] == 9 and config["preset"] == "digits-40"
    short, *said = log.read_text().splitlines()
    assert short.startswith("remixmatch: 6 steps are too few for ")
    assert len(said) == 2 and all(line.startswith("digits-40 seed 0: test accuracy") for line in said)


def test_wandb_resumes_its_run_and_leaves_others_alone(tmp_path, monkeypatch):
    """This matters only with a server, or if engine.api is called within another wandb run."""
    given = {}
    client = SimpleNamespace(offline=False, url="https://wandb.example/run", log=None, finish=None)
    stub = SimpleNamespace(init=lambda **options: given.update(options) or client, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    assert loggers._open_wandb(tmp_path, "abc", {"k": 8}).where == "https://wandb.example/run"
    assert (given["id"], given["resume"], given["reinit"]) == ("abc", "allow", "create_new")


def test_wandb_without_a_key_warns_and_does_not_prompt(tmp_path, alone):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'remixmatch-engine[wandb]'")
    log, folder = tmp_path / "log", tmp_path / "run"
    train = ["train", "digits-40", "--steps", 2, "--out", folder, *TINY_FLAGS, "--log", "wandb"]
    assert finish([start(log, *train, **alone | {"WANDB_MODE": "online"})]) == [0], log.read_text()
    *_, warning, summary = log.read_text().splitlines()
    assert "--log wandb failed (No API key configured. Use `wandb login` to log in.)" in warning
    assert "test accuracy" in summary and [row[0] for row in merged(folder)] == [1, 2]


class Stub:
    """A client that records its metrics, with injected failures."""

    def __init__(self, *failures):
        self.rows, self.failures, self.finished = [], list(failures), 0

    def fails(self, where):
        if self.failures and self.failures[0][0] == where:
            raise self.failures.pop(0)[1]

    def __call__(self, folder, run_id, config):
        self.fails("open")
        return loggers._Open("here", self.log, self.finish)

    def log(self, row):
        self.fails(f"log {row.step}")
        self.rows.append(row)

    def finish(self):
        self.fails("finish")
        self.finished += 1


@pytest.mark.parametrize(
    ("failures", "logged", "finished"),
    [
        ([], 4, 1),
        ([("open", RuntimeError("no server\nat all"))], 4, 1),
        ([("log 2", ConnectionError("no server"))], 4, 1),
        ([("log 2", SystemExit("no server"))], 4, 1),
        # Repeated failures: the remaining metrics may be retried twice at the end.
        ([("log 1", OSError(28, "no server")), *[("log 3", ValueError("no server"))] * 4], 2, 1),
        ([("finish", RuntimeError("no server"))], 4, 0),
        ([("open", RuntimeError("no server"))] * 5, 0, 0),
    ],
)
def test_a_failing_client_causes_one_warning_and_is_retried(tmp_path, monkeypatch, caplog, failures, logged, finished):
    stub = Stub(*failures)
    monkeypatch.setitem(loggers._OPEN, "wandb", stub)
    log = MetricsLog(tmp_path, 0, "wandb")
    for step in (1, 2, 3):
        log.add(step, loss=float(step))
    log._flush()  # of steps 1 and 2
    end = time.monotonic() + 10
    while not caplog.messages and loggers._logged(tmp_path, "wandb").get("step") != 2 and time.monotonic() < end:
        time.sleep(0.01)
    log.add(4, loss=4.0)
    log.close()
    assert [row.step for row in stub.rows] == list(range(1, logged + 1)) and stub.finished == finished
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    said = caplog.messages
    assert len(said) == bool(failures)
    assert all("--log wandb failed (" in line and "no server" in line and "\n" not in line for line in said)
    assert loggers._logged(tmp_path, "wandb").get("step", 0) == logged


def test_messages_say_where_to_view_a_run_and_why_a_client_failed(tmp_path, monkeypatch, capfd):
    """Although the client's own output is discarded."""
    stub = Stub(("finish", RuntimeError("no server")))
    stub.log = lambda row: print("of the client", file=sys.stderr)
    monkeypatch.setitem(loggers._OPEN, "wandb", stub)
    with messages_on_stderr():
        log = MetricsLog(tmp_path, 0, "wandb")
        log.add(1, loss=1.0)
        log.close()
    where, warning = capfd.readouterr().err.splitlines()
    assert where == "wandb: here" and warning.startswith("remixmatch: --log wandb failed (no server); ")


def test_resuming_sends_the_metrics_that_a_client_lacks(tmp_path, monkeypatch):
    # Opening is tried with the first metrics, and again at the end.
    monkeypatch.setitem(loggers._OPEN, "wandb", Stub(*[("open", RuntimeError("no server"))] * 2))
    log = MetricsLog(tmp_path, 0, "wandb")
    log.add(1, loss=1.0)
    log.close()
    monkeypatch.setitem(loggers._OPEN, "wandb", stub := Stub())
    with no_warnings():
        log = MetricsLog(tmp_path, 1, "wandb")
        log.close()
    assert [(row.step, row.values) for row in stub.rows] == [(1, {"loss": 1.0})]


def test_a_hanging_client_delays_neither_metrics_nor_the_end(tmp_path, monkeypatch, caplog):
    stuck = threading.Event()
    stub = Stub()
    stub.log = lambda row: stuck.wait()
    monkeypatch.setitem(loggers._OPEN, "wandb", stub)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.2)
    log = MetricsLog(tmp_path, 0, "wandb")
    begin = time.monotonic()
    for step in range(1, 5):
        log.add(step, loss=float(step))
        log._flush()
    assert time.monotonic() - begin < 0.2
    log.close()
    stuck.set()
    assert time.monotonic() - begin < 5 and "not finished after 0.2 s" in caplog.messages[0]
    assert len(merged(tmp_path)) == 4


def test_training_with_a_client_that_cannot_be_imported(tiny, tmp_path, monkeypatch, caplog, capfd):
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('broken')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    run.train(setup_run(tiny(log="wandb"), tmp_path / "run"), quiet=True)
    run.train(setup_run(tiny(log="none"), tmp_path / "none"), quiet=True)
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "none"))
    (said,) = caplog.messages
    assert "--log wandb failed (broken)" in said and "\n" not in said and capfd.readouterr() == ("", "")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_log_none_writes_only_metrics(tiny, tmp_path):
    run.train(setup_run(tiny(log="none"), tmp_path / "run"), quiet=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "split.json", "metrics.jsonl", "checkpoints", "summary.json",
        "curves.png", "views.png", "ema.safetensors", "history.jsonl", "results.npz",
    }  # fmt: skip


@pytest.mark.usefixtures("unwarned")
def test_tensorboard_added_on_resume_receives_all_metrics(tiny, tmp_path, capfd):
    run.train(setup_run(tiny(log="none"), tmp_path / "run"), quiet=True)
    run.train(setup_run(tiny(log="tensorboard", steps=8), tmp_path / "run", resume=True), quiet=True)
    rows = [
        (row["step"], pytest.approx(row["loss"]))
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "loss" in row
    ]
    assert board(tmp_path / "run") == rows and len(rows) == 8
    assert capfd.readouterr().err == "", "--log does not change which run a checkpoint belongs to"
    assert checkpoint.load_newest(tmp_path / "run" / CHECKPOINTS).step == 8


@pytest.mark.usefixtures("unwarned")
def test_after_a_kill_resuming_writes_missing_metrics_to_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(step, loss=float(step))
    log._flush()  # of steps 1 and 2; then a kill
    log = MetricsLog(tmp_path, 3)
    log.add(4, loss=4.0)
    log.close()
    assert board(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("damage", ["{", "[]", '{"tensorboard": 3}', "{}", None])
def test_a_damaged_logged_json_loses_nothing(tmp_path, damage):
    log = MetricsLog(tmp_path, 0)
    log.add(1, loss=1.0)
    log.close()
    if damage is None:
        (tmp_path / "logged.json").unlink()
    else:
        (tmp_path / "logged.json").write_text(damage)
    log = MetricsLog(tmp_path, 1)
    log.add(2, loss=2.0)
    log.close()
    assert board(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_unknown_loggers_and_missing_extras_are_reported_before_training(tiny, tmp_path, monkeypatch, capfd):
    with pytest.raises(UserError, match="--log must be one of tensorboard, wandb, trackio, none; got 'mlflow'"):
        validate(tiny(log="mlflow"))
    with pytest.raises(SystemExit):
        cli.main(["train", "digits-40", "--log", "mlflow", "--out", str(tmp_path / "run")])
    assert "mlflow" in capfd.readouterr().err
    for client in ("wandb", "trackio"):
        monkeypatch.setattr("engine.config.checks.importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "digits-40", "--log", client, "--out", str(tmp_path / "run")])
        said = f"remixmatch: --log {client} requires {client}: pip install 'remixmatch-engine[{client}]'\n"
        assert (ended.value.code, capfd.readouterr().err) == (2, said)
    assert not (tmp_path / "run").exists()


def test_a_folder_named_wandb_is_not_the_client(tiny, tmp_path, monkeypatch):
    """Using wandb creates one in the current folder, and python -m looks for modules there."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="--log wandb requires wandb"):
        validate(tiny(log="wandb"))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_of_other_threads_is_not_discarded(capsys, monkeypatch, name):
    def print_it(text):
        print(text, file=getattr(sys, name))

    with loggers._quiet():
        print_it("of the client")
        other = threading.Thread(target=print_it, args=("of the run",))
        other.start()
        other.join()
        assert not getattr(sys, name).isatty()
    assert not isinstance(getattr(sys, name), loggers._Others)
    with loggers._quiet():
        monkeypatch.setattr(sys, name, replaced := io.StringIO())
    assert getattr(sys, name) is replaced, "others may replace the stream meanwhile"
    assert getattr(capsys.readouterr(), name[3:]) == "of the run\n"


@pytest.mark.usefixtures("unwarned")
def test_metrics_carry_their_time_of_arrival(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers._OPEN, "wandb", stub := Stub())
    log = MetricsLog(tmp_path, 0, "wandb")
    before = time.time()
    log.add(1, loss=1.0)
    after = time.time()
    log.close()
    (row,) = stub.rows
    assert before <= row.time <= after and row == Row(row.time, 1, {"loss": 1.0})
