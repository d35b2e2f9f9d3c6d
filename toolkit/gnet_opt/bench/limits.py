"""A host with less: CPUs, threads and memory taken away from the processes that are measured.

What comes out is this host's figure with less of it, never that of a device with as much: its
cores, caches and memory are others.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gnet_opt.errors import ConfigError

LABEL = "constrained host"

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_DECIMAL_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
_MOST = 2**60
"""More bytes than any machine has, and fewer than a limit of the system can name (setrlimit(2))."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What a measured process may use.

    Attributes:
        cpus: Numbers of the CPUs that it may run on, None for all.
        memory_bytes: Private memory that it may have, None for all.
    """

    cpus: tuple[int, ...] | None = None
    memory_bytes: int | None = None

    def __bool__(self) -> bool:
        return self.cpus is not None or self.memory_bytes is not None

    def check(self) -> None:
        """Refuse early what this machine cannot do.

        Raises:
            ConfigError: A CPU is not this process's to use, or the system has no such limit.
        """
        if self.cpus is not None:
            if not hasattr(os, "sched_setaffinity"):
                raise ConfigError(
                    "--cpus needs Linux, which binds a process to CPUs. Leave it out."
                )
            own = os.sched_getaffinity(0)
            foreign = sorted(set(self.cpus) - own)
            if foreign:
                raise ConfigError(
                    f"--cpus names {_listed(foreign)}, but this process may use {_listed(own)} "
                    "only. Name some of these."
                )
        if self.memory_bytes is not None and sys.platform != "linux":
            raise ConfigError("--memory needs Linux, which limits a process's data. Leave it out.")

    def apply(self) -> None:
        """Put this process, and all threads that it starts from now on, under the constraint.

        Memory is limited as RLIMIT_DATA: private memory that can be written, touched or not, which
        is what a runtime allocates. Files that are only read (libraries, mapped weights) do not
        count, as the system can drop them; see setrlimit(2), "since Linux 4.7".
        """
        if self.cpus is not None:
            os.sched_setaffinity(0, self.cpus)
        if self.memory_bytes is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (self.memory_bytes, self.memory_bytes))

    def to_dict(self) -> dict[str, Any]:
        """The constraint as it stands in a result file."""
        return {
            "cpus": None if self.cpus is None else list(self.cpus),
            "label": LABEL,
            "memory_bytes": self.memory_bytes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Constraint:
        """What `to_dict` gave."""
        cpus = values["cpus"]
        return cls(cpus=None if cpus is None else tuple(cpus), memory_bytes=values["memory_bytes"])


def parse_cpus(text: str) -> tuple[int, ...]:
    """Numbers of CPUs from a list such as `0-3,6`, sorted.

    Raises:
        ConfigError: The text is no such list.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"--cpus is {text!r}; write numbers and ranges, such as 0-3,6.")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def parse_size(text: str) -> int:
    """Bytes from a size such as `512M`, `1.5GiB` (powers of 1024) or `512MB` (of 1000).

    Raises:
        ConfigError: The text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = match and {**_UNITS, **_DECIMAL_UNITS}.get(match[2].replace("ib", ""))
    if match is None or not unit or not 1 <= float(match[1]) * unit <= _MOST:
        raise ConfigError(f"--memory is {text!r}; write a size such as 512M, 1.5GiB or 512MB.")
    return int(float(match[1]) * unit)


def _listed(numbers: Any) -> str:
    return ", ".join(str(number) for number in sorted(numbers))
