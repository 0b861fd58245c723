"""Content of the pages of `remixmatch report`; test_pages_in_browser.py tests them in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from engine.errors import UserError
from engine.report import charts, command, page, reading
from tests.engine.report.report_runs import make_run, make_table

HOSTILE = ('<script>alert("1")</script>', "</script><img src=x onerror=alert(2)>", "a & 'b' {{ 7 * 7 }} \\ [0].x")


@pytest.fixture(autouse=True)
def short_library(monkeypatch):
    """Replace the browser library, which takes seconds to bundle."""
    monkeypatch.setattr(page, "library", lambda: "/* Vega */")


class Seen(HTMLParser):
    """Tags, text and scripts of a page, as a browser would parse them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts, self._inside = [], "", {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._inside = dict(attributes).get("id", f"script-{len(self.scripts)}")
            self.scripts[self._inside] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.scripts[self._inside] += data
        else:
            self.words += data

    def all(self, tag):
        return [attributes for each, attributes in self.tags if each == tag]


def data_of(spec):
    """Return the values of all data in a chart's specification."""
    inline = [spec, *spec.get("layer", ())]
    return [
        *spec.get("datasets", {}).values(),
        *(each["data"]["values"] for each in inline if "values" in each.get("data", {})),
    ]


def rendered(*paths, **options):
    return page.render(reading.read(paths), **options)


def report(tmp_path, *arguments):
    out = tmp_path / "page.html"
    command.main([*map(str, arguments), "--out", str(out)])
    return Seen(out.read_text(encoding="utf-8"))


def test_a_page_of_one_run_has_all_sections(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    command.main([str(run)])
    assert capsys.readouterr().out.startswith(f"{run}/report.html: 1 run, ")
    seen = Seen((run / "report.html").read_text(encoding="utf-8"))
    for words in (
        "Accuracy and losses", "Pseudo-labels over time", "hidden labels", "Calibration", "Classes over time",
        "CTAugment's bins", "Recall by class", "Confusion matrix", "Most confident errors", "Views",
        "remixmatch train digits-40 --steps 60 --eval-every 10 --log-every 2", "abc123", "def456", "2.15.0",
        "CPU, a machine", "0123456789ab", "94.00 %", "95.00 %", "1 min 15 s",
    ):  # fmt: skip
        assert words in seen.words, words
    plots = [each for each in seen.all("div") if "data-spec" in each]
    assert len(plots) == 12 and all(each["role"] == "img" and len(each["aria-label"]) > 20 for each in plots)
    for each in plots:
        assert json.loads(seen.scripts[each["data-spec"]])["width"] == "container"
    images = seen.all("img")
    assert len(images) == 24 + 3 * 4 and all(each["alt"] and each["src"].startswith("data:image/") for each in images)


def test_a_page_fetches_nothing(tmp_path):
    """No attribute contains an address to fetch, and the page's security policy forbids fetching."""
    seen = Seen(rendered(make_table(tmp_path / "table")))
    addresses = [each.get(name, "") for _, each in seen.tags for name in ("src", "href", "action", "srcset")]
    assert {re.sub(r"^(#|data:image/).*", r"\1", address) for address in addresses} == {"", "#", "data:image/"}
    policies = [each["content"] for each in seen.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")


def test_names_are_escaped(tmp_path):
    """Names of classes, folders, machines and so on cannot add tags, end scripts, or run as templates."""
    name = HOSTILE[0].replace("/", "")
    run = make_run(tmp_path / name, classes=HOSTILE)
    other = make_run(tmp_path / "other", classes=HOSTILE, seed=1)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"device": HOSTILE[1], "commit": HOSTILE[2]}))
    (run / "profile.json").write_text(json.dumps({"ranges": {HOSTILE[0]: {"share": 0.5}}}))
    for paths, harmless in (([run], [other]), ([run, other], [make_run(tmp_path / "plain"), other])):
        text = rendered(*paths, title=HOSTILE[0])
        seen, plain = Seen(text), Seen(rendered(*harmless))
        assert set(tag for tag, _ in seen.tags) == set(tag for tag, _ in plain.tags)
        assert not [each for _, each in seen.tags if any(key.startswith("on") for key in each)]
        assert all(each["src"].startswith("data:image/") for each in seen.all("img"))
        assert HOSTILE[0] in seen.words and HOSTILE[1] in seen.words and HOSTILE[2] in seen.words
        assert len(seen.all("script")) == len(re.findall("<script", text)) == len(re.findall("</script", text))
        for script, content in seen.scripts.items():
            if script.endswith("-spec"):
                json.loads(content)


