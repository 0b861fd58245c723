"""README and the pages of docs/, as tests read them: their commands, their examples in Python, their words of code."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _load_hooks():
    """docs/hooks.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


hooks = _load_hooks()

# README first, whose run `runs/one` others use
PATHS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "measurements").glob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}


def blocks(text):
    """Blocks of code, with the language of each: (language, code)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def lines():
    """Lines of all blocks of code without a language, those that go on behind a backslash as one."""
    code = "\n".join(code for text in TEXTS.values() for language, code in blocks(text) if not language)
    return code.replace("\\\n", " ").splitlines()


def commands():
    """The commands that begin with `remixmatch`, in their order, each once, without comments."""
    found = [shlex.split(line, comments=True) for line in lines() if line.startswith("remixmatch ")]
    return [command for number, command in enumerate(found) if command not in found[:number]]


def examples():
    """Examples in Python: blocks that are no quotes of the source."""
    quoted = {quote.code for text in TEXTS.values() for quote in hooks.quotes(text)}
    python = [code for text in TEXTS.values() for language, code in blocks(text) if language == "python"]
    return [code for code in python if code not in quoted]


def inline():
    """Code in the text, beside blocks and comments."""
    hidden = re.compile(r"^```.*?^```$|<!--.*?-->", re.DOTALL | re.MULTILINE)
    outside = [hidden.sub("", text) for text in TEXTS.values()]
    return [code for text in outside for code in re.findall(r"`([^`\n]+)`", text)]
