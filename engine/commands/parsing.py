"""Command lines: parse flags into dataclasses, show usage, and report each mistake in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from engine.config.values import allowed, must_be
from engine.errors import UserError, nearest_hint

try:
    from tyro import _errors as tyro_errors
except ImportError:  # A private module, which other versions of tyro may lack.
    tyro_errors = None  # type: ignore[assignment]

DataDir = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="DIR",
        help="Folder of prepared data sets.",
        help_behavior_hint="(default: the environment variable REMIXMATCH_DATA, or ~/.cache/remixmatch)",
    ),
]

RENAMED = {"--rule": "--split"}  # Flags of earlier versions.
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


def show_usage(usage: str, words: Mapping[str, str], more: str) -> None:
    """Print the usage of a command: one line for each word it accepts, then where to read more."""
    print(f"usage: remixmatch {usage}\n")
    width = max(map(len, words))
    for word, text in words.items():
        print(f"  {word:{width}}  {text}")
    print(f"\n{more}")


def show_usage_if_asked(argv: Sequence[str], needs: str, usage: str, words: Mapping[str, str], more: str) -> bool:
    """Show the usage of a command if its first word is missing or --help. Returns whether it was shown.

    Args:
        argv: Words after the command.
        needs: What the first word should be, such as "preset".
        usage: See `show_usage`.
        words: See `show_usage`.
        more: See `show_usage`.

    Raises:
        UserError: The first word is missing, or is a flag.
    """
    if argv and argv[0] not in ("-h", "--help"):
        if argv[0].startswith("-"):
            raise UserError(f"the {needs} comes first: remixmatch {usage}")
        return False
    show_usage(usage, words, more)
    if not argv:
        raise UserError(f"{usage.split()[0]} needs a {needs}")
    return True


def parse(options: type, command: str, argv: list[str]) -> Any:
    """Parse flags into a dataclass.

    Args:
        options: Dataclass whose fields are the flags and positional arguments.
        command: Words after `remixmatch` in the command line, such as "data split".
        argv: Words after the command.

    Raises:
        UserError: An unknown flag, a missing or unexpected argument, or a value that is not allowed.
    """
    if "-h" in argv or "--help" in argv:
        _tidy_help(options)
    events: list[Any] = []
    parsed: Any = None
    hook = tyro_errors.on_parse_error(events.append) if tyro_errors else contextlib.nullcontext()
    try:
        # tyro prints a framed error of several lines, which the message below replaces.
        with contextlib.redirect_stderr(io.StringIO()), hook:
            # Without prefixes, since groups of flags only structure the help.
            parsed = tyro.cli(options, prog=f"remixmatch {command}", args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as ended:
        if not ended.code:
            raise
    usage, flags = f"remixmatch {command} --help", flags_of(options)
    if parsed is not None:
        _check_values(flags, argv, usage)
        return parsed
    try:
        text = _mistake(events[0] if events else None, flags, argv, usage)
    except AttributeError:  # An event of another version of tyro.
        text = ""
    line = shlex.join(["remixmatch", *command.split(), *argv])
    raise UserError(text or f"cannot parse '{line}' (see '{usage}')")


def _tidy_help(options: Any) -> None:
    """Show no empty defaults in the help, and "INT" instead of "{None}|INT", unless a field says what to show."""
    for owner, each, kind, extras in _fields(options):
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        shown, metavar = (
            next((value for extra in extras if (value := getattr(extra, key, None)) is not None), None)
            for key in ("help_behavior_hint", "metavar")
        )
        if shown is None and (default is None or default in ("", ())):
            shown = ""
        parts = [part for part in get_args(kind) if part not in (type(None), ...)]
        name = _METAVARS.get(parts[0]) if len(parts) == 1 else None
        if get_args(kind)[-1:] == (...,):
            name = name and f"{name} [{name} ...]"
        tidy = tyro.conf.arg(metavar=metavar or name, help_behavior_hint=shown)
        owner.__annotations__[each.name] = Annotated[(kind, *extras, tidy)]


def _check_values(flags: Mapping[str, Any], argv: Sequence[str], usage: str) -> None:
    """Raise UserError if a flag that takes any number of values has none, or a path is empty; tyro accepts both."""
    words = list(itertools.takewhile("--".__ne__, argv))
    for word, following in itertools.pairwise([*words, "--"]):
        flag, equal, value = word.partition("=")
        hint = flags.get(flag.replace("_", "-"))
        # An empty path, as from a shell variable that is not set, would mean the current folder.
        if flag.startswith("--") and hint and allowed(hint) == "a path" and not (value if equal else following):
            raise UserError(f"{flag} needs a value: a path (see '{usage}')")
        if word.startswith("--") and following.startswith("--") and get_args(hint)[-1:] == (...,):
            raise UserError(f"{word} needs a value: one or more {allowed(hint)} (see '{usage}')")


def _mistake(event: Any, flags: Mapping[str, Any], argv: Sequence[str], usage: str) -> str:
    """Describe what is wrong with a command line.

    Args:
        event: What tyro reported, see `tyro._errors`; None if it reported nothing.
        flags: Type of each flag.
        argv: The words that were parsed.
        usage: Command that shows all flags.

    Returns:
        One line, or "" for an unknown event.
    """
    tokens = [*getattr(event, "tokens", ()), *getattr(event, "unrecognized_tokens", ())]
    words = [word.partition("=")[0] for word in itertools.takewhile("--".__ne__, argv)]
    unknown = [word for word in words if word.startswith("--") and word.replace("_", "-") not in flags]
    unknown = unknown or [token for token in tokens if token.startswith("-") and token.partition("=")[0] in words]
    if unknown and unknown[0].partition("=")[0] in RENAMED:
        return f"{unknown[0].partition('=')[0]} is now {RENAMED[unknown[0].partition('=')[0]]} (see '{usage}')"
    if unknown:
        given = unknown[0].lstrip("-").partition("=")[0].replace("_", "-")
        near = nearest_hint(given, [flag[2:] for flag in flags], prefix="--")
        return f"unknown flag '{unknown[0]}'{near} ('{usage}' lists all flags)"
    if tokens:
        return _unexpected(tokens[0], flags, argv, usage)
    kind = type(event).__name__
    if kind == "MissingArgs":
        names = " and ".join(_name(missing.arg) for missing in event.missing_arguments)
        return f"missing argument {names} (see '{usage}')"
    if kind not in ("InvalidChoice", "BadValue", "InstantiationFailure") or event.argument is None:
        return ""
    name = _name(event.argument)
    if name not in flags:
        return f"missing argument {name} (see '{usage}')" if kind == "BadValue" else ""
    hint = flags[name]
    if kind == "BadValue":
        return f"{name} needs a value: {allowed(hint)}"
    return must_be(name, hint, str(event.value) if kind == "InvalidChoice" else " ".join(_given(name, argv)))


def _unexpected(token: str, flags: Mapping[str, Any], argv: Sequence[str], usage: str) -> str:
    """Describe a word that is neither a flag nor the value of one."""
    place = ""
    for before, word in zip(("", *argv), argv, strict=False):
        flag, equal, value = word.partition("=")
        if token not in (word, value if equal else word):
            continue
        flag = flag if equal else before
        if flags.get(flag.replace("_", "-")) is bool:
            on = flag.replace("--no-", "--", 1)
            return f"{flag} takes no value, got '{token}'; use {on} or {on.replace('--', '--no-', 1)}"
        place = f" after '{before}'" if before else ""
        break
    return f"unexpected argument '{token}'{place} (see '{usage}')"


def _name(argument: Any) -> str:
    """Return the flag of an argument, or the placeholder that stands for it in the help."""
    lowered = argument.lowered
    return str(lowered.metavar) if argument.is_positional() else lowered.name_or_flags[0]


def _given(flag: str, argv: Sequence[str]) -> list[str]:
    """Return the values that a command line gives to a flag."""
    values: list[str] = []
    inside = False
    for word in argv:
        name, equal, value = word.partition("=")
        if word.startswith("--"):
            inside = name.replace("_", "-") == flag
            values = ([value] if equal else []) if inside else values
        elif inside:
            values.append(word)
    return values


def flags_of(options: Any) -> dict[str, Any]:
    """Return the type of each flag of a dataclass, including nested dataclasses."""
    flags: dict[str, Any] = {}
    positional = get_args(tyro.conf.Positional[int])[1]
    for _, field, kind, extras in _fields(options):
        name = next((extra.name for extra in extras if getattr(extra, "name", None)), field.name).replace("_", "-")
        if positional not in extras:
            flags[f"--{name}"] = kind
            if kind is bool:
                flags[f"--no-{name}"] = kind
    return flags | {"--help": None}


def _fields(options: Any) -> Iterator[tuple[Any, dataclasses.Field, Any, list[Any]]]:
    """Yield (dataclass, field, type, annotations) for the fields of a dataclass and of those nested in it."""
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        whole = hints[field.name]
        kind, *extras = get_args(whole) if get_origin(whole) is Annotated else (whole,)
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind)
        else:
            yield options, field, kind, extras
