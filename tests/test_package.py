"""The wheel: its contents, its coexistence with Hugging Face's `kernels`, and the commands of the README and docs/.

The wheel is installed into new environments. They find torch and other dependencies in the environment that runs the
tests, but not the editable install there, since .pth files are only read in an environment's own folder.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import engine
from bench import registry
from pipelines.data.datasets import digits
from tests import pages

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "kernels", "pipelines", "bench")

# Modules of Hugging Face's package `kernels`, version 0.17.2.
THEIR_MODULES = [
    *("_rust", "_system", "_versions", "_windows", "archs", "backends", "benchmark", "benchmarks", "cli", "compat"),
    *("deps", "hf_hub", "importer", "install", "layer", "load", "locking", "python_deps", "resolver", "status"),
    *("validate", "variants", "verify"),
]

# Additional flags with which the commands of the README and the pages take only seconds.
SHORT = {
    "train": "--steps 8 --eval-every 4 --checkpoint-every 4",
    "train folder": "--steps 2 --batch 2 --k 1 --width 16 --blocks 1 --lag 3 --eval-every 2",
    "eval": "",
    "predict": "",
    "doctor": "",
    "export": "",
    "report": "",
    "data list": "",
    "data info": "",
    "data split": "",
    "data prepare": "",
    "data check-split": "",
    "reproduce": "--seeds 0 --methods remixmatch -- --steps 8 --eval-every 4",
    "profile": "--steps 8 --warm-up 1",
}
# Commands that take half a minute or more with any flags. They run only with `--long`, as written.
LONG = {"ablate"}
for name, listed in registry.find().items():
    quick = listed.load().quick
    if quick is None:
        LONG.add(f"bench {name}")
    else:
        SHORT[f"bench {name}"] = quick

# Commands that train for hours and are never run as written.
HOURS = {"train folder"}


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the project's wheel from a copy, which leaves the checkout without a build folder."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", made, source)
    (path,) = made.iterdir()
    return path


@dataclass(frozen=True)
class Installed:
    """A virtual environment with installed wheels."""

    folder: Path

    @property
    def site(self):
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def start(self, folder, *command, timeout=300):
        """Run a command of the environment in a folder on the CPU."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
        environment["REMIXMATCH_DATA"] = str(Path(folder) / "data")
        # Look up the program in the PATH of the environment.
        program = shutil.which(command[0], path=environment["PATH"])
        assert program == str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
        )

    def run(self, folder, *command, timeout=300):
        """Run a command, check that it succeeds, and return its stdout."""
        done = self.start(folder, *command, timeout=timeout)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def files(self):
        """Return the modification time of each file in site-packages by its path."""
        return {str(path): path.stat().st_mtime_ns for path in self.site.rglob("*")}


def install(folder, *wheels):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    installed = Installed(folder)
    ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (installed.site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    for path in wheels:
        pip("--python", folder, "install", "--no-deps", "--no-index", path)
    return installed


def test_the_wheel_contains_all_modules_and_templates(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (license_name,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(license_name) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert "\nLicense-Expression: Apache-2.0\n" in archive.read(metadata).decode()
        assert f"\nVersion: {engine.__version__}\n" in archive.read(metadata).decode()
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if package == "kernels" or (path.parent / "__init__.py").exists()
    }
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "engine" / "report" / "templates").iterdir()}
    assert len(modules) > 50 and templates
    # Not for kernels, whose marker would also apply to Hugging Face's package.
    typed = {f"{package}/py.typed" for package in ("engine", "pipelines", "bench")}
    # Only the records that commands look up are included, and no C++ sources of the emulated device.
    assert {name for name in names if ".dist-info/" not in name} == modules | templates | typed | {
        "bench/results/count.jsonl"
    }
    assert "kernels/__init__.py" not in names


