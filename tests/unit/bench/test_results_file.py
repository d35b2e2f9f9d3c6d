"""Result files from outside: what is read, and how everything else is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import result_documents as documents
from gnet_opt.bench import report, results_file
from gnet_opt.errors import ConfigError

FULL = documents.full()


def written(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "results.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert results_file.read(written(tmp_path, FULL)) == FULL


def set_at(value: Any, path: str, new: Any) -> Any:
    """A copy in which the value at a dotted path is another one; `...` for none at all."""
    changed = copy.deepcopy(value)
    *parents, last = path.split("/")
    inside = changed
    for key in parents:
        inside = inside[int(key)] if key.isdecimal() else inside[key]
    if new is ...:
        del inside[last]
    else:
        inside[int(last) if last.isdecimal() else last] = new
    return changed


SINGLE = "subjects/0/scenarios/single-stream"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("settings", ..., ".settings is missing. Was the file cut off or edited?"),
        ("subjects", [], ".subjects must be a list of at least 1, not []."),
        ("subjects/0/name", 7, ".subjects[0].name must be a text, not 7."),
        ("subjects/0/name", "\ud800", ".subjects[0].name must be a text, not '\\ud800'."),
        ("subjects/1", None, ".subjects[1] must be a table, not None."),
        (f"{SINGLE}/rounds", [], ".rounds must be a list of at least 1, not []."),
        (f"{SINGLE}/rounds/0/samples_ns/3", 0, ".samples_ns[3] must be a whole number of at le"),
        (f"{SINGLE}/rounds/0/samples_ns/3", True, ".samples_ns[3] must be a whole number of at"),
        (f"{SINGLE}/p50_ms", -1.0, ".single-stream.p50_ms must be a number above 0, not -1.0."),
        (f"{SINGLE}/p50_ms", 1e-300, ".single-stream.p50_ms must be a number above 0, not 1e-3"),
        (f"{SINGLE}/p50_ms", 1e300, ".single-stream.p50_ms must be a number above 0, not 1e+3"),
        ("subjects/2/soak/bins/0/p50_ms", "2", ".soak.bins[0].p50_ms must be a number above 0"),
        ("subjects/0/name", "\x1b[2J", ".subjects[0].name must be a text, not '\\x1b[2J'."),
        ("subjects/2/energy/rails/0/name", None, ".energy.rails[0].name must be a text, not No"),
        ("subjects/0/profile/layers/0/precision", ..., ".profile.layers[0].precision is missing"),
        ("environment/machine/cpu", ["x" * 99], ".environment.machine.cpu must be a text, not ["),
        ("comparison/single-stream", 3, ".comparison.single-stream must be a table, not 3."),
    ],
)
def test_a_wrong_value_is_named_by_its_path(
    path: str, value: Any, says: str, tmp_path: Path
) -> None:
    changed = set_at(FULL, path, value)
    with pytest.raises(ConfigError) as caught:
        results_file.read(written(tmp_path, changed))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read: Expecting value"),
        (json.dumps(FULL)[:1000], "cannot be read: "),
        ("[" * 100_000, "cannot be read: "),
        (json.dumps({**FULL, "version": float("nan")}), "cannot be read: NaN is no JSON"),
        ("[]", "has the schema None"),
        ('{"schema": "gnet-opt/bench/2"}', "has the schema 'gnet-opt/bench/2', and this version"),
    ],
)
def test_what_is_no_result_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`gnet-opt bench` run") as caught:
        results_file.read(written(tmp_path, text))
    assert says in str(caught.value)


def test_bytes_that_are_no_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        results_file.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        results_file.read(path)


def test_two_subjects_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = documents.document(documents.subject(2.0), documents.subject(3.0))
    with pytest.raises(ConfigError, match="two with the name 'demo-int8 openvino'"):
        results_file.read(written(tmp_path, twice))


def places(value: Any, path: str = "") -> Iterator[str]:
    """The paths of everything in a document."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for key, inside in entries:
        yield f"{path}{key}"
        yield from places(inside, f"{path}{key}/")


PLACES = sorted(places(FULL))


@settings(max_examples=200, deadline=None)
@given(
    path=st.sampled_from(PLACES),
    value=st.sampled_from(
        [..., None, True, 0, -1, 10**400, 1e-300, 0.5, "<script>", "", [], [None], {}, {"a": []}]
    ),
)
def test_whatever_stands_anywhere_it_is_refused_or_shown(path: str, value: Any) -> None:
    """What passes the check must not break the page: no other error may come."""
    if value is ... and path.rpartition("/")[2].isdecimal():
        return
    changed = set_at(FULL, path, value)
    try:
        results_file.check(changed, "results")
    except ConfigError:
        return
    page = report.render([changed])
    assert "<script" not in page