def test_the_library_cannot_end_its_script(monkeypatch):
    monkeypatch.undo()
    page.library.cache_clear()
    monkeypatch.setattr(page.vl_convert, "javascript_bundle", lambda vl_version: "a</script>b<!--c")
    assert page.library() == "a<\\/script>b<\\!--c"
    page.library.cache_clear()


def test_an_unfinished_run(tmp_path):
    seen = report(tmp_path, make_run(tmp_path / "run", done=False))
    assert "step 30 of 60, not finished" in seen.words and "are written at the end of a run" in seen.words
    assert "Confusion matrix" not in seen.words and "CTAugment's bins" in seen.words


def test_a_run_that_was_given_more_steps_shows_no_earlier_end(tmp_path):
    """Its summary and predictions are those of an earlier last step, until the new one is reached."""
    run = make_run(tmp_path / "run", error=7.75)
    other = make_run(tmp_path / "other", seed=1, error=6.5)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": 100}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "test_accuracy": 93.5, "test_loss": 0.5}\n')
    seen = report(tmp_path, run)
    assert "step 70 of 100, not finished" in seen.words and "93.50 %" in seen.words
    assert "Confusion matrix" not in seen.words and "are written at the end of a run" in seen.words
    assert "92.25 %" not in seen.words and "91.25 %" not in seen.words
    found = reading.read([run, other])
    assert [each.done for each in found.runs] == [False, True] and page.differences(found.runs) == {}
    assert "not finished" in report(tmp_path, run, other).words
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 100}))
    assert reading.read([run]).runs[0].done


def test_throughput_is_shown_if_the_metrics_have_it(tmp_path):
    """Step times of 10, 14 and 30 ms have the median 14."""
    run = make_run(tmp_path / "run", done=False)
    assert "Step" not in {name for name, *_ in page._facts(reading.read([run]).runs[0])}
    assert "Images per second" not in report(tmp_path, run).words
    with (run / "metrics.jsonl").open("a") as file:
        for step, milliseconds in ((10, 10.0), (20, 30.0), (30, 14.0)):
            row = {"step": step, "step_ms": milliseconds, "images_per_second": 96e3 / milliseconds}
            file.write(json.dumps(row | {"memory_mib": 500.0 + step, "lr": 0.002}) + "\n")
    facts = page._facts(reading.read([run]).runs[0])
    words = "median; 6,857 images/s, peak memory 530 MiB, learning rate 0.002"
    assert facts[-2:] == [
        ("Step", "14.00 ms", words),
        ("Left", "about 0 s", "at this step time, without evaluations"),  # 30 steps of 14 ms.
    ]
    seen = report(tmp_path, run)
    for title in ("Step time", "Images per second", "Peak memory"):
        assert title in seen.words, title
    assert "Step time" in report(tmp_path, run, make_run(tmp_path / "old", seed=1)).words


@pytest.mark.parametrize(
    ("counts", "first", "second"),
    [
        ({"evaluations": 50, "evaluations_after_ramp": 45}, "94.00 %", "95.00 %"),
        ({"evaluations": 6, "evaluations_after_ramp": 3}, "95.00 %", "94.00 %"),
        ({}, "95.00 %", "94.00 %"),  # An earlier version's summary; 60 steps end before the ramp.
    ],
)
def test_the_last_step_comes_first_until_20_evaluations_follow_the_ramp(tmp_path, counts, first, second):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | counts))
    (_, shown, name), (_, other, other_name) = page._facts(reading.read([run]).runs[0])[:2]
    assert (shown, other) == (first, second)
    assert [name, other_name][first == "95.00 %"].startswith("median of ")
    two = make_run(tmp_path / "two", error=8.0, k=4)
    words = report(tmp_path, run, two).words
    if counts.get("evaluations") != 50:  # Errors 5 and 8 at the last step; `make_run` makes medians 1 pp lower.
        assert "Medians are over the last 6 evaluations. Differences are those of the last evaluation" in words
    summary = json.loads((two / "summary.json").read_text())
    (two / "summary.json").write_text(json.dumps(summary | counts | {"median_last_20": 80.0}))
    found = page.differences(reading.read([run, two]).runs)
    ((pair,),) = found.values()
    assert pair.points == pytest.approx(3.0 if first == "95.00 %" else 20.0 - 6.0)


