"""labels.csv as people write it: understood, or its mistake named with a line."""

import re
import unicodedata
from pathlib import Path

import pytest

from pipelines.data.cache import DataError
from pipelines.data.table import Entry, read_table
from tests.pages import ROOT

FILES = ("photos/001.jpg", "photos/002.JPG", "more/a b.png", "more/4.png")
NUMBERED = "photos/001.jpg,{}\nphotos/002.JPG,{}\nmore/a b.png,{}\nmore/4.png,{}\n"
EXPECTED = [
    Entry("more/4.png", "dog", "test"),
    Entry("more/a b.png", "", "train"),
    Entry("photos/001.jpg", "cat", "train"),
    Entry("photos/002.JPG", "dog", "train"),
]
PLAIN = "photos/001.jpg,cat\nphotos/002.JPG,dog\nmore/a b.png,\nmore/4.png,dog,test\n"
WINDOWS = PLAIN.replace("/", "\\").replace("\n", "\r\n")


@pytest.fixture
def root(tmp_path):
    for name in FILES:
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return tmp_path / "pets"


def read(root, text, files=FILES):
    content = text.encode() if isinstance(text, str) else text
    (root / "labels.csv").write_bytes(content)
    return read_table(root, files)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.rstrip("\n"),
        *(PLAIN.replace(",", separator) for separator in (";", "\t", "|", " ; ", ", ")),
        *(f"{header}\n{PLAIN}" for header in (
            "file,label", "image,class", "File Name,Label,Split", "path,target,part", "Image_ID,Category,subset",
            '"filename","label","set"', "Datei,Klasse,Part", "img_path,y,partition",
        )),
        "filename;label;split\n" + PLAIN.replace(",", ";"),
        "sep=;\nfilename;label;split\n" + PLAIN.replace(",", ";"),
        "\ufeff" + PLAIN,
        WINDOWS,
        PLAIN.replace("\n", "\r"),
        ("file\tlabel\tpart\n" + PLAIN.replace(",", "\t")).encode("utf-16"),
        ("\ufeff" + PLAIN).encode("utf-16-be"),
        WINDOWS.encode("utf-16-le"),
        PLAIN.encode("utf-16-be"),
        re.sub(r"^", "./", PLAIN, flags=re.MULTILINE).replace("./\n", "").removesuffix("./"),
        PLAIN.replace("photos/", "photos//").replace("more/", "more/./"),
        re.sub(r"^(?=\w)", "/", PLAIN, flags=re.MULTILINE),
        re.sub(r"^(?=\w)", "pets/", PLAIN, flags=re.MULTILINE),
        re.sub(r"^(?=\w)", r"C:\\Users\\me\\pets\\", WINDOWS, flags=re.MULTILINE),
        PLAIN.replace("002.JPG", "002.jpg").replace("001.jpg", "001.JPG").replace("photos/", "Photos/"),
        re.sub(r"([^,\n]+)", r'"\1"', PLAIN),
        re.sub(r"([^,\n]+)", r"'\1'", PLAIN),
        re.sub(r"([^,\n]+)", r"  \1  ", PLAIN),
        PLAIN.replace("\n", ",,,\n") + ",,\n\n ,\n",
        PLAIN.replace("b.png,\n", "b.png\n"),
        *(PLAIN.replace("b.png,", f"b.png,{word}") for word in ("NaN", "nan", "None", "?", "-1", "-1.0", "N/A")),
        PLAIN.replace("cat\n", "cat,TRAIN\n").replace(",test", ", Test "),
        "cat,photos/001.jpg\ndog,photos/002.JPG\n,more/a b.png\ndog,more/4.png,test\n",
        "label,file,part\ncat,photos/001.jpg\ndog,photos/002.JPG\n,more/a b.png\ndog,more/4.png,test\n",
        ",file,width,label,split\n0,photos/001.jpg,5,cat,\n1,photos/002.JPG,5,dog,\n2,more/a b.png,6,,\n"
        "3,more/4.png,7,dog,test\n",
        "id,path,label,split\n0,photos/001.jpg,cat,\n1,photos/002.JPG,dog,\n2,more/a b.png,,\n3,more/4.png,dog,test\n",
    ],
)  # fmt: skip
def test_tables_in_many_styles_say_the_same(root, text):
    assert read(root, text) == EXPECTED


