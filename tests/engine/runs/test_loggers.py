"""Loggers: what TensorBoard, wandb and trackio read of a run, and clients that fail, which no training may notice.

Clients are the real ones, offline, in processes of their own. trackio is not among what `make test` installs.
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
from engine.runs.loggers import Row
from engine.runs.progress import MetricsLog, read_metrics
from engine.runs.setup import setup_run
from engine.training.trainer import CHECKPOINTS
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
    """Environment of a process whose clients reach no network, and write nothing outside of the test's folder."""
    names = ("HOME", "TRACKIO_DIR", "HF_HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC")
    return {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"} | {name: tmp_path / "home" / name for name in names}


def told(client, folder, alone):
    """What a client has of a run's folder: by name of the run its configuration, and (step, values) in their order."""
    if client == "wandb":
        return read_wandb(folder)
    found = folder.with_name("trackio.json")
    assert call(folder.with_name("log"), read_trackio, found, folder.name, **alone) == 0
    return {name: (config, [tuple(row) for row in rows]) for name, (config, rows) in json.loads(found.read_text())}


def read_trackio(out, prefix):
    """Writes what trackio's dashboard would be given of the runs whose name begins so."""
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
    """The same of wandb's offline files, which `wandb sync` would send one after another."""
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
    """Records of a log of LevelDB's, the file's header of 7 bytes taken off, which count for its first block."""
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
    """Rows of metrics.jsonl, one a step."""
    steps = defaultdict(dict)
    for row in read_metrics(folder / "metrics.jsonl"):
        steps[row["step"]] |= {name: value for name, value in row.items() if name != "step"}
    return sorted(steps.items())


def log_rows(folder, client, resumed, steps, kill=False):
    """Logs steps of a run that is resumed at one of them, and which is then closed or killed."""
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
def test_a_client_has_the_rows_of_a_run_and_no_step_twice(tmp_path, alone, client):
    """Though steps 4 and 5 are trained again. All of it is one run, and a folder of the same name another one."""
    log = tmp_path / "log"
    for name in ("a", "b"):
        folder = tmp_path / name / "run"
        assert call(log, log_rows, folder, client, 0, [1, 2, 3, 4, 5], **alone) == 0, log.read_text()
        assert call(log, log_rows, folder, client, 3, [4, 5, 6, 7], **alone) == 0, log.read_text()
        found = told(client, folder, alone)
        mine = next(
            run for run in found if run.endswith(json.loads((folder / "logged.json").read_text())[client]["run"])
        )
        config, rows = found[mine]
        assert rows == merged(folder) and [step for step, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
        assert rows[1] == (2, {"loss": 1.0, "test_accuracy": 92.0})
        assert config["k"] == 8 and config["class_distribution"] == [0.5, 0.5]
    assert len(found) == {"wandb": 1, "trackio": 2}[client]  # in its folder, and in the project that runs share
    assert log.read_text() == "", "it is not to be heard"


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_has_no_step_twice_after_a_kill(tmp_path, alone, client):
    log, folder = tmp_path / "log", tmp_path / "run"
    assert call(log, log_rows, folder, client, 0, range(1, 21), True, **alone) == -signal.SIGKILL, log.read_text()
    assert json.loads((folder / "logged.json").read_text())[client]["step"] == 19, "the newest step may have more rows"
    assert call(log, log_rows, folder, client, 10, range(11, 31), **alone) == 0, log.read_text()
    ((_, rows),) = told(client, folder, alone).values()
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps)) and steps[-11:] == list(range(20, 31))
    assert set(dict(merged(folder))) == set(range(1, 31))


@pytest.mark.parametrize("client", CLIENTS)
def test_a_run_may_be_resumed_with_a_client_that_then_has_all_of_it(tmp_path, alone, client):
    """By the command line, with nothing of the client's on stdout."""
    log, folder = tmp_path / "log", tmp_path / "run"
    train = ["train", "digits-40", "--out", folder, *TINY_FLAGS]
    assert finish([start(log, *train, "--steps", 6, "--log", "none", **alone)]) == [0], log.read_text()
    assert not (folder / "logged.json").exists()
    assert finish([start(log, *train, "--steps", 9, "--log", client, "--resume", **alone)]) == [0], log.read_text()
    ((config, rows),) = told(client, folder, alone).values()
    assert rows == merged(folder) and rows[-1][0] == 9 and rows[-1][1].keys() >= {"loss", "test_accuracy"}
    assert config["steps"] == 9 and config["preset"] == "digits-40"
    said = log.read_text().splitlines()
    assert len(said) == 2 and all(line.startswith("digits-40 seed 0: test accuracy") for line in said)


def test_wandb_is_asked_to_go_on_with_the_run_and_leaves_others_alone(tmp_path, monkeypatch):
    """What shows with its server alone, or where engine.api is called within another run of wandb's."""
    given = {}
    client = SimpleNamespace(offline=False, url="https://wandb.example/run", log=None, finish=None)
    stub = SimpleNamespace(init=lambda **options: given.update(options) or client, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    assert loggers._open_wandb(tmp_path, "abc", {"k": 8}).where == "https://wandb.example/run"
    assert (given["id"], given["resume"], given["reinit"]) == ("abc", "allow", "create_new")


def test_wandb_without_a_key_is_a_warning_and_asks_nothing(tmp_path, alone):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'remixmatch-engine[wandb]'")
    log, folder = tmp_path / "log", tmp_path / "run"
    train = ["train", "digits-40", "--steps", 2, "--out", folder, *TINY_FLAGS, "--log", "wandb"]
    assert finish([start(log, *train, **alone | {"WANDB_MODE": "online"})]) == [0], log.read_text()
    warning, summary = log.read_text().splitlines()
    assert "--log wandb failed (No API key configured. Use `wandb login` to log in.)" in warning
    assert "test accuracy" in summary and [row[0] for row in merged(folder)] == [1, 2]


class Stub:
    """A client that fails when it is told to, and otherwise remembers its rows."""

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
        # again and again: what is left at the end may be tried twice, with the last rows and after them
        ([("log 1", OSError(28, "no server")), *[("log 3", ValueError("no server"))] * 4], 2, 1),
        ([("finish", RuntimeError("no server"))], 4, 0),
        ([("open", RuntimeError("no server"))] * 5, 0, 0),
    ],
)
def test_a_client_that_fails_is_one_warning_and_is_tried_again(
    tmp_path, monkeypatch, caplog, failures, logged, finished
):
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


