"""The options that run a command on another machine, and what is shown of it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gnet_opt.cli import base
from gnet_opt.cli.console import Output, say

if TYPE_CHECKING:
    from gnet_opt.errors import GnetOptError
    from gnet_opt.remote import Device, Outcome, Report, Result, Work

    _Failure = tuple[Device, GnetOptError | None]

F = TypeVar("F", bound=Callable[..., Any])
Show = Callable[[Mapping[str, Any]], Sequence[Any]]
Files = Callable[[Mapping[str, Any]], Mapping[str, str]]

# fmt: off
_HERE = frozenset([
    "as_json", "check", "fleet", "force", "identity", "known_hosts", "on", "out", "python", "quiet",
    "verbose", "workdir",
])
# fmt: on
"""Names of parameters that are for this machine and not for the device."""

_BACKEND = "--backend"
"""The option of a command that names who runs the bundles, where it is not their own backend."""


@dataclass(frozen=True, kw_only=True)
class There:
    """Where a command is to run, as the user said it.

    Attributes:
        devices: The devices.
        fleet: They come from a file, and each gets a folder of its own for its results.
        check: Only look whether they could.
    """

    devices: tuple[Device, ...]
    fleet: bool
    check: bool

    def run(
        self,
        context: click.Context,
        *,
        out: Path | None,
        force: bool,
        output: Output,
        show: Show,
        files: Files,
        only_here: Sequence[str] = (),
    ) -> None:
        """Run the command of a context on the devices and print what they gave.

        Args:
            context: The command with its parameters; those that the user gave go to the device.
            out: The folder for the results, or None to only print them.
            force: Whether `out` may be replaced.
            output: Where to print.
            show: What prints a result file of the command.
            files: Gives the other files that show it, see `gnet_opt.remote.Work.shown`.
            only_here: Options that make no sense on a device, such as `--write`.

        Raises:
            ConfigError: One of those was given.
            GnetOptError: A device failed; the others have been told of first.
        """
        from gnet_opt import remote
        from gnet_opt.errors import ConfigError
        from gnet_opt.files import check_writable

        if out is not None and not self.check:
            check_writable(out, force=force, folder=True)
        work = replace(_work(context), shown=files)
        for word in only_here:
            if word in work.command:
                raise ConfigError(
                    f"{word} changes files, and with --on it would be those of a copy on the "
                    f"device: leave out {word}, or run the command on the device itself."
                )
        with _board(self.devices, output) as tell:
            if self.check:
                reports = remote.check(self.devices, work, tell)
            else:
                results = remote.run(self.devices, work, out, tell, apart=self.fleet)
        if self.check:
            self._print_reports(reports, output)
        else:
            self._print_results(results, out, output, show)

    def _print_reports(self, reports: Sequence[Result[Report]], output: Output) -> None:
        from gnet_opt.cli import render

        shown: list[Any] = []
        values = {}
        failures: list[_Failure] = []
        for result in reports:
            name, report = result.device.name, result.value
            values[name] = {"error": str(result.error)} if report is None else report.to_dict()
            error = result.error
            if report is not None:
                error = report.why_unfit(result.device.address.place)
                shown.append(render.facts({name: report.facts.to_dict()}))
                shown += [f"{name}: {note}" for note in report.notes]
                if error is None:
                    shown.append(f"{name} is ready. Nothing was copied, and nothing changed there.")
            failures.append((result.device, error))
        if not self.fleet and reports[0].error is not None:
            raise reports[0].error
        output.result(values if self.fleet else values[reports[0].device.name], *shown)
        self._raise(failures, output)

    def _print_results(
        self, results: Sequence[Result[Outcome]], out: Path | None, output: Output, show: Show
    ) -> None:
        if not self.fleet and results[0].error is not None:
            raise results[0].error
        shown: list[Any] = [_summary(results)] if self.fleet else []
        values = {}
        for result in results:
            document = None if result.value is None else result.value.document
            error = None if result.error is None else str(result.error)
            values[result.device.name] = {"error": error, "results": document}
            if document is not None:
                shown += [] if self.fleet else show(document)
                notes = document["environment"]["remote"]["notes"]
                shown += [f"{result.device.name}: {note}" for note in notes]
        if out is not None and any(result.value for result in results):
            shown.append(f"Written to {out}.")
        output.result(values if self.fleet else values[results[0].device.name]["results"], *shown)
        self._raise([(result.device, result.error) for result in results], output)

    def _raise(self, failures: Sequence[_Failure], output: Output) -> None:
        """Tell every failure, and end with one error if there are any."""
        from gnet_opt.errors import RemoteError

        failed = [(device, error) for device, error in failures if error is not None]
        if not failed:
            return
        if not self.fleet:
            raise failed[0][1]
        for device, error in failed:
            say(f"{device.name}: {error}")
        names = ", ".join(device.name for device, _ in failed)
        raise RemoteError(f"{len(failed)} of {len(failures)} devices failed: {names}.")


def remote_options(function: F) -> F:
    """Add the options, and gather them in one `There`, or None where the command runs here."""
    import functools

    @click.option("--on", metavar="URL", help="Run on a device: ssh://user@host[:port].")
    @click.option("--fleet", type=base.FOLDER, help="Run on all devices of a TOML file at once.")
    @click.option(
        "--check", is_flag=True, help="Only look whether the devices could; copy nothing."
    )
    @click.option("--identity", type=base.FOLDER, help="Private key; SSH's usual ones by default.")
    @click.option("--known-hosts", type=base.FOLDER, help="Host keys; SSH's usual by default.")
    @click.option("--python", help="Python of the device, with --on; python3 by default.")
    @click.option(
        "--workdir", default="", help="Folder of the device for our own; /var/tmp by default."
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        on: str | None,
        fleet: Path | None,
        check: bool,
        identity: Path | None,
        known_hosts: Path | None,
        python: str | None,
        workdir: str,
        **options: Any,
    ) -> Any:
        there = None
        if on is not None or fleet is not None:
            python = "python3" if python is None else python
            there = _there(on, fleet, identity, known_hosts, python, workdir, check)
        elif check or identity or known_hosts or workdir or python is not None:
            raise click.UsageError(
                "--check, --identity, --known-hosts, --python and --workdir go with --on or "
                "--fleet."
            )
        return function(*args, there=there, **options)

    return wrapper  # type: ignore[return-value]


def _there(
    on: str | None,
    fleet: Path | None,
    identity: Path | None,
    known_hosts: Path | None,
    python: str,
    workdir: str,
    check: bool,
) -> There:
    from gnet_opt.errors import ConfigError
    from gnet_opt.remote import Address, Device, read_fleet

    if on is not None and fleet is not None:
        raise ConfigError("--on names one device and --fleet a file with several: pass only one.")
    if workdir and not workdir.startswith("/"):
        raise ConfigError(f"--workdir {workdir!r} is not a path that begins with a slash.")
    address = Address(host="localhost") if on is None else Address.parse(on)
    device = Device(
        name=address.host,
        address=address,
        identity=identity,
        known_hosts=known_hosts,
        python=python,
        workdir=workdir,
    )
    devices = (device,) if fleet is None else tuple(read_fleet(fleet, device))
    return There(devices=devices, fleet=fleet is not None, check=check)


def _work(context: click.Context) -> Work:
    """The command as the device is to run it: what the user gave, with files to copy as paths."""
    from gnet_opt.bundle import Bundle
    from gnet_opt.remote import OUT, Work

    arguments: list[Any] = []
    options: list[Any] = []
    backends: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        given = context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if name in _HERE or not given or value is None:
            continue
        several = parameter.multiple or parameter.nargs != 1
        values = value if several else (value,)
        if isinstance(parameter, click.Argument):
            arguments += values
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            options.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in values:
                options += [parameter.opts[0], one if isinstance(one, Path) else str(one)]
    for bundle in (path for path in arguments if isinstance(path, Path)):
        opened = Bundle.open(bundle)
        opened.check()
        backends.append(opened.manifest["target"]["backend"])
    chosen = [after for word, after in itertools.pairwise(options) if word == _BACKEND]
    words = ("-m", "gnet_opt", str(context.command.name), *arguments, *options, "-o", OUT)
    return Work(command=words, backends=tuple(dict.fromkeys(chosen or backends)))


def _summary(results: Sequence[Result[Outcome]]) -> Any:
    """The figure of each scenario on each device, one a row."""
    from gnet_opt.cli import render

    rows = []
    for result in results:
        if result.value is None:
            rows.append((result.device.name, "failed", "", "", ""))
            continue
        for subject in result.value.document.get("subjects", ()):
            for scenario, found in subject["scenarios"].items():
                metric = found["metric"]
                figure = "" if metric["value"] is None else f"{metric['value']:.2f}"
                rows.append((result.device.name, subject["name"], scenario, metric["name"], figure))
    columns = ("device", "subject", "scenario", "figure", "value")
    return render.listing("devices", columns, rows)


@contextlib.contextmanager
def _board(devices: Sequence[Device], output: Output) -> Iterator[Callable[[Device, str], None]]:
    """One line a device that tells what it does: rewritten on a terminal, else printed anew."""
    from rich.live import Live
    from rich.table import Table

    console = output.stderr()
    latest = dict.fromkeys((device.name for device in devices), "connecting")
    if output.quiet:
        yield lambda device, text: None
        return
    if not console.is_terminal:

        def note(device: Device, text: str) -> None:
            if latest[device.name] != text:
                latest[device.name] = text
                output.note(f"{device.name}: {text}")

        yield note
        return
    began = time.monotonic()

    def grid() -> Table:
        made = Table.grid(padding=(0, 2))
        seconds = f"{time.monotonic() - began:.0f} s"
        for name, text in latest.items():
            made.add_row(name, text, seconds)
        return made

    with Live(get_renderable=grid, console=console, refresh_per_second=2, transient=True):
        yield lambda device, text: latest.update({device.name: text})