def test_paths_may_be_absolute(root, tmp_path, monkeypatch):
    absolute = re.sub(r"^(?=\w)", f"{root}/", PLAIN, flags=re.MULTILINE)
    assert read(root, absolute) == EXPECTED
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(root)
    for place in (Path("pets"), Path("link"), Path("link").absolute()):
        assert read(place, absolute) == EXPECTED
        assert read(place, absolute.replace(str(root), str(place))) == EXPECTED


def test_labels_of_the_unlabeled_part_are_not_used(root):
    assert read(root, PLAIN.replace("b.png,", "b.png,cat,unlabeled"))[1] == Entry("more/a b.png", "", "unlabeled")


def test_files_with_a_suffix_that_is_unknown_may_be_listed(root):
    (root / "more/scan.xyz").write_bytes(b"image")
    assert read(root, PLAIN + "more/scan.xyz,cat\n")[2] == Entry("more/scan.xyz", "cat", "train")


def test_names_in_another_unicode_form_or_with_separators(tmp_path):
    (tmp_path / "é.png").write_bytes(b"image")
    (tmp_path / "a, b.png").write_bytes(b"image")
    files = ("é.png", "a, b.png")
    expected = [Entry("a, b.png", "x, y", "train"), Entry("é.png", "café", "train")]
    quoted = unicodedata.normalize("NFD", "é.png") + ',café\n"a, b.png","x, y"\n'
    assert read(tmp_path, quoted, files) == expected
    assert read(tmp_path, "é.png;café\na, b.png;x, y\n", files) == expected


def test_labels_may_be_numbers_or_have_spaces(root):
    text = "image label\nphotos/001.jpg 0\nphotos/002.JPG 1\nmore/4.png -1\n"
    files = [name for name in FILES if " " not in name]
    assert [entry.label for entry in read(root, text, files)] == ["", "0", "1"]
    labels = [entry.label for entry in read(root, PLAIN.replace("dog", "a big dog"))]
    assert labels == ["a big dog", "", "cat", "a big dog"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; write one line per image: file,label"),
        (PLAIN.replace("001", "007"), r"line 1: there is no image file .*007.jpg'; paths are relative to .*pets$"),
        ("file,label\n" + PLAIN.replace("photos/001.jpg", "001.jpg"), r"line 2: .*; did you mean photos/001.jpg\?$"),
        (PLAIN.replace("more/4.png", "more/4"), r"line 4: there is no .* 'more/4'; did you mean more/4.png\?$"),
        (PLAIN.replace("more/4.png", "../more/4.png"), r"line 4: there is no image file '\.\./more/4\.png'"),
        (PLAIN.replace("2.JPG,dog", "2.JPG;dog"), "line 2: there is no image file 'photos/002.JPG;dog'"),
        (PLAIN + "photos\\001.jpg,cat\n", "lists photos/001.jpg twice, in lines 1 and 5; keep one of them"),
        (PLAIN.replace("dog,test", "dog,val"), "line 4: part 'val' of more/4.png must be train, test, unlabeled or"),
        (PLAIN.replace("dog,test", "NaN,test"), "line 4: test image more/4.png has no label; give it one, or another"),
        (PLAIN.replace("dog,test", "dog,test,1"), "line 4 has 4 columns, expected file,label or file,label,part; name"),
        ("file,a,b\n" + PLAIN, "line 1 names no column 'label'; rename the column of the labels"),
        (f"file,label\n{PLAIN.replace('dog,test', 'dog,test,1')}", "line 1 names only 2 of 4 columns; name all"),
        ("file,label,class\n" + PLAIN, "line 1 names several columns 'label': label, class; rename all but one"),
        (PLAIN.replace(",dog\n", ',"dog\n'), "line 2 has a quote that is not closed; close or delete it"),
        ('"' + PLAIN * 100, "line 1 has a quote that is not closed; close or delete it"),
        ('"' + PLAIN * 9999, r"cannot be read \(field larger than field limit \(131072\)\); check its quotes"),
        ("a" * 999 + PLAIN, "line 1: there is no image file 'aaaaaa"),
        (PLAIN.replace("dog", "café").encode("latin-1"), "line 2 is not valid UTF-8; save the table as UTF-8"),
        (PLAIN.replace("more/a b.png,\n", ""), "does not list all image files; missing: more/a b.png; add them"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(root, text, words):
    (root.parent / "more").mkdir()
    (root.parent / "more/4.png").write_bytes(b"not below the folder")
    with pytest.raises(DataError, match=words) as error:
        read(root, text)
    assert "\n" not in str(error.value) and str(root / "labels.csv") in str(error.value)


def test_two_files_that_differ_in_case_are_not_confused(root):
    (root / "photos/001.JPG").write_bytes(b"image")
    files = (*FILES, "photos/001.JPG")
    assert read(root, PLAIN + "photos/001.JPG,dog\n", files)[2].file == "photos/001.JPG"
    with pytest.raises(DataError, match=r"line 5: there is no image file 'photos/001.Jpg'"):
        read(root, PLAIN + "photos/001.Jpg,dog\n", files)


def test_the_examples_in_the_documentation(tmp_path):
    page = (ROOT / "docs/own-images.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```text\n(photos/.*?)```", page, flags=re.DOTALL)
    files = ("photos/001.jpg", "photos/002.jpg", "more/003.png", "more/004.png")
    expected = [
        Entry("more/003.png", "cat", "test"),
        Entry("more/004.png", "", "unlabeled"),
        Entry("photos/001.jpg", "cat", "train"),
        Entry("photos/002.jpg", "", "train"),
    ]
    assert read(tmp_path, lines, files) == expected
    for word in ("?", "-1", "-1.0", "NaN", "NA", "N/A", "None", "null", "unlabeled"):
        assert f"`{word}`" in page
        assert read(tmp_path, lines.replace("002.jpg,", f"002.jpg,{word}"), files) == expected
    header = re.search(r"a header such as `(.*?)`", page).group(1)
    assert read(tmp_path, f"{header};part\n" + lines.replace(",", ";"), files) == expected


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (("0.0", "1.0", "", "-1.0"), ["", "", "0", "1"]),
        (("10.0", "2.", "nan", "NaN"), ["", "", "10", "2"]),
        (("0.0", "1.5", "", "-1.0"), ["", "", "0.0", "1.5"]),
        (("0.0", "cat", "", "-1.0"), ["", "", "0.0", "cat"]),
        (("1", "1.0", "", "2"), ["2", "", "1", "1.0"]),
    ],
)
def test_whole_numbers_that_pandas_writes_with_a_point_are_whole(root, written, labels):
    """A column of whole numbers becomes one of floats if one is missing."""
    assert [entry.label for entry in read(root, NUMBERED.format(*written))] == labels


