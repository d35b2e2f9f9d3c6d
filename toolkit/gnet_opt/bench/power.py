"""Energy of an inference, from the counters and sensors that the machine itself has.

`find_rails` looks for what can be read, `Meter` reads it from a thread while something else runs,
and `measure_energy` subtracts what the machine takes when it does nothing. Energy counters are
differenced, power sensors are integrated by the trapezoid rule. The thread belongs to this process,
which waits for the measured one; how long its reading takes is told in the result.

Rails contain each other, so that not all of them may be added up. Only those marked `in_total` are,
all of one kind of source, by these rules:

- Jetson: VDD_IN or POM_5V_IN, the whole module (NVIDIA, forum thread 200883), or a carrier board's
  VIN, the whole board (rbonghi/jetson_stats#900), and nothing else. Without them, on AGX Orin the
  sum of VDD_GPU_SOC, VDD_CPU_CV and VIN_SYS_5V0, which contains VDDQ_VDD2_1V8AO (forum thread
  223111), likewise of AGX Thor's three rails, and of all six of AGX Xavier (thread 81016).
- INA219, INA226 and others of that family: the sensor, where there is one. Of several without those
  names nobody knows which contains which, so no total is made.
- Raspberry Pi 5: the sum over its power chip's rails of volts times amperes.
- RAPL: all packages and their dram. A package contains its core and uncore, and not its dram
  (Intel, "Software Developer's Manual", vol. 3, "RAPL Interfaces"). psys contains them all, but how
  much else is up to the maker of the board, so it is listed only. On AMD the dies of a package
  repeat one counter, so the first counts.
- amd_energy: the sockets, which contain the cores (Documentation/hwmon/amd_energy.rst).
- Battery: all batteries that are discharging.

The first source in this order that has a total gives it: boards first, because they contain most,
and the battery late, because it is told too slowly for short runs. A sensor of unknown wiring comes
after all others.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gnet_opt.bench.heat import vcgencmd

INTERVAL = 0.1
"""Seconds from one reading to the next. RAPL changes every millisecond and wraps around in minutes
at the soonest (Documentation/hwmon/amd_energy.rst), so no counter can wrap around unseen."""

IDLE_SECONDS = 5.0
"""How long to look at the idle machine; its power is the median, so that a short task of somebody
else does not count."""

_ROOT = Path("/")

_ABSENT = (
    "Energy was not measured: nothing that tells it can be read here. Looked for INA power "
    "monitors (/sys/class/hwmon, /sys/bus/i2c/drivers/ina3221x), the power chip of a Raspberry "
    "Pi 5 (vcgencmd pmic_read_adc), RAPL (/sys/class/powercap/intel-rapl:*), amd_energy "
    "(/sys/class/hwmon) and a battery in use (/sys/class/power_supply). A virtual machine does "
    "not see the counters of its host."
)
_ONE_SENSOR = "what is wired behind that sensor"
_WHOLE = ("VIN", "VDD_IN", "POM_5V_IN")
_SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
_PMIC_LINE = re.compile(r"(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([\d.]+)[AV]")


@dataclass(frozen=True, kw_only=True)
class Rail:
    """Something whose power or energy can be read.

    Attributes:
        name: As the machine calls it.
        source: The file or the command that is read.
        read: Gives watts, or, of a counter, joules; raises OSError or ValueError where it cannot.
        counter: Whether `read` gives joules that add up.
        wraps_at: After how many joules a counter starts again from 0, None where not known.
        in_total: Whether it is part of the machine's total.
    """

    name: str
    source: str
    read: Callable[[], float]
    counter: bool = False
    wraps_at: float | None = None
    in_total: bool = False


@dataclass(frozen=True, kw_only=True)
class Rails:
    """What can be read on a machine.

    Attributes:
        rails: The rails, empty where nothing can be read.
        covers: What the rails in the total measure together, empty where there is no total.
        notes: Sentences on what cannot be read and why.
    """

    rails: tuple[Rail, ...] = ()
    covers: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RailEnergy:
    """What an inference takes of one rail.

    Attributes:
        name: The rail's name.
        source: What was read.
        in_total: Whether it is part of the total.
        joules_per_inference: Above idle; below 0 where the difference is lost in the noise.
        idle_watts: The median power before the run.
        busy_watts: The mean power during the run.
    """

    name: str
    source: str
    in_total: bool
    joules_per_inference: float
    idle_watts: float
    busy_watts: float

    def to_dict(self) -> dict[str, Any]:
        """The rail as it stands in a result file."""
        return {
            "busy_watts": self.busy_watts,
            "idle_watts": self.idle_watts,
            "in_total": self.in_total,
            "joules_per_inference": self.joules_per_inference,
            "name": self.name,
            "source": self.source,
        }


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What an inference takes, idle power subtracted.

    Attributes:
        rails: One a rail, empty where nothing could be read.
        note: Sentences: what the total covers and how it was measured, or why there is nothing.
    """

    rails: tuple[RailEnergy, ...]
    note: str

    @property
    def joules_per_inference(self) -> float | None:
        """The sum over the rails in the total, None where there is no total."""
        parts = [rail.joules_per_inference for rail in self.rails if rail.in_total]
        return sum(parts) if parts else None

    def to_dict(self) -> dict[str, Any]:
        """`energy` as it stands in a result file."""
        return {
            "joules_per_inference": self.joules_per_inference,
            "note": self.note,
            "rails": [rail.to_dict() for rail in self.rails],
        }


