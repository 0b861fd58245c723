"""Mistakes in a command line: one line and exit code 2, with what was given, what is allowed, and what to do."""

import ast
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from bench import registry
from engine.commands import main as cli
from engine.commands import parsing
from engine.commands.data import SUBCOMMANDS
from engine.commands.parsing import parse
from engine.errors import UserError
from tests.pages import ROOT

# Command lines up to their flags.
COMMANDS = [
    "train digits-40", "eval", "predict", "export", "doctor", "reproduce digits", "ablate digits-40",
    "profile digits-40", "report", *(f"data {name}" for name in SUBCOMMANDS),
    *(f"bench {name}" for name in registry.find()),
]  # fmt: skip


def fails(capfd, line):
    """Run a command that must end with code 2 and one clean line; return the line without its prefix."""
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    (text,) = capfd.readouterr().err.splitlines()
    check_clean(text)
    return text.removeprefix("remixmatch: ")


def check_clean(text):
    assert not re.search(r"[\u2500-\u257f\n]|  |For full helptext|Traceback", text), text
    for repeated in re.findall(r"\b(\w+\W+\w+)\W+\1\b", text):
        raise AssertionError(f"{repeated!r} is repeated in: {text}")


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flags_and_unexpected_arguments_of_every_command(capfd, command):
    flag = fails(capfd, f"{command} --zzzz 1")
    assert flag == f"unknown flag '--zzzz' ('remixmatch {command} --help' lists all flags)"
    near = fails(capfd, f"{command} --hepl")
    assert near == f"unknown flag '--hepl'; did you mean --help? ('remixmatch {command} --help' lists all flags)"
    if command in ("predict", "report", "bench opening"):  # These accept any number of arguments.
        return
    extra = fails(capfd, f"{command} {'run ' * needs_argument(command)}now")
    place = " after 'run'" * needs_argument(command)
    assert extra == f"unexpected argument 'now'{place} (see 'remixmatch {command} --help')"


def needs_argument(command):
    return command in ("eval", "export") or (command.startswith("data ") and command != "data list")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train digits-40 --K 4", "unknown flag '--K'; did you mean --k? (.* lists all flags)"),
        ("predict run a.png --cvs out", "unknown flag '--cvs'; did you mean --csv? (.* lists all flags)"),
        ("train digits-40 --ablate", "--ablate needs a value: one or more words (see .*)"),
        ("train digits-40 --ablate --k 4", "--ablate needs a value: one or more words (see .*)"),
        ("train digits-40 --class-distribution", "--class-distribution needs a value: one or more numbers (see .*)"),
        ("reproduce digits --seeds", "--seeds needs a value: one or more integers (see .*)"),
        ("reproduce digits --seeds -- --k 4", "--seeds needs a value: one or more integers (see .*)"),
        ("reproduce digits --from", "--from needs a value: one or more paths (see .*)"),
        ("train --seed 1 digits-40", "the preset comes first: remixmatch train PRESET [flags]"),
        ("reproduce --plan", "the table comes first: remixmatch reproduce TABLE [flags] [-- flags of train]"),
        ("ablate --time-only", "the preset comes first: remixmatch ablate PRESET [flags] [-- flags of train]"),
        ("profile --nvtx", "the preset comes first: remixmatch profile PRESET [flags]"),
        ("bench --repeats 1", "the name comes first: remixmatch bench NAME [flags]"),
        ("train digits-40 --see 3", "unknown flag '--see'; did you mean --seed? (.* lists all flags)"),
        ("train digits-40 --max_shif=3", "unknown flag '--max_shif'; did you mean --max-shift? (.* lists all flags)"),
        ("train digits-40 -seed 3", "unknown flag '-seed'; did you mean --seed? (.* lists all flags)"),
        ("train digits-40 --device gpu", "--device must be one of auto, cpu, cuda; got 'gpu'"),
        ("train digits-40 --method fixmach", "--method must be one of .*; got 'fixmach'; did you mean fixmatch?"),
        ("train digits-40 --mode graf", "--mode must be one of .*; got 'graf'; did you mean graph?"),
        ("train digits-40 --stem-channels 4", "--stem-channels must be one of 3, 8; got '4'"),
        ("train digits-40 --seed", "--seed needs a value: an integer"),
        ("train digits-40 --device", "--device needs a value: one of auto, cpu, cuda"),
        ("train digits-40 --out= --steps 0", "--out needs a value: a path (see .*)"),
        ("train digits-40 --data=", "--data needs a value: a path (see .*)"),
        ("export run --out=", "--out needs a value: a path (see .*)"),
        ("train digits-40 --seed --resume", "--seed needs a value: an integer"),
        ("train digits-40 --out", "--out needs a value: a path"),
        ("train digits-40 --seed x", "--seed must be an integer, got 'x'"),
        ("train digits-40 --seed=1.5", "--seed must be an integer, got '1.5'"),
        ("train digits-40 --lr 1 --lr fast", "--lr must be a number, got 'fast'"),
        ("train digits-40 --max_shift two", "--max-shift must be an integer, got 'two'"),
        ("train digits-40 --class-distribution 0.5 b --k 1", "--class-distribution must be numbers, got '0.5 b'"),
        ("train digits-40 --resume yes", "--resume takes no value, got 'yes'; use --resume or --no-resume"),
        ("train digits-40 --no-flip=1", "--no-flip takes no value, got '1'; use --flip or --no-flip"),
        ("train digits-40 --seed 1 2", "unexpected argument '2' after '1' (see 'remixmatch train digits-40 --help')"),
        ("train", "train needs a preset"),
        ("train digit-40", "unknown preset 'digit-40'; did you mean digits-40 or digits-10.*"),
        ("eval", "missing argument DIR (see 'remixmatch eval --help')"),
        ("eval --jso", "unknown flag '--jso'; did you mean --json? (.* lists all flags)"),
        ("predict --batch 4", "missing argument DIR (see 'remixmatch predict --help')"),
        ("predict run a.png --batch 1.5", "--batch must be an integer, got '1.5'"),
        ("export run --to onn", "--to must be one of safetensors, torch, onnx; got 'onn'"),
        ("data", "data needs a command"),
        ("data prepar", "unknown data command 'prepar'; did you mean prepare?"),
        ("bench kernel", "unknown bench 'kernel'; did you mean kernels?"),
        ("data prepare run --decoder gp", "--decoder must be one of auto, cpu, gpu; got 'gp'"),
        ("data check-split run --seed x", "--seed must be an integer, got 'x'"),
        ("bench scaling --ranks 1 a", "--ranks must be integers, got '1 a'"),
        ("reproduce digits -- --seeed 3", "unknown flag '--seeed'; did you mean --seed? ('remixmatch train .*"),
        ("foo", "unknown command 'foo'; choose from train, eval, .*"),
        ("trian", "unknown command 'trian'; did you mean train.*"),
    ],
)
def test_mistakes_say_what_is_allowed(capfd, line, message):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    output = fails(capfd, line)
    assert re.fullmatch(pattern, output), output


