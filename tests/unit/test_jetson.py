from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jetsons
from gnet_opt import jetson
from gnet_opt.jetson import Clock, Memory, PowerMode, Swap, Zone
from jetsons import ORIN_NANO, answers, plant


@pytest.mark.parametrize("release", jetsons.RELEASES)
def test_releases_of_jetson_linux(release: str) -> None:
    assert jetson.parse_release(jetsons.RELEASES[release]) == release


@pytest.mark.parametrize("text", ["", "R36", "# R36 (release)", "# R00 (debug), REVISION: "])
def test_no_release_in_other_texts(text: str) -> None:
    assert jetson.parse_release(text) == ""


def test_the_table_of_jetpacks_has_releases_in_the_form_of_the_file() -> None:
    for release, pack in jetson.JETPACKS.items():
        major, _, revision = release.partition(".")
        line = f"# R{major} (release), REVISION: {revision}, GCID: 1"
        assert jetson.parse_release(line) == release
        assert pack[0] == {"32": "4", "35": "5", "36": "6", "38": "7", "39": "7"}[major]


@pytest.mark.parametrize(("name", "number"), jetsons.POWER_MODES)
def test_power_modes_of_nvpmodel(name: str, number: int) -> None:
    text = jetsons.POWER_MODES[name, number]
    assert jetson.parse_power_mode(text) == PowerMode(id=number, name=name)


def test_a_power_mode_without_its_number() -> None:
    assert jetson.parse_power_mode("NV Power Mode: 15W") == PowerMode(id=None, name="15W")
    assert jetson.parse_power_mode("NV Power Mode") is None


def test_the_modes_of_a_nano() -> None:
    assert jetson.parse_power_modes(jetsons.NANO_MODES) == (
        PowerMode(id=0, name="MAXN", cores=4),
        PowerMode(id=1, name="5W", cores=2),
    )


@pytest.mark.parametrize(
    ("text", "strongest"),
    [
        (jetsons.NANO_MODES, "MAXN"),
        (jetsons.ORIN_NANO_MODES, "MAXN_SUPER"),
        (jetsons.XAVIER_NX_MODES, "MODE_20W_6CORE"),
        ("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n", "15W"),
    ],
    ids=["nano", "orin nano super", "xavier nx", "orin nano"],
)
def test_the_strongest_mode(tmp_path: Path, text: str, strongest: str) -> None:
    board = jetson.read(root=plant(tmp_path, {**ORIN_NANO, "etc/nvpmodel.conf": text}))
    assert board is not None
    assert board.strongest is not None
    assert board.strongest.name == strongest


def test_clocks_in_hertz() -> None:
    assert jetson.parse_clocks(jetsons.NANO_CLOCKS) == (
        *(
            Clock(
                name=name,
                minimum=102_000_000,
                maximum=1_428_000_000,
                current=1_428_000_000,
                governor="schedutil",
            )
            for name in ("cpu0", "cpu1")
        ),
        Clock(name="gpu", minimum=76_800_000, maximum=921_600_000, current=153_600_000),
        Clock(name="emc", minimum=204_000_000, maximum=1_600_000_000, current=1_600_000_000),
    )
    found = jetson.parse_clocks(jetsons.ORIN_NANO_CLOCKS)
    assert [clock.name for clock in found] == ["cpu0", "cpu1", "gpu", "emc"]
    assert not any(clock.fixed for clock in found)


def test_clocks_that_are_fixed() -> None:
    found = jetson.parse_clocks(jetsons.NANO_FIXED_CLOCKS)
    assert [clock.name for clock in found] == ["cpu0", "gpu", "emc"]
    assert all(clock.fixed for clock in found)


@pytest.mark.parametrize(
    "line",
    [
        "Error: Run this script as a root user",
        "cpu3: Online=0 Governor=schedutil MinFreq=1 MaxFreq=2 CurrentFreq=1",
        "cpu0: Online=1 MinFreq= MaxFreq=2 CurrentFreq=1",
        "GPU MinFreq=x MaxFreq=2 CurrentFreq=1",
    ],
)
def test_lines_without_a_clock(line: str) -> None:
    assert jetson.parse_clocks(line) == ()


def test_packages_that_are_installed() -> None:
    assert jetson.parse_packages(jetsons.ORIN_NANO_PACKAGES) == {
        "libnvinfer10": "10.3.0.30-1+cuda12.5",
        "nvidia-jetpack": "6.2.1+b38",
        "nvidia-l4t-core": "36.4.3-20250107174145",
    }


def test_memory_and_swap_in_bytes() -> None:
    memory = jetson.parse_memory(jetsons.MEMORY.format(available=5976884))
    assert memory == Memory(total=7802928 * 1024, available=5976884 * 1024)
    assert jetson.parse_memory("MemTotal: 5 kB\n") is None
    assert jetson.parse_swaps(jetsons.SWAPS) == (
        Swap(name="/dev/zram0", size=650240 * 1024, free=650240 * 1024, compressed=True),
        Swap(name="/swapfile", size=4194300 * 1024, free=3145724 * 1024, compressed=False),
    )
    assert jetson.parse_swaps("Filename\tType\tSize\tUsed\tPriority\n") == ()


@given(st.text())
def test_no_text_makes_a_parser_raise(text: str) -> None:
    for parse in (
        jetson.parse_clocks,
        jetson.parse_memory,
        jetson.parse_packages,
        jetson.parse_power_mode,
        jetson.parse_power_modes,
        jetson.parse_release,
        jetson.parse_swaps,
    ):
        parse(text)


