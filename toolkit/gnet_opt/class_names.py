"""Class names of an image set, found among those of the model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gnet_opt.errors import CalibrationError
from gnet_opt.printable import listed, shown

_SEPARATORS = re.compile(r"[\s_-]+")


def plain(name: str) -> str:
    """A name without what people write differently: case, spaces, hyphens and underscores.

    Letters with marks count as the same whether they are one character or two (Unicode NFC), as
    macOS writes file names in two.
    """
    return _SEPARATORS.sub("", unicodedata.normalize("NFC", name).casefold())


class Names:
    """Class names by index, in which names are found that are written a little differently.

    Attributes:
        all: The names.
        are_numbers: Whether there are names, and each is a number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.all = tuple(names)
        self.are_numbers = bool(names) and all(name.isascii() and name.isdigit() for name in names)
        self._exact: dict[str, list[int]] = {}
        self._plain: dict[str, list[int]] = {}
        self._different: dict[str, str] = {}
        for index, name in enumerate(names):
            self._exact.setdefault(name, []).append(index)
            self._plain.setdefault(plain(name), []).append(index)

    def __bool__(self) -> bool:
        return bool(self.all)

    def find(self, name: str, where: str) -> int | None:
        """The index of a name, by its spelling or else by its `plain` form; None for a stranger.

        Args:
            name: The name that is looked for.
            where: Where it was read, for the message.

        Raises:
            CalibrationError: Several names fit.
        """
        found = self._exact.get(name)
        if found is None and plain(name):
            found = self._plain.get(plain(name))
        if not found:
            return None
        if len(found) > 1:
            fitting = ", ".join(f"{shown(self.all[i])} ({i})" for i in found[:3])
            raise CalibrationError(
                f"{where}: the class {shown(name)} can be any of {fitting}. Use a labels.csv with "
                "class indices, or give the classes different names."
            )
        (index,) = found
        if name != self.all[index]:
            self._different[name] = self.all[index]
        return index

    def note(self, where: str) -> tuple[str, ...]:
        """A sentence on the names that were found in another spelling, if there were any."""
        if not self._different:
            return ()
        pairs = [f"{shown(name)} is {shown(own)}" for name, own in self._different.items()]
        return (f"{where}: class names in another spelling were matched: {listed(pairs)}.",)


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """Which index each of a set's own class names has.

    Attributes:
        indices: The class index of each own name.
        classes: The class names by index.
        notes: What a user is to know of it.
    """

    indices: tuple[int, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def number(own: Sequence[str], known: Sequence[str], where: str) -> Numbering:
    """Give a set's own class names their indices.

    Names that are the model's have the model's indices. Where none is, they are numbered in their
    own order.

    Args:
        own: The set's names.
        known: The model's names by index, empty where they are not known.
        where: Where the set's names were read, for messages.

    Raises:
        CalibrationError: Some names are the model's and others are not, or two are the same class.
    """
    table = Names(known)
    found = [table.find(name, where) for name in own]
    strangers = [name for name, index in zip(own, found, strict=True) if index is None]
    if len(strangers) == len(own):
        return Numbering(indices=tuple(range(len(own))), classes=tuple(own))
    if strangers:
        # Numbering them in their own order would silently exchange classes.
        raise CalibrationError(
            f"{where} names {listed(map(shown, strangers))}, which the model does not know, beside "
            f"classes that it does. The model's classes are {listed(map(shown, known), 10)}."
        )
    indices = tuple(index for index in found if index is not None)
    first: dict[int, str] = {}
    for name, index in zip(own, indices, strict=True):
        if (other := first.setdefault(index, name)) != name:
            raise CalibrationError(
                f"{where} names {shown(other)} and {shown(name)}, which are both the model's class "
                f"{shown(known[index])}. Put the pictures into one of them."
            )
    return Numbering(indices=indices, classes=tuple(known), notes=table.note(where))


def counted_otherwise(names: Iterable[str]) -> bool:
    """Whether names are numbers whose order as text, which decides, is not that of the numbers."""
    texts = list(names)
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
        return False
    return [int(text) for text in texts] != sorted(int(text) for text in texts)