def test_where_a_client_shows_the_run_and_why_it_fails_is_said(tmp_path, monkeypatch, capfd):
    """Though nothing is heard of what the client itself prints."""
    stub = Stub(("finish", RuntimeError("no server")))
    stub.log = lambda row: print("of the client", file=sys.stderr)
    monkeypatch.setitem(loggers._OPEN, "wandb", stub)
    with messages_on_stderr():
        log = MetricsLog(tmp_path, 0, "wandb")
        log.add(1, loss=1.0)
        log.close()
    where, warning = capfd.readouterr().err.splitlines()
    assert where == "wandb: here" and warning.startswith("remixmatch: --log wandb failed (no server); ")


def test_what_a_client_lacks_at_the_end_it_has_after_resuming(tmp_path, monkeypatch):
    # with its row, and again at the end, if that was not known yet
    monkeypatch.setitem(loggers._OPEN, "wandb", Stub(*[("open", RuntimeError("no server"))] * 2))
    log = MetricsLog(tmp_path, 0, "wandb")
    log.add(1, loss=1.0)
    log.close()
    monkeypatch.setitem(loggers._OPEN, "wandb", stub := Stub())
    with no_warnings():
        log = MetricsLog(tmp_path, 1, "wandb")
        log.close()
    assert [(row.step, row.values) for row in stub.rows] == [(1, {"loss": 1.0})]


def test_a_client_that_hangs_holds_up_neither_rows_nor_the_end(tmp_path, monkeypatch, caplog):
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


def test_training_with_a_client_that_cannot_even_be_imported(tiny, tmp_path, monkeypatch, caplog, capfd):
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


def test_none_writes_no_log_beside_metrics(tiny, tmp_path):
    run.train(setup_run(tiny(log="none"), tmp_path / "run"), quiet=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "split.json", "metrics.jsonl", "checkpoints", "summary.json",
        "curves.png", "views.png", "ema.safetensors", "history.jsonl", "results.npz",
    }  # fmt: skip


@pytest.mark.usefixtures("unwarned")
def test_a_run_resumed_with_tensorboard_has_all_of_it_there(tiny, tmp_path, capfd):
    run.train(setup_run(tiny(log="none"), tmp_path / "run"), quiet=True)
    run.train(setup_run(tiny(log="tensorboard", steps=8), tmp_path / "run", resume=True), quiet=True)
    rows = [
        (row["step"], pytest.approx(row["loss"]))
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "loss" in row
    ]
    assert board(tmp_path / "run") == rows and len(rows) == 8
    assert capfd.readouterr().err == "", "its checkpoint is that of this run"
    assert checkpoint.load_newest(tmp_path / "run" / CHECKPOINTS).step == 8


@pytest.mark.usefixtures("unwarned")
def test_tensorboard_has_the_rows_that_a_kill_kept_from_it(tmp_path):
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
def test_a_damaged_record_of_what_was_logged_costs_nothing(tmp_path, damage):
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


def test_unknown_clients_and_missing_extras_are_told_before_training(tiny, tmp_path, monkeypatch, capfd):
    with pytest.raises(UserError, match="--log takes tensorboard, wandb, trackio, none, got 'mlflow'"):
        validate(tiny(log="mlflow"))
    with pytest.raises(SystemExit):
        cli.main(["train", "digits-40", "--log", "mlflow", "--out", str(tmp_path / "run")])
    assert "mlflow" in capfd.readouterr().err
    for client in ("wandb", "trackio"):
        monkeypatch.setattr("engine.config.checks.importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "digits-40", "--log", client, "--out", str(tmp_path / "run")])
        said = f"remixmatch: --log {client} needs {client}: pip install 'remixmatch-engine[{client}]'\n"
        assert (ended.value.code, capfd.readouterr().err) == (2, said)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_clients_name_is_not_the_client(tiny, tmp_path, monkeypatch):
    """wandb leaves one in the folder that it is used from, and python -m looks for modules there."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="--log wandb needs wandb"):
        validate(tiny(log="wandb"))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_another_thread_prints_meanwhile_is_printed(capsys, monkeypatch, name):
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
    assert getattr(sys, name) is replaced, "by others, in the meantime"
    assert getattr(capsys.readouterr(), name[3:]) == "of the run\n"


@pytest.mark.usefixtures("unwarned")
def test_rows_are_given_with_the_time_when_they_came(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers._OPEN, "wandb", stub := Stub())
    log = MetricsLog(tmp_path, 0, "wandb")
    before = time.time()
    log.add(1, loss=1.0)
    after = time.time()
    log.close()
    (row,) = stub.rows
    assert before <= row.time <= after and row == Row(row.time, 1, {"loss": 1.0})
