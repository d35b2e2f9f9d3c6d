"""How warm and how fast the processor is, and how often it was held back, from Linux's own files.

Every function takes the root of the file system, and gives nothing where the system tells nothing:
a virtual machine, a container or another operating system has few of these files or none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from gnet_opt.files import text_of

_ROOT = Path("/")
_VCGENCMD_SECONDS = 2.0

# Names of the sensors that sit in or at a processor, as thermal zones (`x86_pkg_temp`,
# `cpu-thermal`, `soc0-thermal`, `tj-thermal`) and hwmon chips (`coretemp`, `k10temp`) spell them.
_PROCESSOR = re.compile(r"cpu|gpu|soc|core|pkg|package|k10temp|zenpower|tj", re.IGNORECASE)


def vcgencmd(question: str) -> str:
    """What the firmware of a Raspberry Pi answers, empty where there is none or it refuses."""
    program = shutil.which("vcgencmd")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, question],
            capture_output=True,
            check=True,
            text=True,
            timeout=_VCGENCMD_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def read_temperatures(root: Path = _ROOT) -> dict[str, float]:
    """Temperatures in degrees Celsius by sensor.

    Thermal zones come by their type and hwmon sensors by chip and label, both with their number
    where two have the same name (the kernel's Documentation/driver-api/thermal/sysfs-api.rst and
    Documentation/hwmon/sysfs-interface.rst: millidegrees). A zone of a part that is switched off
    cannot be read, and is left out.
    """
    found: dict[str, float] = {}
    for zone in _numbered(root, "sys/class/thermal/thermal_zone*"):
        _add(found, _line(zone / "type") or zone.name, zone.name, _number(zone / "temp"))
    for sensor in _numbered(root, "sys/class/hwmon/hwmon*/temp*_input"):
        stem = sensor.name.removesuffix("_input")
        label = _line(sensor.with_name(f"{stem}_label")) or stem
        chip = _line(sensor.with_name("name")) or sensor.parent.name
        _add(found, f"{chip} {label}", sensor.parent.name, _number(sensor))
    return found


def hottest(temperatures: dict[str, float]) -> float | None:
    """The highest temperature of a processor, of any sensor where no name tells of a processor.

    A drive or a power supply may be warmer, but does not slow the processor down.
    """
    own = [value for name, value in temperatures.items() if _PROCESSOR.search(name)]
    return max(own or temperatures.values(), default=None)


def read_frequencies(root: Path = _ROOT) -> dict[str, float]:
    """Current clock frequencies in MHz by logical CPU (`cpu0`), from cpufreq's kHz."""
    found: dict[str, float] = {}
    for folder in _numbered(root, "sys/devices/system/cpu/cpu[0-9]*"):
        kilohertz = _number(folder / "cpufreq" / "scaling_cur_freq")
        if kilohertz is not None:
            found[folder.name] = kilohertz / 1e3
    return found


def read_throttle_count(
    root: Path = _ROOT, firmware: Callable[[str], str] | None = None
) -> int | None:
    """How often the processor was held back since the start; only its growth means something.

    The sum of what there is:

    - x86: `core_throttle_count` of every CPU and the greatest `package_throttle_count`, which all
      CPUs of a package repeat (Documentation/ABI/testing/sysfs-devices-system-cpu);
    - Jetson Orin and Thor: `oc*_event_cnt`, events of under-voltage and over-current
      ("Jetson Linux Developer Guide", Platform Power and Performance);
    - Raspberry Pi: the number of kinds, out of four, that `get_throttled` has seen since the start
      (bits 16 to 19: under-voltage, capped frequency, throttling, soft temperature limit). It
      counts kinds, no events: what has happened before cannot be seen to happen again.

    Args:
        root: The root of the file system.
        firmware: Answers a Pi's `vcgencmd` commands; None for the real one, of this machine only.

    Returns:
        The count; None where nothing counts.
    """
    if firmware is None and root == _ROOT:
        firmware = vcgencmd
    cpus = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"
    counts = [
        *_numbers(root.glob(f"{cpus}/core_throttle_count")),
        *_numbers(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")),
    ]
    packages = _numbers(root.glob(f"{cpus}/package_throttle_count"))
    if packages:
        counts.append(max(packages))
    flags = _throttled_flags(root, firmware)
    if flags is not None:
        counts.append((flags >> 16 & 0xF).bit_count())
    return int(sum(counts)) if counts else None


def _throttled_flags(root: Path, firmware: Callable[[str], str] | None) -> int | None:
    # The file is in the Raspberry Pi's own kernel, and holds the bits in hexadecimal without 0x.
    texts = [_line(path) for path in root.glob("sys/devices/platform/soc*/*firmware/get_throttled")]
    if not any(texts) and firmware is not None:
        texts = [firmware("get_throttled").strip().removeprefix("throttled=")]
    try:
        return int(next(filter(None, texts), ""), 16)
    except ValueError:
        return None


def _numbered(root: Path, pattern: str) -> list[Path]:
    """The paths in the order of their numbers: thermal_zone10 comes after thermal_zone9."""
    return sorted(
        root.glob(pattern),
        key=lambda path: [int(part) for part in re.findall(r"\d+", str(path.relative_to(root)))],
    )


def _add(found: dict[str, float], name: str, where: str, millidegrees: float | None) -> None:
    if millidegrees is not None:
        found[f"{name} ({where})" if name in found else name] = millidegrees / 1e3


def _numbers(paths: Iterable[Path]) -> list[float]:
    return [value for path in paths if (value := _number(path)) is not None]


def _number(path: Path) -> float | None:
    try:
        return float(_line(path))
    except ValueError:
        return None


def _line(path: Path) -> str:
    return text_of(path).strip("\0\n ")
