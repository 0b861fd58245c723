"""Atomic file writes with errors, failed writes, killed processes and concurrent writers."""

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import files
from pipelines.files import (
    Locked,
    atomic_write,
    checked_json,
    first_line,
    fits,
    lock,
    read_json,
    read_json_lines,
    write_bytes,
    write_text,
)

ROOT = Path(__file__).parents[2]


def python(script, folder, **options):
    """Start an interpreter that runs `script` in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **options
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def former(tmp_path):
    """Return an existing file, the only one in its folder."""
    path = tmp_path / "file.txt"
    path.write_text("former")
    return path


def test_the_old_content_stays_until_the_new_content_is_complete(former):
    with atomic_write(former) as file:
        file.write(b"new")
        file.flush()
        assert former.read_text() == "former" and names(former.parent) == [".file.txt.partial", "file.txt"]
        assert Path(file.name) == former.with_name(".file.txt.partial")
    assert former.read_text() == "new" and names(former.parent) == ["file.txt"]


def test_text_is_utf8_and_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "text", "größer\n")
        write_bytes(tmp_path / "bytes", b"\x00\xff")
    finally:
        os.umask(before)
    assert (tmp_path / "text").read_bytes() == "größer\n".encode() and (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(5, "elsewhere"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_in_the_block_leaves_the_old_file(former, error):
    with pytest.raises(type(error)) as raised, atomic_write(former) as file:
        file.write(b"half")
        raise error
    assert raised.value is error and former.read_text() == "former" and names(former.parent) == ["file.txt"]


def test_errors_name_the_path_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_text(tmp_path / "none" / "file.txt", "new")
    assert raised.value.filename == str(tmp_path / "none" / "file.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / "folder", "new")
    assert raised.value.filename == str(tmp_path / "folder") and names(tmp_path) == ["folder"]


# The kernel rejects writes past a limit, as with a full disk.
LIMITED = """
import resource, signal
from pathlib import Path
from pipelines.files import atomic_write, write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path("file.txt")
try:
{}
except OSError as error:
    print(error.errno, type(error.__cause__).__name__)
"""


@pytest.mark.parametrize(
    ("block", "cause"),
    [
        ("    write_bytes(path, bytes(200_000))", "NoneType"),
        ("    with atomic_write(path) as file:\n        for _ in range(200): file.write(bytes(1000))", "NoneType"),
        ("    with atomic_write(path) as file:\n        file.write(bytes(100_001))", "NoneType"),
        (
            # As in torch.save.
            "    with atomic_write(path) as file:\n"
            "        try: file.write(bytes(200_000))\n"
            "        except OSError: raise RuntimeError('unexpected pos') from None",
            "RuntimeError",
        ),
        (
            "    with atomic_write(path) as file:\n"
            "        try: file.write(bytes(200_000))\n"
            "        except OSError: pass",
            "NoneType",
        ),
    ],
    ids=["at once", "when flushed", "one write", "replaced by another error", "ignored"],
)
def test_a_failed_write_raises_its_cause_and_keeps_the_old_file(former, block, cause):
    process = python(LIMITED.format(block), former.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=60)
    assert (output.split(), errors) == ([str(errno.EFBIG), cause], "")
    assert former.read_text() == "former" and names(former.parent) == ["file.txt"]


def test_a_killed_process_leaves_a_partial_file_that_the_next_write_replaces(former):
    script = """
from pathlib import Path
from pipelines.files import atomic_write
with atomic_write(Path("file.txt")) as file:
    file.write(bytes(100_000))
    file.flush()
    print("there", flush=True)
    input()
"""
    process = python(script, former.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "there\n"
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert former.read_text() == "former" and names(former.parent) == [".file.txt.partial", "file.txt"]
    write_text(former, "new")
    assert former.read_text() == "new" and names(former.parent) == ["file.txt"]


def test_several_processes_can_replace_one_file(tmp_path):
    script = """
