"""Configurations in and out as YAML: `--config FILE` and `--print-config`.

YAML types are taken from the fields and not guessed from the text, since YAML 1.1 reads `1e-3` as text, `no` as false
and `010` as 8. Quoted text stands for text alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from engine.config.config import SECTIONS, Config, convert_fields, field_types
from engine.config.methods import METHODS
from engine.config.presets import preset
from engine.errors import UserError, printable, unknown

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_config(path: Path) -> dict[str, Any]:
    """Read fields of a configuration from a YAML or JSON file, such as the config.json of a run.

    Args:
        path: The file, the folder of a run, or "-" for standard input. Names of fields may be written with hyphens, as
            flags are.

    Returns:
        Values of the fields that the file contains.

    Raises:
        UserError: It cannot be read, a name is no field or occurs twice, or a value is not allowed.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        with open(0 if str(path) == "-" else path, encoding="utf-8-sig", closefd=str(path) != "-") as file:
            values = convert_fields(_fields(file.read()))
        if "preset" in values:
            preset(values["preset"])
        if "method" in values and values["method"] not in METHODS:
            raise unknown("method", values["method"], METHODS)
        return values
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--config {path} cannot be read ({reason})") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"--config {path}{line}: not YAML ({error.problem or error.context})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _fields(text: str) -> dict[str, Any]:
    """Return the entries of a YAML mapping, with plain words converted according to the field that they belong to."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except UserError:
        raise
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return values
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError("must map names of fields to values, such as 'steps: 1000'")
    found: dict[str, Any] = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"line {key.start_mark.line + 1} has a list or a mapping where the name of a field belongs")
        name = str(key.value).replace("-", "_")
        if name in found:
            raise UserError(f"line {key.start_mark.line + 1} gives {printable(name)} again")
        found[name] = _value(name, field_types().get(name), node)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object, with names as fields are written; raise UserError if two are equal."""
    found: dict[str, Any] = {}
    for given, value in pairs:
        name = given.replace("-", "_")
        if name in found:
            raise UserError(f"gives {printable(name)} again")
        found[name] = value
    return found


def _value(name: str, hint: Any, node: yaml.Node) -> Any:
    """Return the value of a node: a plain word is read as its field's type, everything else is kept for the check."""
    if isinstance(node, yaml.SequenceNode):
        item = get_args(hint)[0] if get_origin(hint) is tuple else None
        # Lists in lists are never allowed, and a file can nest them without end.
        return [[] if isinstance(each, yaml.SequenceNode) else _value(name, item, each) for each in node.value]
    if isinstance(node, yaml.MappingNode):
        return {}
    text = str(node.value)
    if node.style is not None:
        return text
    if text in ("", "~", "null"):
        return None
    if hint is bool:
        return _BOOLS.get(text.lower(), text)
    kind = hint if hint in (int, float) else type(get_args(hint)[0]) if get_args(hint) else str
    if kind not in (int, float):
        return text
    if re.fullmatch(r"[+-]?0[0-9_]+", text):
        raise UserError(f"{name} must not begin with 0, which some YAML readers take for octal; got {text[:80]}")
    if re.fullmatch(r"[+-]?0[xob]\w*", text, re.IGNORECASE):
        raise UserError(f"{name} must be a decimal number, got {text[:80]}")
    if kind is float and re.fullmatch(r"[+-]?\.(inf|nan)", text, re.IGNORECASE):
        text = text.replace(".", "")  # YAML's words for them.
    try:
        return kind(text)
    except ValueError:
        return text


def config_yaml(config: Config, sources: Mapping[str, str]) -> str:
    """Return a configuration as YAML that `read_config` reads, each value with its source as a comment.

    Args:
        config: The configuration.
        sources: Where the value of each field comes from.
    """
    lines = []
    for section in ("", *SECTIONS):
        lines += [f"\n# {section}"] if section else []
        for field in dataclasses.fields(Config):
            if field.metadata.get("section", "") == section:
                source = f"  # {printable(sources[field.name])}" if field.name in sources else ""
                lines.append(f"{field.name}: {_inline(getattr(config, field.name))}{source}")
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    # A list keeps the dumper from ending the document after a single word.
    items = list(value) if isinstance(value, tuple) else [value]
    text = yaml.safe_dump(items, default_flow_style=True, width=math.inf, allow_unicode=True).strip()
    return text if isinstance(value, tuple) else text[1:-1]
