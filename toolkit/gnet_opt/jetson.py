"""What an NVIDIA Jetson says of itself: software, power mode, clocks, memory, heat, storage.

Everything is only read. What is absent or may not be read is left out, and nothing here raises for
it: a board in a container, or one with another Linux, tells less. The parsers are functions of the
text alone, so that text from another machine will do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gnet_opt.files import text_of

Run = Callable[[Sequence[str]], str]
"""Runs a command and gives what it printed, or an empty text where that failed."""

SYSTEM = Path("/")

JETPACKS = {
    "32.6.1": "4.6",
    "32.7.1": "4.6.1",
    "32.7.2": "4.6.2",
    "32.7.3": "4.6.3",
    "32.7.4": "4.6.4",
    "32.7.5": "4.6.5",
    "32.7.6": "4.6.6",
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
"""JetPack by the release of Jetson Linux (L4T) that it brings.

From NVIDIA's archive, https://developer.nvidia.com/embedded/jetpack-archive, by way of projects
that keep this table up to date: `jetson_containers/l4t_version.py` of dusty-nv/jetson-containers
for 4 and 5, and what others read off the archive on 2026-09-22 for 6 and 7. A release that is not
listed gives no JetPack: the next number cannot be guessed."""

_TIMEOUT = 20
"""Seconds that a command may take; jetson_clocks is a shell script that reads many files."""

_PACKAGES = re.compile(r"nvidia-l4t-core|nvidia-jetpack|libnvinfer\d+|python3-libnvinfer")
_DESKTOP = frozenset({"Xorg", "Xwayland", "gnome-shell", "lxpanel", "lxsession", "unity-panel-ser"})
"""Processes of the desktops of JetPack's images, as the kernel cuts their names, in 15 letters."""
_GPU_NODES = ("dev/nvgpu/igpu0", "dev/nvhost-ctrl-gpu", "dev/nvidia0")
"""The GPU's device node in Jetson Linux 36 and 39, up to 35, and on Thor."""
_GPU_CLOCK = re.compile(r"\.(gpu|gp10b|gv11b|ga10b)$|^gpu-gpc-\d+$")
"""The GPU's folder in /sys/class/devfreq, by chip: 57000000.gpu, 17000000.ga10b, gpu-gpc-0."""
_MODULE = re.compile(r"nvidia,p\d{4}-\d{4}")
"""NVIDIA's part number of a module or a kit, by which the device tree names every Jetson."""
_TRTEXEC = "usr/src/tensorrt/bin/trtexec"


@dataclass(frozen=True, kw_only=True)
class PowerMode:
    """A power mode of nvpmodel.

    Attributes:
        id: Its number, which `nvpmodel -m` takes, or None where it is not known.
        name: Its name, `MAXN` or `MODE_15W_6CORE` for example.
        cores: CPU cores that are online in it, or None where it is not known.
    """

    id: int | None
    name: str
    cores: int | None = None

    @property
    def budget(self) -> float:
        """Watts by its name, infinite where the name means no limit, 0 where it does not say.

        NVIDIA's own files call MAXN "the NONE power model to release all constraints".
        """
        if "MAXN" in self.name:
            return float("inf")
        found = re.search(r"(\d+)W", self.name)
        return float(found[1]) if found else 0.0


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A clock and the limits that its governor keeps to, in Hz.

    Attributes:
        name: `cpu0` and so on (the first core of a group that shares it), `gpu`, or `emc`, the
            memory's, which only root can read.
        minimum: The least it may fall to.
        maximum: The most.
        current: What it is now.
        governor: Who chooses between them, empty where it is not told.
    """

    name: str
    minimum: int
    maximum: int
    current: int
    governor: str = ""

    @property
    def fixed(self) -> bool:
        """Whether it stays as it is, as after `jetson_clocks`."""
        return self.minimum == self.maximum


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One swap area, in bytes; `compressed` is one in memory itself (zram)."""

    name: str
    size: int
    free: int
    compressed: bool