def test_a_run_without_history_and_results(tmp_path):
    """Or with damaged files."""
    run = make_run(tmp_path / "run")
    (run / "history.jsonl").unlink()
    (run / "results.npz").unlink()
    (run / "views.png").write_bytes(b"\x89PNG")
    seen = report(tmp_path, run)
    assert "are missing from this folder, or damaged" in seen.words and "Test accuracy" in seen.words
    assert [each for each in seen.all("img") if each["alt"] == "images with their weak and strong views"]
    (run / "history.jsonl").write_text(
        '{"step": 1, "bins": {"rotate": [[1, 1]]}}\n{"step": 2, "bins": {"rotate": [[1]]}}\n'
    )
    (run / "results.npz").write_bytes(b"PK")
    assert "CTAugment's bins" not in report(tmp_path, run).words


def test_a_diverged_run_and_damaged_files(tmp_path):
    """Charts omit values that are not finite and malformed lines."""
    run = make_run(tmp_path / "run", done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "loss": NaN, "test_loss": Infinity}\n[1]\n{"loss": 1}\n{"st')
    rows = reading.read_history(run)
    rows[-1]["p_model"][0] = rows[-1]["bins"]["blur"][0][3] = float("nan")
    (run / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text('{"steps": 60}')
    (run / "split.json").write_text("{")
    seen = report(tmp_path, run)
    specs = [content for name, content in seen.scripts.items() if name.endswith("-spec")]
    assert len(specs) > 5 and not [each for each in specs if "NaN" in each or "Infinity" in each]
    assert "not finished" in seen.words


def test_results_of_other_classes_are_not_shown(tmp_path):
    run = make_run(tmp_path / "run")
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"class_names": ["cat", "dog"]}))
    assert "Confusion matrix" not in report(tmp_path, run).words


def test_a_folder_whose_name_is_not_utf8(tmp_path, capsys):
    run = make_run(tmp_path / os.fsdecode(b"r\xffn"))
    assert "r?n" in report(tmp_path, run).words


def test_a_supervised_run_has_no_pseudo_labels(tmp_path):
    seen = report(tmp_path, make_run(tmp_path / "run", method="supervised"))
    assert "A supervised run has no pseudo-labels." in seen.words and "p~(y)" not in seen.words


@pytest.mark.parametrize("count", [2, 13, 40, 200])
def test_charts_are_bounded_for_many_classes(tmp_path, count):
    run = make_run(tmp_path / "run", classes=[f"class {number}" for number in range(count)], side=40)
    text = rendered(run)
    seen = Seen(text)
    assert len(text) < 1_000_000
    assert ("Shown are the 20 of" in seen.words) == (count > 20)
    specs = [json.loads(content) for name, content in seen.scripts.items() if name.endswith("-spec")]
    largest = max(len(values) for spec in specs for values in data_of(spec))
    assert largest <= 400


def test_a_folder_of_reproduce(tmp_path, caplog):
    seen = report(tmp_path, make_table(tmp_path / "table"))
    for words in (
        "digits: test error in percent", "6.05 ± 0.07", "+1.00 [+0.50, +1.50]", "remixmatch seed 0", "fixmatch seed 1",
        "digits-40-uda-seed0-9876543210 has no metrics", "Settings that differ from remixmatch",
    ):  # fmt: skip
        assert words in seen.words, words
    assert "digits-40-uda-seed0-9876543210 has no metrics" in caplog.text
    assert seen.words.index("remixmatch seed 0") < seen.words.index("fixmatch seed 0")
    assert len([each for each in seen.all("details") if each.get("class") == "run"]) == 4


def test_runs_have_the_order_of_their_table(tmp_path):
    folder = make_table(tmp_path / "table", ("remixmatch", "uda", "fixmatch"))
    names = [run.name for run in reading.read([folder]).runs]
    assert names == [f"{row} seed {seed}" for row in ("remixmatch", "uda", "fixmatch") for seed in (0, 1)]


