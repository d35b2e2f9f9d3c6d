from __future__ import annotations

import pytest

from gnet_opt.cli.console import Output


def test_a_warning_stands_out_from_the_other_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    Output().note("Warning: the top-1 is no better than guessing.")
    Output().note("Nothing was assumed.")
    warned, told = capsys.readouterr().err.splitlines()
    assert "\x1b[1m" in warned
    assert "\x1b[2m" in told
    Output(quiet=True).note("Warning: not now.")
    assert capsys.readouterr().err == ""
