"""Image sets: which pictures, with which labels, and proof that two sets are disjoint."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from gnet_opt import image_folder, labels_csv, texts
from gnet_opt.errors import CalibrationError
from gnet_opt.files import is_file, sha256_file, sha256_text
from gnet_opt.pictures import open_picture
from gnet_opt.printable import listed, shown

_TABLE = "labels.csv"


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Pictures in a fixed order, with labels where the set has them.

    Attributes:
        name: Where the set came from, for messages and the manifest.
        files: The picture files.
        labels: The class index of each file, or None for a set without labels.
        classes: Class names by index where folders or a `classes.txt` name them, else empty.
        notes: What a user is to know of how the set was read: what was passed over, and what was
            taken otherwise than it is written.
        known_hashes: SHA-256 by file, as far as they were computed; subsets share it.
    """

    name: str
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    known_hashes: dict[Path, str] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def open(cls, folder: Path | str, *, classes: Sequence[str] = ()) -> ImageSet:
        """Read an image set from a folder.

        Three layouts are known: `labels.csv` beside the pictures (`labels_csv.read`);
        ImageFolder, one folder a class, with subfolders or without, in torchvision's order; and a
        plain folder of pictures without labels. Where the set's own names (its folders, or
        `classes.txt`) are the model's, they get the model's indices; where they have nothing in
        common, they are numbered in their own order.

        Args:
            folder: The folder.
            classes: The model's class names by index, where they are known.

        Raises:
            CalibrationError: The folder does not exist, holds no picture, its labels are
                unreadable, some of its class names are the model's and others are not, or its
                folders are parts of a set (`train`, `val`) instead of classes.
        """
        if not str(folder):
            raise CalibrationError("The path of an image set is empty. Pass a folder of pictures.")
        folder = Path(folder)
        if not folder.is_dir():
            raise CalibrationError(
                f"{shown(folder)} is not a folder. Pass a folder of pictures (ImageFolder layout, "
                "labels.csv, or plain)."
            )
        passed = image_folder.PassedOver(folder)
        try:
            listing = image_folder.look(folder, passed)
        except OSError as error:
            raise CalibrationError(
                f"{shown(folder)} cannot be read ({error.strerror}). Pass another folder."
            ) from error
        own, notes = _listed_classes(folder / "classes.txt")
        # Windows does not tell Labels.csv from labels.csv.
        tables = sorted((name for name in listing.others if name.lower() == _TABLE), reverse=True)
        if tables:
            found = labels_csv.read(folder, folder / tables[0], own=own, known=classes)
        else:
            found = image_folder.read(folder, listing, passed, own=own, known=classes)
        return cls(
            name=_name(folder),
            files=found.files,
            labels=found.labels,
            classes=found.classes,
            notes=(*notes, *found.notes),
        )

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
        known = self.known_hashes
        try:
            for path in self.files:
                if path not in known:
                    known[path] = sha256_file(path)
        except OSError as error:
            raise CalibrationError(
                f"{shown(error.filename)} cannot be read ({error.strerror}). Remove or replace "
                "the file."
            ) from error
        return tuple(known[path] for path in self.files)

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

    def remarks(self, known: Sequence[str] = ()) -> tuple[str, ...]:
        """What a user is to know of the set, in sentences; every file is hashed for it.

        Beside `notes` that the set's class names are not the model's, so that only their order
        counts, and that a picture is there more than once.

        Args:
            known: The model's class names by index, where they are known.
        """
        found = list(self.notes)
        if known and self.classes and tuple(known) != self.classes:
            found.append(
                f"{self.name} names its classes ({shown(self.classes[0])}, ...) unlike the model "
                f"({shown(known[0])}, ...): they are taken in order."
            )
        if twice := self._copies():
            found.append(twice)
        return tuple(found)

    def _copies(self) -> str:
        """A sentence on pictures that are in the set more than once, by their content."""
        first: dict[str, int] = {}
        copies = [
            (first[digest], index)
            for index, digest in enumerate(self.hashes)
            if first.setdefault(digest, index) != index
        ]
        if not copies:
            return ""
        labels = self.labels or (0,) * len(self)
        # The most telling example is one whose labels contradict each other.
        contrary = [pair for pair in copies if labels[pair[0]] != labels[pair[1]]]
        one, other = (shown(self.files[index]) for index in (contrary or copies)[0])
        beyond = f"; {len(contrary)} of them have another label there" if contrary else ""
        return (
            f"{len(copies)} of {len(self)} pictures of {self.name} are copies of others in it, for "
            f"example {other} of {one}{beyond}. Each counts as often as it is there."
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
                f"({listed(map(shown, self.classes))}), but the model has {model or classes}, so "
                "an index would mean another class. Give the model a card with its labels, or the "
                "set a labels.csv with the model's class indices."
            )
        if self.labels and min(self.labels) == 1 and max(self.labels) == many:
            raise CalibrationError(
                f"The labels of {self.name} are 1 to {many}, but the model counts its classes "
                f"from 0 to {many - 1}. Subtract 1 from each label, or write class names."
            )
        for path, label in zip(self.files, self.labels, strict=True):
            if not 0 <= label < many:
                raise CalibrationError(
                    f"{shown(path)} has label {label}, but the model has "
                    f"{model or f'{classes} classes'} (0..{many - 1}). "
                    "Use labels of the model's own classes."
                )


def with_labels_of(images: ImageSet, classes: int) -> ImageSet:
    """A set, without its labels where they cannot be those of a model with so many classes.

    Nobody said that the labels of a calibration set are the model's own.
    """
    try:
        images.check_labels(classes)
    except CalibrationError:
        return replace(images, labels=None)
    return images


def check_disjoint(
    first: ImageSet,
    second: ImageSet,
    *,
    roles: tuple[str, str] = ("calibration", "evaluation"),
    why: str = "Accuracy measured on them would be too good.",
) -> None:
    """Prove by content that no picture is in both sets.

    Pictures are compared by the SHA-256 of their bytes, so that a copy under another name counts.

    Args:
        first: What a model learned or was calibrated from.
        second: What it is measured on.
        roles: What the two sets are for, for the message.
        why: Why they may not share a picture, a sentence for the message.

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
            f"for example {shown(one)} and {shown(other)}. {why} Pass sets without common pictures."
        )


def _listed_classes(listed: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The set's own class names in index order from a `classes.txt`, and notes on reading it."""
    if not is_file(listed):
        return (), ()
    lines, notes = texts.lines(listed)
    return tuple(name for line in lines if (name := line.strip())), notes


def _name(folder: Path) -> str:
    """The folder's name, for messages and manifests, whatever bytes it is made of."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "replace")
