"""Prediction of files and folders, and errors of the Python API."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.api import load, train
from engine.commands import main as cli
from engine.config.presets import preset
from engine.errors import UserError
from engine.inference import predict
from tests.processes import ROOT


@pytest.fixture
def folder(tmp_path, images):
    """Nine digits, some in a subfolder, one damaged file and one that is not an image."""
    root = tmp_path / "new"
    (root / "deeper down ü").mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(root / ("deeper down ü" if number > 6 else "") / f"{number}.png")
    (root / "5b.png").write_bytes(b"nothing")
    (root / "notes.txt").write_text("not an image")
    return root


def exit_code(*arguments):
    """Run a command and return its exit code."""
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as ended:
        return ended.code
    return 0


def order(root):
    """Return the numbers of the images in the order of their sorted names."""
    return [int(path.stem) for path in sorted(root.rglob("*.png")) if path.stem != "5b"]


def test_predicting_a_folder_to_csv(trained, folder, tmp_path, expected, capsys):
    table = tmp_path / "out.csv"
    table.write_text("what was there")
    assert exit_code("predict", trained, folder, "--csv", table, "--batch", "4") == 1
    told = capsys.readouterr()
    assert told.out == f"{table}: 9 of 10 images\n"
    assert "5b.png cannot be read as an image (unknown image format); skipped\n" in told.err
    assert told.err.endswith("\nremixmatch: 1 of 10 files could not be read as images\n")
    with table.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "class", *map(str, range(10))] and len(rows) == 9
    for row, number in zip(rows, order(folder), strict=True):
        assert row[0].endswith(f"{number}.png") and row[1] == str(expected[number].argmax())
        np.testing.assert_allclose(np.array(row[2:], float), expected[number], atol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_predicting_folders_and_files_to_json_lines(trained, folder, expected, capsys):
    assert exit_code("predict", trained, folder, folder / "3.png", "--json") == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10 and rows[-1]["image"] == str(folder / "3.png")
    assert list(rows[-1]["probabilities"].values()) == pytest.approx(expected[3].tolist(), abs=1e-5)


def test_file_names_with_any_bytes_and_characters(trained, tmp_path, images, monkeypatch):
    names = ["a b.png", os.fsdecode(b"\xff.png"), "é 猫.png"]
    for name in names:
        Image.fromarray(images[0]).save(tmp_path / name)
    content = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content, encoding="ascii"))
    cli.main(["predict", str(trained), str(tmp_path)])
    lines = content.getvalue().decode().splitlines()
    for line, name in zip(lines, [r"a b", r"\xe9 \u732b", r"\udcff"], strict=True):
        assert line.startswith(f"{tmp_path}/{name}.png: ")
    cli.main(["predict", str(trained), str(tmp_path), "--csv", str(tmp_path / "out.csv")])
    rows = (tmp_path / "out.csv").read_bytes().splitlines()[1:]
    assert {row.split(b",")[0] for row in rows} == {os.fsencode(tmp_path / name) for name in names}


def test_what_a_folder_has_besides_images_is_named(trained, tmp_path, images, capsys):
    Image.fromarray(images[0]).save(tmp_path / "a.jfif", "JPEG")
    (tmp_path / "store").mkdir()
    Image.fromarray(images[1]).save(tmp_path / "store" / "b.PGM")
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jfif").rename(tmp_path / "in" / "a.jfif")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "store")
    for name in ("c.HEIC", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    assert exit_code("predict", trained, tmp_path / "in") == 1
    told = capsys.readouterr()
    assert [line.split(":")[0] for line in told.out.splitlines()] == [
        f"{tmp_path}/in/a.jfif",
        f"{tmp_path}/in/linked/b.PGM",
    ]
    start = f"remixmatch: {tmp_path}/in: left out 1 file "
    assert f"{start}(PIL does not read .heic here; convert it to JPEG or PNG): c.HEIC\n" in told.err
    assert f"{start}without the suffix of an image: 1 .txt\n" in told.err
    assert "pipe.png cannot be read as an image (a pipe, socket or device instead of a file); skipped" in told.err


def test_images_are_turned_upright(trained, tmp_path, images, capsys):
    """The EXIF orientation 6 says that the first row is on the right: the file holds the image turned to the left."""
    upright = images[4]
    Image.fromarray(upright).save(tmp_path / "a.png")
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(tmp_path / "b.png", exif=tags)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "c.png")
    cli.main(["predict", str(trained), *(str(tmp_path / f"{name}.png") for name in "abc"), "--json"])
    a, b, c = (json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines())
    assert a == b != c


def test_hidden_files_are_skipped_and_unreadable_folders_reported(trained, tmp_path, images, monkeypatch):
    for name in ("a.png", ".b.png", ".hidden/c.png", "d/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(images[0]).save(tmp_path / name)
    assert predict.find_images([tmp_path]) == [tmp_path / "a.png", tmp_path / "d" / "e.png"]
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path) == str(tmp_path / "d"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"d cannot be read \(Permission denied\)"):
        predict.find_images([tmp_path])


@pytest.mark.parametrize(
    ("output", "begins"),
    [
        ([], "{path}: {best}  ("),
        (["--json"], '{{"image": "{path}", "class": "{best}", '),
        (["--csv", "out.csv"], "{path},{best},"),
    ],
)
def test_named_files_are_predicted_without_the_damaged_ones(
    trained, folder, expected, elsewhere, capsys, output, begins
):
    good = [folder / "2.png", folder / "4.png", folder / "6.png"]
    named = [folder / "5b.png", good[0], folder / "no.png", *good[1:]]
    assert exit_code("predict", trained, *named, *output, "--batch", "2") == 1
    out, err = capsys.readouterr()
    lines = Path("out.csv").read_text().splitlines()[1:] if "--csv" in output else out.splitlines()
    for line, path, number in zip(lines, good, (2, 4, 6), strict=True):
        assert line.startswith(begins.format(path=path, best=expected[number].argmax()))
    assert [line for line in err.splitlines() if line.startswith("remixmatch: ")] == [
        f"remixmatch: {folder}/5b.png cannot be read as an image (unknown image format); skipped",
        f"remixmatch: {folder}/no.png: no such file; skipped",
        "remixmatch: 2 of 5 files could not be read as images",
    ]


def test_files_are_read_a_batch_at_a_time(trained, folder, monkeypatch, capsys):
    """Read two files, print two results, and so on, whether the files are named or found in a folder."""
    read = predict.read_image
    monkeypatch.setattr(predict, "read_image", lambda path, *rest: print(f"read {path}") or read(path, *rest))
    files = [folder / f"{number}.png" for number in (1, 2, 3)]
    for given in (files, [folder / "deeper down ü", files[2]]):
        cli.main(["predict", str(trained), *map(str, given), "--batch", "2"])
        out = capsys.readouterr().out.splitlines()
        assert [line.startswith("read") for line in out] == [True, True, False, False, True, False]


def test_prediction_errors(trained, folder, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    (tmp_path / "bad" / "b.jpg").write_bytes(b"b")
    for arguments, *words in [
        ([], "predict needs at least one image"),
        ([tmp_path / "bad"], "a.jpg cannot be read as an image", "b.jpg cannot be", "no image could be read"),
        ([folder / "5b.png"], "5b.png cannot be read as an image"),
        ([folder / "no.png"], "no.png: no such file"),
        ([folder / "1.png", "--csv", tmp_path / "no" / "out.csv"], "no/out.csv (No such file or directory)"),
        ([folder, "--batch", "0"], "--batch must be at least 1"),
    ]:
        assert exit_code("predict", trained, *arguments) == 2
        said = capsys.readouterr()
        assert not said.out
        for line, word in zip(said.err.splitlines(), words, strict=True):
            assert word in line
    (tmp_path / "before.csv").write_text("as it was")
    with pytest.raises(SystemExit):
        cli.main(["predict", str(trained), str(tmp_path / "bad"), "--csv", str(tmp_path / "before.csv")])
    assert (tmp_path / "before.csv").read_text() == "as it was"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image file in"):
        predict.find_images([tmp_path / "empty"])


def test_top_classes(trained, folder, expected, elsewhere, capsys):
    """The best classes, in order, in the text, in JSON and in CSV; with more classes than there are, all of them."""
    image, values = folder / "3.png", expected[3]
    best = sorted(range(10), key=lambda number: -values[number])
    for top in (1, 3, 99):
        listed = [(str(number), values[number]) for number in best[:top]]
        arguments = ["predict", str(trained), str(image), "--top", str(top)]
        cli.main(arguments)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{image}: {best[0]}  (")
        shown = re.findall(r"(\d) (0\.\d{3})[,)]", line)
        assert [(name, float(p)) for name, p in shown] == [(name, pytest.approx(p, abs=1e-3)) for name, p in listed]
        cli.main([*arguments, "--json"])
        (row,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert row["image"] == str(image) and row["class"] == str(best[0])
        assert list(row["probabilities"].items()) == [(name, pytest.approx(p, abs=1e-5)) for name, p in listed]
        cli.main([*arguments, "--csv", "out.csv"])
        assert capsys.readouterr().out == "out.csv: 1 of 1 images\n"
        with open("out.csv", newline="") as file:
            head, cells = csv.reader(file)
        assert head[:5] == ["file", "class", "probability", "class_2", "probability_2"][: 1 + 2 * top]
        assert len(head) == 1 + 2 * min(top, 10) and cells[1::2] == [name for name, _ in listed]
        np.testing.assert_allclose(np.array(cells[2::2], float), [p for _, p in listed], atol=1e-5)
    assert exit_code("predict", trained, image, "--top", "0") == 2
    assert "--top must be at least 1, got 0" in capsys.readouterr().err


def test_summary_of_predictions(trained, tmp_path, images, expected, capsys):
    """Classes are counted; where every file is in a folder named after a class, the recalls follow."""
    best = expected.argmax(1)
    for number, image in enumerate(images[:6]):
        (tmp_path / "new" / str(best[0])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "new" / str(best[0]) / f"{number}.png")
    cli.main(["predict", str(trained), str(tmp_path / "new"), "--csv", str(tmp_path / "out.csv")])
    counts, figures, head, row = capsys.readouterr().err.splitlines()
    assert sorted(re.findall(r"(\d) (\d)(?:,|$)", counts.removeprefix("predicted classes: "))) == sorted(
        (str(each), str((best[:6] == each).sum())) for each in set(best[:6])
    )
    right = 100 * (best[:6] == best[0]).mean()
    words = "compared with the names of the folders"
    means = f"balanced accuracy {right:.2f} %, geometric mean of recalls {right:.2f} %"
    assert figures == f"{words}: accuracy {right:.2f} %, {means}"
    assert head.startswith("class  images") and row.split()[:3] == [str(best[0]), "6", f"{right:.2f}"]
    Image.fromarray(images[7]).save(tmp_path / "new" / "7.png")
    cli.main(["predict", str(trained), str(tmp_path / "new")])
    assert len(capsys.readouterr().err.splitlines()) == 1, "7.png is in no folder of a class"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("a b.png", "a b.png"),
        ("=1+1.png", "./=1+1.png"),
        ("+a.png", "./+a.png"),
        ("-a.png", "./-a.png"),
        ("@a.png", "./@a.png"),
        ("\ta.png", "./\ta.png"),
        ("\ra.png", "./\ra.png"),
        ('a,b;"c".png', 'a,b;"c".png'),
        ("two\nlines.png", "two\nlines.png"),
        ("'=a.png", "'=a.png"),
    ],
)
def test_files_in_a_csv_are_the_same_files_but_no_formulas(trained, elsewhere, images, name, cell):
    Image.fromarray(images[0]).save(name)
    cli.main(["predict", str(trained), "--csv", "out.csv", "--", name])
    with open("out.csv", newline="") as file:
        (_, row) = csv.reader(file)
    assert row[0] == cell and os.path.samefile(row[0], name)


def test_class_names_in_a_csv_are_no_formulas_and_can_be_restored(tmp_path):
    names = {
        **{"cat": "cat", "=1+1": "'=1+1", "+a": "'+a", "-a": "'-a", "@a": "'@a", "\ta": "'\ta", "a=b": "a=b"},
        **{
            "-1": "-1",
            "+2.5": "+2.5",
            "-1+cmd": "'-1+cmd",
            "'=a": "''=a",
            "'a": "'a",
            "é 猫": "é 猫",
            'a,"b"': 'a,"b"',
        },
    }
    for top in (None, len(names)):
        values = np.linspace(1, 0, len(names), dtype=np.float32)
        predict.write_csv(tmp_path / "out.csv", list(names), iter([(Path("a.png"), values)]), top)
        with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
            head, row = csv.reader(file)
        assert (head[2:] if top is None else row[1::2]) == list(names.values()) and row[1] == "cat"
    for name, cell in names.items():
        restored = cell[1:] if cell.lstrip("'")[:1] in {*"=+-@\t\r"} and cell.startswith("'") else cell
        assert restored == name


def test_printed_names_stay_on_one_line(trained, tmp_path, images, capsys):
    path = tmp_path / "two\nlines\x1b[31m é.png"
    Image.fromarray(images[0]).save(path)
    cli.main(["predict", str(trained), str(path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/two\\nlines\\x1b[31m é.png: ")


@pytest.mark.parametrize("broken", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_csv_leaves_the_existing_file(tmp_path, broken):
    def rows():
        yield from [(Path(f"{number}.png"), np.array([0.25, 0.75])) for number in range(1000)]
        raise broken

    path = tmp_path / "out.csv"
    path.write_text("as it was")
    with pytest.raises(UserError if isinstance(broken, OSError) else KeyboardInterrupt):
        predict.write_csv(path, ["a", "b"], rows())
    assert path.read_text() == "as it was" and [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]


def test_the_api_reports_errors_like_the_command_line(trained, tmp_path):
    with pytest.raises(UserError, match="unknown configuration field 'sed'; did you mean seed"):
        train("digits-40", sed=1)
    with pytest.raises(UserError, match="--k must be at least 1"):
        train("digits-40", k=0)
    with pytest.raises(UserError, match="already contains a run"):
        train("digits-40", out=trained)
    with pytest.raises(UserError, match="unknown preset"):
        train("digit")
    with pytest.raises(UserError, match="holds no run"):
        load(tmp_path)
    assert preset("digits-40").steps == 2500, "presets do not change"


def test_remarks_on_many_files_are_summarized(trained, tmp_path, capsys):
    for number in range(5):
        deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * (100 + number)
        Image.fromarray(deep).save(tmp_path / f"{number}.png")
    cli.main(["predict", str(trained), str(tmp_path), "--batch", "2"])
    names = f"{tmp_path}/0.png, {tmp_path}/1.png, {tmp_path}/2.png and 2 more"
    told = capsys.readouterr().err
    assert f"remixmatch: 5 files: values stretched to 0 to 255 ({names})\n" in told and "resized" not in told
    cli.main(["predict", str(trained), str(tmp_path), "--batch", "5"])
    told = capsys.readouterr().err
    assert told.count(": values stretched to 0 to 255: mode I;16, 0 to ") == 5 and "5 files" not in told


def test_a_csv_goes_to_standard_output_for_a_dash(trained, tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "engine.commands.main", "predict", trained, "a.png", "--csv", "-", "--top", "1"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    head, row = ended.stdout.splitlines()
    assert head == "file,class,probability" and row.startswith("a.png,") and not (tmp_path / "-").exists()


def test_two_forms_of_output_are_refused(trained, tmp_path, capsys):
    assert exit_code("predict", trained, tmp_path, "--json", "--csv", "out.csv") == 2
    assert "--json prints and --csv writes the result; leave one of them out" in capsys.readouterr().err


def test_a_pipe_in_place_of_the_configuration_does_not_wait(tmp_path, images, capsys):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/config.json")
    for arguments in (("predict", tmp_path / "run", tmp_path / "a.png"), ("eval", tmp_path / "run")):
        assert exit_code(*arguments) == 2
        assert "run/config.json cannot be read (not a regular file)\n" in capsys.readouterr().err
