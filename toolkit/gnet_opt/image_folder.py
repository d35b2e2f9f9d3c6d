"""Pictures in folders, in the order of torchvision's ImageFolder, and what is passed over there."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gnet_opt.class_names import Names, Numbering, counted_otherwise, number, plain
from gnet_opt.errors import CalibrationError
from gnet_opt.pictures import FORMATS
from gnet_opt.printable import listed, shown

SUFFIXES = frozenset(ending for endings in FORMATS.values() for ending in endings)
"""The endings of picture files, in lower case. torchvision's (`datasets.folder.IMG_EXTENSIONS`) are
among them."""

_QUIET = frozenset({".ds_store", ".gitignore", ".gitkeep", "desktop.ini", "thumbs.db"})
"""Files that file managers and git leave, in lower case; nobody takes them for pictures."""

_SYSTEM = frozenset(
    {"$recycle.bin", "@eadir", "__macosx", "lost+found", "system volume information"}
)
"""Folders that systems and archives leave, in lower case; never a class."""

_DESCRIPTIONS = frozenset(
    {"", ".csv", ".html", ".json", ".md", ".py", ".rst", ".sh", ".toml", ".txt", ".yaml", ".yml"}
)
"""Endings of files that describe a set, which may lie beside its classes or pictures."""

_TRAINING = frozenset({"train", "training"})
_OTHER_PARTS = frozenset({"eval", "evaluation", "test", "testing", "val", "valid", "validation"})


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a folder holds.

    Attributes:
        files: The picture files.
        labels: The class index of each, or None where there are no classes.
        classes: The class names by index, as far as they are known.
        notes: What a user is to know of it.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Listing:
    """What lies directly in a folder, each entry looked at once.

    Attributes:
        pictures: Names of picture files.
        folders: Names of folders, those that are links too.
        links: Names of those folders that are links.
        others: Names of files that are no pictures by their endings.
    """

    pictures: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)


class PassedOver:
    """Everything in a set that is not taken, by reason, to be told in one sentence."""

    def __init__(self, folder: Path) -> None:
        self._start = len(str(folder)) + 1
        self._endings: Counter[str] = Counter()
        self._entries: dict[str, list[str]] = {}

    def add(self, reason: str, path: str) -> None:
        """Note one entry, with the reason as what such entries are."""
        self._entries.setdefault(reason, []).append(path)

    def add_others(self, names: Iterable[str]) -> None:
        """Note files with endings of no picture."""
        self._endings.update(_ending(name) or "no ending" for name in names)

    def __str__(self) -> str:
        """How many of what, with examples; empty where nothing was passed over."""
        parts = []
        if self._endings:
            each = listed((f"{shown(end)} {n}" for end, n in self._endings.most_common()), 5)
            parts.append(f"files with endings of no picture: {self._endings.total()} ({each})")
        for reason, paths in self._entries.items():
            each = listed(shown(path[self._start :]) for path in sorted(paths))
            parts.append(f"{reason}: {len(paths)} ({each})")
        return "; ".join(parts)


def _ending(name: str) -> str:
    """A file name's ending with its dot, in lower case; quicker than `PurePath.suffix`."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def look(folder: Path, passed: PassedOver) -> Listing:
    """List a folder, links followed.

    Raises:
        OSError: The folder cannot be read.
    """
    found = Listing()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            lower = name.lower()
            if lower in _QUIET:
                continue
            if name.startswith("."):
                passed.add("hidden", entry.path)
                continue
            try:
                is_folder = entry.is_dir()
                is_file = not is_folder and entry.is_file()
            except OSError:  # a link to itself, or nothing that may be looked at
                passed.add("not readable", entry.path)
                continue
            if is_folder and lower in _SYSTEM:
                passed.add("of the system", entry.path)
            elif is_folder:
                found.folders.append(name)
                if entry.is_symlink():
                    found.links.add(name)
            elif is_file and _ending(lower) in SUFFIXES:
                found.pictures.append(name)
            elif is_file:
                found.others.append(name)
            elif entry.is_symlink():
                passed.add("links to nothing", entry.path)
            else:
                passed.add("no regular files", entry.path)
    return found


def _above(folder: Path) -> set[tuple[int, int]]:
    """A folder and those that it is in, to know a link back to one of them."""
    real = folder.resolve()
    status = [path.stat() for path in (real, *real.parents)]
    return {(one.st_dev, one.st_ino) for one in status}


def _pictures_below(top: Path, above: set[tuple[int, int]], passed: PassedOver) -> tuple[Path, ...]:
    """The pictures of a class, in its subfolders too, as torchvision's `make_dataset` orders them.

    That is `sorted(os.walk(top, followlinks=True))` with sorted names. A folder that is reached a
    second time through a link, and one that the set is in (`above`), is passed over, so that a
    circle of links ends.
    """
    found: list[tuple[str, list[str]]] = []
    links: list[Path] = []
    seen = set(above)
    folders = [top]
    while folders or links:
        # Links come last: a folder is taken where it really is.
        folder = folders.pop() if folders else links.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                passed.add("links to a folder that is there already", str(folder))
                continue
            seen.add((status.st_dev, status.st_ino))
            listing = look(folder, passed)
        except OSError:
            passed.add("not readable", str(folder))
            continue
        passed.add_others(listing.others)
        found.append((str(folder), sorted(listing.pictures)))
        for name in sorted(listing.folders, reverse=True):
            (links if name in listing.links else folders).append(folder / name)
        links.sort(reverse=True)
    return tuple(Path(folder, name) for folder, names in sorted(found) for name in names)


