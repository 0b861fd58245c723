"""labels.csv: the labels of a folder's images as people write them.

The separator is a comma, semicolon, tab, vertical bar or space. The column of files is the one whose cells name files;
the others are found by their names or, without a header, by their order. Every mistake is reported with its line.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.cache import DataError
from pipelines.data.image_files import real_files
from pipelines.files import read_file, some

TABLE = "labels.csv"
PARTS = ("train", "test", "unlabeled")
# Labels of unlabeled images, in lower case.
UNLABELED = ("", "?", "-1", "-1.0", "nan", "none", "null", "na", "n/a", "unlabeled", "unlabelled")
_WHOLE = re.compile(r"-?[0-9]+\.0*")  # A whole number with a point.
_SEPARATORS = ",;\t| "
_SAMPLE = 100  # Lines from which the separator and the columns are determined.
_LABEL = ("label", "labels", "class", "classname", "target", "category", "y")
_PART = ("part", "split", "set", "subset", "partition")


@dataclass(frozen=True)
class Entry:
    """An image in a table.

    Attributes:
        file: Path relative to the folder, as in the list of its images.
        label: Name of the class; "" for an unlabeled image.
        part: One of PARTS.
    """

    file: str
    label: str
    part: str


@dataclass(frozen=True)
class _Line:
    """A line of a table: its number, from 1, and its cells."""

    number: int
    cells: list[str]


def read_table(root: Path, images: Sequence[str], as_written: bool = False) -> list[Entry]:
    """Read the table of a folder.

    Args:
        root: The folder.
        images: Relative paths of its image files.
        as_written: Keep labels such as 1.0, which pandas writes for whole numbers if some are missing. By default they
            become 1 if all labels are of this kind.

    Returns:
        An entry for every image.

    Raises:
        DataError: The table cannot be read, or does not list every image once with a valid label and part.
    """
    path = root / TABLE
    files = _Files(root, images)
    text = _without_comments(_text(path), files)
    declared = re.match(r"sep=(.)\n", text)  # Written for Excel.
    separator = declared.group(1) if declared else _separator(text, files)
    try:
        lines = _split(text, separator)[1 if declared else 0 :]
    except csv.Error as error:
        raise DataError(f"{path} cannot be read ({error}); check its quotes") from None
    if not lines:
        raise DataError(f"{path} is empty; write one line per image: file,label")
    if broken := [line.number for line in lines if any("\n" in cell for cell in line.cells)]:
        raise DataError(f"{path}, line {broken[0]} has a quote that is not closed; close or delete it")
    try:
        entries = _entries(path, lines, files, as_written)
    except DataError as error:
        if separator != " ":
            raise
        raise DataError(
            f"{error}; the columns are separated by spaces: use commas, semicolons, tabs or vertical bars if names "
            "contain spaces"
        ) from None
    names = dict(zip(real_files(root, images), images, strict=True))  # A table may name files through links.
    if extra := sorted(names[path] for path in names.keys() - real_files(root, [entry.file for entry in entries])):
        raise DataError(
            f"{path} does not list all image files; missing: {some(extra)}; add them, without a label if it is unknown"
        )
    return sorted(entries, key=lambda entry: entry.file)


def _entries(path: Path, lines: list[_Line], files: _Files, as_written: bool) -> list[Entry]:
    """Return the entries in the lines of a table; see `read_table`."""
    columns, lines = _columns(path, lines, files)
    labels = [_cell(line, columns, "label") for line in lines]
    whole = not as_written and all(_WHOLE.fullmatch(label) or label.lower() in UNLABELED for label in labels)
    entries: list[Entry] = []
    first: dict[str, int] = {}
    for line in lines:
        named, label = _cell(line, columns, "file"), _cell(line, columns, "label")
        file = files.find(named)
        if file is None:
            raise DataError(f"{path}, line {line.number}: {files.missing(named)}")
        if file in first:
            raise DataError(f"{path} lists {file} twice, in lines {first[file]} and {line.number}; keep one of them")
        first[file] = line.number
        label = label.partition(".")[0] if whole else label
        unlabeled = label.lower() in UNLABELED and not (as_written and label == "-1.0")
        part = _cell(line, columns, "part")
        entries.append(_entry(f"{path}, line {line.number}", file, "" if unlabeled else label, part))
    return entries


def _cell(line: _Line, columns: dict[str, int], kind: str) -> str:
    """Return the cell of a line in a column; "" if there is none."""
    place = columns.get(kind, len(line.cells))
    return line.cells[place] if place < len(line.cells) else ""


def _text(path: Path) -> str:
    """Return the text of a file in UTF-8 or UTF-16, with or without a byte order mark."""
    try:
        content = read_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    encoding = "UTF-8-sig"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
    elif 0 in content[:2]:  # ASCII characters in UTF-16 have a zero byte, the high one.
        encoding = "UTF-16-be" if content[0] == 0 else "UTF-16-le"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {number} is not valid {encoding.removesuffix('-sig')}; save the table as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path}, line {number} contains a NUL character; delete it, or save the table as UTF-8 again")
    return text


def _without_comments(text: str, files: _Files) -> str:
    """Empty the lines that begin with #, except for those that name a file or, as a header, the column of labels."""
    lines = text.split("\n")
    for place, line in enumerate(lines):
        if line.startswith("#"):
            cells = [_unquoted(cell) for cell in re.split(r"[,;\t|]", line)]
            header = len(cells) > 1 and any(_word(cell) in _LABEL for cell in cells)
            if not header and not any(files.find(cell) for cell in (*cells, *line.split())):
                lines[place] = ""
    return "\n".join(lines)


