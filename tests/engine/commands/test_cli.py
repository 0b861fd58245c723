"""The command line: one clear line and exit code 2 for invalid input, and correct results otherwise."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import metadata, version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from bench import registry
from engine.commands import doctor as doctor_command
from engine.commands import main as cli
from engine.commands.output import messages_on_stderr
from engine.config.config import SECTIONS, Config, config_json
from engine.config.presets import preset
from engine.runs.folder import default_folder
from engine.runs.progress import MetricsLog, ProgressLine, read_metrics
from pipelines.data import cache
from pipelines.data.datasets import digits
from tests.logs import no_warnings

ROOT = Path(__file__).parents[3]


def fails(capfd, *arguments):
    """Run a command that must exit with code 2 and one line; return the line."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    assert ended.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("remixmatch: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["train", "digits-40", "--steps", "3", "--batch", "8", "--width", "8", "--out", str(folder), "--quiet"]
    cli.main([*arguments, "--device", "cpu"])
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit-40"], "unknown preset 'digit-40'; did you mean digits-40"),
        (["trian"], "unknown command 'trian'"),
        (["train", "digits-40", "--k", "0"], "--k must be at least 1, got 0"),
        (["train", "digits-40", "--labels", "45"], "positive multiple of 10 labels"),
        (["train", "digits-40", "--labels", "2000"], "2000 labels needs 200 images per class, but class 8 has 138"),
        (
            ["train", "digits-40", "--max-shift", "16"],
            "--max-shift must be less than the images' shorter side of 16 pixels",
        ),
        (["train", "digits-40", "--class-distribution", "0.5", "0.5"], "needs 10 numbers, one per class, got 2"),
        (["train", "digits-40", "--max-shift", "two"], "--max-shift must be an integer, got 'two'"),
        (["bench", "nothing"], "unknown bench 'nothing'; choose from "),
        (["doctor", "now"], "now"),
    ],
)
def test_invalid_input_writes_nothing(capfd, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capfd, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_works_in_a_checkout_without_installation(command, tmp_path):
    for package in ("engine", "kernels", "pipelines", "bench"):
        (tmp_path / package).symlink_to(ROOT / package)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; sys.argv[0] = 'remixmatch'"
    )
    code += "; from engine.commands.main import main; main()"
    asked = [sys.executable, "-c", code, command, "--help"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"remixmatch {command}" in done.stdout, done.stderr


def test_invalid_folders(capfd, tmp_path, trained):
    before = sorted(trained.rglob("*"))
    assert "already contains a run" in fails(capfd, "train", "digits-40", "--out", trained)
    assert "seed 0 -> 5" in fails(capfd, "train", "digits-40", "--out", trained, "--resume", "--seed", 5)
    assert "preset digits-40 -> digits-10" in fails(capfd, "train", "digits-10", "--out", trained, "--resume")
    assert fails(capfd, "eval", tmp_path).endswith(f"{tmp_path} holds no run; config.json is missing")
    assert f"{trained.parent} holds no run; give the folder of one run, for example {trained}" in fails(
        capfd, "eval", trained.parent
    )
    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    config = trained / "config.json"
    for command, more in (("eval", []), ("predict", [image]), ("export", []), ("report", [])):
        assert fails(capfd, command, tmp_path / "none", *more).endswith(f"no folder '{tmp_path}/none'")
        assert fails(capfd, command, config, *more).endswith(f"{config} is a file; give the run's folder, {trained}")
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in fails(capfd, "train", "digits-40", "--out", file)
    assert sorted(trained.rglob("*")) == before


def test_invalid_input_of_a_process_is_one_line_and_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "engine", "train", "cifar"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and not done.stdout
    hint = "did you mean cifar10-40 or cifar10-250?"
    assert done.stderr == f"remixmatch: unknown preset 'cifar'; {hint}\n"


def test_resume_starts_a_new_run_and_says_so_if_there_is_none(tmp_path, capfd):
    flags = [
        "--steps",
        "1",
        "--batch",
        "8",
        "--width",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "new"),
        "--resume",
    ]
    cli.main(["train", "digits-40", *flags])
    assert f"no run in {tmp_path / 'new'}; starting a new one" in capfd.readouterr().err.splitlines()
    cli.main(["train", "digits-40", *flags])
    assert "starting a new one" not in capfd.readouterr().err