def read(
    folder: Path,
    listing: Listing,
    passed: PassedOver,
    *,
    own: Sequence[str] = (),
    known: Sequence[str] = (),
) -> Found:
    """Take the pictures of an ImageFolder, or of a plain folder.

    Args:
        folder: The folder.
        listing: What lies in it.
        passed: What is not taken; the list goes on here.
        own: The set's own class names in index order, where a `classes.txt` gives them.
        known: The model's class names by index, where they are known.

    Raises:
        CalibrationError: There is no picture, the folders are not classes but parts of a set, or
            some of them are the model's classes and others are not.
    """
    names = sorted(listing.folders)  # an empty class folder keeps its index
    above = _above(folder)
    pictures = {name: _pictures_below(folder / name, above, passed) for name in names}
    described = [n for n in listing.others if _ending(n) in _DESCRIPTIONS]
    passed.add_others(set(listing.others).difference(described))
    where = shown(folder)
    if not any(pictures.values()):
        if not listing.pictures:
            beside = f"; passed over: {passed}" if str(passed) else ""
            raise CalibrationError(
                f"{where} holds no picture ({', '.join(sorted(SUFFIXES))}{beside}). "
                "Pass a folder of pictures."
            )
        files = tuple(folder / name for name in sorted(listing.pictures))
        return Found(files=files, notes=_notes(folder, passed))
    _check_classes(folder, pictures, {plain(name) for name in (*own, *known)})
    for name in listing.pictures:
        passed.add("pictures in no class folder", str(folder / name))
    numbering = _number(folder, names, own, known)
    notes = numbering.notes
    if numbering.classes == tuple(names):
        notes = (*notes, *_wrapped(folder, pictures))
    notes = (*notes, *_notes(folder, passed))
    return Found(
        files=tuple(path for name in names for path in pictures[name]),
        labels=tuple(
            index
            for index, name in zip(numbering.indices, names, strict=True)
            for _ in pictures[name]
        ),
        classes=numbering.classes,
        notes=notes,
    )


def _number(
    folder: Path, names: Sequence[str], own: Sequence[str], known: Sequence[str]
) -> Numbering:
    """The class index of each folder: as its `classes.txt` says if that lists all of them."""
    where, beside = shown(folder), shown(folder / "classes.txt")
    table = Names(own)
    places = [table.find(name, where) for name in names]
    listed_all = [place for place in places if place is not None]
    if own and len(listed_all) == len(names):
        if len(set(listed_all)) < len(names):
            raise CalibrationError(
                f"Two folders of {where} are the same class of {beside}. Put the pictures into one."
            )
        whole = number(own, known, beside)
        indices = tuple(whole.indices[place] for place in listed_all)
        notes = (*table.note(where), *whole.notes)
        return Numbering(indices=indices, classes=whole.classes, notes=notes)
    found = number(names, known, where)
    notes = found.notes
    if own:
        stranger = names[places.index(None)]
        notes = (*notes, f"{beside} does not list {shown(stranger)}, so it is not used.")
    if found.classes == tuple(names) != tuple(known) and counted_otherwise(names):
        notes = (*notes, _order_of_numbers(folder, names))
    return replace(found, notes=notes)


def _check_classes(folder: Path, pictures: dict[str, tuple[Path, ...]], classes: set[str]) -> None:
    """Refuse folders that are parts of a set, and names that no list of classes can hold."""
    filled = [name for name, files in pictures.items() if files]
    parts = [
        name
        for name in filled
        if name.lower() in _TRAINING | _OTHER_PARTS and plain(name) not in classes
    ]
    # "train" alone among others can be a class: the vehicle.
    both = {name.lower() in _TRAINING for name in parts} == {True, False}
    if parts and (both or len(parts) == len(filled)):
        raise CalibrationError(
            f"{shown(folder)} holds {' and '.join(sorted(parts))}, which are parts of a set and "
            f"not classes. Pass one of them, such as {shown(folder / parts[0])}."
        )
    for name in pictures:
        if any(unicodedata.category(one) in ("Cc", "Cs") for one in name):
            raise CalibrationError(
                f"The class folder {shown(folder / name)} has a control character or a byte that "
                "is not UTF-8 in its name, so a list of classes cannot hold it. Rename it."
            )


def _order_of_numbers(folder: Path, names: Sequence[str]) -> str:
    pairs = listed((f"folder {name} is class {index}" for index, name in enumerate(names)), 4)
    return (
        f"The class folders of {shown(folder)} are numbers and are taken in the order of their "
        f"names as text, as torchvision's ImageFolder does: {pairs}. If the model counts "
        "otherwise, write the names in its order into a classes.txt beside the folders."
    )


def _wrapped(folder: Path, pictures: dict[str, tuple[Path, ...]]) -> tuple[str, ...]:
    """A sentence where one folder is around what look like the class folders."""
    if len(pictures) != 1:
        return ()
    ((name, files),) = pictures.items()
    parts = [path.relative_to(folder / name).parts for path in files]
    below = sorted({one[0] for one in parts if len(one) > 1})
    if len(below) < 2:
        return ()
    return (
        f"{shown(folder)} has one class, {shown(name)}, with pictures in "
        f"{listed(map(shown, below))}. If those are the classes, pass {shown(folder / name)}.",
    )


def _notes(folder: Path, passed: PassedOver) -> tuple[str, ...]:
    return (f"Passed over in {shown(folder)}: {passed}.",) if str(passed) else ()
