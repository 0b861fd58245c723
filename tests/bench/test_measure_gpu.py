"""The script that measures a GPU: a failing part does not stop the others, and the report comes last."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "measure_gpu.sh"
STUB = """#!/bin/sh
case "$*" in
    *nvidia.dali*) exit {dali} ;;
    *"bench kernels"*) echo broken >&2; exit 7 ;;
    *"--modes eager --views synthetic --repeats 1 --steps 1 --out"*) ;;
    *"bench throughput"*) kill -9 $$ ;;
esac
echo "ran $*"
"""


def measure(tmp_path, *arguments, dali=0):
    stub = tmp_path / "python"
    stub.write_text(STUB.format(dali=dali))
    stub.chmod(0o755)
    command = [SCRIPT, tmp_path / "out", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHON": str(stub)}, capture_output=True, text=True)


@pytest.mark.parametrize("small", [True, False])
def test_failed_parts_are_listed_and_do_not_stop_the_others(tmp_path, small):
    done = measure(tmp_path, *["--small"] * small)
    assert done.returncode == 1, done.stderr
    benches = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("ran -m bench ")]
    wanted = "variants convolutions pipelines scaling baseline report"
    if not small:
        wanted = (
            "throughput variants baseline convolutions convolutions pipelines start start pipelines pipelines report"
        )
    assert benches == wanted.split()
    assert "ran -m engine.studies.profile cifar10-250 --dataset noise-32" in done.stdout
    assert ("ran -m pytest -q -m gpu" in done.stdout) is not small
    assert ("-n 8 --dist worksteal tests" in done.stdout) is not small
    broken, killed = "kernels (exit code 7)", "throughput (timed out)"
    failed = [broken, killed] if small else [killed, broken, "deterministic (timed out)", "dali-step (timed out)"]
    assert done.stdout.splitlines()[-1] == f"failed: {';'.join(failed)}"
    assert (tmp_path / "out" / "kernels.log").read_text() == "broken\n"
    assert f"--out {tmp_path}/out/pipelines.jsonl" in done.stdout


def test_runs_without_dali(tmp_path):
    done = measure(tmp_path, "--small", dali=1)
    assert "DALI is not installed; skipping its views and their tests" in done.stdout
    assert "--views fused synthetic" in done.stdout
    full = measure(tmp_path, dali=1).stdout
    assert "dali-graph" not in full
    ignored = [word.removeprefix("--ignore=") for word in full.split() if word.startswith("--ignore=")]
    assert "tests/pipelines/test_dali_graph.py" in ignored and all((ROOT / path).exists() for path in ignored)


def test_an_earlier_checkout_is_timed_too(tmp_path, monkeypatch):
    assert "--before" not in measure(tmp_path).stdout
    monkeypatch.setenv("BEFORE", "/an earlier/checkout")
    for arguments in ([], ["--small"]):
        assert "--before /an earlier/checkout" in measure(tmp_path, *arguments).stdout


def test_invalid_option(tmp_path):
    done = measure(tmp_path, "--cpu")
    assert done.returncode == 2 and "unknown option '--cpu'" in done.stderr


def test_python_m_bench_reports_an_error_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "kernel"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench", run_name="__main__")
    assert ended.value.code == 2
    message = "remixmatch: unknown bench 'kernel'; did you mean kernels?"
    assert capsys.readouterr().err.splitlines() == [message]