import os
from pathlib import Path
from pipelines.files import write_text
for _ in range(200):
    write_text(Path("file.txt"), str(os.getpid())[-1] * 50_000, shared=True)
"""
    write_text(tmp_path / "file.txt", "0" * 50_000)
    processes = [python(script, tmp_path) for _ in range(3)]
    seen = 0
    while seen < 100 or any(process.poll() is None for process in processes):
        text = (tmp_path / "file.txt").read_text()
        assert len(text) == 50_000 and len(set(text)) == 1
        seen += 1
    assert [process.wait(60) for process in processes] == [0] * 3 and names(tmp_path) == ["file.txt"]


def test_sync_flushes_the_file_before_and_the_folder_after_the_rename(former, monkeypatch):
    seen, fsync = [], os.fsync

    def flush(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((kind, os.fstat(descriptor).st_size if kind == "file" else None, former.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    write_text(former, "unflushed")
    assert seen == []
    with atomic_write(former, sync=True) as file:
        file.write(b"new")
    assert seen == [("file", 3, "unflushed"), ("folder", None, "new")]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(pipe, b"new")
    assert os.read(reader, 10) == b"new" and pipe.is_fifo() and names(tmp_path) == ["pipe"]
    os.close(reader)
    with pytest.raises(OSError, match="No such device"):  # Nothing reads it.
        write_bytes(pipe, b"new")


LOCKING = """
from pathlib import Path
from pipelines.files import lock
with lock(Path(".lock")):
    print("locked", flush=True)
    input()