def test_an_orin_nano(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", ORIN_NANO)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    board = jetson.read(bundle, root=root)
    assert board is not None
    assert board.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert board.compatible[-1] == "nvidia,tegra234"
    assert (board.l4t, board.jetpack, board.tensorrt) == ("36.4.3", "6.2.1", "10.3.0.30")
    assert not board.tensorrt_python
    assert board.trtexec.endswith("/usr/src/tensorrt/bin/trtexec")
    assert board.power_mode == PowerMode(id=1, name="25W")
    assert [clock.name for clock in board.clocks] == ["cpu0", "gpu"]
    assert board.clocks[0].maximum == 1_344_000_000
    assert board.clocks[1].governor == "nvhost_podgov"
    assert board.zones == (Zone(name="cpu-thermal", celsius=49.468, throttles_at=99.0),)
    assert set(board.storage) == {"/", str(bundle)}
    assert all(free > 0 for free in board.storage.values())
    assert board.gpu
    assert board.desktop == ("gnome-shell",)
    assert json.loads(json.dumps(board.to_dict()))["memory"]["available"] == 5976884 * 1024


def test_trtexec_as_the_script_of_a_bundle_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = plant(tmp_path, {"tools/trtexec": "", **ORIN_NANO}) / "tools" / "trtexec"
    own.chmod(0o755)
    monkeypatch.setattr(jetson, "SYSTEM", tmp_path)
    monkeypatch.setattr(jetson, "query", answers({}))
    for name, value in (("TRTEXEC", str(own)), ("PATH", str(own.parent))):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            board = jetson.read(root=tmp_path)
            assert board is not None
            assert board.trtexec == str(own)
    other = jetson.read(root=plant(tmp_path / "other", ORIN_NANO))
    assert other is not None
    assert other.trtexec == str(tmp_path / "other/usr/src/tensorrt/bin/trtexec")


def test_commands_come_before_files(tmp_path: Path) -> None:
    root = plant(tmp_path, {**ORIN_NANO, "etc/nvpmodel.conf": jetsons.NANO_MODES})
    run = answers(
        {
            "nvpmodel -q": "NV Power Mode: 5W\n1\n",
            "jetson_clocks --show": jetsons.NANO_FIXED_CLOCKS,
        }
    )
    board = jetson.read(root=root, run=run)
    assert board is not None
    assert board.power_mode == PowerMode(id=1, name="5W", cores=2)
    assert [clock.name for clock in board.clocks] == ["cpu0", "gpu", "emc"]


def test_only_what_tells_something_is_run(tmp_path: Path) -> None:
    commands = []

    def run(command: object) -> str:
        commands.append(command)
        return ""

    jetson.read(root=plant(tmp_path, ORIN_NANO), run=run)
    assert sorted(map(str, commands)) == ["['jetson_clocks', '--show']", "['nvpmodel', '-q']"]


def test_the_jetpack_that_follows_from_jetson_linux(tmp_path: Path) -> None:
    root = plant(tmp_path, {"etc/nv_tegra_release": jetsons.RELEASES["32.7.1"]})
    board = jetson.read(root=root)
    assert board is not None
    assert (board.l4t, board.jetpack) == ("32.7.1", "4.6.1")


def test_a_release_that_nobody_has_listed(tmp_path: Path) -> None:
    line = jetsons.RELEASES["39.2.1"].replace("2.1", "9.9")
    board = jetson.read(root=plant(tmp_path, {"etc/nv_tegra_release": line}))
    assert board is not None
    assert (board.l4t, board.jetpack) == ("39.9.9", "")


def test_a_jetson_that_tells_nothing_else(tmp_path: Path) -> None:
    root = plant(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0"})
    board = jetson.read(tmp_path / "gone", root=root)
    assert board is not None
    assert board.power_mode is None
    assert board.strongest is None
    assert board.memory is None
    assert (board.clocks, board.swaps, board.zones, board.desktop) == ((), (), (), ())
    assert (board.l4t, board.jetpack, board.tensorrt, board.trtexec) == ("", "", "", "")
    assert not board.gpu
    assert set(board.storage) == {"/"}


def test_a_jetson_in_a_container_whose_model_does_not_say_so(tmp_path: Path) -> None:
    tree = {
        "proc/device-tree/model": "NVIDIA Orin NX Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0",
    }
    board = jetson.read(root=plant(tmp_path, tree))
    assert board is not None
    assert board.l4t == ""


@pytest.mark.parametrize("model", ["", "Raspberry Pi 5 Model B Rev 1.0\0", "Nintendo Switch\0"])
def test_other_machines(tmp_path: Path, model: str) -> None:
    tree = {
        "proc/device-tree/model": model,
        "proc/device-tree/compatible": "nintendo,odin\0nvidia,tegra210\0",
    }
    assert jetson.read(root=plant(tmp_path, tree)) is None


def test_a_command_that_fails_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jetson.query([sys.executable, "-c", "print('told')"]) == "told\n"
    assert jetson.query(["/no/such/command"]) == ""

    def late(command: object, timeout: float, **rest: object) -> None:
        raise subprocess.TimeoutExpired("nvpmodel", timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert jetson.query(["nvpmodel", "-q"]) == ""
