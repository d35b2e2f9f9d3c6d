"""The state of a machine, read from recorded trees of /proc and /sys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gnet_opt.bench.host import HostState, why_unstable

# The layout is that of the kernel's Documentation/admin-guide/pm/cpufreq.rst,
# Documentation/driver-api/thermal/sysfs-api.rst and Documentation/filesystems/proc.rst.
LAPTOP = {
    "proc/loadavg": "0.42 0.30 0.21 2/512 12345\n",
    "proc/meminfo": "MemTotal:       16306240 kB\nMemAvailable:   12000000 kB\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "800123\n",
    "sys/devices/system/cpu/cpu10/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
    "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
    "sys/devices/system/cpu/intel_pstate/no_turbo": "0\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "27800\n",
    "sys/class/thermal/thermal_zone1/type": "acpitz\n",
    "sys/class/thermal/thermal_zone1/temp": "29800\n",
    "sys/class/thermal/thermal_zone2/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone2/temp": "51000\n",
    "sys/class/thermal/thermal_zone3/type": "iwlwifi_1\n",  # cannot be read while it is off
}
PI = {
    "proc/loadavg": "0.00 0.01 0.05 1/180 900\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpufreq/boost": "0\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_laptop(tmp_path: Path) -> None:
    assert HostState.read(tree(tmp_path, LAPTOP)).to_dict() == {
        "frequencies_mhz": {"cpu0": 2400.0, "cpu1": 800.123},
        "governors": ["performance", "powersave"],
        "load1": 0.42,
        "memory_available_bytes": 12_000_000 * 1024,
        "temperatures_c": {"acpitz": 27.8, "acpitz (thermal_zone1)": 29.8, "x86_pkg_temp": 51.0},
        "throttle_count": 7,
        "turbo": True,
    }


def test_a_raspberry_pi(tmp_path: Path) -> None:
    state = HostState.read(tree(tmp_path, PI))
    assert state.temperatures_c == {"cpu-thermal": 48.312}
    assert state.throttle_count is None  # it does not count
    assert state.turbo is False
    assert state.memory_available_bytes is None


def test_what_is_not_there_is_not_guessed(tmp_path: Path) -> None:
    assert HostState.read(tmp_path) == HostState(temperatures_c={}, frequencies_mhz={})


def test_this_machine() -> None:
    state = HostState.read()
    if Path("/proc/loadavg").exists():
        assert state.load1 is not None and state.load1 >= 0


CALM = HostState(
    load1=0.1,
    governors=("performance",),
    turbo=True,
    temperatures_c={"cpu": 50.0},
    frequencies_mhz={},
    throttle_count=5,
)


def test_a_stable_run() -> None:
    later = replace(CALM, load1=2.0, temperatures_c={"cpu": 59.0})  # the load is our own
    assert why_unstable(CALM, later, 4, {"a, single-stream": 0.1}) == []


@pytest.mark.parametrize(
    ("start", "end", "sentence"),
    [
        (
            {"load1": 1.5},
            {},
            "Something else was running: the load at the start was 1.50 on 4 CPUs.",
        ),
        (
            {},
            {"throttle_count": 9},
            "The CPU was slowed down for heat 4 times during the run.",
        ),
        ({}, {"temperatures_c": {"cpu": 71.6}}, "cpu went from 50 to 72 °C."),
        (
            {},
            {"governors": ("powersave",)},
            "The setting governors of the CPU changed during the run.",
        ),
        ({}, {"turbo": False}, "The setting turbo of the CPU changed during the run."),
    ],
)
def test_what_makes_a_run_unstable(start: dict, end: dict, sentence: str) -> None:  # type: ignore[type-arg]
    assert why_unstable(replace(CALM, **start), replace(CALM, **end), 4, {}) == [sentence]


def test_times_tell_it_too() -> None:
    assert why_unstable(CALM, CALM, 4, {"b, offline": 0.234}, ("a",)) == [
        "a: times were not steady yet when the first round began.",
        "b, offline: rounds differ by 23 %.",
    ]