"""


def test_a_lock_excludes_other_processes_and_names_its_owner(tmp_path):
    process = python(LOCKING, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(Locked, match=rf"^process {process.pid} on {socket.gethostname()} since \d{{4}}-"):
        lock(tmp_path / ".lock").__enter__()
    process.communicate("\n", timeout=60)
    assert process.returncode == 0 and names(tmp_path) == []
    with lock(tmp_path / ".lock"):
        assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


def test_a_kill_releases_the_lock(tmp_path):
    process = python(LOCKING, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "locked\n"
    process.kill()
    process.communicate(timeout=60)
    with lock(tmp_path / ".lock"):
        assert read_json(tmp_path / ".lock")["process"] == os.getpid()


def test_an_error_releases_the_lock_also_within_one_process(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), lock(tmp_path / ".lock"):
        with pytest.raises(Locked, match=f"process {os.getpid()} "):
            lock(tmp_path / ".lock").__enter__()
        (tmp_path / ".lock").write_bytes(b"\xff")
        with pytest.raises(Locked, match=r"^another process$"):
            lock(tmp_path / ".lock").__enter__()
        raise RuntimeError("broken")
    assert names(tmp_path) == []


def test_a_partial_file_that_is_a_link_is_replaced(former, tmp_path):
    (tmp_path / ".new.partial").symlink_to(former)
    before = former.read_bytes()
    write_text(tmp_path / "new", "text")
    assert former.read_bytes() == before and (tmp_path / "new").read_text() == "text"
    assert not (tmp_path / "new").is_symlink()


def test_a_lock_never_writes_to_the_target_of_a_link_or_waits_for_a_fifo(former):
    (former.parent / "link").symlink_to(former)
    (former.parent / "nowhere").symlink_to(former.parent / "none")
    os.mkfifo(former.parent / "fifo")
    for name in ("link", "nowhere", "fifo"):
        with pytest.raises(OSError):
            lock(former.parent / name).__enter__()
    assert former.read_text() == "former" and names(former.parent) == ["fifo", "file.txt", "link", "nowhere"]


def test_a_lock_that_was_removed_since_it_was_opened_is_taken_again(tmp_path, monkeypatch):
    """The former owner removes the file between `open` and `flock` of the next one."""
    flock, seen = files.fcntl.flock, []

    def remove_first(file, operation):
        if not seen:
            (tmp_path / ".lock").unlink()
        seen.append(file)
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", remove_first)
    with lock(tmp_path / ".lock"):
        assert len(seen) == 2 and read_json(tmp_path / ".lock")["process"] == os.getpid()


def test_a_file_system_without_stable_inodes_can_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os.path, "samestat", lambda one, other: False)
    with lock(tmp_path / ".lock"):
        assert read_json(tmp_path / ".lock")["process"] == os.getpid()


def test_a_file_system_without_locks_causes_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with lock(tmp_path / ".lock"):
        (said,) = caplog.messages
    assert said == f"{tmp_path / '.lock'} cannot be locked (No locks available); let no other process write there"


def test_missing_or_damaged_json_is_read_as_empty(tmp_path):
    path = tmp_path / "file.json"
    for content in (None, b"", b'{"a": 1', b"[1]", b"3", b'{"a": "\xff"}'):
        if content is not None:
            path.write_bytes(content)
        assert read_json(path) == {}
    assert read_json(tmp_path) == {}
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}


def test_damaged_json_lines_are_skipped(tmp_path, caplog):
    path = tmp_path / "records.jsonl"
    ints, both = ((lambda record, kind=kind: fits(record, {"a": kind})) for kind in (int, (int, str)))
    assert read_json_lines(path, ints) == []
    path.write_bytes(b'{"a": 1}\n[2]\n\n{"a": "\xff"}\n3\n{"a": 4}\n{"a": 5')
    assert read_json_lines(path, ints) == [{"a": 1}, {"a": 4}]
    assert caplog.messages == [f"{path}: skipped 4 damaged lines"]  # but not the last one, which a kill has cut off
    assert read_json_lines(path, both) == [
        {"a": 1},
        {"a": "\ufffd"},
        {"a": 4},
    ]
    path.write_bytes(b'{"a": 1}\n' + b"[" * 100_000 + b"\n")
    assert read_json_lines(path, ints) == [{"a": 1}] and read_json(path) == {}
    with pytest.raises(OSError):  # An unreadable file is not the same as an empty one.
        read_json_lines(tmp_path, {})
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_json_lines(tmp_path / "fifo", {})
    assert read_json(tmp_path / "fifo") == {}


def test_a_checksum_detects_every_change_of_the_content(tmp_path):
    path, content = tmp_path / "file.json", {"b": [1, 2.5, "x"], "a": {"c": None}}
    text = checked_json(content)
    path.write_text(text)
    assert read_json(path) == content and json.loads(text).keys() == {"a", "b", "checksum"}
    for old, new in [
        ("2.5", "2.6"),
        ('"x"', '"y"'),
        ('"c"', '"d"'),
        ("null", "0"),
        ('"checksum": "', '"checksum": "0'),
    ]:
        path.write_text(text.replace(old, new))
        assert read_json(path) == {}
    path.write_text(json.dumps(content))  # by an earlier version
    assert read_json(path) == content


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, [0, -3, 2**63 - 1], [True, 1.0, "1", None, 2**63, -(2**63) - 1, [1]]),
        (float, [0, 1.5, float("nan"), float("inf")], [False, "1.5", None, 10**30, {}]),
        (str, ["", "x"], [1, None, ["x"]]),
        (bool, [True, False], [0, 1, "true"]),
        ((float, None), [None, 2], ["x", True]),
        ([int], [[], [1, 2]], [1, [1.5], [None], {}, [[1]]]),
        ({"a": int, "b?": str}, [{"a": 1}, {"a": 1, "b": "x", "c": []}], [{}, {"b": "x"}, {"a": 1, "b": 2}, [], "a"]),
        ({"a": int, str: [float]}, [{"a": 1}, {"a": 1, "c": [2]}], [{"a": 1, "c": 2}, {"c": [2]}]),
    ],
)
def test_json_values_and_their_kinds(kind, right, wrong):
    assert [value for value in right if not fits(value, kind)] == []
    assert [value for value in wrong if fits(value, kind)] == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
        (ValueError("x" * 200), "x" * 120),
    ],
)
def test_first_line_of_an_error_or_its_type(error, text):
    assert first_line(error) == text and first_line(error, 2) == text[: 2 if str(error) else None]