def test_resume_does_not_need_the_flags_again(trained, capfd):
    cli.main(["train", "digits-40", "--out", str(trained), "--resume", "--quiet"])
    assert "digits-40 seed 0: test accuracy" in capfd.readouterr().out


def test_eval_matches_the_accuracy_in_the_summary(trained, capfd):
    cli.main(["eval", str(trained), "--json"])
    result = json.loads(capfd.readouterr().out)
    assert result["test_accuracy"] == json.loads((trained / "summary.json").read_text())["test_accuracy"]
    assert result["images"] == 360
    cli.main(["eval", str(trained)])
    assert f"test accuracy {result['test_accuracy']:.2f} % of 360 images" in capfd.readouterr().out


def test_predict_converts_modes_and_sizes(trained, tmp_path, capfd):
    image = digits().test_images[0]
    files = {}
    for name, picture in {
        "same.png": Image.fromarray(image),
        "gray.png": Image.fromarray(image[..., 0]),
        "palette.png": Image.fromarray(image).quantize(256),
        "clear.png": Image.fromarray(np.dstack([image, np.full((16, 16), 255, np.uint8)])),
        "deep.png": Image.fromarray(image[..., 0].astype(np.uint16) * 257),
        "large.png": Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST),
    }.items():
        files[name] = tmp_path / name
        picture.save(files[name])
    cli.main(["predict", str(trained), *map(str, files.values()), "--json"])
    out, err = capfd.readouterr()
    rows = {Path(row["image"]).name: row for row in map(json.loads, out.splitlines())}
    same = rows["same.png"]["probabilities"]
    assert sum(same.values()) == pytest.approx(1) and rows["same.png"]["class"] == max(same, key=same.get)
    for name in ("gray.png", "palette.png", "clear.png", "deep.png"):
        assert rows[name]["probabilities"] == pytest.approx(same, abs=1e-5), name
    assert rows["large.png"]["probabilities"] == pytest.approx(same, abs=0.2)
    assert [line for line in err.splitlines() if "large.png" in line] == [
        f"remixmatch: {files['large.png']}: 64x64 pixels, resized to 16x16"
    ]
    cli.main(["predict", str(trained), str(files["same.png"])])
    assert f"{files['same.png']}: {rows['same.png']['class']}  (" in capfd.readouterr().out


def test_predict_rejects_files_that_are_not_images(trained, tmp_path, capfd):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:500])
    assert "text.png cannot be read as an image" in fails(capfd, "predict", trained, text)
    assert "cut.png cannot be read as an image" in fails(capfd, "predict", trained, cut)
    assert "no such file" in fails(capfd, "predict", trained, tmp_path / "none.png")
    assert "at least one image" in fails(capfd, "predict", trained)


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder(preset("digits-10"), resume=False)
    assert str(first) == "runs/digits-10-seed0"
    assert default_folder(preset("digits-10"), resume=True) == first
    first.mkdir(parents=True)
    assert str(default_folder(preset("digits-10"), resume=False)) == "runs/digits-10-seed0-2"
    assert default_folder(preset("digits-10"), resume=True) == first


@pytest.mark.parametrize(("command", "listed"), [("train", "digits-40"), ("bench", "throughput")])
def test_command_without_its_argument_lists_the_choices_and_fails(capfd, command, listed):
    with pytest.raises(SystemExit) as ended:
        cli.main([command])
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and f"\n  {listed} " in out
    assert err.splitlines()[-1].startswith(f"remixmatch: {command} needs a ")