def find_rails(root: Path = _ROOT, firmware: Callable[[str], str] | None = None) -> Rails:
    """Look for everything that tells power or energy, and read each once.

    Args:
        root: The root of the file system.
        firmware: Answers a Pi's `vcgencmd` commands; None for the real one, of this machine only.
    """
    if firmware is None and root == _ROOT:
        firmware = vcgencmd
    battery = _battery(root)
    groups = [
        _ina(root),
        _ina_of_old_jetsons(root),
        _pmic(firmware),
        _rapl(root),
        _amd_energy(root),
        battery,
    ]
    ordered = sorted(groups, key=lambda group: group.covers == _ONE_SENSOR)
    total = next((group for group in ordered if group.covers), Rails())
    rails = tuple(
        rail if group is total else replace(rail, in_total=False)
        for group in groups
        for rail in group.rails
    )
    if rails:
        groups.remove(battery)  # nobody misses a battery where something better is there
    notes = tuple(note for group in groups for note in group.notes)
    return Rails(rails=rails, covers=total.covers, notes=notes if rails else (_ABSENT, *notes))


class Meter:
    """Reads rails from a thread of its own, from entering the context to leaving it.

    Attributes:
        seconds: From entering to leaving.
        reading: The share of that time that the thread spent reading, an upper bound of what it
            took of one core.
    """

    def __init__(
        self,
        rails: Sequence[Rail],
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds = 0.0
        self.reading = 0.0
        self._accounts = [Account(rail) for rail in rails]
        self._interval = interval
        self._clock = clock
        self._started = 0.0
        self._spent = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def accounts(self) -> tuple[Account, ...]:
        """What was read, one a rail, in their order."""
        return tuple(self._accounts)

    def __enter__(self) -> Meter:
        self._started = self._clock()
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._read()
        self.seconds = self._clock() - self._started
        self.reading = self._spent / self.seconds if self.seconds else 0.0

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._read()

    def _read(self) -> None:
        started = self._clock()
        for account in self._accounts:
            try:
                value = account.rail.read()
            except (OSError, ValueError):
                continue  # the next reading spans the gap
            account.add(self._clock(), value)
        self._spent += self._clock() - started


class Account:
    """The readings of one rail, added up.

    Attributes:
        rail: The rail.
        joules: Energy from the first to the last reading.
        seconds: How long these readings span.
        watts: Mean power of each interval between two readings.
    """

    def __init__(self, rail: Rail) -> None:
        self.rail = rail
        self.joules = 0.0
        self.seconds = 0.0
        self.watts: list[float] = []
        self._last: tuple[float, float] | None = None

    def add(self, now: float, value: float) -> None:
        """Add a reading.

        Args:
            now: When it was taken, in seconds.
            value: What `rail.read` gave.
        """
        before, self._last = self._last, (now, value)
        if before is None or now <= before[0]:
            return
        seconds = now - before[0]
        if self.rail.counter:
            joules = value - before[1]
            if joules < 0 and self.rail.wraps_at is None:
                return
            if joules < 0:
                joules += self.rail.wraps_at or 0.0
        else:
            joules = (before[1] + value) / 2 * seconds
        self.joules += joules
        self.seconds += seconds
        self.watts.append(joules / seconds)

    @property
    def is_alive(self) -> bool:
        """Whether it tells anything: a counter that stands still belongs to nothing."""
        return self.seconds > 0 and (self.joules > 0 or not self.rail.counter)


def measure_energy(
    run: Callable[[], int],
    rails: Rails,
    *,
    idle_seconds: float = IDLE_SECONDS,
    interval: float = INTERVAL,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    """Measure what one inference takes above the idle machine.

    (mean power during the run - median power before) x seconds / inferences, for each rail.

    Args:
        run: Runs inferences in another process and gives their number, at least one. It should
            take seconds: a counter may stand still for many milliseconds.
        rails: What to read; without rails `run` is not called.
        idle_seconds: How long to look at the idle machine before.
        interval: Seconds from one reading to the next.
        sleep: Waits for so many seconds.

    Raises:
        ValueError: The run made no inference.
    """
    if not rails.rails:
        return Energy(rails=(), note=" ".join(rails.notes))
    with Meter(rails.rails, interval) as idle:
        sleep(idle_seconds)
    with Meter(rails.rails, interval) as busy:
        count = run()
    if count < 1:
        raise ValueError("the run made no inference")
    results, silent = [], []
    for before, during in zip(idle.accounts, busy.accounts, strict=True):
        rail = before.rail
        if not (before.watts and during.is_alive):
            silent.append(rail)
            continue
        idle_watts = statistics.median(before.watts)
        busy_watts = during.joules / during.seconds
        results.append(
            RailEnergy(
                name=rail.name,
                source=rail.source,
                in_total=rail.in_total,
                joules_per_inference=(busy_watts - idle_watts) * busy.seconds / count,
                idle_watts=idle_watts,
                busy_watts=busy_watts,
            )
        )
    if any(rail.in_total for rail in silent):
        # The rest of a sum would be taken for the whole.
        results = [replace(result, in_total=False) for result in results]
    return Energy(rails=tuple(results), note=_note(results, silent, rails, idle, busy, interval))


def _note(
    results: Sequence[RailEnergy],
    silent: Sequence[Rail],
    rails: Rails,
    idle: Meter,
    busy: Meter,
    interval: float,
) -> str:
    total = [result for result in results if result.in_total]
    sentences = []
    if total:
        watts = sum(result.idle_watts for result in total)
        names = " + ".join(result.name for result in total)
        sentences += [
            f"The total is {names}: {rails.covers}.",
            f"Idle power, {watts:.2f} W (median of {idle.seconds:.0f} s before), is subtracted.",
        ]
        if sum(result.joules_per_inference for result in total) <= 0:
            sentences.append(
                "The run took no more than the idle machine: the difference is lost in the noise. "
                "Measure longer, on a machine that does nothing else."
            )
    elif results:
        sentences.append(
            "There is no total, as it is not known which of these rails contain others, or a part "
            "of it could not be read. Idle power is subtracted from each."
        )
    sentences += [
        f"{rail.name} ({rail.source}) told nothing during the run and is left out."
        for rail in silent
    ]
    sentences.append(
        f"Read every {interval:g} s, which took {100 * busy.reading:.1f} % of the time."
    )
    return " ".join([*sentences, *rails.notes])


def parse_pmic(text: str) -> float:
    """Watts from the answer to `vcgencmd pmic_read_adc`: volts times amperes of every rail.

    Inputs that tell volts only, EXT5V and BATT, do not count, and the loss of the power chip and
    what hangs on USB and on the 5 V pins are not in it.

    Raises:
        ValueError: There is no rail with both in the text.
    """
    values = {(rail, unit): float(value) for rail, unit, value in _PMIC_LINE.findall(text)}
    watts = [
        amperes * values[rail, "V"]
        for (rail, unit), amperes in values.items()
        if unit == "A" and (rail, "V") in values
    ]
    if not watts:
        raise ValueError("no rail has both a voltage and a current")
    return sum(watts)


def _ina(root: Path) -> Rails:
    """INA219 to INA3221 as hwmon devices: µW, or mV and mA (Documentation/hwmon/ina3221.rst)."""
    # A newer Jetson shows its INA3221 in both places; hwmon's number tells that they are the same.
    folders = {
        folder.name: folder
        for pattern in ("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/class/hwmon/hwmon*")
        for folder in root.glob(pattern)
    }
    rails = []
    for _, folder in sorted(folders.items()):
        chip = _text(folder / "name")
        if not re.fullmatch(r"ina\d+\w*", chip):
            continue
        # in4 to in7 and curr4 of an INA3221 are shunt voltages and sums.
        for channel in (1, 2, 3):
            label = next(
                filter(
                    None, (_text(folder / f"{kind}{channel}_label") for kind in ("in", "power"))
                ),
                _text(folder / "label") or f"{chip} {folder.name} channel {channel}",
            )
            if label == "NC" or _text(folder / f"in{channel}_enable") == "0":
                continue
            power, volts, amperes = (
                folder / f"{kind}{channel}_input" for kind in ("power", "in", "curr")
            )
            if power.exists():
                read, source = _scaled(power, 1e-6), power
            elif volts.exists() and amperes.exists():
                read, source = _product(volts, amperes, 1e-6), amperes
            else:
                continue
            rails.append(Rail(name=label, source=_path(root, source), read=read))
    return _with_total(_readable(rails))


def _ina_of_old_jetsons(root: Path) -> Rails:
    """INA3221 in NVIDIA's own driver up to JetPack 4: mW beside `rail_name_N`."""
    rails: dict[str, Rail] = {}
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio*device*/rail_name_*")):
        name = _text(label)
        power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
        if name and name != "NC" and name not in rails:
            rails[name] = Rail(name=name, source=_path(root, power), read=_scaled(power, 1e-3))
    return _with_total(_readable(list(rails.values())))


def _with_total(rails: Sequence[Rail]) -> Rails:
    """Mark the rails of INA sensors that are the total; the rules stand above."""
    names = [rail.name for rail in rails]
    whole = [name for name in _WHOLE if name in names][:1]
    if whole:
        total, covers = whole, "the whole module" if whole != ["VIN"] else "the whole board"
    elif sums := [list(parts) for parts in _SUMS if set(parts) <= set(names)]:
        total, covers = sums[0], "the module, without what else the carrier board takes"
    elif len(rails) == 1:
        total, covers = names, _ONE_SENSOR
    else:
        total, covers = [], ""
    firsts = {names.index(name) for name in total}  # a second one of that name is not added
    return Rails(
        rails=tuple(replace(rail, in_total=index in firsts) for index, rail in enumerate(rails)),
        covers=covers,
    )


def _pmic(firmware: Callable[[str], str] | None) -> Rails:
    if firmware is None:
        return Rails()
    ask = firmware
    rail = Rail(
        name="Raspberry Pi power chip",
        source="vcgencmd pmic_read_adc",
        read=lambda: parse_pmic(ask("pmic_read_adc")),
        in_total=True,
    )
    covers = "the rails of the board, without its power chip's loss and what hangs on 5 V and USB"
    return Rails(rails=(rail,), covers=covers) if _readable([rail]) else Rails()


def _rapl(root: Path) -> Rails:
    """RAPL zones, Intel's and AMD's (Documentation/power/powercap/powercap.rst: µJ).

    Zones named intel-rapl-mmio are the same counters seen through another window.
    """
    zones = {zone.name: zone for zone in root.glob("sys/class/powercap/intel-rapl:*")}
    titles = {number: _text(zone / "name") for number, zone in zones.items()}
    vendor_is_amd = "AuthenticAMD" in _text(root / "proc" / "cpuinfo")
    rails = []
    for number, zone in sorted(zones.items()):
        title = titles[number]
        above = titles.get(number.rpartition(":")[0], "")
        is_repeated = vendor_is_amd and re.search(r"-die-[1-9]", title) is not None
        try:
            wraps_at = _value(zone / "max_energy_range_uj") * 1e-6
        except (OSError, ValueError):
            wraps_at = None
        rails.append(
            Rail(
                name=f"{above} {title}".strip(),
                source=_path(root, zone / "energy_uj"),
                read=_scaled(zone / "energy_uj", 1e-6),
                counter=True,
                wraps_at=wraps_at,
                in_total=title == "dram" or (title.startswith("package") and not is_repeated),
            )
        )
    covers = "the processor, with its memory where dram is named, and not the whole machine"
    return _counters(
        rails, covers, "RAPL", "CVE-2020-8694", "/sys/class/powercap/intel-rapl:*/energy_uj"
    )


def _amd_energy(root: Path) -> Rails:
    rails = []
    for counter in sorted(root.glob("sys/class/hwmon/hwmon*/energy*_input")):
        if _text(counter.with_name("name")) != "amd_energy":
            continue
        label = _text(counter.with_name(counter.name.replace("_input", "_label")))
        rails.append(
            Rail(
                name=label or counter.name.removesuffix("_input"),
                source=_path(root, counter),
                read=_scaled(counter, 1e-6),
                counter=True,
                in_total=label.startswith("Esocket"),
            )
        )
    covers = "the processor, and not the whole machine"
    return _counters(
        rails, covers, "amd_energy", "CVE-2020-12912", "/sys/class/hwmon/hwmon*/energy*_input"
    )


def _counters(rails: Sequence[Rail], covers: str, what: str, reason: str, files: str) -> Rails:
    """The counters that can be read, and a sentence on those that only root may read."""
    denied = []
    for rail in rails:
        try:
            rail.read()
        except PermissionError:
            denied.append(rail)
        except (OSError, ValueError):
            pass
    readable = _readable(rails)
    notes = (
        (
            f"{what} is here, but only root may read it, as its counters can spy on other programs "
            f"({reason}). On a machine of your own, allow it until the next start with: "
            f"sudo chmod a+r {files}",
        )
        if denied
        else ()
    )
    # A sum that lacks a part that is there would be taken for the whole.
    if any(rail.in_total for rail in denied) or not any(rail.in_total for rail in readable):
        readable, covers = [replace(rail, in_total=False) for rail in readable], ""
    return Rails(rails=tuple(readable), covers=covers, notes=notes)


def _battery(root: Path) -> Rails:
    """Batteries in use: µW, or µA and µV (Documentation/ABI/testing/sysfs-class-power)."""
    rails, notes = [], []
    for folder in sorted(root.glob("sys/class/power_supply/*")):
        # The scope of a mouse's or a headset's battery is Device.
        if _text(folder / "type") != "Battery" or _text(folder / "scope") == "Device":
            continue
        status = _text(folder / "status") or "Unknown"
        if status != "Discharging":
            notes.append(
                f"The battery {folder.name} tells nothing of what the machine takes while it is "
                f"on its charger (status: {status}). Unplug it to measure by the battery."
            )
            continue
        power = folder / "power_now"
        read = (
            _scaled(power, 1e-6)
            if power.exists()
            else _product(folder / "current_now", folder / "voltage_now", 1e-12)
        )
        source = power if power.exists() else folder / "current_now"
        rail = Rail(
            name=folder.name,
            source=_path(root, source),
            read=_while_discharging(folder / "status", read),
            in_total=True,
        )
        rails += _readable([rail])
    covers = (
        "the whole machine with its screen, told so seldom that only a run of minutes counts"
        if rails
        else ""
    )
    return Rails(rails=tuple(rails), covers=covers, notes=tuple(notes))


def _while_discharging(status: Path, read: Callable[[], float]) -> Callable[[], float]:
    def checked() -> float:
        if _text(status) != "Discharging":
            raise ValueError("the battery is not discharging any more")
        return abs(read())  # a current that leaves the battery is negative in some drivers

    return checked


def _readable(rails: Sequence[Rail]) -> list[Rail]:
    readable = []
    for rail in rails:
        try:
            rail.read()
        except (OSError, ValueError):
            continue
        readable.append(rail)
    return readable


def _scaled(path: Path, factor: float) -> Callable[[], float]:
    return lambda: _value(path) * factor


def _product(one: Path, other: Path, factor: float) -> Callable[[], float]:
    return lambda: _value(one) * _value(other) * factor


def _value(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _path(root: Path, path: Path) -> str:
    return f"/{path.relative_to(root).as_posix()}"