class _Files:
    """Image files of a folder, which tables name in different ways."""

    def __init__(self, root: Path, images: Sequence[str]) -> None:
        self._root, self._images = root, set(images)
        self._roots = (str(root), str(root.absolute()), os.path.realpath(root))
        self._folded = Counter(map(_folded, images))
        self._by_folded = {_folded(name): name for name in images}

    def find(self, cell: str) -> str | None:
        """Return the image file that a cell names; None if there is none, or it could be several."""
        if cell in self._images:
            return cell
        forms = self._forms(cell)
        if exact := next((name for name in forms if name in self._images), None):
            return exact
        for name in map(_folded, forms):
            if self._folded[name] == 1:
                return self._by_folded[name]
        # The image files of a folder are those with known suffixes; a table may name others.
        return next((n for n in forms if not n.startswith("..") and os.path.isfile(self._root / n)), None)

    def _forms(self, cell: str) -> list[str]:
        """Return the relative paths that a cell could mean, the most literal one first."""
        forms = []
        for name in (cell, cell.replace("\\", "/")):
            for root in self._roots:
                if name.startswith(f"{root}/"):
                    forms.append(name[len(root) + 1 :])
            forms.append(name.lstrip("/"))
            # A path from elsewhere, such as pets/a.png next to the folder or C:/pets/a.png on another computer.
            _, inside, after = f"/{name}".partition(f"/{os.path.basename(self._roots[1])}/")
            forms += [after] if inside else []
        return [os.path.normpath(name) for name in dict.fromkeys(forms) if name.strip("/.")]

    def missing(self, cell: str) -> str:
        """Say that a cell names no image, and which image it may mean."""
        last = os.path.basename(cell.replace("\\", "/")).casefold()
        near = [n for n in self._images if last in (os.path.basename(n).casefold(), _stem(n))] if last else []
        hint = f"; did you mean {near[0]}?" if len(near) == 1 else f"; paths are relative to {self._root}"
        return f"there is no image file '{cell}'{hint}"


def _folded(name: str) -> str:
    """Return a name without the differences that file systems of other computers ignore."""
    return unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0].casefold()


