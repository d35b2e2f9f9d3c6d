from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from gnet_opt.cli import base, remote_options
from gnet_opt.cli.console import Output
from gnet_opt.cli.remote_options import There
from gnet_opt.errors import ConfigError
from gnet_opt.remote import OUT


@click.command(name="measure")
@click.argument("names", nargs=-1)
@click.option("--scenario", "scenarios", multiple=True, default=["one"])
@click.option("--seed", type=int, default=0)
@click.option("--seconds", type=float, default=1.0)
@click.option("--cpus")
@click.option("--sweep", is_flag=True)
@click.option("--warm/--cold", default=True)
@click.option("--backend", "backends", multiple=True)
@click.option("--images", type=base.FOLDER)
@base.threads
@remote_options.remote_options
@base.output_option(False, "Folder.")
@base.force
@base.common
def measure(there: There | None, out: Path | None, output: Output, **options: Any) -> None:
    context = click.get_current_context()
    context.obj.append((there, remote_options._work(context)))


def called(*arguments: str | Path) -> tuple[There | None, Any]:
    calls: list[tuple[There | None, Any]] = []
    done: Result = CliRunner().invoke(
        measure, [str(word) for word in arguments], obj=calls, standalone_mode=False
    )
    if done.exception is not None:
        raise done.exception
    (call,) = calls
    return call


def test_without_them_a_command_runs_here() -> None:
    there, _ = called("a")
    assert there is None


def test_what_the_user_gave_goes_to_the_device() -> None:
    _, work = called(
        *("a", "--seed", "-1", "--scenario", "x", "--scenario", "y", "--sweep", "--cold"),
        *("--threads", "2", "--images", "my pictures", "--cpus", "0-1", "--backend", "openvino"),
        *("--on", "ssh://nano", "--python", "python3.12", "--identity", "key", "--workdir", "/d"),
        *("--known-hosts", "hosts", "-o", "out here", "--force", "--json", "--verbose", "--quiet"),
        *("--check", "--seconds", "0.5"),
    )
    assert work.command[:4] == ("-m", "gnet_opt", "measure", "a")
    assert work.command[-2:] == ("-o", OUT)
    words = [str(word) for word in work.command[4:-2]]
    assert " ".join(words) == (
        "--scenario x --scenario y --seed -1 --seconds 0.5 --cpus 0-1 --sweep --cold "
        "--backend openvino --images my pictures --threads 2"
    )
    assert work.command[words.index("my pictures") + 4] == Path("my pictures")
    assert work.backends == ("openvino",)


def test_what_the_user_left_out_is_left_to_the_device() -> None:
    _, work = called("a", "--on", "ssh://nano")
    assert work.command == ("-m", "gnet_opt", "measure", "a", "-o", OUT)


def test_one_device() -> None:
    there, _ = called("a", "--on", "ssh://me@nano:2222", "--python", "/py", "--workdir", "/data")
    assert there is not None and not there.fleet and not there.check
    (device,) = there.devices
    assert (device.name, device.address.port, device.python) == ("nano", 2222, "/py")
    assert device.workdir == "/data"


def test_a_fleet(tmp_path: Path) -> None:
    fleet = tmp_path / "devices.toml"
    fleet.write_text('[[device]]\nname = "one"\nurl = "ssh://nano"\n')
    there, _ = called("a", "--fleet", fleet, "--check", "--python", "/py")
    assert there is not None and there.fleet and there.check
    assert [(device.name, device.python) for device in there.devices] == [("one", "/py")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "nano"], "does not begin with ssh://"),
        (["--on", "ssh://a", "--fleet", "x.toml"], "pass only one"),
        (["--on", "ssh://a", "--workdir", "here"], "begins with a slash"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        called("a", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--check"],
        ["--identity", "key"],
        ["--known-hosts", "h"],
        ["--workdir", "/d"],
        ["--python", "python3"],
    ],
)
def test_they_need_a_device(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError, match="go with --on or --fleet"):
        called("a", *arguments)


def test_options_that_change_files_stay_here() -> None:
    there, _ = called("a", "--on", "ssh://nano", "--sweep")
    assert there is not None
    context = click.Context(measure, info_name="measure")
    with context:
        measure.parse_args(context, ["a", "--sweep", "--on", "ssh://nano"])
        with pytest.raises(ConfigError, match="--sweep changes files"):
            there.run(
                context,
                out=None,
                force=False,
                output=Output(quiet=True),
                show=lambda document: [],
                files=lambda document: {},
                only_here=["--sweep"],
            )


FORWARDED = {
    *("backend_names", "bundles", "cpus", "images", "keep", "latency_bound", "memory", "rounds"),
    *("scenarios", "seconds", "seed", "soak", "sweep", "threads"),
}


def test_every_option_is_for_here_or_for_the_device() -> None:
    """A new option has to be put in one of the two sets."""

    @click.command
    @remote_options.remote_options
    @base.output_option(False, "Folder.")
    @base.force
    @base.common
    def only_here(**options: Any) -> None: ...

    assert {parameter.name for parameter in only_here.params} == remote_options._HERE
    names = {str(parameter.name) for parameter in base.gnet_opt.commands["bench"].params}
    assert names - remote_options._HERE == FORWARDED
