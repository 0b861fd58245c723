"""Discovery of benches: one file adds a bench to the list, the flags, the report and the documentation."""

import re
import sys
from pathlib import Path

import pytest

import bench
from bench import cli, registry
from engine.measuring import records
from tests.pages import TEXTS

FOLDER = Path(bench.__file__).parent
BENCHES = registry.find()

MADE_UP = '''"""`remixmatch bench made_up`: doubles a number without measuring anything."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bench.registry import Bench, Table
from engine.measuring import records


@dataclass
class Options:
    out: Path = records.OUT / "made_up.jsonl"
    number: int = 1
    name: str = ""


def main(options):
    values = {"number": options.number, "name": options.name, "result": 2 * options.number}
    records.append(options.out, records.record("made_up", torch.device("cpu"), **values))


BENCH = Bench(
    options=Options,
    main=main,
    quick="--number 5",
    tables={"made_up": Table(("number",), {"n": "{number}", "2 n": "{result:.1f}", "name": "{name}", "ms": "{ms}"})},
)
'''


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A bench in a separate folder that is added to the package path."""
    path = tmp_path / "more" / "things" / "made_up.py"
    path.parent.mkdir(parents=True)
    path.write_text(MADE_UP)
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(tmp_path / "more")])
    monkeypatch.chdir(tmp_path)
    yield "bench.things.made_up"
    for name in ("bench.things.made_up", "bench.things"):
        sys.modules.pop(name, None)


def test_one_file_adds_a_bench(made_up, capsys):
    assert registry.find().keys() - BENCHES.keys() == {"made_up"}
    cli.main(["--help"])
    out = capsys.readouterr().out
    assert re.search(r"^  made_up +doubles a number without measuring anything$", out, re.MULTILINE)
    assert made_up not in sys.modules, "listing benches must not import them"

    with pytest.raises(SystemExit) as ended:
        cli.main(["made_up", "--help"])
    assert ended.value.code == 0 and "--number INT" in capsys.readouterr().out

    assert registry.find()["made_up"].load().quick == "--number 5"
    for flags in ("--number 5 --name old", "--number 7", "--number 5 --name new"):
        cli.main(["made_up", *flags.split()])
    cli.main(["report"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["## made_up", ""]
    assert lines[2:6] == [
        "| n | 2 n | name | ms |", "| --- | --- | --- | --- |", "| 5 | 10.0 | new |  |", "| 7 | 14.0 |  |  |"
    ]  # fmt: skip
    assert lines[7].startswith("Measured on CPU")


def test_all_files_that_define_a_bench_are_found():
    defining = {path.stem for path in FOLDER.rglob("*.py") if "\nBENCH = " in path.read_text(encoding="utf-8")}
    assert defining == BENCHES.keys() and len(defining) > 10


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_writes_its_kind_of_record_to_the_default_folder(name):
    loaded = BENCHES[name].load()
    if name == "report":
        assert not loaded.tables
        return
    assert loaded.options().out == records.OUT / f"{name}.jsonl" == Path("bench-results", f"{name}.jsonl")
    assert name in loaded.tables


def test_kinds_of_records_are_unique():
    kinds = [kind for listed in BENCHES.values() for kind in listed.load().tables]
    assert len(kinds) == len(set(kinds))


def test_the_benchmarks_page_lists_all_benches():
    lines = re.findall(r"^remixmatch bench (\w+)[^#\n]* # (.+)$", TEXTS["docs/benchmarks.md"], re.MULTILINE)
    assert dict(lines) == {name: listed.help for name, listed in BENCHES.items()}
    assert len(lines) == len(BENCHES)
