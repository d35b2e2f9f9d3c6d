"""`gnet-opt bench --on`: the command on a device gives what it gives here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import content, gnet_opt
from sshd import Sshd, running

from gnet_opt.bench import results_file
from gnet_opt.remote import job


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running(tmp_path_factory.mktemp("sshd")) as made:
        yield made


@pytest.fixture
def on(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(job, "POLL_SECONDS", 0.1)
    keys = ["--identity", str(server.identity), "--known-hosts", str(server.known_hosts)]
    return ["--on", server.url, *keys, "--python", sys.executable, "--workdir", str(server.work)]


QUICK = ["--threads", "1", "--rounds", "2", "--seconds", "0.05"]


def test_a_device_gives_the_same_document_as_here(
    server: Sshd, bundle: Callable[[str], Path], on: list[str], tmp_path: Path
) -> None:
    root = bundle("cpu")
    before = content(root)
    here = gnet_opt("bench", root, *QUICK, "--json")
    assert here.code == 0, here.err
    there = gnet_opt("bench", root, *QUICK, *on, "-o", tmp_path / "out", "--json")
    assert there.code == 0, there.err
    found, wanted = there.json, here.json
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "results.csv").is_file()
    assert results_file.read(tmp_path / "out" / "results.json") == found
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"reached over SSH at 127.0.0.1:{server.port}" in page
    remote = found["environment"].pop("remote")
    assert remote["host"] == f"127.0.0.1:{server.port}"
    assert found["schema"] == wanted["schema"] == "gnet-opt/bench/1"
    assert found["settings"] == wanted["settings"]
    assert found["environment"]["machine"] == wanted["environment"]["machine"]
    assert found["environment"].keys() == wanted["environment"].keys()
    (one,), (other,) = found["subjects"], wanted["subjects"]
    assert one.keys() == other.keys()
    for key in ("name", "precision", "backend", "model_sha256", "artifact_sha256", "native"):
        assert one[key] == other[key]
    figures = one["scenarios"]["single-stream"]
    assert figures["n"] == sum(len(turn["samples_ns"]) for turn in figures["rounds"]) > 0
    assert content(root) == before
    assert not list(server.work.iterdir()) and not list(server.home.iterdir())


def test_check_tells_and_copies_nothing(
    server: Sshd, bundle: Callable[[str], Path], on: list[str], tmp_path: Path
) -> None:
    done = gnet_opt("bench", bundle("cpu"), *on, "--check", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "is ready. Nothing was copied, and nothing changed there." in done.out
    assert not (tmp_path / "out").exists()
    assert not list(server.work.iterdir())
    told = gnet_opt("bench", bundle("cpu"), *on, "--check", "--json").json
    assert told["problems"] == []
    assert told["facts"]["workdir"] == str(server.work)


def test_a_failure_there_is_told_as_one_here(bundle: Callable[[str], Path], on: list[str]) -> None:
    done = gnet_opt("bench", bundle("cpu"), *on, "--backend", "nonsense", "-q")
    assert done.code == 2
    assert "(exit code 2): There is no backend 'nonsense'" in done.err
    assert done.out == ""


def test_a_fleet_shows_all_and_fails_for_one(
    server: Sshd, bundle: Callable[[str], Path], on: list[str], tmp_path: Path
) -> None:
    fleet = tmp_path / "devices.toml"
    fleet.write_text(
        f'[[device]]\nname = "one"\nurl = "{server.url}"\n'
        '[[device]]\nname = "away"\nurl = "ssh://127.0.0.1:1"\n'
    )
    words = ["bench", bundle("cpu"), "--fleet", fleet, *on[2:], *QUICK]
    done = gnet_opt(*words, "-o", tmp_path / "out")
    assert done.code == 9
    assert done.err.splitlines()[-1] == "gnet-opt: 1 of 2 devices failed: away."
    assert "away: 127.0.0.1:1 cannot be reached" in done.err
    table = [line.split() for line in done.out.splitlines()]
    assert ["away", "failed"] in table
    assert [row for row in table if row[:1] == ["one"] and "p90_ms" in row]
    assert os.listdir(tmp_path / "out") == ["one"]  # noqa: PTH208 - names are what counts
    told = gnet_opt(*words, "--json").json
    assert told["away"]["results"] is None
    assert told["one"]["error"] is None
    assert told["one"]["results"]["environment"]["remote"]["name"] == "one"


def test_what_changes_files_stays_here(bundle: Callable[[str], Path], on: list[str]) -> None:
    done = gnet_opt("bench", bundle("cpu"), *on, "--sweep", "--write")
    assert done.code == 2
    assert "--write changes files, and with --on it would be those of a copy" in done.err