@dataclass(frozen=True, kw_only=True)
class Zone:
    """A thermal zone, in degrees Celsius.

    Attributes:
        name: `cpu-thermal` for example.
        celsius: Its temperature.
        throttles_at: Where clocks are lowered, or None where the kernel does not tell.
    """

    name: str
    celsius: float
    throttles_at: float | None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory in bytes; `available` is what a new program can have without swapping."""

    total: int
    available: int


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """One Jetson; an empty text or None is what could not be read.

    Attributes:
        model: Its name in the device tree.
        compatible: Module and chip in the device tree, `nvidia,tegra234` for example.
        l4t: The release of Jetson Linux, `36.4.3` for example.
        jetpack: The JetPack that is installed, or that Jetson Linux belongs to.
        tensorrt: The version of TensorRT's libraries.
        tensorrt_python: Whether Python finds TensorRT's package: this Python on this machine, the
            system's where other files than this machine's were read.
        trtexec: The path of TensorRT's trtexec, empty where it is not installed.
        power_mode: The present one.
        power_modes: All that the board has.
        clocks: Of the CPU, the GPU and, for root, the memory.
        memory: Its main memory, which the GPU shares.
        swaps: Its swap areas.
        storage: Free bytes by folder: `/` and the one that was asked for.
        zones: Its temperatures.
        gpu: Whether the GPU is there to be used; inside a container it may not be.
        desktop: Processes of a desktop that runs.
    """

    model: str
    compatible: tuple[str, ...]
    l4t: str
    jetpack: str
    tensorrt: str
    tensorrt_python: bool
    trtexec: str
    power_mode: PowerMode | None
    power_modes: tuple[PowerMode, ...]
    clocks: tuple[Clock, ...]
    memory: Memory | None
    swaps: tuple[Swap, ...]
    storage: dict[str, int]
    zones: tuple[Zone, ...]
    gpu: bool
    desktop: tuple[str, ...]

    @property
    def strongest(self) -> PowerMode | None:
        """The power mode with the largest budget, and of several the one with the most cores."""
        return max(self.power_modes, key=lambda mode: (mode.budget, mode.cores or 0), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: bytes, Hz, degrees Celsius."""
        return asdict(self)


def read(
    folder: Path | None = None, *, root: Path = SYSTEM, run: Run | None = None
) -> Jetson | None:
    """Read what this machine is, if it is a Jetson.

    Args:
        folder: A folder whose free storage matters, that of a bundle for example.
        root: Where the machine's files are; another folder than `/` holds those of another one.
        run: Runs `nvpmodel -q` and `jetson_clocks --show`. By default they are run on this
            machine, and left out where `root` is another.

    Returns:
        None where it is no Jetson.
    """
    model = text_of(root / "proc/device-tree/model").strip("\0\n ")
    compatible = tuple(filter(None, text_of(root / "proc/device-tree/compatible").split("\0")))
    release = text_of(root / "etc/nv_tegra_release")
    # Tegra chips are in other computers, too, and a container may hide the one or the other.
    if not (release or "Jetson" in model or any(map(_MODULE.match, compatible))):
        return None
    if run is None:
        run = query if root == SYSTEM else _nothing
    packages = parse_packages(text_of(root / "var/lib/dpkg/status"))
    l4t = parse_release(release) or packages.get("nvidia-l4t-core", "").partition("-")[0]
    modes = parse_power_modes(text_of(root / "etc/nvpmodel.conf"))
    return Jetson(
        model=model,
        compatible=compatible,
        l4t=l4t,
        jetpack=packages.get("nvidia-jetpack", "").partition("+")[0] or JETPACKS.get(l4t, ""),
        tensorrt=_tensorrt(packages),
        tensorrt_python=_has_python_package(root, packages),
        trtexec=_trtexec(root),
        power_mode=_power_mode(root, run, modes),
        power_modes=modes,
        clocks=parse_clocks(run(["jetson_clocks", "--show"])) or _clocks(root),
        memory=parse_memory(text_of(root / "proc/meminfo")),
        swaps=parse_swaps(text_of(root / "proc/swaps")),
        storage=_storage(root, folder),
        zones=_zones(root),
        gpu=any(_exists(root / node) for node in _GPU_NODES),
        desktop=_desktop(root),
    )


