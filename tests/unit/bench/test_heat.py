from __future__ import annotations

import os
from pathlib import Path

import pytest

from gnet_opt.bench import heat
from gnet_opt.bench.heat import (
    hottest,
    read_frequencies,
    read_temperatures,
    read_throttle_count,
    vcgencmd,
)
from sysfs import DESKTOP, JETSON_ORIN_NANO, write_tree


def test_a_jetson(tmp_path: Path) -> None:
    root = write_tree(tmp_path, JETSON_ORIN_NANO)
    temperatures = read_temperatures(root)
    assert temperatures == {"cpu-thermal": 51.187, "gpu-thermal": 50.218, "tj-thermal": 51.187}
    assert list(temperatures) == ["cpu-thermal", "gpu-thermal", "tj-thermal"]
    assert hottest(temperatures) == 51.187
    assert read_frequencies(root) == {"cpu0": 1510.4, "cpu10": 729.6}
    assert read_throttle_count(root) == 3


def test_a_desktop(tmp_path: Path) -> None:
    root = write_tree(tmp_path, DESKTOP)
    temperatures = read_temperatures(root)
    assert temperatures == {
        "acpitz": 27.8,
        "acpitz (thermal_zone1)": 29.8,
        "coretemp Package id 0": 61.0,
        "coretemp Core 0": 59.0,
        "nvme Composite": 71.85,
    }
    assert hottest(temperatures) == 61.0  # not the drive, which is warmer
    assert read_frequencies(root) == {}
    assert read_throttle_count(root) == 3 + 4 + 10  # the package's own count once


def test_without_a_processor_sensor_any_counts() -> None:
    assert hottest({"acpitz": 27.8, "nvme Composite": 41.0}) == 41.0
    assert hottest({}) is None


def test_nothing_is_told(tmp_path: Path) -> None:
    assert read_temperatures(tmp_path) == {}
    assert read_frequencies(tmp_path) == {}
    assert read_throttle_count(tmp_path) is None


@pytest.mark.parametrize("text", ["", "unknown", "0x"])
def test_a_file_that_holds_no_number_is_left_out(tmp_path: Path, text: str) -> None:
    cpu = "sys/devices/system/cpu/cpu0"
    root = write_tree(
        tmp_path,
        {
            f"{cpu}/cpufreq/scaling_cur_freq": text,
            f"{cpu}/thermal_throttle/core_throttle_count": text,
            "sys/class/thermal/thermal_zone0/temp": text,
        },
    )
    assert (read_temperatures(root), read_frequencies(root)) == ({}, {})
    assert read_throttle_count(root) is None


# Bits as the Raspberry Pi documentation lists them for `vcgencmd get_throttled`.
@pytest.mark.parametrize(
    ("bits", "count"),
    [
        ("0", 0),
        ("5", 0),  # under-voltage and throttled now; not kept
        ("50005", 2),  # both now and since the start
        ("f0000", 4),
        ("80000", 1),  # the soft temperature limit once
    ],
)
def test_a_raspberry_pi(tmp_path: Path, bits: str, count: int) -> None:
    kernel = {"sys/devices/platform/soc/soc:firmware/get_throttled": bits}
    assert read_throttle_count(write_tree(tmp_path / "file", kernel)) == count
    asked = []

    def firmware(question: str) -> str:
        asked.append(question)
        return f"throttled=0x{bits}\n"

    assert read_throttle_count(tmp_path / "no file", firmware) == count
    assert asked == ["get_throttled"]


def test_a_firmware_that_refuses(tmp_path: Path) -> None:
    assert read_throttle_count(tmp_path, lambda question: "") is None
    assert read_throttle_count(tmp_path, lambda question: "VCHI initialization failed") is None


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_vcgencmd_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vcgencmd("get_throttled") == ""
    program = tmp_path / "vcgencmd"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x50005\n')
    program.chmod(0o755)
    assert vcgencmd("get_throttled") == "throttled=0x50005\n"
    assert vcgencmd("measure_temp") == ""  # it fails
    monkeypatch.setattr(heat, "_VCGENCMD_SECONDS", 0.2)
    program.write_text("#!/bin/sh\nwhile :; do :; done\n")
    assert vcgencmd("get_throttled") == ""  # it hangs


def test_the_files_of_this_machine_are_read() -> None:
    for temperature in read_temperatures().values():
        assert -60 < temperature < 150
    for frequency in read_frequencies().values():
        assert 10 < frequency < 10_000
    count = read_throttle_count()
    assert count is None or count >= 0