def test_a_folder_of_ablate(tmp_path):
    folder = make_table(tmp_path / "ablate", ("remixmatch", "k=1"), (0,), method="remixmatch")
    (folder / "table.json").unlink()
    (folder / "ablate.csv").write_text(
        "preset,variant,seed,cell,error_median,step_ms,ratio,ratio_low,launches\n"
        "digits-40,remixmatch,0,0123456789,6.0,10.5,1,1,\ndigits-40,k=1,0,k1,7.0,7.25,0.69,0.6,\n"
    )
    (folder / "digits-40-k=1-seed0-0123456789").rename(folder / "digits-40-k=1-seed0-k1")
    seen = report(tmp_path, folder)
    for words in (
        "digits-40, ablated",
        "Step time",
        "Cost of each variant",
        "7.25",
        "0.69",
        "k=1 seed 0",
        "remixmatch seed 0",
        "+1.00",
    ):
        assert words in seen.words, words
    assert "launches" not in seen.words
    (folder / "ablate.csv").write_text("x\n1\n")
    assert "Cost" not in report(tmp_path, folder).words


def test_differences_are_from_the_same_seed_of_the_first_group(tmp_path):
    runs = [
        make_run(tmp_path / "a0", seed=0, error=5.0),
        make_run(tmp_path / "a1", seed=1, error=7.0),
        make_run(tmp_path / "b1", seed=1, error=7.5, k=4),
        make_run(tmp_path / "b2", seed=2, error=1.0, k=4),
        make_run(tmp_path / "going", seed=0, done=False, k=4),
    ]
    found = page.differences(reading.read(runs).runs)
    assert list(found) == ["remixmatch, k=4"]
    ((pair,),) = found.values()
    assert (pair.run.name, pair.other.name) == ("b1", "a1") and pair.points == pytest.approx(0.5)
    found = page.differences(reading.read(runs[:2]).runs)
    assert list(found) == ["a1"] and found["a1"][0].points == pytest.approx(2.0)


def test_runs_with_different_data_are_not_compared(tmp_path):
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", k=4)
    split = json.loads((two / "split.json").read_text())
    (two / "split.json").write_text(json.dumps(split | {"labels": 400}))
    assert page.differences(reading.read([one, two]).runs) == {}


def test_many_runs_are_drawn_as_groups(tmp_path):
    for number in range(12):
        make_run(tmp_path / "runs" / f"run{number}", seed=number % 6, k=2 + number // 6)
    found = reading.read([tmp_path / "runs"])
    assert [run.group for run in found.runs] == ["remixmatch"] * 6 + ["remixmatch, k=3"] * 6
    chart = page._curves(found.runs).parts[0]
    assert [each["k"] for each in data_of(chart.spec)[0]] == ["remixmatch", "remixmatch, k=3"]
    chart = page._curves(found.runs[:6] + [found.runs[0]] * 3).parts[0]  # only 6 distinct runs, each drawn
    assert len(data_of(chart.spec)[0]) == 6


def grid(found, title):
    """Return the table of that title in sections of a page."""
    (grid,) = (
        part for section in found for part in section.parts if isinstance(part, page.Grid) and part.title == title
    )
    return grid


def test_recalls_of_unequal_classes(tmp_path):
    for seed, row in ((0, (90.0, 80.0, 10.0)), (1, (70.0, 60.0, 20.0))):
        make_run(tmp_path / f"unequal{seed}", seed=seed, recalls=row, error=40.0, imbalance=10.0)
    make_run(tmp_path / "old", seed=2, imbalance=10.0)  # Of an earlier version, which recorded no recalls.
    make_run(tmp_path / "equal", seed=0, recalls=(95.0,) * 3, method="fixmatch")
    found = reading.read([tmp_path])
    known = grid(page.compare(found), "Recall by class")
    assert list(known.head) == ["group", "runs", "balanced accuracy, %", "geometric mean, %", "cat", "dog", "bird"]
    ((_, *row),) = known.rows
    geometric = ((90 * 80 * 10) ** (1 / 3) + (70 * 60 * 20) ** (1 / 3)) / 2
    assert row == [2, "55.00", f"{geometric:.2f}", "80.00", "70.00", "15.00"]
    seen = report(tmp_path, tmp_path / "unequal0")
    assert (
        "Balanced accuracy" in seen.words
        and "60.00 %" in seen.words
        and "geometric mean of recalls 41.60 %" in seen.words
    )
    assert "Balanced accuracy" not in report(tmp_path, tmp_path / "equal").words
    lines = [{"row": "remixmatch", "preset": "p", "balanced": {"mean": 60.0, "deviation": 1.0}, "geometric": None}]
    table = grid([page._table(lines)], "Errors over seeds")
    assert "balanced accuracy, %" in table.head and "60.00 ± 1.00" in table.rows[0]


def test_lines_over_runs_use_common_steps():
    assert page.over_runs([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 7.0, 9.0])], max) == ([2, 3], [4.0, 7.0])


