"""The deny-list finds its phrases where people read, and only there."""

from tests.prose import ALLOWED, DENIED, ROOT, hits

PAGE = "docs/page.md"


def found(path: str, content: str) -> list[str]:
    return [hit.split("'")[1] for hit in hits(path, content)]


def test_phrases_are_found_in_pages_across_lines():
    assert found(PAGE, "The runs that were told\nfrom zero go on\nwith step 5.\n") == ["told", "go on with"]
    assert found(PAGE, "Beside the road, Twins.") == ["Beside", "Twins"]
    assert next(hits(PAGE, "one\ntwo, as\nit is\n")).startswith("docs/page.md:2: 'as it is'; write: baseline")
    assert not found(PAGE, "Resumes from step 5; tolder and twinned are other words.\n")


def test_phrases_are_found_in_what_a_person_reads_of_python():
    source = (
        '"""A twin of it."""\n'
        "told = beside\n"
        "# Steps in\n"
        "# turns.\n"
        'text = f"there are {told}"\n'
        "def test_what_is_told(): ...\n"
    )
    assert sorted(found("kernels/one.py", source)) == ["in turns", "there are", "told", "twin"]


def test_exceptions_are_needed():
    for _, phrase, reason in ALLOWED:
        assert reason
        if phrase != ".*":
            assert phrase in DENIED or any(phrase.rstrip("s") in denied for denied in DENIED) or phrase == "by rule"
    assert found("pipelines/data/folder.py", '"twins"') == [] and found("pipelines/other.py", '"twins"') == ["twins"]
    assert "twins" in (ROOT / "pipelines/data/folder.py").read_text(encoding="utf-8")
