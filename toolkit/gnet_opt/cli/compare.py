"""`gnet-opt compare` and `gnet-opt report`: what the files of `gnet-opt bench` say."""

from __future__ import annotations

import re
from pathlib import Path

import click

from gnet_opt.cli import base
from gnet_opt.cli.base import gnet_opt
from gnet_opt.cli.console import Output

# As `gnet_opt.bench.compare.CONDITIONS`, which is not imported for --help.
_CONDITIONS = (
    "affinity",
    "architecture",
    "batch",
    "board",
    "constraint",
    "cores",
    "cpu",
    "governors",
    "instructions",
    "latency-bound",
    "threads",
    "turbo",
)


def _percent(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A share from a text such as `5%`, `5 %` or `5`."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%?", value.strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is no percentage. Write it as 5%.")
    return float(match[1]) / 100


@gnet_opt.command()
@click.argument("a", metavar="A.json", type=base.FOLDER)
@click.argument("b", metavar="B.json", type=base.FOLDER)
@click.option(
    "--fail-if-slower",
    "limit",
    callback=_percent,
    metavar="PERCENT",
    help="Exit with 8 where B is slower beyond the noise, and by more than this.",
)
@click.option(
    "--match",
    type=click.Choice(["name", "index"]),
    default="name",
    show_default=True,
    help="Which subjects belong together.",
)
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="DIFFERENCE",
    type=click.Choice(_CONDITIONS),
    help="A condition that may differ, by the name in the refusal; may be repeated.",
)
@click.option(
    "--drift",
    callback=_percent,
    default=None,
    show_default="2%, and down to 1% the more a control load explains",
    metavar="PERCENT",
    help="How far the level of a run moves by itself: its standard deviation.",
)
@base.common
def compare(
    a: Path,
    b: Path,
    limit: float | None,
    match: str,
    allowed: tuple[str, ...],
    drift: float | None,
    output: Output,
) -> None:
    """Say whether B is equal to A, faster or slower, each beyond the noise of the two runs.

    A.json and B.json are the results.json of two `gnet-opt bench` runs. Runs that were measured
    under different conditions are refused.
    """
    from gnet_opt.bench.compare import compare as compare_runs
    from gnet_opt.bench.results_file import read
    from gnet_opt.cli import render
    from gnet_opt.errors import GateFailedError

    found = compare_runs(
        read(a),
        read(b),
        match="index" if match == "index" else "name",
        allowed=allowed,
        drift=drift,
    )
    slower = [] if limit is None else found.slower_than(limit)
    document = {**found.to_dict(), "limit": limit, "ok": not slower}
    output.result(document, *render.compared_runs(found))
    if slower:
        which = "; ".join(
            f"{row.subject}, {row.scenario}: {100 * (row.ratio.value - 1):+.1f} % "
            f"[{100 * (row.ratio.low - 1):+.1f}, {100 * (row.ratio.high - 1):+.1f}]"
            for row in slower
        )
        raise GateFailedError(
            f"B is slower than A by more than {100 * (limit or 0):g} %: {which}. Measure once more "
            "to be sure, then look at what differs."
        )


@gnet_opt.command()
@click.argument("files", metavar="RESULTS.json...", nargs=-1, required=True, type=base.FOLDER)
@base.output_option(False, "The HTML file; report.html beside the first results by default.")
@base.force
@base.common
def report(files: tuple[Path, ...], out: Path | None, force: bool, output: Output) -> None:
    """Write a page that shows the results of one or more `gnet-opt bench` runs.

    The page is one HTML file without scripts, and loads nothing from anywhere.
    """
    from gnet_opt.bench.report import render
    from gnet_opt.bench.results_file import read
    from gnet_opt.files import check_writable, write_text

    documents = [read(path) for path in files]
    where = files[0].with_name("report.html") if out is None else out
    check_writable(where, force=force)
    write_text(where, render(documents))
    output.result({"report": str(where), "results": [str(path) for path in files]}, str(where))
