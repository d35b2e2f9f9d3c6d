"""Whether a device can do the work, told before anything is copied to it.

Problems stop the run, and all of them are told at once; notes do not, but they say why figures may
be other than expected. Each comes with the command that would help. None is run by us.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from gnet_opt.bench.host import BUSY
from gnet_opt.errors import RemoteError

OLDEST_PYTHON = (3, 10)
"""As `requires-python` of gnet-opt."""

RUNTIMES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "reference": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
"""The module that each of our own backends imports; others cannot be looked for."""

_BASE = {
    "PIL": "pillow",
    "click": "click",
    "numpy": "numpy",
    "rich": "rich",
    "threadpoolctl": "threadpoolctl",
}
"""What gnet-opt imports on a device in any case: packages by module."""

_TOMLI = "tomli"
"""Reads TOML before Python 3.11."""

MODULES = tuple(sorted({*_BASE, _TOMLI, *RUNTIMES.values()}))
"""What to ask a device for."""

_COPIES = 2
"""Room for the files, in multiples of their size: the copies, and as much again for scratch files
(another backend than the bundle's own compiles the model anew)."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `gnet_opt.remote.device probe` tells of a device.

    Attributes:
        architecture: As `uname -m` prints it.
        board: The board's name, empty where there is none.
        cpus: CPUs that a process may use.
        disk_free: Bytes free below `workdir`, None without one.
        governors: Frequency governors of all CPUs, each once.
        load1: Load average over a minute.
        memory_available: Bytes that programs can use without swapping.
        memory_total: Bytes.
        modules: Versions of modules; None for one that is not there, empty where it does not tell.
        power_mode: Of an NVIDIA Jetson, empty elsewhere.
        python: The version's three numbers.
        swap_free: Bytes.
        swap_total: Bytes.
        system: The operating system, such as `Linux`.
        workdir: The folder in which ours can be made, None where none is writable.
    """

    architecture: str
    board: str
    cpus: int | None
    disk_free: int | None
    governors: list[str]
    load1: float | None
    memory_available: int | None
    memory_total: int | None
    modules: Mapping[str, str | None]
    power_mode: str
    python: list[int]
    swap_free: int | None
    swap_total: int | None
    system: str
    workdir: str | None

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Facts:
        """Read what the device sent."""
        return cls(**{field.name: table[field.name] for field in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """The facts for a report."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a work asks of a device.

    Attributes:
        python: The Python there, for the commands in messages.
        workdir: The folder that the user named, or empty.
        bytes: Size of the files to copy; they have to fit into memory, too, to be run.
        backends: Backends whose runtimes are needed.
    """

    python: str
    workdir: str
    bytes: int
    backends: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a pre-flight.

    Attributes:
        facts: What the device has.
        problems: Sentences that say why the work cannot be done there.
        notes: Sentences that say what to bear in mind.
    """

    facts: Facts
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "facts": self.facts.to_dict(),
            "notes": list(self.notes),
            "problems": list(self.problems),
        }

    def why_unfit(self, place: str) -> RemoteError | None:
        """An error that tells all problems at once, or None where there are none."""
        if not self.problems:
            return None
        return RemoteError(
            f"{place} cannot do this yet; nothing was copied to it, and nothing changed there:",
            *self.problems,
        )


def judge(facts: Facts, needs: Needs) -> Report:
    """Compare what a device has with what a work needs."""
    return Report(
        facts=facts,
        problems=(*_system_problems(facts), *_room_problems(facts, needs), *_missing(facts, needs)),
        notes=(*_old(facts, needs), *_notes(facts)),
    )


def _system_problems(facts: Facts) -> list[str]:
    found = []
    if facts.system != "Linux":
        found.append(
            f"It runs {facts.system}. Only Linux devices are measured from afar; install gnet-opt "
            "there and run the command without --on."
        )
    if tuple(facts.python) < OLDEST_PYTHON:
        found.append(
            f"Its Python is {_dotted(facts.python)}, and {_dotted(OLDEST_PYTHON)} or later is "
            "needed. If there is another one, name it with --python PATH."
        )
    return found


def _room_problems(facts: Facts, needs: Needs) -> list[str]:
    found = []
    wanted = _COPIES * needs.bytes
    if facts.workdir is None:
        where = needs.workdir or "/var/tmp nor /tmp"
        neither = "" if needs.workdir else "Neither "
        verb = "is not" if needs.workdir else "is"
        found.append(
            f"{neither}{where} {verb} a folder that can be written. Name one with --workdir."
        )
    elif facts.disk_free is not None and facts.disk_free < wanted:
        found.append(
            f"{facts.workdir} has {_size(facts.disk_free)} free, and {_size(wanted)} is needed. "
            "Free some (du -xh / | sort -h | tail), or name another place with --workdir."
        )
    if facts.memory_available is not None and facts.memory_available < needs.bytes:
        found.append(
            f"{_size(facts.memory_available)} of memory is available, less than the "
            f"{_size(needs.bytes)} of the files. End other programs there: ps aux --sort -rss"
        )
    return found


def _missing(facts: Facts, needs: Needs) -> list[str]:
    if tuple(facts.python) < OLDEST_PYTHON:
        return []  # told already, and the other Python has its own packages
    absent = [
        package
        for module, package in _wanted(facts, needs).items()
        if facts.modules.get(module) is None
    ]
    if not absent:
        return []
    return [
        f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed for "
        f"{needs.python} there. Run there, if you want it: {needs.python} -m pip install "
        f"{' '.join(absent)}"
    ]


def _wanted(facts: Facts, needs: Needs) -> dict[str, str]:
    """Packages by module."""
    runtimes = [RUNTIMES[name] for name in needs.backends if name in RUNTIMES]
    old = {_TOMLI: _TOMLI} if tuple(facts.python) < (3, 11) else {}
    return {**_BASE, **old, **{module: module.replace("_", "-") for module in runtimes}}


def _old(facts: Facts, needs: Needs) -> list[str]:
    least = _least_versions()
    found = []
    for module, package in _wanted(facts, needs).items():
        version = facts.modules.get(module)
        if version and package in least and _numbers(version) < _numbers(least[package]):
            found.append(
                f"{package} is {version} there; gnet-opt is made for {least[package]} or later."
            )
    return found


def _notes(facts: Facts) -> list[str]:
    found = []
    if facts.load1 is not None and facts.cpus and facts.load1 > BUSY * facts.cpus:
        found.append(
            f"Something is running there: the load is {facts.load1:.2f} on {facts.cpus} CPUs. "
            "Figures will be worse than those of an idle device."
        )
    slow = [name for name in facts.governors if name != "performance"]
    if slow:
        found.append(
            f"The CPU governor is {', '.join(slow)}: clocks follow the load. For steady figures, "
            "run there: sudo cpupower frequency-set -g performance"
        )
    if facts.power_mode:
        found.append(
            f"The power mode is {facts.power_mode}; figures hold for it alone. `nvpmodel -q` "
            "tells it, and sudo nvpmodel -m N changes it."
        )
    if facts.swap_total and facts.swap_free is not None:
        used = facts.swap_total - facts.swap_free
        if used * 2 > facts.swap_total:
            found.append(
                f"More than half of its swap is in use ({_size(used)}): it may be short of memory."
            )
    return found


def _least_versions() -> dict[str, str]:
    """The least version of each package, from gnet-opt's own metadata."""
    try:
        lines = requires("gnet-opt") or []
    except PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _dotted(version: tuple[int, ...] | list[int]) -> str:
    return ".".join(map(str, version))


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
