"""The pages of docs/ and their site: it builds without a warning, needs no other host, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from bench import registry
from engine.commands.main import COMMANDS
from tests.pages import ROOT, TEXTS, blocks, hooks, inline, lines

SHOWN = ("Step", "guess_labels_reference", "bin_probabilities", "update_weights", "make_plan")
SHOWN += ("assemble_batch_reference",)


# Attributes that a browser fetches automatically, by element.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}
OVERVIEW = "docs/measurements/index.md"
QUOTES = [quote for text in TEXTS.values() for quote in hooks.quotes(text)]


class Page(HTMLParser):
    """What a page of the site loads, where its links lead, and what can be linked to in it."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.anchors, self.classes, self.equations = [], [], {""}, set(), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self.classes |= set((given.get("class") or "").split())
        self.equations += tag == "math" and given["display"] == "block"
        if given.get(FETCHED.get(tag)):
            self.loads.append(given[FETCHED[tag]])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # with --quiet mkdocs counts no warnings, and --strict has no effect
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (done.stdout + done.stderr).splitlines()
    assert all(line.startswith("INFO") for line in said), said
    return folder


def test_the_site_loads_nothing_from_other_hosts(site):
    for path in site.rglob("*.html"):
        page = Page(path)
        assert page.loads, path
        assert not [url for url in page.loads if urlsplit(url).scheme or url.startswith("//")], path
        assert "mermaid" not in page.classes, "the theme fetches what draws these diagrams from another host"
    for path in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import\s*)[\"']?(https?:|//)", path.read_text(encoding="utf-8"))
        assert not urls, path


def test_every_link_leads_somewhere(site):
    found = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > len(TEXTS)
    for path, page in found.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if target in found:
                assert unquote(parts.fragment) in found[target].anchors, f"{path.name}: {link}"


def test_ten_equations_stand_next_to_their_code(site):
    text = TEXTS["docs/method.md"]
    sections = re.split(r"^## (\d+)\. .*$", text, flags=re.M)[1:]
    assert sections[::2] == [str(number) for number in range(1, 11)]
    for section in sections[1::2]:
        assert [language for language, _ in blocks(section)].count("math") == 1
        assert hooks.quotes(section)
    page = Page(site / "method.html")
    assert page.equations == 10
    assert "$`" not in (site / "method.html").read_text() and "$<code>" not in (site / "method.html").read_text()
    names = {quote.name.split(".")[0] for quote in hooks.quotes(text)}
    assert names >= set(SHOWN)


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: f"{quote.path}-{quote.name}")
def test_the_source_still_has_what_a_page_quotes(quote):
    first, last = hooks.find(quote)
    assert last - first + 1 == len(quote.code.splitlines())


def test_every_block_of_python_in_the_method_is_a_quote():
    text = TEXTS["docs/method.md"]
    python = [code for language, code in blocks(text) if language == "python"]
    assert python == [quote.code for quote in hooks.quotes(text)]


def test_a_quote_that_is_not_in_the_source_fails():
    quote = hooks.Quote("kernels/guess.py", "guess_labels_reference", "return (log_q / temperature).softmax(dim=1)\n")
    assert hooks.find(quote)
    for changed in (
        {"code": "return (log_q * temperature).softmax(dim=1)\n"},
        {"name": "guess_labels"},  # another function of the file
        {"code": "# Each of two lines is there.\nreturn (log_q / temperature).softmax(dim=1)\n"},
    ):
        with pytest.raises(ValueError, match="no longer contains the lines"):
            hooks.find(hooks.Quote(**vars(quote) | changed))
    with pytest.raises(ValueError, match="has no guessing"):
        hooks.find(hooks.Quote("kernels/guess.py", "guessing", "x\n"))


def test_a_link_to_no_file_is_a_warning(caplog):
    class File:
        src_uri = "quick-start.md"

    class Shown:
        file = File

    text = "[a](gpus.md) [b](../engine/training/step.py) [c](../engine/stop.py) `[d](no.md)`\n"
    made = hooks.on_page_markdown(text, Shown, None, None)
    assert made.startswith("[a](gpus.md) [b](source/engine/training/step.py.md)") and made.endswith("`[d](no.md)`\n")
    (record,) = caplog.records
    assert record.name.startswith("mkdocs.") and "docs/quick-start.md links to ../engine/stop.py" in record.message


def test_commands_in_the_text_exist():
    for code in inline():
        words = code.split()
        if words[0] == "remixmatch" and len(words) > 1:
            assert words[1] in COMMANDS, code
            assert words[1] != "bench" or words[2] in registry.find(), code
        if words[:1] == ["bench"] and len(words) > 1:
            assert words[1] in registry.find(), code


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [code.split()[1] for code in [*inline(), *lines()] if re.match(r"make [a-z]", code)]
    assert set(named) >= {"run", "test", "docs", "lint"} and set(named) <= targets


def test_readme_is_a_two_minute_read():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 120
    assert "](docs/images/views.png)" in readme
    # Each page, but only the overview of a folder.
    expected = {page for page in TEXTS if page.startswith("docs/") and page.count("/") == 1} | {OVERVIEW}
    assert set(re.findall(r"\]\((docs/[\w/-]+\.md)", readme)) == expected


def test_the_overview_of_measurements_links_to_every_page():
    folder = OVERVIEW.rpartition("/")[0]
    linked = re.findall(r"^\| \[[^]]+\]\(([\w-]+\.md)\) \|", TEXTS[OVERVIEW], re.MULTILINE)
    assert {f"{folder}/{page}" for page in linked} == {page for page in TEXTS if page.startswith(folder)} - {OVERVIEW}
    for page in linked:
        assert page == "log.md" or re.match(r"# .+\n\n\*\*Conclusion", TEXTS[f"{folder}/{page}"]), page


def test_the_menu_has_every_page_of_measurements():
    menu = re.findall(r"^ +- [^:]+: (measurements/[\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in menu) == sorted(page for page in TEXTS if "/measurements/" in page)


def test_log_of_measurements_is_newest_first():
    dates = re.findall(r"^## (.+)$", TEXTS["docs/measurements/log.md"], re.MULTILINE)
    assert dates == sorted(set(dates), reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)


def test_numbers_in_readme_are_also_in_the_results():
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+", TEXTS["README.md"])
    assert len(numbers) >= 12
    assert not [number for number in numbers if number not in TEXTS["docs/results.md"]]