def query(command: Sequence[str]) -> str:
    """Run a command that only tells something; what it printed, empty where it failed."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def parse_release(text: str) -> str:
    """The release of Jetson Linux in /etc/nv_tegra_release, `36.4.3` for example, or empty."""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else ""


def parse_packages(text: str) -> dict[str, str]:
    """Versions of NVIDIA's packages in /var/lib/dpkg/status (its format: `man deb-control`)."""
    found = {}
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE))
        name = fields.get("Package", "")
        if _PACKAGES.fullmatch(name) and fields.get("Status", "").endswith(" installed"):
            found[name] = fields.get("Version", "")
    return found


def parse_power_mode(text: str) -> PowerMode | None:
    """The mode that `nvpmodel -q` prints: its name and, in a line of its own, its number."""
    found = re.search(r"NV Power Mode: *(\S+)[ \t]*(?:\r?\n(\d+)\b)?", text)
    if found is None:
        return None
    return PowerMode(id=None if found[2] is None else int(found[2]), name=found[1])


def parse_power_modes(text: str) -> tuple[PowerMode, ...]:
    """All modes of a board from /etc/nvpmodel.conf, in the file's order."""
    modes = []
    for part in re.split(r"^\s*(?=< *(?:POWER_MODEL|PM_CONFIG)\b)", text, flags=re.MULTILINE):
        found = re.match(r"< *POWER_MODEL +ID=(\d+) +NAME=(\S+?) *>", part)
        if found:
            online = re.findall(r"^\s*CPU_ONLINE +CORE_\d+ +([01])", part, re.MULTILINE)
            cores = sum(map(int, online)) if online else None
            modes.append(PowerMode(id=int(found[1]), name=found[2], cores=cores))
    return tuple(modes)


def parse_clocks(text: str) -> tuple[Clock, ...]:
    """The clocks that `jetson_clocks --show` prints for root: CPUs in kHz, the others in Hz."""
    clocks = []
    for line in text.splitlines():
        found = re.match(r"(cpu\d+|GPU|EMC)\b:?", line)
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        limits = [fields.get(f"{key}Freq", "") for key in ("Min", "Max", "Current")]
        if found is None or fields.get("Online") == "0" or not all(map(str.isdecimal, limits)):
            continue
        minimum, maximum, current = map(int, limits)
        if found[1].startswith("cpu"):
            minimum, maximum, current = (1000 * value for value in (minimum, maximum, current))
        if found[1] == "EMC" and fields.get("FreqOverride") == "1":
            minimum = maximum = current  # the override holds it, whatever its limits say
        clocks.append(
            Clock(
                name=found[1].lower(),
                minimum=minimum,
                maximum=maximum,
                current=current,
                governor=fields.get("Governor", ""),
            )
        )
    return tuple(clocks)


def parse_memory(text: str) -> Memory | None:
    """Total and available memory in /proc/meminfo."""
    fields = {key: int(kib) << 10 for key, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}
    if not {"MemTotal", "MemAvailable"} <= set(fields):
        return None
    return Memory(total=fields["MemTotal"], available=fields["MemAvailable"])


def parse_swaps(text: str) -> tuple[Swap, ...]:
    """The swap areas in /proc/swaps, which counts in KiB."""
    return tuple(
        Swap(
            name=name,
            size=int(size) << 10,
            free=(int(size) - int(used)) << 10,
            compressed="/zram" in name,
        )
        for name, size, used in re.findall(r"^(/\S+)\s+\S+\s+(\d+)\s+(\d+)", text, re.MULTILINE)
    )


