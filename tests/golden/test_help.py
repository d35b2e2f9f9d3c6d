"""What `--help` prints, word for word: a change shows in the diff of a commit.

`GNET_OPT_UPDATE_GOLDEN=1 python -m pytest tests/golden` writes the files anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gnet_opt.cli import base

HELP = Path(__file__).with_name("help")
COMMANDS = sorted(base.gnet_opt.commands)


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(
        base.gnet_opt, [*arguments, "--help"], prog_name="gnet-opt", terminal_width=100
    )
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", ["gnet-opt", *COMMANDS])
def test_help(command: str) -> None:
    text = printed(*([] if command == "gnet-opt" else [command]))
    path = HELP / f"{command}.txt"
    if os.environ.get("GNET_OPT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_there_is_no_help_of_a_command_that_is_gone() -> None:
    assert sorted(path.stem for path in HELP.glob("*.txt")) == sorted(["gnet-opt", *COMMANDS])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command: str) -> None:
    for parameter in base.gnet_opt.commands[command].params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            described = bool(parameter.help) or isinstance(parameter.type, click.Choice)
            assert described, f"{command} {parameter.opts[0]}"


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_mean_the_same_everywhere_are_everywhere(command: str) -> None:
    options = {
        flag for parameter in base.gnet_opt.commands[command].params for flag in parameter.opts
    }
    assert {"--json", "--verbose", "-v", "--quiet", "-q"} <= options
    if "--output" in options:
        assert "-o" in options
        assert "--force" in options
