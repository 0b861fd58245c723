"""Pages of `remixmatch report` in a real browser: Debian's chromium, driven by playwright without a download."""

import re

import pytest

from bench.runs import opening
from engine.measuring import records
from engine.measuring.process import output
from engine.report import page, reading
from tests.engine.report.report_runs import make_run, make_table

if problem := opening.missing():
    pytest.skip(f"needs {problem}", allow_module_level=True)

HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "plain")
SCHEMES, WIDTHS = ("light", "dark"), (360, 1400)


@pytest.fixture(scope="module")
def browser():
    with opening.launch() as found:
        yield found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The page of one run with a profile and hostile names."""
    run = make_run(tmp_path_factory.mktemp("one") / "run", classes=HOSTILE)
    (run / "profile.json").write_text('{"ranges": {"<b>forward": {"share": 0.6}, "views": {"share": 0.4}}}')
    (run / "report.html").write_text(page.render(reading.read([run]), title="<script>alert(3)</script>"))
    return run / "report.html"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The page of a folder of reproduce."""
    folder = make_table(tmp_path_factory.mktemp("several") / "table", ("remixmatch", "fixmatch", "supervised"))
    (folder / "report.html").write_text(page.render(reading.read([folder])))
    return folder / "report.html"


class Opened:
    """A page in its own window, with its console messages, errors, dialogs and requests."""

    def __init__(self, browser, path, scheme="light", width=1400, fragment=""):
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.trouble, self.requests = [], []
        self.page.on("console", lambda said: self.trouble.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{path}{fragment}")
        opening.wait_until_drawn(self.page)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def plots(self):
        """Return label, number of visible marks, overflow and so on of each visible chart."""
        return self.page.evaluate("""() =>
            [...document.querySelectorAll(".plot")].filter(p => !p.closest("details:not([open])")).map(p => {
                const marks = [...p.querySelectorAll(".role-mark path, .role-mark line, .role-mark text")];
                const svg = p.querySelector("svg"), outside = svg && svg.getBoundingClientRect().right
                    - p.closest("figure").getBoundingClientRect().right;
                const seen = m => { const box = m.getBoundingClientRect(); return box.width + box.height > 1; };
                return {label: p.ariaLabel, role: p.getAttribute("role"), marks: marks.filter(seen).length, outside,
                        drawn: p.dataset.drawn, height: svg && svg.getBoundingClientRect().height};
            })""")

    def check(self):
        """Assert that there were no errors, all charts and images are drawn, and nothing is wider than the window."""
        assert self.trouble == []
        assert {url.split(":")[0] for url in self.requests} <= {"file", "data"} and len(self.requests) >= 1
        assert [url for url in self.requests if url.startswith("file:")] == self.requests[:1]
        for each in self.plots():
            assert each["drawn"] == "yes" and each["marks"] > 0 and each["height"] > 60, each
            assert each["outside"] <= 0, each
            assert each["role"] == "img" and "Vega" not in each["label"] and len(each["label"]) > 20, each
        missing = self.page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        assert missing == 0
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_run(browser, one, scheme, width):
    with Opened(browser, one, scheme, width) as opened:
        opened.check()
        assert len(opened.plots()) == 13
        assert opened.page.text_content("h1") == "<script>alert(3)</script>"
        background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        texts = opened.page.evaluate("""() => [...document.querySelectorAll(".role-axis-label text, .weak_marks text")]
            .map(t => getComputedStyle(t).fill)""")
        assert len(texts) > 20
        for color in [background, *texts]:
            dark = sum(map(int, re.findall(r"\d+", color)[:3])) < 3 * 128
            assert dark == ((scheme == "dark") == (color == background)), color


@pytest.mark.parametrize("width", WIDTHS)
def test_several_runs(browser, several, width):
    """A run's charts are drawn when it is opened by a click or a link."""
    with Opened(browser, several, "light", width) as opened:
        opened.check()
        before = len(opened.plots())
        assert before == 9
        opened.page.click("td.first a >> text=fixmatch seed 1")
        opened.page.wait_for_selector("details.run[open] section:nth-of-type(5) .plot[data-drawn=yes] >> nth=1")
        assert opened.page.evaluate("document.querySelector('details.run[open] h3').textContent") == "fixmatch seed 1"
        assert len(opened.plots()) > before + 8
        opened.check()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_no_serious_problems(browser, one, several, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    # Only color rules depend on the scheme.
    options = {"runOnly": ["color-contrast"]} if scheme == "dark" else {"resultTypes": ["violations"]}
    for path, fragment in ((one, ""), (several, "#run-0")):
        with Opened(browser, path, scheme, 1400, fragment) as opened:
            opened.page.evaluate(
                "document.querySelector('details.data').open = true"
            )  # all others have the same markup
            opened.page.wait_for_function("!document.querySelector('details[open] .plot:not([data-drawn=yes])')")
            # Assistive technology ignores the content of charts.
            response = axe.run(opened.page, {"exclude": [[".plot > div"]]}, options).response
            serious = {each["id"]: [node["html"][:200] for node in each["nodes"][:3]] for each in response["violations"]
                       if each["impact"] in ("serious", "critical")}  # fmt: skip
            assert serious == {}
            assert [each for each in response["passes"] if each["id"] == "color-contrast"]


def test_keyboard_navigation(browser, one):
    """The skip link, the sections and the chart data are reachable, and the focus is visible."""
    with Opened(browser, one) as opened:
        keys, seen = opened.page.keyboard, []
        for _ in range(12):
            keys.press("Tab")
            seen.append(
                opened.page.evaluate("""() => {
                const at = document.activeElement, style = getComputedStyle(at);
                return [at.tagName, at.textContent.trim().slice(0, 30), style.outlineStyle,
                        at.getBoundingClientRect().left];
            }""")
            )
        assert seen[0][1] == "Skip to content" and seen[0][3] >= 0
        assert [each[0] for each in seen[1:9]] == ["A"] * 8 and seen[9][:2] == ["SUMMARY", "Data of Test accuracy"]
        assert all(each[2] == "solid" for each in seen)
        keys.press("Shift+Tab"), keys.press("Shift+Tab"), keys.press("Enter")
        assert opened.page.evaluate("document.activeElement.closest('details').open")
        assert opened.page.is_visible("text=94")


def test_print_is_dark_on_white_in_any_scheme(browser, one):
    with Opened(browser, one, "dark") as opened:
        opened.page.emulate_media(media="print")
        colors = opened.page.evaluate("""() => [getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector(".role-axis-label text")).fill]""")
        assert colors == ["rgb(255, 255, 255)", "rgb(68, 68, 68)"]
        assert not opened.page.is_visible("nav") and not opened.page.is_visible("details.data")
        assert len(opened.page.pdf()) > 20_000


def test_data_and_images_work_without_scripts(browser, one):
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(f"file://{one}")
    assert shown.is_visible("noscript p") and shown.is_visible("img >> nth=0")
    shown.click("text=Data of Test accuracy")
    assert shown.is_visible("td >> text=95")
    context.close()


def test_the_opening_benchmark_writes_a_record(tmp_path):
    """It runs in its own process, since playwright allows one browser at a time."""
    run = make_run(tmp_path / "run")
    said = output("engine", "bench", "opening", str(run), "--out", str(tmp_path / "rows"), "--repeats", "1")
    assert "drawing at 1 400 pixels, s: " in said and "drawing at 360 pixels, s: " in said
    (row,) = records.read(tmp_path / "rows")
    assert row["runs"] == 1 and 0.5 < row["megabytes"] < 5 and row["browser"].startswith("chromium ")
    assert min(row["desk_seconds"], row["phone_seconds"], row["write_seconds"]) > 0
    assert not (run / "report.html").exists()
