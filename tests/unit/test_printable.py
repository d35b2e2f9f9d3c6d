"""No text of a file or a device reaches the terminal as it is."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnet_opt import cli
from gnet_opt.cli import render, run
from gnet_opt.cli.console import Output, say
from gnet_opt.errors import ConfigError, GnetOptError, RemoteError
from gnet_opt.files import dump_json
from gnet_opt.printable import LONGEST, one_line, printable, printable_json

HOSTILE = "a\x1b]0;title\x07b\x9b31mc\u202ed\u2066e\x00f\ud800g\rh\x7f"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

texts = st.text(
    st.one_of(st.characters(exclude_categories=()), st.sampled_from(sorted(set(HOSTILE)))),
    max_size=40,
)


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert printable(HOSTILE) == (r"a\x1b]0;title\x07b\x9b31mc\u202ed\u2066e\x00f\ud800g\rh\x7f")
    assert printable("Ärger\twith 日本\r\nמים 🙂") == "Ärger\twith 日本\nמים 🙂"


@given(texts)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text)
    assert not OBEYED.search(shown)
    assert printable(shown) == shown
    shown.encode()
    assert "\n" not in one_line(text)


@given(st.dictionaries(texts, texts))
def test_json_says_the_same_with_escapes(value: dict[str, str]) -> None:
    document = dump_json(value)
    assert not OBEYED.search(document)
    document.encode()
    assert json.loads(document) == value
    assert printable_json(document) == document


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    error = ConfigError(f"card.toml: crop = {'x/' * 6000!r} is no number. Write a whole number.")
    shown = str(error)
    assert len(shown) < LONGEST + 60
    assert shown.startswith("card.toml: crop = 'x/x/")
    assert " characters left out] " in shown
    assert shown.endswith("is no number. Write a whole number.")
    assert str(GnetOptError("x" * LONGEST)) == "x" * LONGEST


def test_an_error_is_one_line_and_lists_its_points() -> None:
    assert str(ConfigError("weights = a\nb\x1b[2J")) == r"weights = a\nb\x1b[2J"
    assert str(RemoteError("It cannot:", "no\x1b", "one")) == "It cannot:\n  - no\\x1b\n  - one"
    assert str(GnetOptError()) == ""


def shown_by(*renderables: object) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        Output().result(None, *renderables)
        for renderable in renderables:
            if isinstance(renderable, str):
                Output().note(renderable)
                say(renderable)
    return out.getvalue(), err.getvalue()


@given(texts)
def test_every_way_to_the_terminal_is_covered(text: str) -> None:
    made = (
        render.table(text, (text, text), [(text, text)]),
        render.listing(text, (text,), [(text,)]),
    )
    for shown in shown_by(text, *made, render.facts({text: {text: text}})):
        assert not OBEYED.search(shown)


def test_a_text_is_no_style_and_no_picture() -> None:
    text = "[/nothing] [bold]:smile:"
    for shown in shown_by(text, render.table(text, (text,), [(text,)])):
        assert text in shown
    out, _ = shown_by(render.table(text, (text,), [(text,)]))
    assert out.count(text) == 3


@pytest.mark.parametrize("setting", ["lines", ""])
def test_progress_is_covered(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNET_OPT_PROGRESS", setting)
    if not setting:
        monkeypatch.setenv("FORCE_COLOR", "1")
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert list(Output().progress([1], HOSTILE)) == [1]
    assert printable(HOSTILE) in err.getvalue()
    assert "\x07" not in err.getvalue() and "\u202e" not in err.getvalue()


@pytest.mark.parametrize(
    "arguments", [["quantize", "--\x1b[2J"], ["\x1b[2J"], ["inspect", "\x1b[2J.onnx"]]
)
def test_what_was_typed_is_covered(arguments: list[str]) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert run(arguments) in (2, 4)
    assert r"\x1b[2J" in err.getvalue()
    assert not OBEYED.search(err.getvalue())


def test_a_traceback_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise ValueError(HOSTILE)

    monkeypatch.setattr(cli, "run", broken)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            cli.main([])
        except ValueError as error:
            sys.excepthook(ValueError, error, error.__traceback__)
    assert err.getvalue().endswith(f"ValueError: {printable(HOSTILE)}\n")
