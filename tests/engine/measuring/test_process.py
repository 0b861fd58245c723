"""Child processes import this project's packages, whatever lies in the working folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from engine.measuring.process import output
from pipelines.processes import python_environment

ROOT = Path(__file__).parents[3]
OURS = ("engine", "kernels", "pipelines", "bench")
# Modules that a user's project may have, two of the standard library among them.
OTHERS = ("torch", "numpy", "tyro", "rich", "submitit", "secrets", "statistics")

# Each starts a process, and waits for it.
STARTERS = {
    "train --gpus": "from engine.distributed.launch import launch; launch(['--help'], 1, 0)",
    "a job": """
import os, pathlib
from unittest.mock import Mock
from engine.config.presets import preset
from engine.studies import jobs
jobs.train_command = lambda folder, config: [jobs.sys.executable, "-m", "engine", "--help"]
jobs._train(pathlib.Path(os.environ["JOB"]), jobs.Job("a", preset("digits-40")), Mock(), {}, jobs.Stop())
print((pathlib.Path(os.environ["JOB"]) / "log.txt").read_text())
""",
    "a measurement": "from engine.measuring.process import output; print(output('engine', '--help'))",
}


@pytest.fixture
def project(tmp_path):
    """The folder of a project whose modules have the names of ours and of libraries, and end every process."""
    folder = tmp_path / "project"
    for name in OURS + OTHERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('the {name} of the working folder')\n")
        (folder / name / "__main__.py").write_text("")
    (tmp_path / "job").mkdir()
    return folder


def start(folder, *arguments, **environment):
    variables = os.environ | {"JOB": str(folder.parent / "job"), "PYTHONSAFEPATH": ""} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("starter", STARTERS)
@pytest.mark.parametrize("path", ["", str(ROOT) + os.pathsep], ids=["no path", "an empty entry"])
def test_a_child_does_not_import_modules_of_the_working_folder(project, starter, path):
    # The parent is started like the command `remixmatch`, without the working folder on its path.
    script = f"import os\nos.environ['PYTHONPATH'] = {path!r}\n{STARTERS[starter]}"
    done = start(project, "-P", "-c", script, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "usage: remixmatch COMMAND" in done.stdout, done.stdout + done.stderr
    assert "of the working folder" not in done.stdout + done.stderr


def test_ranks_of_a_torchrun_without_safe_paths_import_no_library_of_the_working_folder(project):
    """The user's own torchrun starts `python -m engine`, which searches the working folder for `engine` itself."""
    for name in OURS:
        (project / name / "__init__.py").unlink()
        (project / name / "__main__.py").unlink()
        (project / name).rmdir()
    done = start(project, "-m", "engine", "train", "digits-40", "--gpus", "0", PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and "--gpus must be at least 1" in done.stderr
    assert "of the working folder" not in done.stderr


def test_a_checkout_is_run_from_its_own_folder():
    # Without `site`, an editable installation of the engine is not found.
    done = start(ROOT, "-S", "-m", "engine", "data", "list", PYTHONPATH=str(Path(tyro.__file__).parents[1]))
    assert done.returncode == 0 and "digits" in done.stdout, done.stderr


def test_folders_come_before_the_entries_of_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}/one{os.pathsep}{os.pathsep}/two{os.pathsep}/one")
    made = python_environment(Path("/two"), Path("/three"))
    assert made["PYTHONPATH"].split(os.pathsep) == ["/two", "/three", "/one"] and made["PYTHONSAFEPATH"] == "1"
    monkeypatch.delenv("PYTHONPATH")
    assert python_environment()["PYTHONPATH"] == str(ROOT)


def test_a_failed_module_raises_its_output():
    with pytest.raises(RuntimeError, match="engine nothing ended with exit code 2: remixmatch: unknown command"):
        output("engine", "nothing")


def test_every_file_that_starts_python_uses_this_environment():
    for folder in OURS:
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "sys.executable" not in text or "python_environment(" in text, path