@pytest.mark.parametrize(
    "text",
    [
        "# my labels\n" + PLAIN,
        "#\n# cats, dogs; and a label\nfile,label,part\n" + PLAIN.replace("more/4", "# checked\nmore/4"),
        "#file,label,part\n" + PLAIN,
        "#label,file,part\ncat,photos/001.jpg\ndog,photos/002.JPG\n,more/a b.png\ndog,more/4.png,test\n",
    ],
)
def test_lines_that_begin_with_a_hash_are_comments_or_a_header(root, text):
    assert read(root, text) == EXPECTED


def test_names_may_begin_with_a_hash(root):
    for name in ("#1.png", "# 2.png"):
        (root / name).write_bytes(b"image")
    for separator in ",;":
        text = (PLAIN + "#1.png,cat\n# 2.png,dog\n").replace(",", separator)
        labels = {entry.file: entry.label for entry in read(root, text, (*FILES, "#1.png", "# 2.png"))}
        assert (labels["#1.png"], labels["# 2.png"]) == ("cat", "dog")


@pytest.mark.parametrize("name", ["{}.png", "a b {}.png"])
def test_the_first_separator_may_be_late(tmp_path, name):
    files = [name.format(number) for number in range(111)]
    for file in files:
        (tmp_path / file).write_bytes(b"image")
    entries = read(tmp_path, "\n".join(files) + ";a\n", files)
    assert {entry.file for entry in entries if entry.label} == {files[-1]} and len(entries) == 111


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            PLAIN.replace(",", " "),
            r"labels.csv, line 3: .*: use commas, semicolons, tabs or vertical bars if names cont",
        ),
        ("1.png big dog\n", "line 1: part 'dog' of 1.png must be .* or vertical bars if names contain spaces$"),
        (PLAIN.replace("dog,test", "d\0g,test"), "labels.csv, line 4 contains a NUL character; delete it, or save"),
        (PLAIN.replace("photos/002", "photos/0\x0002"), "labels.csv, line 2 contains a NUL character"),
    ],
)
def test_spaces_as_separators_and_characters_of_damaged_files_are_named(root, text, words):
    (root / "1.png").write_bytes(b"image")
    with pytest.raises(DataError, match=words):
        read(root, text, (*FILES, "1.png"))
