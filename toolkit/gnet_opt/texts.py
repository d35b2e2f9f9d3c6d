"""Text files as people and their programs write them: several encodings, bounded lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from gnet_opt.errors import CalibrationError
from gnet_opt.printable import shown

_LONGEST = 1 << 16
"""Characters of a line; more is no text that a person or a spreadsheet wrote."""

_BLOCK = 1 << 20

_MARKS = (
    # UTF-32's little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""How a text begins that says its encoding."""

_FALLBACK = "cp1252"


def lines(path: Path) -> tuple[Iterator[str], tuple[str, ...]]:
    """The lines of a text file with their ends, one at a time, and what is to be told of it.

    The encoding is that of the byte order mark, without one UTF-8, and where a text is not, then
    Windows-1252 (which Latin-1 is a part of, but for control characters).

    Raises:
        CalibrationError: It is no text, or, while it is read, a line has no end.
    """
    name = shown(path)
    try:
        encoding = _encoding(path)
    except OSError as error:
        raise CalibrationError(
            f"{name} cannot be read ({error.strerror}). Correct or remove the file."
        ) from error
    if encoding != _FALLBACK:
        return _lines(path, encoding), ()
    note = f"{name} is not UTF-8 and was read as Windows-1252. Save it as UTF-8 if names are wrong."
    return _lines(path, encoding), (note,)


def _encoding(path: Path) -> str:
    """What a text is written in, found by decoding all of it."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\3\4":
        raise CalibrationError(
            f"{shown(path)} is a spreadsheet's own file or another archive. Save it as CSV."
        )
    marked = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)
    if _decodes(path, marked or "utf-8"):
        return marked or "utf-8"
    if marked is None and _decodes(path, _FALLBACK):
        return _FALLBACK
    raise CalibrationError(
        f"{shown(path)} cannot be read as {(marked or 'UTF-8').upper()} text. Save it as UTF-8."
    )


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as stream:
        try:
            while block := stream.read(_BLOCK):
                if "\0" in decoder.decode(block):
                    return False
            decoder.decode(b"", final=True)
        except UnicodeError:
            return False
    return True


def _lines(path: Path, encoding: str) -> Iterator[str]:
    # Untranslated ends: a quoted text of a table may hold them.
    with path.open(encoding=encoding, newline="") as stream:
        number = 0
        while line := stream.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                raise CalibrationError(
                    f"{shown(path)}, line {number} has more than {_LONGEST} characters, so this "
                    "is no table of names. Correct the file."
                )
            yield line
