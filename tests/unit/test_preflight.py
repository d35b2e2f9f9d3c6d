from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import jetsons
from gnet_opt.preflight import (
    MEMORY_FOR_BUILD,
    STORAGE_FOR_BUILD,
    Report,
    assess,
    no_room,
    preflight,
)
from gnet_opt.preflight import target_of as target_of_board
from gnet_opt.target import find
from jetsons import ORIN_NANO, READY, answers, plant


def report(tmp_path: Path, files: Mapping[str, str], **rest: object) -> Report:
    return preflight(root=plant(tmp_path, files), **rest)  # type: ignore[arg-type]


def about(sentences: tuple[str, ...]) -> list[str]:
    return [sentence.partition(":")[0] for sentence in sentences]


def test_a_board_that_is_ready(tmp_path: Path) -> None:
    found = report(tmp_path, READY)
    assert found.target == "jetson-orin-nano"
    assert (found.blockers, found.advice) == ((), ())


def test_a_board_as_its_owner_finds_it(tmp_path: Path) -> None:
    found = report(tmp_path, ORIN_NANO)
    assert found.blockers == ()
    assert about(found.advice) == ["Power mode", "Clocks", "TensorRT", "TensorRT"]
    power, clocks, version, package = found.advice
    assert power == (
        "Power mode: it is 25W, not MAXN_SUPER, the board's largest. If its supply and its cooling "
        "allow: sudo nvpmodel -m 2 (some modes ask for a restart). Build and time an engine in the "
        "mode in which it will run."
    )
    assert "cpu0 730 to 1344 MHz (schedutil), gpu 306 to 918 MHz (nvhost_podgov)" in clocks
    assert clocks.endswith("sudo jetson_clocks")
    assert version.startswith("TensorRT: 10.3.0.30 (JetPack 6.2.1) is installed, and the target ")
    assert "jetson-orin-nano speaks of 10.16 (JetPack 7.2)" in version
    assert "sudo apt install python3-libnvinfer" in package
    assert "--system-site-packages" in package


def test_cores_with_the_same_limits_are_spoken_of_once(tmp_path: Path) -> None:
    run = answers({"jetson_clocks --show": jetsons.NANO_CLOCKS})
    (clocks,) = report(tmp_path, READY, run=run).advice
    assert ": cpu0 102 to 1428 MHz (schedutil), gpu 77 to 922 MHz. Timings" in clocks


def test_no_jetson(tmp_path: Path) -> None:
    found = report(tmp_path, {})
    assert found == Report(board=None)
    assert found.to_dict() == {"advice": [], "blockers": [], "board": None, "target": ""}


def test_what_is_printed_is_plain_data(tmp_path: Path) -> None:
    told = json.loads(json.dumps(report(tmp_path, ORIN_NANO).to_dict()))
    assert sorted(told) == ["advice", "blockers", "board", "target"]
    assert told["board"]["power_mode"] == {"cores": None, "id": 1, "name": "25W"}


def memory(available: int, swap: int | None, kind: str = "/swapfile") -> dict[str, str]:
    """A board with these bytes available and free on one swap area."""
    areas = "" if swap is None else f"{kind} file {swap >> 10} 0 -2\n"
    return {
        **READY,
        "proc/meminfo": jetsons.MEMORY.format(available=available >> 10),
        "proc/swaps": f"Filename Type Size Used Priority\n{areas}",
    }


@pytest.mark.parametrize(
    ("available", "swap", "kind", "blocked"),
    [
        (MEMORY_FOR_BUILD, None, "", False),
        (MEMORY_FOR_BUILD - 4096, None, "", True),
        (1 << 30, 1 << 30, "/swapfile", False),
        (1 << 30, (1 << 30) - 4096, "/swapfile", True),
        (1 << 30, 1 << 30, "/dev/zram0", True),
    ],
    ids=["enough", "too little", "with swap", "with too little swap", "zram is memory itself"],
)
def test_memory_for_a_build(
    tmp_path: Path, available: int, swap: int | None, kind: str, blocked: bool
) -> None:
    found = report(tmp_path, memory(available, swap, kind))
    assert about(found.blockers) == (["Memory"] if blocked else [])
    if blocked:
        assert "sudo swapon /swapfile" in found.blockers[0]


def test_a_desktop_is_spoken_of_where_memory_is_short(tmp_path: Path) -> None:
    files = {**memory(1 << 30, 4 << 30), "proc/812/comm": "gnome-shell\n"}
    found = report(tmp_path, files)
    assert found.blockers == ()
    assert about(found.advice) == ["Desktop"]
    assert "sudo systemctl isolate multi-user.target" in found.advice[0]