def test_equal_folder_names_are_distinguished(tmp_path):
    one, two = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert [run.name for run in reading.read([one, two]).runs] == ["x/run", "y/run"]
    assert len(reading.read([one, one]).runs) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"ranges": {"forward": {"ms": 1.0, "share": 0.4}, "backward": {"share": 0.5}}}, ["backward", "forward"]),
        ({"ranges": {"x": 1, "y": {"ms": 2}, "z": {"share": "1"}}}, []),
        ([1], []),
    ],
)
def test_only_a_valid_profile_is_shown(tmp_path, content, expected):
    run = make_run(tmp_path / "run")
    (run / "profile.json").write_text(json.dumps(content))
    assert [name for name, _ in reading.read([run]).runs[0].profile] == expected
    assert ("Share of a step's time" in report(tmp_path, run).words) == bool(expected)


def test_long_lines_are_thinned_and_end_at_the_last_step():
    steps, values = charts.thinned(range(1, 1001), [float(n) for n in range(1, 1001)])
    assert len(steps) == charts.MOST_POINTS and steps[-1] == 1000 and values[0] == np.mean(range(1, 8))


def test_calibration_counts():
    results = {"predicted": np.array([0, 1, 1]), "labels": np.array([0, 0, 1]),
               "confidence": np.array([1.0, 0.55, 0.5], np.float16)}  # fmt: skip
    assert page.intervals(results) == [(0, 0)] * 5 + [(2, 1)] + [(0, 0)] * 3 + [(1, 1)]


def test_the_confusion_matrix(tmp_path):
    run = reading.read([make_run(tmp_path / "run")]).runs[0]
    run.results.update(labels=np.array([0, 0, 2], np.uint16), predicted=np.array([0, 1, 2], np.uint16))
    assert page.confusion(run).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("side", [16, 33, 64])
def test_encoded_images_match(side):
    import base64
    import io

    from PIL import Image

    ramp = np.linspace(0, 255, side).astype(np.uint8)
    image = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 99)], -1)
    kind, content = page.data_uri(image.astype(np.uint8)).split(";base64,")
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)
    assert kind == ("data:image/png" if side == 16 else "data:image/webp")
    assert np.abs(found - image).max() <= (0 if side == 16 else 24)


def test_errors_are_one_line(tmp_path, monkeypatch):
    def told(*arguments):
        with pytest.raises(UserError) as error:
            command.main([str(each) for each in arguments])
        assert "\n" not in str(error.value)
        return str(error.value)

    run = make_run(tmp_path / "run")
    assert "requires the folder of a run" in told()
    assert f"no folder '{tmp_path}/none'" in told(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "contains no run" in told(tmp_path / "empty")
    begun = shutil.copytree(run, tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    assert "nothing to report yet" in told(begun)
    assert f"--out {run} is a folder" in told(run, "--out", run)
    assert "cannot write " in told(run, "--out", tmp_path / "no" / "page.html")
    (begun / "metrics.jsonl").write_text('{"step": 1}\n')
    (begun / "config.json").write_text('{"unknown": 1}')
    assert "is not a configuration of this version" in told(begun)
    monkeypatch.setattr(command, "NEEDED", ("altair", "no_such_package"))
    assert told(run) == "report needs no_such_package: pip install 'remixmatch-engine[report]'"


def test_neither_pages_nor_errors_import_torch(tmp_path):
    """Importing torch takes longer than everything else."""
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from engine.report import command, page; from engine.errors import UserError\n"
        "page.library = lambda: ''\n"
        "try: command.main(sys.argv[1:])\n"
        "except UserError: sys.exit(len({'torch', 'altair'} & sys.modules.keys()))\n"
        "assert 'altair' in sys.modules and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code, run]).returncode == 0
    code = code.replace("command, page;", "command;").replace("page.library = lambda: ''\n", "")
    assert subprocess.run([sys.executable, "-c", code, "nowhere"]).returncode == 0