def test_help_lists_presets_and_every_field_in_its_section(capfd):
    cli.main(["--help"])
    assert "doctor" in capfd.readouterr().out
    cli.main(["train", "--help"])
    assert "digits-40-supervised" in capfd.readouterr().out
    for arguments in (["bench", "--help"], ["bench", "-h"]):
        cli.main(arguments)
        out = capfd.readouterr().out
        for bench in registry.find():
            assert re.search(rf"^  {bench} +\w.{{10,}}$", out, re.MULTILINE), bench
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--help"])
    out = capfd.readouterr().out
    assert ended.value.code == 0 and "usage: remixmatch doctor" in out and "ready to train" not in out
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "digits-40", "--help"])
    assert ended.value.code == 0
    titles = (*SECTIONS, "folder", "ablation", "source", "rank")
    _, *texts = re.split("|".join(f"{title} options" for title in titles), capfd.readouterr().out)
    sections = dict(zip(titles, texts, strict=True))
    for field in set(fields(Config)) - {Config.__dataclass_fields__["preset"]}:
        flag = "--" + field.name.replace("_", "-") + " "
        assert [title for title, text in sections.items() if flag in text or flag[:-1] + "," in text] != [], field.name
    for title, flag in {
        "method": "k",
        "data": "labels",
        "network": "width",
        "rank": "gpus",
        "folder": "out",
    }.items():
        assert f"--{flag} " in sections[title], flag


HEAVY = ("torch", "triton", "nvidia.dali", "sklearn", "tensorboard", "wandb", "trackio", "matplotlib", "rich.progress")
WATCHED = "\n".join([
    "import sys",
    "from engine.commands.main import main",
    "try:",
    "    main(sys.argv[1:])",
    "finally:",
    f"    print('heavy:', *(name for name in {HEAVY} if name in sys.modules))",
])  # fmt: skip


def run_watched(*arguments):
    """Run a command in its own process, which prints at its end which packages of HEAVY it has imported."""
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_and_errors_do_not_import_torch(tmp_path):
    """Heavy packages are imported only after the options, the data and the folder have been checked."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config_json(preset("digits-40")))
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["bench", "--help"],
        ["doctor", "--help"],
        ["train", "digits-40", "--help"],
        ["train", "digits-40", "--colour"],
        ["train", "digits-40", "--width", "wide"],
        ["train", "digits-40", "--k", "0"],
        ["train", "digits-40", "--labels", "45"],
        ["train", "digits-40", "--out", str(tmp_path / "run")],
        ["data", "prepare", "--help"],
        ["data", "prepare", str(tmp_path), "--size", "8"],
        ["data", "info", "stl10", "--data-dir", str(tmp_path)],
    ):
        done = run_watched(*arguments)
        assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
        assert done.stdout.splitlines()[-1] == "heavy:", arguments


@pytest.mark.skipif(torch.cuda.is_available(), reason="uses torch to detect the GPU")
def test_data_commands_do_not_import_torch(tmp_path):
    for number in range(6):
        path = tmp_path / "pets" / ("train", "test")[number // 4] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    where = ["--data-dir", tmp_path / "data"]
    for arguments, imported in (
        (["prepare", tmp_path / "pets", "--size", 8], "rich.progress"),
        (["prepare", tmp_path / "pets", "--size", 8], ""),
        (["info", tmp_path / "pets", "--verify", "--png", tmp_path / "grid.png"], ""),
        (["list"], ""),
        (["split", "digits", "--labels", 40], ""),
    ):
        done = run_watched("data", *arguments, *where)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"heavy: {imported}".rstrip(), arguments


def test_closed_pipe_ends_a_command_silently():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "engine", "train", "digits-40", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def doctor(capfd, *flags):
    """Run `remixmatch doctor` and return its exit code and what it prints."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *map(str, flags)])
    return ended.value.code, capfd.readouterr().out


def test_doctor_reports_this_machine(capfd):
    code, out = doctor(capfd)
    assert code == 0, out
    for name in ("engine", "CPU", "threads", "GPU", "driver", "torch", "triton", "DALI", "apex", "data"):
        assert f" {name} " in out
    assert out.endswith("ready to train\n") and engine.__version__ in out


