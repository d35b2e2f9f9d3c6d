"""The command group, and the options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gnet_opt import __version__
from gnet_opt.cli.console import Output

F = TypeVar("F", bound=Callable[..., Any])


class _Path(click.Path):
    """A path; an empty text, as an unset variable of a shell gives it, is none."""

    def convert(self, value: Any, parameter: Any, context: Any) -> Any:
        if value == "":
            self.fail("the path is empty.", parameter, context)
        return super().convert(value, parameter, context)


FOLDER = _Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gnet-opt")
def gnet_opt() -> None:
    """From a trained GoogLeNet to a verified INT8 bundle for one edge device."""


def common(function: F) -> F:
    """Add the options that mean the same everywhere, and gather them in one `Output`."""
    import functools

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("-v", "--verbose", is_flag=True, help="Print all facts, and tracebacks.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but results and errors.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, verbose: bool, quiet: bool, **options: Any) -> Any:
        output = Output(json=as_json, quiet=quiet, verbose=verbose)
        return function(*args, output=output, **options)

    return wrapper  # type: ignore[return-value]


def output_option(required: bool, text: str) -> Callable[[F], F]:
    """The option `-o/--output`, with the help text of a command."""
    return click.option("-o", "--output", "out", type=FOLDER, required=required, help=text)


force = click.option("--force", is_flag=True, help="Replace what is there.")
threads = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads; the runtime's own choice by default."
)
