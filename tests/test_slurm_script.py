"""The Slurm script with stubbed commands: it runs one torchrun per node and requeues the job if that helps."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sbatch"
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\nnode9\\n"; fi',
    # Runs once instead of on every node.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"',
    "torchrun": 'eval "$OUTCOME"',
}
SAVES = "mkdir -p checkpoints; touch checkpoints/step-00000012.pt;"


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs the script and returns its exit code, the commands it called, and its output."""
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >>"$CALLS"\n{body}\n')
        stub.chmod(0o755)
    folder, calls = tmp_path / "a run", tmp_path / "calls"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000009.pt").touch()

    def run(outcome, *arguments):
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "OUTCOME": f"cd '{folder}'; {outcome}",
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NODELIST": "node[7-9]",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_CPUS_PER_TASK": "16",
        }
        command = ["bash", SCRIPT, *(arguments or ("digits-40", folder))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout + done.stderr

    run.folder = folder
    return run


def test_every_node_runs_one_torchrun_with_the_first_node_as_rendezvous(submit):
    code, calls, _ = submit("touch summary.json", "digits-40", submit.folder, "--seed", "3")
    assert code == 0
    assert [call.split()[0] for call in calls] == ["scontrol", "srun", "torchrun"]
    assert calls[0] == "scontrol show hostnames node[7-9]"
    options, torchrun = calls[1].split(" torchrun ")
    assert {"--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=16"} < set(options.split())
    assert calls[2] == f"torchrun {torchrun}"
    assert torchrun.startswith("--nnodes 3 --nproc-per-node gpu --max-restarts 3 ")
    assert "--rdzv-backend c10d --rdzv-endpoint node7:24567 --rdzv-id 1234567" in torchrun
    assert torchrun.endswith(f"-m -- engine train digits-40 --out {submit.folder} --resume --seed 3")


def test_workers_do_not_share_the_rendezvous_store(submit):
    assert submit('test "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 && touch summary.json')[0] == 0


@pytest.mark.parametrize(
    ("outcome", "code", "requeued"),
    [
        (f"{SAVES} touch summary.json", 0, False),
        (f"{SAVES} touch -d tomorrow summary.json; exit 1", 1, False),  # A node failed after the run had finished.
        (f"{SAVES} touch -d yesterday summary.json; exit 1", 1, True),  # A finished run was continued with more steps.
        (f"{SAVES} exit 1", 1, True),  # The time limit was reached, or workers failed too often.
        (f"{SAVES} exit 143", 143, True),
        (f"{SAVES} exit 2", 2, False),
        ("exit 1", 1, False),  # Every further job would fail in the same way.
    ],
)
def test_a_job_that_saved_a_checkpoint_is_requeued_until_the_run_is_finished(submit, outcome, code, requeued):
    exit_code, calls, output = submit(outcome)
    assert exit_code == code
    assert calls[3:] == ["scontrol requeue 1234567"] * requeued
    assert "slurm.sbatch: " in output


def test_a_job_that_saved_the_first_checkpoint_is_requeued(submit):
    (submit.folder / "checkpoints" / "step-00000009.pt").unlink()
    assert submit("exit 1")[1][3:] == []
    assert submit(f"{SAVES} exit 1")[1][-1] == "scontrol requeue 1234567"


def test_without_a_folder_it_prints_the_usage(submit):
    code, calls, output = submit("", "digits-40")
    assert code == 2 and calls == [] and output.startswith("usage: sbatch")
