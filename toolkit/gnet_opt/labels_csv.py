"""`labels.csv`: a table of picture files and classes, as programs and spreadsheets write it."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gnet_opt import texts
from gnet_opt.class_names import Names, number, plain
from gnet_opt.errors import CalibrationError
from gnet_opt.files import is_file
from gnet_opt.image_folder import Found
from gnet_opt.printable import listed, shown

_FILE = ("file", "path", "filename", "image", "image_path", "img")
_LABEL = ("label", "class", "target", "category", "class_id")
_SEPARATORS = ",;\t"

_ONE_CLASS = (
    "A picture has one class here, and sets with several classes a picture cannot be used: write "
    "the one that counts into a column label"
)

_WHOLE = re.compile(r"(-?\d{1,9})([.,]0*)?", re.ASCII)
"""A class index, which spreadsheets and pandas also write as 3.0 or 3,0."""

_BETWEEN = re.compile(r"[\s,;|/+]+")
"""What is between the classes of a picture that has several."""

_FLAG = re.compile(r"[01]?([.,]0*)?|true|false", re.ASCII | re.IGNORECASE)
_FLAG_ROWS = 100

_Row = tuple[int, list[str]]
"""The number of a line and its cells."""


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Where the two columns of a table are, and how many it has."""

    file: int
    label: int
    count: int


def read(folder: Path, table: Path, *, own: Sequence[str] = (), known: Sequence[str] = ()) -> Found:
    """Take the pictures that a table lists, in its order, with their labels.

    The header names one column for the file (`file`, `path`, `filename`, `image`, `image_path` or
    `img`) and one for the class (`label`, `class`, `target`, `category` or `class_id`), in any
    spelling that `class_names.plain` makes the same; where there are several, `file` and `label`
    count. Columns are separated by commas, semicolons or tabs. A file is relative to the folder or
    absolute, with slashes or backslashes. A class is an index, or a name of `own` or else `known`.

    Args:
        folder: The folder of the set.
        table: The table.
        own: The set's own class names in index order, where a `classes.txt` gives them.
        known: The model's class names by index, where they are known.

    Raises:
        CalibrationError: The table cannot be read, or a line of it is wrong.
    """
    numbering = number(own, known, shown(folder / "classes.txt")) if own else None
    names = Names(own or known)
    columns, rows, notes = _open(folder, table)
    labels: dict[Path, int] = {}
    indices: dict[str, int] = {}
    outside: list[str] = []
    for line, row in rows:
        where = f"{shown(table)}, line {line}"
        path = _file(folder, row[columns.file], where)
        text = row[columns.label]
        if text not in indices:
            index = _index(text, names, where)
            inside = numbering is not None and 0 <= index < len(numbering.indices)
            indices[text] = numbering.indices[index] if numbering and inside else index
        if path in labels:
            what = "Remove one of the lines."
            if labels[path] != indices[text]:
                what = f"Its labels differ. {_ONE_CLASS}, once for each picture."
            raise CalibrationError(f"{where}: {shown(path)} is listed twice. {what}")
        labels[path] = indices[text]
        if _is_outside(row[columns.file]):
            outside.append(str(path))
    if not labels:
        raise CalibrationError(f"{shown(table)} lists no picture. Add rows file,label.")
    if outside:
        notes += (
            f"Pictures of {shown(table)} that lie outside its folder: {len(outside)}, for example "
            f"{shown(outside[0])}.",
        )
    return Found(
        files=tuple(labels),
        labels=tuple(labels.values()),
        classes=numbering.classes if numbering else tuple(known),
        notes=(*notes, *names.note(shown(table)), *(numbering.notes if numbering else ())),
    )


# --- The table ----------------------------------------------------------------------------------


def _open(folder: Path, table: Path) -> tuple[_Columns, Iterator[_Row], tuple[str, ...]]:
    """Find the columns; the rows behind the header come as they are read."""
    lines, notes = texts.lines(table)
    first = next(lines, "")
    before = 0
    separators = _SEPARATORS
    if said := re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE):  # Excel's own first line
        separators, first, before = said[1], next(lines, ""), 1
    while first and not first.strip(f"{_SEPARATORS} \r\n"):
        first, before = next(lines, ""), before + 1
    headers = {one: _cells(next(csv.reader([first], delimiter=one), [])) for one in separators}
    for separator, header in headers.items():
        file, label = _find(header, _FILE, table), _find(header, _LABEL, table)
        if file is not None and label is not None:
            columns = _Columns(file=file, label=label, count=len(header))
            return columns, _rows(lines, separator, table, before + 1, len(header)), notes
    separator = max(headers, key=lambda one: len(headers[one]))
    header = headers[separator]
    rows = _rows(lines, separator, table, before + 1, len(header))
    raise CalibrationError(_why_no_columns(folder, table, header, rows))