def _tensorrt(packages: dict[str, str]) -> str:
    """TensorRT's version of the newest runtime library, `10.3.0.30` for example."""
    found = [name for name in packages if name.startswith("libnvinfer")]
    if not found:
        return ""
    newest = max(found, key=lambda name: int(name.removeprefix("libnvinfer")))
    return packages[newest].partition("-")[0]


def _has_python_package(root: Path, packages: dict[str, str]) -> bool:
    return find_spec("tensorrt") is not None if root == SYSTEM else "python3-libnvinfer" in packages


def _trtexec(root: Path) -> str:
    """trtexec as a bundle's script finds it: by TRTEXEC, in PATH, or where JetPack keeps it."""
    named = shutil.which(os.environ.get("TRTEXEC", "trtexec")) if root == SYSTEM else None
    kept = root / _TRTEXEC
    return named or (str(kept) if _exists(kept) else "")


def _power_mode(root: Path, run: Run, modes: Iterable[PowerMode]) -> PowerMode | None:
    """The present mode by nvpmodel itself or, where it cannot be asked, by what it keeps."""
    told = parse_power_mode(run(["nvpmodel", "-q"]))
    kept = re.search(r"pmode:(\d+)", text_of(root / "var/lib/nvpmodel/status"))
    if told is None and kept is None:
        return None
    for mode in modes:
        if (told and mode.name == told.name) or (told is None and kept and mode.id == int(kept[1])):
            return mode
    return told


def _clocks(root: Path) -> tuple[Clock, ...]:
    """The clocks in /sys, which everyone may read and jetson_clocks changes."""
    policies = (root / "sys/devices/system/cpu/cpufreq").glob("policy[0-9]*")
    found = [
        _clock(f"cpu{path.name.removeprefix('policy')}", path, "scaling_", 1000)
        for path in sorted(policies, key=lambda path: int(path.name.removeprefix("policy")))
    ]
    for path in sorted((root / "sys/class/devfreq").glob("*")):
        if _GPU_CLOCK.search(path.name):
            found.append(_clock("gpu", path, "", 1))
    return tuple(clock for clock in found if clock is not None)


def _clock(name: str, path: Path, prefix: str, unit: int) -> Clock | None:
    limits = [_number(path / f"{prefix}{key}_freq") for key in ("min", "max", "cur")]
    if None in limits:
        return None
    minimum, maximum, current = (unit * value for value in limits if value is not None)
    governor = text_of(path / f"{prefix}governor").strip()
    return Clock(name=name, minimum=minimum, maximum=maximum, current=current, governor=governor)


def _storage(root: Path, folder: Path | None) -> dict[str, int]:
    """Free bytes by folder, for a user that is not root."""
    found = {}
    for name, path in (("/", root), *([(str(folder), folder)] if folder else [])):
        try:
            found[name] = shutil.disk_usage(path).free
        except OSError:
            continue
    return found


def _zones(root: Path) -> tuple[Zone, ...]:
    """The thermal zones that give a value: those of parts that are off give an error.

    Thresholds of type `passive` are where the kernel lowers clocks
    (https://docs.kernel.org/driver-api/thermal/sysfs-api.html).
    """
    zones = []
    for path in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _number(path / "temp")
        if value is None:
            continue
        points = [
            _number(kind.with_name(kind.name.replace("_type", "_temp")))
            for kind in path.glob("trip_point_*_type")
            if text_of(kind).strip() == "passive"
        ]
        passive = [point / 1000 for point in points if point is not None and point > 0]
        name = text_of(path / "type").strip() or path.name
        zones.append(Zone(name=name, celsius=value / 1000, throttles_at=min(passive, default=None)))
    return tuple(zones)


def _desktop(root: Path) -> tuple[str, ...]:
    # Not with the file in the pattern: looking for it fails where a process ends meanwhile.
    running = {text_of(path / "comm").strip() for path in (root / "proc").glob("[0-9]*")}
    return tuple(sorted(running & _DESKTOP))


def _number(path: Path) -> int | None:
    text = text_of(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _nothing(command: Sequence[str]) -> str:
    """What a command prints on a machine that is not there."""
    return ""
