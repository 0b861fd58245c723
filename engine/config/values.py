"""Values of configuration fields from Python, JSON and YAML: conversion to the type of the field, and what is allowed.

A field's type is a dataclass annotation of `engine.config.config.Config`: bool, int, float, str, a Literal, or a tuple
of any length. This module does not import `Config`, which uses it.
"""

from __future__ import annotations

import numbers
import operator
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from engine.errors import nearest_hint, printable

# Environment variable with the cores that a run may use, for several runs at a time on one machine.
CORES = "REMIXMATCH_CORES"

_KINDS = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "words"),
}


def flag_of(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def flag_with_value(name: str, value: Any) -> list[str]:
    """Return the words of a command line that give a value to a field."""
    if isinstance(value, bool):
        return [flag_of(name if value else f"no-{name}")]
    return [flag_of(name), *map(str, value if isinstance(value, tuple) else (value,))]


def choices(hint: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, which may be optional; () for any other type."""
    hint = _without_none(hint)
    return get_args(hint) if get_origin(hint) is Literal else ()


def allowed(hint: Any) -> str:
    """Describe the values of a type: "an integer", "one of a, b"."""
    hint = _without_none(hint)
    if choices(hint):
        return f"one of {', '.join(map(str, choices(hint)))}"
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        count = "" if rest == [...] else f"{1 + len(rest)} "
        return f"{count}{_KINDS.get(first, ('', 'paths'))[1]}"
    return _KINDS.get(hint, ("a path", ""))[0]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(each for each in get_args(hint) if each is not type(None))
    return hint


def must_be(name: str, hint: Any, given: str, quoted: bool = True) -> str:
    """Describe a value that is not allowed: "--mode must be one of eager, compile; got 'egaer'; did you mean eager?".

    Args:
        name: The field or flag.
        hint: Its type.
        given: The value as text.
        quoted: Whether the value is text, which is shown in quotes.
    """
    text = _shortened(printable(given))
    text = f"'{text}'" if quoted else text
    if not choices(hint):
        return f"{name} must be {allowed(hint)}, got {text}"
    # Short words are all alike: gpu is meant as cuda, but is near to cpu.
    near = nearest_hint(given, map(str, choices(hint))) if quoted and len(given) > 3 else ""
    return f"{name} must be {allowed(hint)}; got {text}{near}"


def convert(name: str, hint: Any, value: Any) -> Any:
    """Convert a value to the type of a field.

    An integer stands for a float, a list or array for a tuple, a path for text, and numpy's scalars for Python's. No
    text stands for a number, and neither True nor False does.

    Args:
        name: The field, for the message.
        hint: Its type.
        value: The value.

    Raises:
        TypeError: The value has another type, or is not one of the allowed ones. The message says so in one line.
    """
    try:
        converted = _convert(hint, value)
    except OverflowError:  # An integer that is larger than any float.
        converted = None
    if converted is None:
        raise TypeError(must_be(name, hint, value if isinstance(value, str) else shown(value), isinstance(value, str)))
    return converted


def shown(value: Any) -> str:
    """Return a value in one short line."""
    try:
        return _shortened(" ".join(repr(value).split()))
    except ValueError:  # Python does not write integers of more than 4300 digits.
        return "a number of thousands of digits"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_scalar(value: Any) -> bool:
    """Whether it is a scalar of numpy or torch, or an array without dimensions."""
    return getattr(value, "shape", None) == () and hasattr(value, "item")


def _convert(hint: Any, value: Any) -> Any:
    """Return the converted value, or None if it is not allowed."""
    value = value.item() if _is_scalar(value) else value
    if choices(hint):
        return next((each for each in choices(hint) if type(each) is type(value) and each == value), None)
    if get_origin(hint) is tuple:
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list | tuple):
            return None
        items = [_convert(get_args(hint)[0], each) for each in values]
        return None if None in items else tuple(items)
    return _PLAIN[hint](value)


def _number(value: Any, kind: Any, make: Callable[[Any], Any]) -> Any:
    return make(value) if isinstance(value, kind) and not isinstance(value, bool) else None


_PLAIN: Mapping[Any, Callable[[Any], Any]] = {
    bool: lambda value: value if isinstance(value, bool) else None,
    int: lambda value: _number(value, numbers.Integral, operator.index),
    float: lambda value: _number(value, numbers.Real, float),
    str: lambda value: os.fspath(value) if isinstance(value, str | os.PathLike) else None,
}