def _rows(
    lines: Iterator[str], separator: str, table: Path, before: int, count: int
) -> Iterator[_Row]:
    """The rows of a table that are not empty, each with `count` cells."""
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        for row in reader:
            cells = _cells(row)
            if not cells:
                continue
            line = before + reader.line_num
            if len(cells) > count:
                raise CalibrationError(
                    f"{shown(table)}, line {line} has {len(cells)} cells, but the header {count}. "
                    f"Put a text with {separator!r} in it between double quotes."
                )
            yield line, cells + [""] * (count - len(cells))
    except csv.Error as error:
        line = before + reader.line_num
        raise CalibrationError(
            f"{shown(table)}, line {line}: {error}. Correct the line; a quote may be missing."
        ) from error


def _cells(row: list[str]) -> list[str]:
    """Cells without blanks around them, and without empty ones at the end."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _find(header: list[str], names: tuple[str, ...], table: Path) -> int | None:
    """The number of the one column with a name like these; the first of them wins over others."""
    wanted = {plain(name) for name in names}
    found = [index for index, cell in enumerate(header) if plain(cell) in wanted]
    found = [index for index in found if plain(header[index]) == names[0]] or found
    if len(found) > 1:
        raise CalibrationError(
            f"{shown(table)} has several columns for the {names[0]}: "
            f"{listed(shown(header[index]) for index in found)}. Name the one that counts "
            f"{names[0]}, and no other."
        )
    return found[0] if found else None


def _why_no_columns(folder: Path, table: Path, header: list[str], rows: Iterator[_Row]) -> str:
    name = shown(table)
    needs = f"{name} needs a header with the columns file and label"
    if not header:
        return f"{needs}; it is empty."
    told = listed((shown(cell, 60) for cell in header), 6)
    if any(is_file(folder / cell.replace("\\", "/")) for cell in header if cell):
        return f"{needs}; its first line is {told}. Write the line file,label above it."
    flags = [index for index, cell in enumerate(header) if plain(cell) not in map(plain, _FILE)]
    some = [[row[index] for index in flags] for _, row in itertools.islice(rows, _FLAG_ROWS)]
    if len(flags) > 1 and some and all(_FLAG.fullmatch(cell) for row in some for cell in row):
        sums = {sum(cell[:1] in ("1", "t", "T") for cell in row) for row in some}
        classes = listed(shown(header[index], 60) for index in flags)
        if sums == {1}:
            return (
                f"{name} has no column label, but one column of 0 and 1 for each of {len(flags)} "
                f"classes ({classes}; one-hot). Write one column label instead, with the name of "
                "the column that holds the 1."
            )
        return (
            f"{name} has no column label, but columns of 0 and 1 ({classes}), of which a picture "
            f"has several or none. {_ONE_CLASS}."
        )
    return (
        f"{needs}; what it has is {told}. Name the columns so. Also understood: "
        f"{', '.join(_FILE[1:])} for file, and {', '.join(_LABEL[1:])} for label."
    )


# --- A row --------------------------------------------------------------------------------------


def _file(folder: Path, cell: str, where: str) -> Path:
    if not cell:
        raise CalibrationError(f"{where} names no file. Correct the column file.")
    # With slashes first: a backslash is what separates folders on Windows.
    for text in dict.fromkeys((cell.replace("\\", "/"), cell)):
        path = folder / text
        if is_file(path):
            return path
    foreign = re.match(r"[A-Za-z]:[\\/]|\\\\", cell)
    way = (
        "Write paths relative to the folder of labels.csv" if foreign else "Correct the column file"
    )
    raise CalibrationError(f"{where}: {shown(folder / cell)} does not exist. {way}.")


def _is_outside(cell: str) -> bool:
    text = cell.replace("\\", "/")
    # The usual case first: a set may have a million lines.
    return (text[0] == "/" or ".." in text or ":" in text) and (
        Path(text).is_absolute() or ".." in Path(text).parts
    )


def _index(text: str, names: Names, where: str) -> int:
    """The index that a label is, or that of the class that it names."""
    if not text:
        raise CalibrationError(f"{where} has no label. Write its class into the column label.")
    found = names.find(text, where)
    whole = _WHOLE.fullmatch(text)
    if found is None and whole:
        # Where the names themselves are numbers, a number is a name and nothing else.
        if not names.are_numbers:
            return int(whole[1])
        found = names.find(str(int(whole[1])), where)
    if found is not None:
        return found
    parts = [part.strip("'\"") for part in _BETWEEN.split(text.strip("[](){} ")) if part]
    if len(parts) > 1 and all(
        _WHOLE.fullmatch(part) or names.find(part, where) is not None for part in parts
    ):
        raise CalibrationError(
            f"{where}: the label '{shown(text, 60)}' names several classes. {_ONE_CLASS}."
        )
    known = (
        f"The classes are {listed(map(shown, names.all), 10)}."
        if names
        else "Use indices, or list the class names in index order, one a line, in a classes.txt "
        "beside the table."
    )
    raise CalibrationError(
        f"{where}: the label '{shown(text, 60)}' is neither a class index nor a known class name. "
        f"{known}"
    )