def _separator(text: str, files: _Files) -> str:
    """Return the separator with which a cell of most lines names a file, or else with which most have several cells."""
    lines = text.split("\n")
    chosen = set(range(min(len(lines), _SAMPLE)))
    for candidate in _SEPARATORS:  # The first lines may have a single cell each.
        chosen |= set(itertools.islice((place for place, line in enumerate(lines) if candidate in line), _SAMPLE))
    sample = "\n".join(lines[place] for place in sorted(chosen))
    best, separator = (-1, -1), _SEPARATORS[0]
    for candidate in _SEPARATORS:
        with contextlib.suppress(csv.Error):
            rows = _split(sample, candidate)
            named = sum(any(files.find(cell) for cell in row.cells) for row in rows)
            if (score := (named, sum(len(row.cells) > 1 for row in rows))) > best:
                best, separator = score, candidate
    return separator


def _split(text: str, separator: str) -> list[_Line]:
    """Split a text into lines and cells, without empty lines and empty cells at the end of a line."""
    lines = []
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    for row in reader:
        cells = [_unquoted(cell) for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            lines.append(_Line(reader.line_num - sum(cell.count("\n") for cell in cells), cells))
    return lines


def _unquoted(cell: str) -> str:
    cell = cell.strip()
    quoted = len(cell) > 1 and cell[0] == cell[-1] and cell[0] in "'\""
    return cell[1:-1].strip() if quoted else cell


def _columns(path: Path, lines: list[_Line], files: _Files) -> tuple[dict[str, int], list[_Line]]:
    """Return the places of the columns file, label and part, as far as they exist, and the lines without the header."""
    sample = lines[:_SAMPLE]
    width = max(len(line.cells) for line in lines)
    matches = [0] * width
    for line in sample:
        for place, cell in enumerate(line.cells):
            matches[place] += files.find(cell) is not None
    file = matches.index(max(matches))
    header = lines[0].cells + [""] * (width - len(lines[0].cells))
    words = [_word(cell) for cell in header]
    # Without a dot or a slash, this is no file, but the name of a column.
    is_name = any(word in _LABEL for word in words) or not re.search(r"[./\\]", header[file])
    if is_name and files.find(header[file]) is None:
        return {"file": file} | _named_columns(f"{path}, line {lines[0].number}", header, words, file), lines[1:]
    if width > 3:
        number = next(line.number for line in lines if len(line.cells) == width)
        raise DataError(
            f"{path}, line {number} has {width} columns, expected file,label or file,label,part; name the columns in "
            "the first line"
        )
    rest = [place for place in range(width) if place != file]
    return {"file": file} | dict(zip(("label", "part"), rest, strict=False)), lines


def _word(cell: str) -> str:
    return re.sub(r"[^a-z]", "", cell.lower())


def _named_columns(where: str, header: list[str], words: list[str], file: int) -> dict[str, int]:
    """Return the places of the columns label and part in a header. A single other column holds the labels."""
    columns = {}
    for kind, known in (("label", _LABEL), ("part", _PART)):
        places = [place for place, word in enumerate(words) if word in known and place != file]
        if len(places) > 1:
            names = ", ".join(header[place] for place in places)
            raise DataError(f"{where} names several columns '{kind}': {names}; rename all but one of them")
        if places:
            columns[kind] = places[0]
    rest = [place for place, cell in enumerate(header) if cell and place not in (file, *columns.values())]
    if "label" not in columns:
        if len(rest) != 1:
            raise DataError(f"{where} names no column 'label'; rename the column of the labels")
        columns["label"] = rest[0]
    unnamed = [place for place, cell in enumerate(header) if place and not cell]  # The first may be a row number.
    if unnamed and "part" not in columns:
        if len(unnamed) > 1:
            raise DataError(f"{where} names only {len(header) - len(unnamed)} of {len(header)} columns; name all")
        columns["part"] = unnamed[0]
    return columns


def _entry(where: str, file: str, label: str, part: str) -> Entry:
    part = part.lower() or "train"
    if part not in PARTS:
        raise DataError(f"{where}: part '{part}' of {file} must be train, test, unlabeled or empty")
    if part == "test" and not label:
        raise DataError(f"{where}: test image {file} has no label; give it one, or another part")
    return Entry(file, "" if part == "unlabeled" else label, part)
