"""What the site's pages need beyond mkdocs: equations, quotes of the source, links to files outside docs/.

The same Markdown is read on GitHub, so its conventions are GitHub's:

- Equations are LaTeX in blocks of ```math, or inline in $`...`$. They become MathML here, which browsers show by
  themselves.
- Links to other files of the repository are relative to the page. Those outside docs/ get a page of their own here,
  with line numbers if they are source; data and pictures are copied.
- A quote of the source is a block of ```python below a line that names the file and the function. The build fails where
  the function no longer has these lines, and the line says where in the file they are.
"""

from __future__ import annotations

import ast
import html
import logging
import posixpath
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
log = logging.getLogger("mkdocs.hooks.docs")  # warnings of mkdocs' loggers end a strict build

# files that GitHub and packages look for elsewhere, and what they are called in the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCE = "source"  # folder of the pages that show source files
LANGUAGES = {".py": "python", ".sh": "bash", ".cpp": "cpp", ".toml": "toml", ".yml": "yaml", ".json": "json"}
COPIED = (".jsonl", ".png")

_CODE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_TARGET = re.compile(r"(?<=\]\()(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_INLINE_MATH = re.compile(r"\$<code>([^<]+)</code>\$")  # what Markdown makes of $`...`$
_QUOTE = re.compile(
    r"^\[`(?P<path>[^`]+)`\]\((?P<link>[^)]+)\), `(?P<name>[\w.]+)`:\n\n```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Quote:
    """Lines of the source that a page shows.

    Attributes:
        path: of the file, from the repository's root.
        name: of the function, class or method that has them, or of the variable that a module assigns.
        code: the lines, without the indentation that all of them have.
    """

    path: str
    name: str
    code: str


def quotes(markdown: str) -> list[Quote]:
    """The quotes of a page, in their order."""
    return [Quote(found["path"], found["name"], found["code"]) for found in _QUOTE.finditer(markdown)]


def find(quote: Quote) -> tuple[int, int]:
    """The first and the last line of a quote in its file, counted from 1.

    Raises:
        ValueError: the file has no such function, or that has not these lines, one after another.
    """
    text = (ROOT / quote.path).read_text(encoding="utf-8")
    first, last = _span(ast.parse(text), quote)
    lines, wanted = text.splitlines(), quote.code.rstrip("\n").splitlines()
    for start in range(first - 1, last - len(wanted) + 1):
        if textwrap.dedent("\n".join(lines[start : start + len(wanted)])).splitlines() == wanted:
            return start + 1, start + len(wanted)
    raise ValueError(
        f"{quote.name} in {quote.path} (lines {first} to {last}) has no longer the lines that the page quotes, "
        f"beginning with '{wanted[0]}': quote them anew, and see whether the text beside them is still true"
    )


def _span(tree: ast.AST, quote: Quote) -> tuple[int, int]:
    node: Any = tree
    for name in quote.name.split("."):
        inside = [child for child in node.body if name in _names(child)]
        if not inside:
            raise ValueError(f"{quote.path} has no {quote.name}")
        node = inside[-1]
    return node.lineno, node.end_lineno


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """A page with something changed everywhere but in code, in blocks or inline."""
    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def targets(markdown: str) -> Iterator[str]:
    """The files that a page links to, as it names them."""
    found: list[str] = []
    outside_code(markdown, lambda text: found.extend(m["path"] for m in _TARGET.finditer(text)) or text)
    return (path for path in found if not _external(path))


def _external(path: str) -> bool:
    return "://" in path or path.startswith("mailto:")


def in_repository(page: str, target: str) -> str:
    """Where a link of a page leads: both from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def in_site(path: str) -> str:
    """What a file of the repository is called among the site's files."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{SOURCE}/{path}" if path.endswith(COPIED) else f"{SOURCE}/{path}.md"


def math(latex: str, display: str = "block") -> str:
    """LaTeX as MathML."""
    from latex2mathml.converter import convert

    # it takes \sim for the tilde of ASCII, which stands too high
    return convert(latex.strip(), display=display).replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")


def _math_fence(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{math(source)}</div>'


def _of_page(src_uri: str) -> str:
    names = {site: path for path, site in PAGES.items()}
    return names.get(src_uri, f"docs/{src_uri}")


# What follows is called by mkdocs


def on_config(config: Any) -> Any:
    """Has blocks of ```math turned into MathML."""
    fences = [{"name": "math", "class": "math", "format": _math_fence}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside docs/, and whatever pages link to there."""
    from mkdocs.structure.files import File, InclusionLevel

    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    linked = {
        in_repository(_of_page(file.src_uri), target)
        for file in files.documentation_pages()
        for target in targets(file.content_string)
    }
    for path in sorted(linked):
        if path in PAGES or path.startswith("docs/") or not (ROOT / path).is_file():
            continue
        if path.endswith(COPIED):
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=2))
        fence = max(fence, "```", key=len)
        language = LANGUAGES.get(Path(path).suffix, "text")
        head = f"---\nhide: [toc]\nsearch:\n  exclude: true\n---\n\n# {path}\n"
        shown = f'{head}\n{fence}{language} linenums="1"\n{text}{fence}\n'
        files.append(File.generated(config, in_site(path), content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Checks quotes, says where they are, and turns links into the site's."""
    if page.file.src_uri.startswith(f"{SOURCE}/"):
        return markdown
    path = _of_page(page.file.src_uri)
    above = posixpath.dirname(page.file.src_uri)

    def in_site_from_here(found: re.Match[str]) -> str:
        if _external(found["path"]):
            return found.group()
        target = in_repository(path, found["path"])
        if not (ROOT / target).is_file():
            log.warning(f"{path} links to {found['path']}, which is no file of the repository")
        return posixpath.relpath(in_site(target), above or ".") + (found["anchor"] or "")

    def quote(found: re.Match[str]) -> str:
        try:
            first, last = find(Quote(found["path"], found["name"], found["code"]))
        except ValueError as error:
            log.warning(f"{path}: {error}")
            return found.group()
        url = posixpath.relpath(f"{SOURCE}/{found['path']}.html", above or ".") + f"#__codelineno-0-{first}"
        lines = f"line {first}" if first == last else f"lines {first} to {last}"
        head = f'<a href="{url}"><code>{html.escape(found["path"])}</code></a>, `{found["name"]}`, {lines}:'
        return f"{head}\n\n```python\n{found['code']}```"

    markdown = outside_code(markdown, lambda text: _TARGET.sub(in_site_from_here, text))
    return _QUOTE.sub(quote, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turns inline equations into MathML: earlier, Markdown would take them for blocks."""
    return _INLINE_MATH.sub(lambda found: math(html.unescape(found[1]), "inline"), content)