@dataclass
class Options:
    name: tyro.conf.Positional[str]
    pair: tuple[int, int] = (1, 2)
    """Two numbers."""
    mode: Literal["left", "right"] | None = None
    other: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = field(default_factory=tuple)
    on: bool = True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x --pair 1", "--pair needs a value: 2 integers"),
        ("x --pair 1 b", "--pair must be 2 integers, got '1 b'"),
        ("x --mode c", "--mode must be one of left, right; got 'c'"),
        ("x --fron a", "unknown flag '--fron'; did you mean --from?"),
        ("x --on yes", "--on takes no value, got 'yes'; use --on or --no-on"),
        ("--pair 1 2", "missing argument STR"),
        ("x y -- --zzzz", "unexpected argument 'y' after 'x'"),
    ],
)
def test_other_types(words, message):
    with pytest.raises(UserError) as caught:
        parse(Options, "some command", words.split())
    check_clean(str(caught.value))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("words", ["x --pair 1", "--on", "x --mode c"])
def test_without_the_reports_of_tyro_the_message_is_clean_but_short(monkeypatch, words):
    monkeypatch.setattr(parsing, "tyro_errors", None)
    with pytest.raises(UserError) as caught:
        parse(Options, "some command", words.split())
    assert str(caught.value) == f"cannot parse 'remixmatch some command {words}' (see 'remixmatch some command --help')"
    with pytest.raises(UserError, match="unknown flag '--fron'; did you mean --from"):
        parse(Options, "some command", ["x", "--fron", "a"])


def test_what_is_right_is_parsed():
    options = parse(Options, "some command", ["x", "--pair", "3", "4", "--from", "a", "b", "--no-on", "--mode", "left"])
    assert options == Options("x", (3, 4), "left", (Path("a"), Path("b")), False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_empty_defaults_and_no_raw_types(capfd, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    text = " ".join(re.sub("[│─╭╮╰╯]", "", capfd.readouterr().out).split())
    assert ended.value.code == 0
    assert not re.search(r"\(default: (|None|''|\(\))\)|\{None|None\}", text), text


def test_help_texts_are_single_lines():
    """The help of a flag breaks where its docstring does."""
    checked = 0
    for path in sorted(path for folder in ("engine", "bench") for path in (ROOT / folder).rglob("*.py")):
        for options in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = options.body if isinstance(options, ast.ClassDef) else []
            for field_, statement in pairwise(body):
                if isinstance(field_, ast.AnnAssign) and isinstance(statement, ast.Expr):
                    checked += 1
                    assert "\n" not in ast.literal_eval(statement.value), (path, ast.unparse(statement))
    assert checked > 100
