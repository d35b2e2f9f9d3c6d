"""What this machine is, read without running anything and without importing a runtime."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gnet_opt.files import text_of

_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One computer.

    Attributes:
        architecture: `x86_64`, `aarch64`, or what the system calls it.
        instructions: CPU flags in the spelling of Linux's /proc/cpuinfo, such as `avx512_vnni`.
        cpu: The CPU's name.
        board: The board's name from the device tree, empty where there is none.
        cores: Logical CPUs that this process may use.
        system: The operating system.
    """

    architecture: str
    instructions: frozenset[str]
    cpu: str
    board: str
    cores: int
    system: str

    def to_dict(self) -> dict[str, Any]:
        """What a manifest or a result file records of the machine it was made on."""
        return {
            "architecture": self.architecture,
            "board": self.board,
            "cores": self.cores,
            "cpu": self.cpu,
            "instructions": sorted(self.instructions & _RELEVANT),
            "system": self.system,
        }


# fmt: off
_RELEVANT = frozenset([
    "sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
])
# fmt: on


@cache
def this_machine() -> Machine:
    """Describe the machine that runs this process."""
    raw = platform.machine().lower()
    cpuinfo = text_of(Path("/proc/cpuinfo"))
    return Machine(
        architecture=_ARCHITECTURES.get(raw, raw),
        instructions=parse_flags(cpuinfo) or _numpy_flags(),
        cpu=_field(cpuinfo, "model name") or platform.processor() or raw,
        board=text_of(Path("/proc/device-tree/model")).strip("\0\n "),
        cores=len(own_cpus()),
        system=f"{platform.system()} {platform.release()}",
    )


def own_cpus() -> tuple[int, ...]:
    """The CPUs that this process may run on: all there are where the system binds no process."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def parse_flags(cpuinfo: str) -> frozenset[str]:
    """The instruction set flags in the text of /proc/cpuinfo (`flags`, or `Features` on Arm)."""
    return frozenset((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())


def _numpy_flags() -> frozenset[str]:
    """The flags that matter from NumPy's own detection, where there is no /proc/cpuinfo."""
    try:
        features = importlib.import_module("numpy._core._multiarray_umath").__cpu_features__
    except (ImportError, AttributeError):
        return frozenset()
    found = {name.lower() for name, present in features.items() if present}
    # NumPy names groups of instructions by the processor that brought them; from Cascade Lake on
    # AVX-512 processors have VNNI.
    if found & {"avx512_clx", "avx512_icl", "avx512_spr"}:
        found.add("avx512_vnni")
    return frozenset(found)


def _field(cpuinfo: str, name: str) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
