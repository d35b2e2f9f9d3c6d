"""Text from files and devices, made fit to be shown on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 1200
"""How many characters of a message are shown: a value out of a file can have any length."""

_END = 400
"""How many of them are its last, which say what to do now."""

# Control characters but tab and newline; separators of lines and paragraphs and what turns the
# direction of text around (Unicode 16, UAX #9, table 1); halves of surrogate pairs, which UTF-8
# cannot write.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in which every character that a terminal would obey is written as its escape.

    Among them are ESC, with which a text moves the cursor, sets the title of the window or writes
    to the clipboard, and the overrides of direction, which show another text than there is.
    Newlines and tabs stay.
    """
    text = text.replace("\r\n", "\n")
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """A printable text without line breaks, its middle left out where it is very long."""
    line = printable(text).replace("\n", "\\n")
    if len(line) <= LONGEST:
        return line
    left_out = len(line) - LONGEST
    return f"{line[: LONGEST - _END]} [{left_out} characters left out] {line[-_END:]}"


def shown(text: object, longest: int = 300) -> str:
    """A name or another value as a part of a message: on one line, and cut in the middle."""
    whole = str(text)
    if len(whole) > longest:
        whole = f"{whole[: longest // 2]}...{whole[-longest // 2 :]}"
    return printable(whole).replace("\n", "\\n").replace("\t", "\\t")


def listed(texts: Iterable[str], most: int = 3) -> str:
    """The first few of some texts for a message, with dots where there are more."""
    found = list(texts)
    return ", ".join([*found[:most], "..."] if len(found) > most else found)


def printable_json(document: str) -> str:
    """The same JSON document, with those characters as JSON's escapes: they stand in strings."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found.group()):04x}", document)
