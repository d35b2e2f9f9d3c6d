"""Where the command line writes: results to stdout, everything else to stderr.

All that is shown goes through here: names, notes, errors and log lines come from files and devices
of others, and none of their characters steers the terminal.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gnet_opt.files import dump_json
from gnet_opt.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

_FILE_WIDTH = 160
"""Width of tables that go to a file or a pipe, in characters."""

_PROGRESS = "GNET_OPT_PROGRESS"
"""Set to `lines` where the command runs for another machine, which reads its progress."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """How much to say, and in which form.

    Attributes:
        json: The result is one JSON document instead of tables.
        quiet: Nothing but results and errors.
        verbose: Facts of every stage, and tracebacks of errors.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def note(self, text: str) -> None:
        """Tell the user something beside the result; what begins with `Warning:` in bold."""
        if not self.quiet:
            style = "bold" if text.startswith("Warning:") else "dim"
            _console(stderr=True).print(text, style=style)

    def stderr(self) -> Console:
        """The console for what is shown while work goes on."""
        return _console(stderr=True)

    def result(self, value: Any, *renderables: Any) -> None:
        """Print a result: as JSON, or as what is given to show it."""
        if self.json:
            import click

            click.echo(dump_json(value), nl=False)
            return
        console = _console(stderr=False)
        for renderable in renderables:
            # Sentences are not broken: a path or a command in them is there to be copied.
            whole = isinstance(renderable, str)
            console.print(renderable, soft_wrap=whole)

    def progress(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The `Progress` of the command line: a bar on stderr, with the time left."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        label = printable(label)
        console = _console(stderr=True)
        if os.environ.get(_PROGRESS) == "lines":
            yield from _lines(items, label, total)
            return
        if self.quiet or not console.is_terminal:
            yield from items
            return
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=label)


def _lines(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    """One line on stderr for each item, for who follows from another machine."""
    import click

    for done, item in enumerate(items):
        click.echo(f"{label} {done + 1}" + (f"/{total}" if total else ""), err=True)
        yield item


def say(text: str) -> None:
    """Write a text to stderr as it is, but for control characters."""
    import click

    click.echo(printable(text), err=True)


@functools.cache
def _terminal() -> type[Console]:
    from rich.console import Console

    class Terminal(Console):
        """Every string of a table or of a sentence becomes text here, before it is laid out."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

    return Terminal


def _console(*, stderr: bool) -> Console:
    # Nothing in a text is a style or a picture, only what is given as such.
    console = _terminal()(
        stderr=stderr, soft_wrap=stderr, markup=False, emoji=False, highlight=False
    )
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console