@pytest.fixture(scope="module")
def their_wheel(tmp_path_factory):
    """Build a stand-in for Hugging Face's `kernels`: a regular package with the same module names."""
    path = tmp_path_factory.mktemp("theirs") / "kernels-0.17.2-py3-none-any.whl"
    info = "kernels-0.17.2.dist-info"
    files = {f"kernels/{name}.py": f"NAME = '{name}'\n" for name in THEIR_MODULES}
    files |= {
        "kernels/__init__.py": "from kernels.layer import NAME\n\nTHEIRS = True\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return path


def test_no_module_has_the_name_of_a_hugging_face_module():
    assert not {path.stem for path in (ROOT / "kernels").iterdir()} & set(THEIR_MODULES)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_hugging_faces_kernels_works_in_the_same_environment(wheel, their_wheel, tmp_path, first):
    wheels = [wheel, their_wheel] if first == "ours" else [their_wheel, wheel]
    installed = install(tmp_path / "environment", *wheels)
    for each in wheels:
        with zipfile.ZipFile(each) as archive:
            for name in archive.namelist():
                if not name.endswith("/RECORD"):  # Installers change this file.
                    assert (installed.site / name).read_bytes() == archive.read(name), name
    script = (
        "import kernels, kernels.guess, engine.training.step\n"
        "files = [module.__file__ for module in (kernels, kernels.guess, engine.training.step)]\n"
        "print(*files, kernels.THEIRS, kernels.NAME, sep='\\n')"
    )
    files = [
        str(installed.site / module)
        for module in ("kernels/__init__.py", "kernels/guess.py", "engine/training/step.py")
    ]
    assert installed.run(tmp_path, "python", "-P", "-c", script).splitlines() == [*files, "True", "layer"]


def test_commands_that_need_a_checkout_print_one_line(wheel, tmp_path):
    installed = install(tmp_path / "environment", wheel)
    for command, message in {
        "remixmatch bench count": "the emulated device needs a checkout of the project",
        "python -m bench.emulator -c pass": "the emulated device needs a checkout of the project",
        "remixmatch bench report": "bench-results has no records; measure some with remixmatch bench NAME",
    }.items():
        done = installed.start(tmp_path, *command.split())
        assert done.returncode == 2 and done.stderr.startswith(f"remixmatch: {message}"), done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "bench-results").exists()


def kind(command):
    """Return the key of a command in SHORT and LONG: its first word, or its first two if it has subcommands."""
    two = command[1] in ("bench", "data") or command[1:3] == ["train", "folder"]
    return " ".join(command[1 : 3 if two else 2])


def test_every_command_of_the_pages_is_listed():
    commands = pages.commands()
    assert commands
    unknown = [shlex.join(command) for command in commands if kind(command) not in SHORT.keys() | LONG]
    assert not unknown, "add flags that make the command short to SHORT, or to `quick` of the bench"


def some_images(folder):
    """Create the files used by the pages' commands: an image, a folder with a data set, and a folder to classify."""
    images, labels = digits().test_images, digits().test_labels

    def save(path, number, side=100):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).resize((side, side)).save(path)

    save(folder / "image.png", 0, images.shape[1])
    for number in range(24):
        part = ("train", "test", "unlabeled")[number % 3]
        where = (
            folder / "pets" / part if part == "unlabeled" else folder / "pets" / part / f"class {labels[number] % 2}"
        )
        save(where / f"{number}.jpg", number)
    save(folder / "new" / "1.jpg", 30)


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.long)], ids=["short", "as written"])
def test_the_commands_of_the_pages_work_with_the_wheel_in_an_empty_folder(wheel, tmp_path, short):
    commands = [command for command in pages.commands() if not short or kind(command) not in LONG]
    installed = install(tmp_path / "environment", wheel)
    before = installed.files()
    folder = tmp_path / "empty"
    folder.mkdir()
    some_images(folder)
    for command in commands:
        if short or kind(command) in HOURS:
            installed.run(folder, *command, *SHORT[kind(command)].split())
        else:
            installed.run(folder, *command, timeout=3600)
    for example in pages.examples():
        installed.run(folder, "python", "-P", "-c", example)
    assert installed.files() == before
    written = {path.stem for path in (folder / "bench-results").iterdir()}
    assert written == {command[2] for command in commands if command[1] == "bench"} - {"report"}


def test_former_names_of_modules():
    """Scripts that were written before data sets and inference had folders of their own still run."""
    from engine import predict
    from engine.inference.predict import read_image
    from pipelines import decode, folder
    from pipelines.data import decode as decoding
    from pipelines.data import folder as folders

    assert predict.read_image is read_image and decode.decode is decoding.decode
    assert folder.prepare is folders.prepare and folder.cache_of is folders.cache_of and folder.scan is folders.scan