def test_doctor_as_json_shows_versions_extras_and_the_data_folder(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(doctor_command.EXTRAS, "timm", ("no-such-package",))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("REMIXMATCH_DATA", "")  # --data-dir sets both of these.
    monkeypatch.setattr(cache, "_flag", "")
    code, out = doctor(capfd, "--json", "--data-dir", tmp_path / "a" / "b")
    found = json.loads(out)
    assert code == 0 and found["ready"] is True and found["version"] == version("remixmatch-engine")
    checks = found["checks"]
    fix = "pip install 'remixmatch-engine[timm]'"
    assert checks["extra timm"] == {
        "state": "optional",
        "found": "no-such-package is not installed; optional",
        "fix": fix,
    }
    assert re.fullmatch(rf"{tmp_path}/a/b \(not created yet\), \d+\.\d GiB free", checks["data"]["found"])
    assert checks["threads"]["found"].endswith(f" on {len(os.sched_getaffinity(0))} cores (OMP_NUM_THREADS=3)")
    assert torch.__version__ in checks["torch"]["found"]


def test_doctor_names_what_is_missing(capfd, monkeypatch):
    def missing():
        raise ImportError("no module named torch\nsecond line")

    monkeypatch.setattr(doctor_command, "CHECKS", {"torch": (missing, "pip install torch")})
    code, out = doctor(capfd, "--json")
    expected = {"state": "missing", "found": "ImportError: no module named torch", "fix": "pip install torch"}
    assert code == 1 and json.loads(out)["checks"] == {"torch": expected} and not json.loads(out)["ready"]
    code, out = doctor(capfd)
    assert code == 1 and out.endswith("not ready: apply the fixes above\n")


def test_doctor_reads_cpu_features_and_knows_all_extras(monkeypatch):
    text = "processor : 0\nflags\t\t: fpu avx2 avx512f\n\nflags : fpu\n"
    with monkeypatch.context() as context:
        context.setattr(Path, "read_text", lambda path, **_: text)
        assert doctor_command._cpu()[1] == "has avx2, avx512f of avx2, avx512f, avx512_bf16, amx_bf16"
    extras = metadata("remixmatch-engine").get_all("Provides-Extra")
    assert doctor_command.EXTRAS.keys() == set(extras) - {"dev", "docs"}


@pytest.mark.parametrize("words", [["version"], ["--version"], ["-V"]])
def test_version(capfd, words):
    cli.main(words)
    assert capfd.readouterr().out == f"remixmatch-engine {version('remixmatch-engine')}\n"


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(step, loss=float(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # Truncated by a kill.
    with no_warnings():
        log = MetricsLog(tmp_path, 2)
        log.add(3, loss=30.0)
        log.close()
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]


def test_progress_shows_speed_losses_and_time_left(capfd):
    with messages_on_stderr():
        line = ProgressLine(steps=10)
        line.start(4, images_per_step=100)
        line.update(10, {"loss": 1.25})
        line.close()
    err = capfd.readouterr().err
    assert "step 10/10" in err and "steps/s" in err and "images/s" in err and "loss 1.250" in err and "s left" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "pets", "--dataset", "digits"], "--dataset and --data both name the images; leave out one of them"),
        (["--class-prior", "p.json", "--class-distribution", "1"],
         "--class-prior and --class-distribution both set p(y); leave out one of them"),
        (["--split", "all", "--config", "FILE"],
         "--split all uses every label; leave out labels in --config FILE, or give another --split"),
        (["--imbalance", "10", "--n1", "20", "--config", "FILE"],
         "--n1 20 and the ratios set the number of labels; leave out labels in --config FILE or --n1"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(tmp_path, capfd, flags, message):
    file = tmp_path / "run.yaml"
    file.write_text("labels: 20\n")
    line = fails(capfd, "train", "digits-40", *(file if flag == "FILE" else flag for flag in flags))
    assert line == f"remixmatch: {message.replace('FILE', str(file))}"


def test_a_run_is_not_resumed_with_another_method(tmp_path, capfd):
    flags = ["train", "digits-40", "--steps-scale", "0.002", "--out", str(tmp_path / "run"), "--quiet"]
    cli.main([*flags, "--method", "freematch"])
    cli.main([*flags, "--resume"])  # --steps-scale scales what the method of the run sets.
    capfd.readouterr()
    line = fails(capfd, *flags, "--method", "fixmatch", "--resume")
    assert line.endswith("run was started with a different configuration: method freematch -> fixmatch")
