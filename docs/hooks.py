"""mkdocs hooks for the site: equations, quotes of the source, and links to files outside docs/.

GitHub renders the same Markdown, so the conventions are GitHub's:

- Equations are LaTeX in ```math blocks, or inline in $`...`$. Here they become MathML, which browsers render natively.
- Links to other files of the repository are relative to the page. Here a file outside docs/ gets its own page, with
  line numbers if it is source; data and images are copied.
- A quote of the source is a ```python block below a line that names file and function. The build adds the line numbers,
  and fails if the function no longer has these lines.
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
log = logging.getLogger("mkdocs.hooks.docs")  # Warnings of mkdocs loggers fail a strict build.

# Files outside docs/ because GitHub and packages expect them there, and their names in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCE = "source"  # Folder of the pages that show source files.
LANGUAGES = {".py": "python", ".sh": "bash", ".cpp": "cpp", ".toml": "toml", ".yml": "yaml", ".json": "json"}
COPIED = (".jsonl", ".png")

_CODE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_TARGET = re.compile(r"(?<=\]\()(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_INLINE_MATH = re.compile(r"\$<code>([^<]+)</code>\$")  # Markdown's output for $`...`$.
_QUOTE = re.compile(
    r"^\[`(?P<path>[^`]+)`\]\((?P<link>[^)]+)\), `(?P<name>[\w.]+)`:\n\n```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Quote:
    """Source lines quoted by a page.

    Attributes:
        path: Path of the file in the repository.
        name: Qualified name of the function, class or method that contains them, or of the variable they assign.
        code: The lines, without their common indentation.
    """

    path: str
    name: str
    code: str


def quotes(markdown: str) -> list[Quote]:
    """Return the quotes of a page, in order."""
    return [Quote(found["path"], found["name"], found["code"]) for found in _QUOTE.finditer(markdown)]


def find(quote: Quote) -> tuple[int, int]:
    """Return the first and the last line number of a quote in its file, counted from 1.

    Raises:
        ValueError: The file does not contain the function, or the function does not contain the lines.
    """
    text = (ROOT / quote.path).read_text(encoding="utf-8")
    first, last = _span(ast.parse(text), quote)
    lines, wanted = text.splitlines(), quote.code.rstrip("\n").splitlines()
    for start in range(first - 1, last - len(wanted) + 1):
        if textwrap.dedent("\n".join(lines[start : start + len(wanted)])).splitlines() == wanted:
            return start + 1, start + len(wanted)
    raise ValueError(
        f"{quote.name} in {quote.path} (lines {first} to {last}) no longer contains the lines that the page quotes, "
        f"beginning with '{wanted[0]}'; update the quote and check the text around it"
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
    """Apply a change to a page, except to code blocks and inline code."""
    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def targets(markdown: str) -> Iterator[str]:
    """Return the files that a page links to, as written in its links."""
    found: list[str] = []
    outside_code(markdown, lambda text: found.extend(m["path"] for m in _TARGET.finditer(text)) or text)
    return (path for path in found if not _external(path))


def _external(path: str) -> bool:
    return "://" in path or path.startswith("mailto:")


def in_repository(page: str, target: str) -> str:
    """Return the path of a link's target; page and target are paths in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def in_site(path: str) -> str:
    """Return the name of a file of the repository in the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{SOURCE}/{path}" if path.endswith(COPIED) else f"{SOURCE}/{path}.md"


def math(latex: str, display: str = "block") -> str:
    """Convert LaTeX to MathML."""
    from latex2mathml.converter import convert

    # latex2mathml renders \sim as the ASCII tilde, which is too high.
    return convert(latex.strip(), display=display).replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")


def _math_fence(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{math(source)}</div>'


def _of_page(src_uri: str) -> str:
    names = {site: path for path, site in PAGES.items()}
    return names.get(src_uri, f"docs/{src_uri}")


# Hooks that mkdocs calls


def on_config(config: Any) -> Any:
    """Convert ```math blocks to MathML."""
    fences = [{"name": "math", "class": "math", "format": _math_fence}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/, and the files there that pages link to."""
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
    """Check quotes, add their line numbers, and rewrite links for the site."""
    if page.file.src_uri.startswith(f"{SOURCE}/"):
        return markdown
    path = _of_page(page.file.src_uri)
    above = posixpath.dirname(page.file.src_uri)

    def in_site_from_here(found: re.Match[str]) -> str:
        if _external(found["path"]):
            return found.group()
        target = in_repository(path, found["path"])
        if not (ROOT / target).is_file():
            log.warning(f"{path} links to {found['path']}, which is not a file of the repository")
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
    """Convert inline equations to MathML, after Markdown, which would otherwise treat them as blocks."""
    return _INLINE_MATH.sub(lambda found: math(html.unescape(found[1]), "inline"), content)
