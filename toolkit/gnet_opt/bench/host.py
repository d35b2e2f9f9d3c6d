"""What else decides over times: clock, heat, load and memory of the machine at one moment.

Read from the files of Linux's /proc and /sys; what is not there is None or empty, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.bench.heat import read_frequencies, read_temperatures, read_throttle_count
from gnet_opt.files import text_of

BUSY = 0.25
"""Load a CPU at the start from which on a machine is called busy."""

HOTTER = 10.0
"""Rise of a temperature during a run, in degrees Celsius, that is worth a sentence."""

SPREAD = 0.1
"""Spread of the rounds' medians from which on a run is called unstable."""

_CPU = Path("sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True)
class HostState:
    """The machine at one moment.

    Attributes:
        load1: Load average over a minute, None where the system has none.
        governors: The frequency governors of all CPUs, sorted, each once.
        turbo: Whether clocks above the nominal one are allowed, None where not known.
        temperatures_c: By sensor, in degrees Celsius.
        frequencies_mhz: By CPU, such as `cpu0`.
        throttle_count: How often CPUs have been slowed down for heat since boot, None where the
            system does not count.
        memory_available_bytes: What new programs could use without swapping.
    """

    load1: float | None = None
    governors: tuple[str, ...] = ()
    turbo: bool | None = None
    temperatures_c: Mapping[str, float]
    frequencies_mhz: Mapping[str, float]
    throttle_count: int | None = None
    memory_available_bytes: int | None = None

    @classmethod
    def read(cls, root: Path = Path("/")) -> HostState:
        """Read the state from the files below `root`."""
        load = text_of(root / "proc/loadavg").split()
        available = re.search(r"^MemAvailable:\s*(\d+) kB", text_of(root / "proc/meminfo"), re.M)
        return cls(
            load1=float(load[0]) if load else None,
            governors=_governors(root),
            turbo=_turbo(root),
            temperatures_c=read_temperatures(root),
            frequencies_mhz=read_frequencies(root),
            throttle_count=read_throttle_count(root),
            memory_available_bytes=int(available[1]) * 1024 if available else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The state as it stands in a result file."""
        return {
            "frequencies_mhz": dict(self.frequencies_mhz),
            "governors": list(self.governors),
            "load1": self.load1,
            "memory_available_bytes": self.memory_available_bytes,
            "temperatures_c": dict(self.temperatures_c),
            "throttle_count": self.throttle_count,
            "turbo": self.turbo,
        }


def why_unstable(
    start: HostState,
    end: HostState,
    cpus: int,
    spreads: Mapping[str, float],
    unsteady: tuple[str, ...] = (),
) -> list[str]:
    """Sentences that say why a run's figures are to be doubted; none for a stable run.

    Args:
        start: The machine before the run.
        end: The machine after it.
        cpus: How many CPUs the machine has for us.
        spreads: (slowest - fastest) / median of the rounds, by what was measured.
        unsteady: Subjects whose times were not steady when their first round began.
    """
    found = []
    if start.load1 is not None and start.load1 > BUSY * cpus:
        found.append(
            f"Something else was running: the load at the start was {start.load1:.2f} on "
            f"{cpus} CPU{'s' if cpus > 1 else ''}."
        )
    if start.throttle_count is not None and end.throttle_count is not None:
        times = end.throttle_count - start.throttle_count
        if times > 0:
            found.append(f"The CPU was slowed down for heat {times} times during the run.")
    for name, before in start.temperatures_c.items():
        after = end.temperatures_c.get(name)
        if after is not None and after - before > HOTTER:
            found.append(f"{name} went from {before:.0f} to {after:.0f} °C.")
    for what in ("governors", "turbo"):
        if getattr(start, what) != getattr(end, what):
            found.append(f"The setting {what} of the CPU changed during the run.")
    for name in unsteady:
        found.append(f"{name}: times were not steady yet when the first round began.")
    for name, spread in spreads.items():
        if spread > SPREAD:
            found.append(f"{name}: rounds differ by {100 * spread:.0f} %.")
    return found


def _turbo(root: Path) -> bool | None:
    for name, yes in (("intel_pstate/no_turbo", "0"), ("cpufreq/boost", "1")):
        if text := text_of(root / _CPU / name).strip():
            return text == yes
    return None


def _governors(root: Path) -> tuple[str, ...]:
    texts = {
        text_of(path).strip() for path in (root / _CPU).glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    return tuple(sorted(texts - {""}))
