"""A deny-list for everything a person reads: `python -m tests.prose` prints every hit and fails if there is one.

It reads comments, strings, docstrings and test names in Python files, and all of every other tracked text file.
codespell checks the spelling, ruff the form of docstrings.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Phrases that readers stumble over (regular expressions; a space matches any white space), and what to write instead.
DENIED = {
    r"told": "significant (statistics); reported, printed (messages); distinguished",
    r"(goes|gone|go|going|went) on with|begun with": "resume, continue, started with",
    r"as it is": "baseline, unchanged",
    r"by (the )?rule": "by heuristic",
    r"in turns": "interleaved, alternating",
    r"so many": "N, or a number",
    r"beside": "alongside, compared with, next to",
    r"twins?": "reference implementation",
    r"mend(s|ed|ing)?": "fix",
    r"points (more|less|fewer)": "difference in error, pp",
    r"brings? (the )?most|what \w+ brings": "the largest contribution, the benefit",
    r"for no time": "at no measurable cost",
    r"whose time (is|was) over|that (is|was) over": "which timed out",
    r"of which the|of whom|by which": "a clause with its own subject, or two sentences",
    r"what of": "which of",
    r"(taken|thing|with|or|done) otherwise": "changed",
    r"nobody|somebody|whoever": "the subject: a user, another process, nothing",
    r"mistakes? of (yours|theirs|the user's|a user)": "invalid input",
    r"there (is|are) no such \w+[,;.:]": "unknown X; choose from ...",
    r"there are (?=\{)": "choose from ...",
    r"a (thread|process) of its own": "its own thread",
    r"rows? of (views|the network)": "views, samples",
}

# (file, phrase, reason why it is right there), the first two as regular expressions.
ALLOWED = [
    (r"tests/(test_)?prose\.py", r".*", "the list itself and its test"),
    (r"bench/(step/variants\.py|measure_gpu\.sh)|tests/test_measurements\.py", r"by rule", "a name in recorded rows"),
    (r"(bench|tests)/.*", r"beside", "a key of recorded rows"),
    (r"pipelines/data/folder\.py", r"twins", "a key of cache.json"),
]

_TEXT = {".py", ".md", ".sh", ".yml", ".yaml", ".toml", ".txt", ".js", ".css", ".html", ".cpp", ".h", ".cu", ".sbatch"}
_SKIPPED = re.compile(r"^(bench/results/|constraints\.txt)")
_DENIED = {
    re.compile(rf"\b(?:{phrase.replace(' ', chr(92) + 's+')})(?!\w)", re.I): instead
    for phrase, instead in DENIED.items()
}


class _Strings(ast.NodeVisitor):
    """Collects (line number, text) of strings and of the names of tests; fields of f-strings become `{}`."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.append((node.lineno, node.value))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
        self.found.append((node.lineno, "".join(parts)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name.startswith("test_"):
            self.found.append((node.lineno, node.name.replace("_", " ")))
        self.generic_visit(node)


def texts(path: str, content: str) -> list[tuple[int, str]]:
    """Return (line number, text) for each part of a file that a person reads."""
    if not path.endswith(".py"):
        return [(1, content)]
    strings = _Strings()
    strings.visit(ast.parse(content))
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            text, line = token.string.lstrip("#! "), token.start[0]
            if comments and comments[-1][0] + comments[-1][1].count("\n") + 1 == line:
                comments[-1] = comments[-1][0], f"{comments[-1][1]}\n{text}"  # A comment of several lines is one text.
            else:
                comments.append((line, text))
    return strings.found + comments


def hits(path: str, content: str) -> Iterator[str]:
    """Yield one line for each denied phrase in a file."""
    allowed = [re.compile(phrase, re.I) for file, phrase, _ in ALLOWED if re.fullmatch(file, path)]
    for first, text in texts(path, content):
        for pattern, instead in _DENIED.items():
            for match in pattern.finditer(text):
                phrase = " ".join(match[0].split())
                if not any(each.fullmatch(phrase) for each in allowed):
                    yield f"{path}:{first + text.count(chr(10), 0, match.start())}: '{phrase}'; write: {instead}"


def main() -> int:
    """Check every tracked text file and return the exit code."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [
        hit
        for path in listed.splitlines()
        if (Path(path).suffix in _TEXT or Path(path).name == "Makefile") and not _SKIPPED.match(path)
        for hit in hits(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    print("\n".join([*found, f"{len(found)} denied phrases"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
