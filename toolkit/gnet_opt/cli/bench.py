"""`gnet-opt bench`: its options, and what it writes."""

from __future__ import annotations

from pathlib import Path

import click

from gnet_opt.cli import base
from gnet_opt.cli.base import gnet_opt
from gnet_opt.cli.console import Output
from gnet_opt.cli.remote_options import There, remote_options

# As `gnet_opt.bench.scenarios.SCENARIOS`, which is not imported for --help.
_SCENARIOS = ("single-stream", "multi-stream", "offline", "server")


@gnet_opt.command()
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=base.FOLDER)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice([*_SCENARIOS, "all"]),
    default=["single-stream"],
    show_default=True,
    help="What to measure, after MLPerf; may be repeated.",
)
@click.option(
    "--backend",
    "backend_names",
    multiple=True,
    metavar="NAME",
    help="Who runs it, each bundle's own backend by default; may be repeated.",
)
@base.threads
@click.option("--cpus", metavar="LIST", help="CPUs to run on, such as 0-3,6.")
@click.option("--memory", metavar="SIZE", help="Memory that a process may have, such as 512M.")
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Least duration of a turn.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Turns of each in each scenario, with new processes.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the order of turns and of arrivals."
)
@click.option(
    "--latency-bound",
    type=click.FloatRange(0, min_open=True),
    metavar="MS",
    help="Of the server scenario; four times p90 of the slowest by default.",
)
@click.option(
    "--images",
    type=base.FOLDER,
    help="Pictures to go from file to result; the golden ones as JPEG by default.",
)
@click.option("--soak", metavar="DURATION", help="Run each on and on as well, for 90s, 10m or 1h.")
@click.option("--sweep", is_flag=True, help="Find the best threads, streams and batch as well.")
@click.option(
    "--write", "keep", is_flag=True, help="Note what --sweep finds in the bundle's manifest."
)
@base.output_option(False, "Folder for results.json, results.csv and report.html.")
@remote_options
@base.force
@base.common
def bench(
    bundles: tuple[Path, ...],
    scenarios: tuple[str, ...],
    backend_names: tuple[str, ...],
    threads: int | None,
    cpus: str | None,
    memory: str | None,
    seconds: float,
    rounds: int,
    seed: int,
    latency_bound: float | None,
    images: Path | None,
    soak: str | None,
    sweep: bool,
    keep: bool,
    out: Path | None,
    there: There | None,
    force: bool,
    output: Output,
) -> None:
    """Measure BUNDLE, and more than one side by side, on this machine or over SSH on a device.

    Each runs in a process of its own, new in each round; they take turns, and the first is what the
    others are compared with.
    """
    from gnet_opt import benchmark
    from gnet_opt.bench import limits
    from gnet_opt.bench.session import Plan
    from gnet_opt.bench.soak import parse_duration
    from gnet_opt.cli import bench_tables
    from gnet_opt.errors import ConfigError
    from gnet_opt.files import check_writable

    wanted = _SCENARIOS if "all" in scenarios else tuple(s for s in _SCENARIOS if s in scenarios)
    plan = Plan(
        scenarios=wanted,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        latency_bound_ms=latency_bound,
        threads=threads,
        soak=0.0 if soak is None else parse_duration(soak),
        constraint=limits.Constraint(
            cpus=None if cpus is None else limits.parse_cpus(cpus),
            memory_bytes=None if memory is None else limits.parse_size(memory),
        ),
    )
    if there is not None:
        there.run(
            click.get_current_context(),
            out=out,
            force=force,
            output=output,
            show=bench_tables.shown,
            files=benchmark.report_of,
            only_here=["--write"],
        )
        return
    if out is not None:
        check_writable(out, force=force, folder=True)
    if keep and (not sweep or backend_names):
        raise ConfigError(
            "--write notes in each bundle what --sweep finds for its own backend: pass --sweep, "
            "too, and leave out --backend."
        )
    results = benchmark.bench(
        bundles,
        plan,
        backend_names=backend_names,
        images=images,
        sweep=sweep,
        progress=output.progress,
    )
    if out is not None:
        benchmark.write(results, out)
    if keep:
        for folder, subject in zip(bundles, results.subjects, strict=True):
            benchmark.note_best(folder, subject)
    document = results.to_dict()
    shown = bench_tables.shown(document)
    if out is not None:
        shown.append(f"Written: {', '.join(str(path) for path in sorted(out.iterdir()))}")
    output.result(document, *shown)