def test_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plant(tmp_path / "root", READY)
    bundle = tmp_path / "bundle"
    free = {root: 5 << 20, bundle: STORAGE_FOR_BUILD - 1}
    usage = type("Usage", (), {})

    def disk_usage(path: Path) -> object:
        found = usage()
        found.free = free[path]
        return found

    monkeypatch.setattr("gnet_opt.jetson.shutil.disk_usage", disk_usage)
    found = preflight(folder=bundle, root=root)
    assert about(found.blockers) == ["Storage"]
    assert str(bundle) in found.blockers[0]
    assert about(found.advice) == ["Storage"]
    free[bundle] = STORAGE_FOR_BUILD
    free[root] = 1 << 30
    found = preflight(folder=bundle, root=root)
    assert (found.blockers, found.advice) == ((), ())


def test_no_tensorrt(tmp_path: Path) -> None:
    files = {
        path: text
        for path, text in READY.items()
        if path not in ("usr/src/tensorrt/bin/trtexec", "var/lib/dpkg/status")
    }
    found = report(tmp_path, files)
    assert about(found.blockers) == ["TensorRT"]
    assert "sudo apt install nvidia-jetpack" in found.blockers[0]


def test_tensorrt_of_another_major_version(tmp_path: Path) -> None:
    files = {**READY, "var/lib/dpkg/status": READY["var/lib/dpkg/status"].replace("10.16", "11.4")}
    found = report(tmp_path, files)
    (advice,) = found.advice
    assert "is for another trtexec" in advice
    assert 'Copy jetson-orin-nano.toml with options.tensorrt = "11.4"' in advice
    # Where another target is asked for, its version counts.
    assert preflight(find("nvidia-gpu"), root=tmp_path).advice == ()


def test_no_gpu(tmp_path: Path) -> None:
    files = {path: text for path, text in READY.items() if not path.startswith("dev/")}
    found = report(tmp_path, files)
    assert about(found.blockers) == ["GPU"]
    assert "--runtime nvidia" in found.blockers[0]


def test_room_alone_is_asked_of_who_has_used_the_gpu(tmp_path: Path) -> None:
    """A device node of another name must not stop a build on a GPU that answers."""
    files = {path: text for path, text in READY.items() if not path.startswith("dev/")}
    assert no_room(tmp_path, root=plant(tmp_path / "a", files)) == ()
    short = plant(tmp_path / "b", memory(1 << 20, None, "partition"))
    assert about(no_room(tmp_path, root=short)) == ["Memory"]
    assert no_room(tmp_path, root=plant(tmp_path / "c", {})) == ()


def test_heat(tmp_path: Path) -> None:
    files = {**READY, "sys/class/thermal/thermal_zone0/temp": "99000\n"}
    found = report(tmp_path, files)
    assert about(found.advice) == ["Heat"]
    assert "cpu-thermal is at 99 °C" in found.advice[0]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Nano 2GB Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Xavier NX Developer Kit (eMMC)", "jetson-xavier-nx"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Orin Nano Developer Kit", "jetson-orin-nano"),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            "jetson-orin-nano",
        ),
        ("NVIDIA Orin NX Developer Kit", "jetson-orin-nx"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super", "jetson-orin-nx"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "jetson-thor"),
        ("NVIDIA Jetson AGX Xavier Developer Kit", ""),
        ("NVIDIA Jetson TX2 Developer Kit", ""),
    ],
)
def test_which_target_a_board_is(tmp_path: Path, model: str, name: str) -> None:
    files = {**READY, "proc/device-tree/model": f"{model}\0"}
    found = report(tmp_path, files)
    assert found.target == name
    assert found.board is not None
    target = target_of_board(found.board)
    assert (target.name if target else "") == name


def test_a_board_without_a_target_is_judged_all_the_same(tmp_path: Path) -> None:
    files = {**ORIN_NANO, "proc/device-tree/model": "NVIDIA Jetson TX2 Developer Kit\0"}
    found = report(tmp_path, files)
    assert found.target == ""
    assert about(found.advice) == ["Power mode", "Clocks", "TensorRT"]


def test_a_report_of_another_machine_is_judged_here(tmp_path: Path) -> None:
    found = report(tmp_path, ORIN_NANO)
    assert found.board is not None
    assert assess(found.board) == found
