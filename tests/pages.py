"""Commands, Python examples and inline code of the README and the pages of docs/."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _load_hooks():
    """Load docs/hooks.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Needed by dataclasses.
    spec.loader.exec_module(module)
    return module


hooks = _load_hooks()

# The README comes first, since other pages use its run `runs/one`.
PATHS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "measurements").glob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}


def blocks(text):
    """Return the code blocks as (language, code)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def lines():
    """Return the lines of all code blocks without a language, joining lines continued by a backslash."""
    code = "\n".join(code for text in TEXTS.values() for language, code in blocks(text) if not language)
    return code.replace("\\\n", " ").splitlines()


def commands():
    """Return the `remixmatch` commands in order, without duplicates and comments."""
    found = [shlex.split(line, comments=True) for line in lines() if line.startswith("remixmatch ")]
    return [command for number, command in enumerate(found) if command not in found[:number]]


def examples():
    """Return the Python examples that run as they are: code blocks that do not quote the source.

    Code that needs the reader's own data is marked as `py` instead of `python`.
    """
    quoted = {quote.code for text in TEXTS.values() for quote in hooks.quotes(text)}
    python = [code for text in TEXTS.values() for language, code in blocks(text) if language == "python"]
    return [code for code in python if code not in quoted]


def inline():
    """Return inline code outside code blocks and comments."""
    hidden = re.compile(r"^```.*?^```$|<!--.*?-->", re.DOTALL | re.MULTILINE)
    outside = [hidden.sub("", text) for text in TEXTS.values()]
    return [code for text in outside for code in re.findall(r"`([^`\n]+)`", text)]


def agrees(text, value):
    """Return whether a number, as printed, is a value rounded to its decimals."""
    return abs(float(text) - value) <= 0.5 * 10 ** -len(text.partition(".")[2]) + 1e-9
