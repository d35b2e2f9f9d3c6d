"""How long work tells of its progress without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Called as `progress(items, "what is done")`; yields the items and shows how far it is."""

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """Yield each of `items`; `total` is their number where `len(items)` does not tell."""
        ...


def silent(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The `Progress` that shows nothing, for use as a library."""
    yield from items
