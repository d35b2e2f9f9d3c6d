"""Image sets: which pictures, with which labels, and proof that two sets are disjoint."""

from __future__ import annotations

import csv
import io
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gnet_opt.errors import CalibrationError
from gnet_opt.files import is_file, sha256_file, sha256_text
from gnet_opt.pictures import open_picture

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Pictures in a fixed order, with labels where the set has them.

    Attributes:
        name: Where the set came from, for messages and the manifest.
        files: The picture files.
        labels: The class index of each file, or None for a set without labels.
        classes: Class names by index where folders or a `classes.txt` name them, else empty.
    """

    name: str
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def open(cls, folder: Path, *, classes: Sequence[str] = ()) -> ImageSet:
        """Read an image set from a folder.

        Three layouts are known: `labels.csv` with the columns `file,label` beside the pictures
        (a label is a class index, or a class name where `classes` or `classes.txt` lists the
        names); ImageFolder, one folder a class; and a plain folder of pictures without labels.
        Where the set's own names (its folders, or `classes.txt`) are the model's, they get the
        model's indices; where they have nothing in common, they are numbered in their own order.

        Args:
            folder: The folder.
            classes: The model's class names by index, where they are known.

        Raises:
            CalibrationError: The folder does not exist, holds no picture, its labels are
                unreadable, or some of its class names are the model's and others are not.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CalibrationError(
                f"{folder} is not a folder. Pass a folder of pictures (ImageFolder layout, "
                "labels.csv, or plain)."
            )
        known = tuple(classes)
        if (folder / "labels.csv").is_file():
            return _open_csv(folder, known)
        # An empty class folder keeps its index; a hidden folder, of thumbnails say, is no class.
        subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        if any(_pictures(subfolder) for subfolder in subfolders):
            return _open_image_folder(folder, subfolders, known)
        files = _pictures(folder)
        if not files:
            raise CalibrationError(
                f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}). "
                "Pass a folder of pictures."
            )
        return cls(name=_name(folder), files=files)

    def sample(self, count: int | None, seed: int) -> ImageSet:
        """A random subset of `count` pictures in the set's order, the same for the same seed."""
        if count is None or count >= len(self):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self)), count))
        return self.take(chosen)

    def spread(self, count: int) -> ImageSet:
        """At most `count` pictures, evenly over the set."""
        count = min(count, len(self))
        return self.take([index * len(self) // count for index in range(count)])

    def varied(self, count: int, seed: int) -> ImageSet:
        """At most `count` images, of as many classes as possible and from all over the set.

        With labels the classes take turns, in an order by the seed; without, one image comes from
        each of `count` equal parts of the set. Which one of its class or part, the seed decides.
        Any beginning of the result is spread as widely.
        """
        count = min(count, len(self))
        chance = random.Random(seed)
        if self.labels is None:
            starts = [index * len(self) // count for index in range(count)]
            ends = [*starts[1:], len(self)]
            chosen = [chance.randrange(*part) for part in zip(starts, ends, strict=True)]
            return self.take(chance.sample(chosen, count))
        of_class: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            of_class.setdefault(label, []).append(index)
        queues = [chance.sample(indices, len(indices)) for indices in of_class.values()]
        chance.shuffle(queues)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
        return self.take([index for index in turns if index is not None][:count])

    def take(self, indices: Sequence[int]) -> ImageSet:
        """The pictures at `indices`."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        return replace(self, files=tuple(self.files[i] for i in indices), labels=labels)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of each file's bytes, in the order of `files`."""
        try:
            return tuple(sha256_file(path) for path in self.files)
        except OSError as error:
            raise CalibrationError(
                f"{error.filename} cannot be read ({error.strerror}). Remove or replace the file."
            ) from error

    @cached_property
    def digest(self) -> str:
        """One SHA-256 for the whole set: contents, order and labels, not file names."""
        labels = self.labels if self.labels is not None else ("",) * len(self)
        return sha256_text(
            "\n".join(f"{h} {label}" for h, label in zip(self.hashes, labels, strict=True))
        )

    def check_readable(self) -> None:
        """Read the head of every picture, so that a bad file is found before long work.

        Raises:
            CalibrationError: A file cannot be read as a picture.
        """
        for path in self.files:
            with open_picture(path):
                pass

    def note_names(self, known: Sequence[str]) -> str:
        """A sentence when the set's class names are not the model's, so that only order counts."""
        if not known or not self.classes or tuple(known) == self.classes:
            return ""
        return (
            f"{self.name} names its classes ({self.classes[0]}, ...) unlike the model "
            f"({known[0]}, ...): they are taken in order."
        )

    def check_labels(self, classes: int) -> None:
        """Require labels, all of them below `classes`.

        Args:
            classes: The outputs of the model; with one it tells two classes apart, 0 and 1.

        Raises:
            CalibrationError: There are no labels, one is out of range, or the set names another
                number of classes, so that its indices would mean other classes than the model's.
        """
        if self.labels is None:
            raise CalibrationError(
                f"The image set {self.name} has no labels, and accuracy needs them. Use one "
                "folder a class, or a labels.csv with the columns file,label."
            )
        many, model = (2, "one output for two classes") if classes == 1 else (classes, "")
        if self.classes and len(self.classes) != many:
            raise CalibrationError(
                f"The image set {self.name} names {len(self.classes)} classes "
                f"({', '.join(self.classes[:3])}, ...), but the model has {model or classes}, so "
                "an index would mean another class. Give the model a card with its labels, or the "
                "set a labels.csv with the model's class indices."
            )
        for path, label in zip(self.files, self.labels, strict=True):
            if not 0 <= label < many:
                raise CalibrationError(
                    f"{path} has label {label}, but the model has {model or f'{classes} classes'} "
                    f"(0..{many - 1}). Use labels of the model's own classes."
                )


def check_disjoint(
    first: ImageSet, second: ImageSet, *, roles: tuple[str, str] = ("calibration", "evaluation")
) -> None:
    """Prove by content that no picture is in both sets.

    Pictures are compared by the SHA-256 of their bytes, so that a copy under another name counts.

    Args:
        first: What a model learned or was calibrated from.
        second: What it is measured on.
        roles: What the two sets are for, for the message.

    Raises:
        CalibrationError: At least one picture is in both.
    """
    seen = dict(zip(first.hashes, first.files, strict=True))
    shared = [
        (seen[digest], path)
        for digest, path in zip(second.hashes, second.files, strict=True)
        if digest in seen
    ]
    if shared:
        one, other = shared[0]
        raise CalibrationError(
            f"{len(shared)} of {len(second)} {roles[1]} pictures are {roles[0]} pictures too, "
            f"for example {one} and {other}. Accuracy measured on them would be too good; "
            "pass sets without common pictures."
        )


def _pictures(folder: Path) -> tuple[Path, ...]:
    return tuple(
        sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    )


def _read_text(path: Path) -> str:
    try:
        # Spreadsheets put a byte order mark in front.
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _open_csv(folder: Path, known: tuple[str, ...]) -> ImageSet:
    table = folder / "labels.csv"
    own = _listed_classes(folder)
    indices, names = _number(own, known, folder / "classes.txt") if own else ((), known)
    labels: dict[Path, int] = {}
    for line, row in _rows(table):
        where = f"{table}, line {line}"
        path = folder / (row["file"] or "").strip()
        if not is_file(path):
            raise CalibrationError(f"{where}: {path} does not exist. Correct the column file.")
        if path in labels:
            raise CalibrationError(f"{where}: {path} is listed twice. Remove one of the lines.")
        label = _label((row["label"] or "").strip(), own or known, where)
        labels[path] = indices[label] if 0 <= label < len(indices) else label
    if not labels:
        raise CalibrationError(f"{table} lists no picture. Add rows file,label.")
    return ImageSet(
        name=_name(folder), files=tuple(labels), labels=tuple(labels.values()), classes=names
    )


def _listed_classes(folder: Path) -> tuple[str, ...]:
    """The set's own class names in index order, from `classes.txt`; empty where there is none."""
    listed = folder / "classes.txt"
    if not listed.is_file():
        return ()
    return tuple(line.strip() for line in _read_text(listed).splitlines() if line.strip())


def _rows(table: Path) -> list[tuple[int, dict[str, str | None]]]:
    """The rows of a labels.csv with their line numbers."""
    reader = csv.DictReader(io.StringIO(_read_text(table), newline=""))
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows: list[tuple[int, dict[str, str | None]]] = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise CalibrationError(f"{table}, line {reader.line_num}: {error}.") from error
    if not {"file", "label"} <= set(reader.fieldnames):
        raise CalibrationError(f"{table} needs a header with the columns file and label.")
    return rows


def _label(text: str, names: tuple[str, ...], where: str) -> int:
    if text in names:
        return names.index(text)
    if text.isascii() and text.removeprefix("-").isdigit():
        return int(text)
    raise CalibrationError(
        f"{where}: the label {text!r} is neither a class index nor a known class name."
    )


def _open_image_folder(folder: Path, subfolders: list[Path], known: tuple[str, ...]) -> ImageSet:
    found = tuple(path.name for path in subfolders)
    own = _listed_classes(folder)
    if own and set(found) <= set(own):
        numbers, names = _number(own, known, folder / "classes.txt")
        indices = tuple(numbers[own.index(name)] for name in found)
    else:
        indices, names = _number(found, known, folder)
    files: list[Path] = []
    labels: list[int] = []
    for index, subfolder in zip(indices, subfolders, strict=True):
        pictures = _pictures(subfolder)
        files.extend(pictures)
        labels.extend([index] * len(pictures))
    return ImageSet(name=_name(folder), files=tuple(files), labels=tuple(labels), classes=names)


def _number(
    own: tuple[str, ...], known: tuple[str, ...], where: Path
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The class index of each of a set's own names, and the names by index."""
    strangers = [name for name in own if name not in known]
    if len(strangers) == len(own):
        return tuple(range(len(own))), own
    if strangers:
        # Numbering them in their own order would silently exchange classes.
        raise CalibrationError(
            f"{where} names {', '.join(strangers[:3])}, which the model does not know, beside "
            f"classes that it does. The model's classes are {', '.join(known[:10])}."
        )
    return tuple(known.index(name) for name in own), known


def _name(folder: Path) -> str:
    """The folder's name, for messages and manifests, whatever bytes it is made of."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "replace")
