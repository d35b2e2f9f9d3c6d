from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gnet_opt.bench.power import (
    Account,
    Energy,
    Meter,
    Rail,
    RailEnergy,
    Rails,
    find_rails,
    measure_energy,
    parse_pmic,
)
from gnet_opt.files import dump_json
from sysfs import (
    AMD_ENERGY,
    BATTERY,
    INA226,
    JETSON_AGX_ORIN,
    JETSON_NANO,
    JETSON_ORIN_NANO,
    PMIC,
    RAPL_LAPTOP,
    RAPL_TWO_DIES,
    RAPL_TWO_SOCKETS,
    write_tree,
)


def values(rails: Rails) -> dict[str, float]:
    return {rail.name: pytest.approx(rail.read()) for rail in rails.rails}


def total(rails: Rails) -> list[str]:
    return [rail.name for rail in rails.rails if rail.in_total]


def test_rapl_of_two_sockets(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, RAPL_TWO_SOCKETS))
    assert values(rails) == {
        "package-0": 10360.237493,
        "package-0 dram": 2000.0,
        "package-1": 9000.0,
        "package-1 dram": 1000.0,
    }
    assert total(rails) == ["package-0", "package-0 dram", "package-1", "package-1 dram"]
    assert [rail.wraps_at for rail in rails.rails] == pytest.approx([65532.610987] * 4)
    assert all(rail.counter for rail in rails.rails)
    assert rails.rails[1].source == "/sys/class/powercap/intel-rapl:0:0/energy_uj"
    assert rails.covers.startswith("the processor") and rails.notes == ()


def test_what_a_package_contains_is_not_added_to_it(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, RAPL_LAPTOP))
    # and the second window to the package is no package
    assert list(values(rails)) == ["package-0", "package-0 core", "package-0 uncore", "psys"]
    assert total(rails) == ["package-0"]


def test_dies_that_repeat_a_counter_are_not_added(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, RAPL_TWO_DIES))
    assert list(values(rails)) == ["package-0-die-0", "package-0-die-1"]
    assert total(rails) == ["package-0-die-0"]
    intel = find_rails(write_tree(tmp_path, {"proc/cpuinfo": "vendor_id\t: GenuineIntel"}))
    assert total(intel) == ["package-0-die-0", "package-0-die-1"]


def deny(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Make files unreadable for root, too, who may run the tests."""
    read = Path.read_text

    def checked(path: Path, **options: str) -> str:
        if part in path.as_posix():
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", checked)


def test_counters_that_only_root_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, RAPL_TWO_SOCKETS)
    deny(monkeypatch, "energy_uj")
    rails = find_rails(root)
    assert rails.rails == () and rails.covers == ""
    absent, denied = rails.notes
    assert absent.startswith("Energy was not measured: nothing that tells it can be read here.")
    assert denied == (
        "RAPL is here, but only root may read it, as its counters can spy on other programs "
        "(CVE-2020-8694). On a machine of your own, allow it until the next start with: "
        "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
    )


def test_a_total_without_one_of_its_parts_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path, RAPL_TWO_SOCKETS)
    deny(monkeypatch, "intel-rapl:1/energy_uj")
    rails = find_rails(root)
    assert list(values(rails)) == ["package-0", "package-0 dram", "package-1 dram"]
    assert total(rails) == [] and rails.covers == ""
    assert "CVE-2020-8694" in rails.notes[0]


def test_amd_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tree(tmp_path, AMD_ENERGY)
    rails = find_rails(root)
    assert values(rails) == {"Ecore000": 1.0, "Ecore001": 1.5, "Esocket0": 9.0}
    assert total(rails) == ["Esocket0"]
    deny(monkeypatch, "energy3_input")
    rails = find_rails(root)
    assert total(rails) == []
    assert "amd_energy is here, but only root may read it" in rails.notes[0]
    assert "CVE-2020-12912" in rails.notes[0]


def test_a_jetson_orin_nano(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, JETSON_ORIN_NANO))
    # mV x mA, and neither shunt voltages nor sums
    assert values(rails) == {
        "VDD_IN": 9.250304,
        "VDD_CPU_GPU_CV": 0.59712,
        "VDD_SOC": 1.512704,
    }
    assert total(rails) == ["VDD_IN"]
    assert rails.covers == "the whole module"
    assert rails.rails[0].source == "/sys/class/hwmon/hwmon1/curr1_input"


def test_a_jetson_agx_orin(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, JETSON_AGX_ORIN))
    # each once, though it is seen in two places, and nothing where nothing is connected
    assert list(values(rails)) == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]
    assert total(rails) == ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]
    assert rails.covers.startswith("the module, without")


def test_a_jetson_nano_of_jetpack_4(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, JETSON_NANO))
    assert values(rails) == {"POM_5V_IN": 2.363, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.761}
    assert total(rails) == ["POM_5V_IN"]
    assert rails.rails[0].source == (
        "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input"
    )


def test_a_sensor_on_the_bench(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, INA226))
    assert values(rails) == {"ina226 hwmon2 channel 1": 4.11312}
    assert total(rails) == ["ina226 hwmon2 channel 1"]
    assert rails.covers == "what is wired behind that sensor"
    (tmp_path / "sys/class/hwmon/hwmon2/label").write_text("solar panel\n")
    assert list(values(find_rails(tmp_path))) == ["solar panel"]


def test_of_several_unknown_sensors_no_total_is_made(tmp_path: Path) -> None:
    other = {path.replace("hwmon2", "hwmon7"): text for path, text in INA226.items()}
    rails = find_rails(write_tree(tmp_path, INA226, other))
    assert len(rails.rails) == 2 and total(rails) == []


def test_a_sensor_of_unknown_wiring_comes_after_all_others(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, INA226, BATTERY))
    assert total(rails) == ["BAT0"] and rails.covers.startswith("the whole machine")
    assert total(find_rails(write_tree(tmp_path, JETSON_NANO))) == ["POM_5V_IN"]


def test_a_total_that_is_seen_twice_counts_once(tmp_path: Path) -> None:
    other = {path.replace("hwmon1", "hwmon9"): text for path, text in JETSON_ORIN_NANO.items()}
    rails = find_rails(write_tree(tmp_path, JETSON_ORIN_NANO, other))
    assert len(rails.rails) == 6 and total(rails) == ["VDD_IN"]


def test_a_channel_that_is_switched_off_is_none(tmp_path: Path) -> None:
    root = write_tree(tmp_path, JETSON_ORIN_NANO)
    (root / "sys/class/hwmon/hwmon1/in2_enable").write_text("0\n")
    assert list(values(find_rails(root))) == ["VDD_IN", "VDD_SOC"]


def test_a_raspberry_pi_5(tmp_path: Path) -> None:
    rails = find_rails(tmp_path, lambda question: PMIC if question == "pmic_read_adc" else "")
    assert values(rails) == {"Raspberry Pi power chip": 7.239819}
    assert total(rails) == ["Raspberry Pi power chip"]
    # An older Pi, or a user without the right to ask, gets no rail.
    assert find_rails(tmp_path, lambda question: "error=1").rails == ()


def test_rails_of_the_power_chip_need_volts_and_amperes() -> None:
    assert parse_pmic("A_A current(1)=2.0A\nA_V volt(2)=1.5V\nB_A current(3)=9.0A\n") == 3.0
    with pytest.raises(ValueError, match="no rail has both"):
        parse_pmic("EXT5V_V volt(24)=5.09066000V\n")


def test_a_battery_in_use(tmp_path: Path) -> None:
    root = write_tree(tmp_path, BATTERY)
    rails = find_rails(root)
    assert values(rails) == {"BAT0": 15.0}  # not the mouse's
    assert total(rails) == ["BAT0"] and "a run of minutes" in rails.covers
    battery = root / "sys/class/power_supply/BAT0"
    (battery / "power_now").write_text("14000000\n")
    rails = find_rails(root)
    assert values(rails) == {"BAT0": 14.0}
    (battery / "status").write_text("Charging\n")  # plugged in while it runs
    with pytest.raises(ValueError, match="not discharging"):
        rails.rails[0].read()
    rails = find_rails(root)
    assert rails.rails == ()
    assert rails.notes[1] == (
        "The battery BAT0 tells nothing of what the machine takes while it is on its charger "
        "(status: Charging). Unplug it to measure by the battery."
    )


def test_totals_of_different_sources_are_not_mixed(tmp_path: Path) -> None:
    rails = find_rails(write_tree(tmp_path, BATTERY, RAPL_LAPTOP, AMD_ENERGY))
    assert total(rails) == ["package-0"]
    assert {"BAT0", "Esocket0"} < set(values(rails))
    (tmp_path / "sys/class/power_supply/BAT0/status").write_text("Full\n")
    assert find_rails(tmp_path).notes == ()  # nobody misses it


@pytest.mark.parametrize("text", ["", "n/a", "\xff"])
def test_a_sensor_that_cannot_be_read_is_no_rail(tmp_path: Path, text: str) -> None:
    root = write_tree(tmp_path, INA226)
    (root / "sys/class/hwmon/hwmon2/power1_input").write_text(text, encoding="latin-1")
    assert find_rails(root).rails == ()


def test_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    rails = find_rails(tmp_path)
    ran: list[int] = []
    energy = measure_energy(lambda: ran.append(1) or 1, rails, sleep=ran.append)
    assert ran == [] and energy.rails == () and energy.joules_per_inference is None
    for place in ("/sys/class/powercap/intel-rapl:*", "/sys/class/hwmon", "pmic_read_adc"):
        assert place in energy.note
    assert energy.to_dict() == {"joules_per_inference": None, "note": energy.note, "rails": []}


def rail(read: Callable[[], float] = float, **options: object) -> Rail:
    return Rail(**{"name": "a", "source": "/a", "read": read, **options})  # type: ignore[arg-type]


def fed(rail: Rail, *readings: tuple[float, float]) -> Account:
    account = Account(rail)
    for now, value in readings:
        account.add(now, value)
    return account


def test_a_counter_is_differenced() -> None:
    account = fed(rail(counter=True), (0, 100), (2, 110), (3, 125))
    assert (account.joules, account.seconds, account.watts) == (25, 3, [5, 15])
    assert account.is_alive


def test_a_counter_that_wraps_around() -> None:
    wrapping = rail(counter=True, wraps_at=65_532.0)
    account = fed(wrapping, (0, 65_530), (1, 2), (2, 7))
    assert (account.joules, account.watts) == (9, [4, 5])
    # Where nobody knows how far it counts, the interval is left out.
    account = fed(rail(counter=True), (0, 65_530), (1, 2), (2, 7))
    assert (account.joules, account.seconds, account.watts) == (5, 1, [5])


@given(
    energy=st.lists(st.floats(0, 99, allow_nan=False), min_size=1, max_size=40),
    start=st.floats(0, 99),
)
def test_a_wrapping_counter_loses_nothing(energy: list[float], start: float) -> None:
    account, reading = Account(rail(counter=True, wraps_at=100.0)), start
    account.add(0, reading)
    for second, joules in enumerate(energy, 1):
        reading = (reading + joules) % 100
        account.add(second, reading)
    assert account.joules == pytest.approx(sum(energy), abs=1e-9)


def test_power_is_integrated_by_the_trapezoid_rule() -> None:
    account = fed(rail(), (0, 4), (1, 6), (4, 6), (4, 9))
    assert (account.joules, account.seconds, account.watts) == (5 + 18, 4, [5, 6])


@given(
    slope=st.floats(-10, 10),
    base=st.floats(0, 100),
    steps=st.lists(st.floats(0.01, 5), min_size=1, max_size=30),
)
def test_power_that_changes_steadily_is_integrated_exactly(
    slope: float, base: float, steps: list[float]
) -> None:
    account, now = fed(rail(), (0, base)), 0.0
    for step in steps:
        now += step
        account.add(now, base + slope * now)
    assert account.joules == pytest.approx(base * now + slope * now**2 / 2, rel=1e-6, abs=1e-6)


def test_what_stands_still_is_not_alive() -> None:
    assert not fed(rail(counter=True), (0, 5), (9, 5)).is_alive
    assert not fed(rail(), (0, 5)).is_alive
    assert fed(rail(), (0, 0), (1, 0)).is_alive  # a rail without power


class Machine:
    """A machine that takes 5 W, and 20 W while it works, told in real time."""

    def __init__(self) -> None:
        self.joules, self.watts, self.then = 60.0, 5.0, time.perf_counter()

    def count(self) -> float:
        now = time.perf_counter()
        self.joules, self.then = self.joules + self.watts * (now - self.then), now
        return self.joules % 62  # wraps around soon

    def power(self) -> float:
        return self.watts

    def work(self, seconds: float = 0.5, runs: int = 100) -> int:
        self.count()
        self.watts = 20.0
        time.sleep(seconds)
        self.count()
        self.watts = 5.0
        return runs


def test_energy_of_an_inference() -> None:
    machine = Machine()
    rails = Rails(
        rails=(
            rail(machine.count, name="package-0", counter=True, wraps_at=62.0, in_total=True),
            rail(machine.power, name="VDD", source="/vdd"),
            rail(lambda: 7.0, name="dead", counter=True),
        ),
        covers="the processor",
        notes=("And a note.",),
    )
    energy = measure_energy(machine.work, rails, idle_seconds=0.3, interval=0.01)
    package, sensor = energy.rails
    # 0.5 s of 15 W more, for 100 inferences; sleeping takes a little longer, never shorter.
    assert package.idle_watts == pytest.approx(5, rel=0.05)
    assert 0.07 < package.joules_per_inference < 0.2
    assert sensor.name == "VDD" and sensor.idle_watts == 5
    assert 10 < sensor.busy_watts <= 20
    assert energy.joules_per_inference == package.joules_per_inference
    assert energy.note.startswith("The total is package-0: the processor. Idle power, 5.")
    assert "dead (/a) told nothing during the run and is left out." in energy.note
    assert "Read every 0.01 s, which took " in energy.note
    assert energy.note.endswith(" And a note.")
    told = energy.to_dict()
    assert dump_json(told)
    assert told["rails"][1] == {
        "busy_watts": sensor.busy_watts,
        "idle_watts": 5.0,
        "in_total": False,
        "joules_per_inference": sensor.joules_per_inference,
        "name": "VDD",
        "source": "/vdd",
    }


def test_a_total_is_the_sum_of_its_parts() -> None:
    parts = [
        RailEnergy(
            name=name,
            source="/",
            in_total=in_total,
            joules_per_inference=joules,
            idle_watts=1,
            busy_watts=2,
        )
        for name, joules, in_total in (("a", 0.5, True), ("b", 0.25, True), ("c", 9.0, False))
    ]
    assert Energy(rails=tuple(parts), note="").joules_per_inference == 0.75
    assert Energy(rails=(parts[2],), note="").joules_per_inference is None


def test_a_total_that_lacks_a_part_is_not_told() -> None:
    def gone() -> float:
        raise OSError("EAGAIN")

    machine = Machine()
    rails = Rails(
        rails=(
            rail(machine.power, name="there", in_total=True),
            rail(gone, name="gone", in_total=True),
        ),
        covers="both",
    )
    energy = measure_energy(lambda: machine.work(0.05), rails, idle_seconds=0.05, interval=0.01)
    assert [part.name for part in energy.rails] == ["there"]
    assert energy.joules_per_inference is None
    assert energy.note.startswith("There is no total, ")


def test_a_run_that_takes_no_more_than_nothing_is_told() -> None:
    rails = Rails(rails=(rail(lambda: 3.0, in_total=True),), covers="it")
    energy = measure_energy(lambda: 10, rails, idle_seconds=0.02, interval=0.01)
    assert energy.joules_per_inference == pytest.approx(0)
    assert "lost in the noise" in energy.note


def test_a_run_without_inferences_has_no_energy() -> None:
    rails = Rails(rails=(rail(lambda: 3.0),))
    with pytest.raises(ValueError, match="no inference"):
        measure_energy(lambda: 0, rails, idle_seconds=0, interval=0.01)


def test_a_meter_reads_beside_the_work_and_ends_with_it() -> None:
    reads: list[float] = []

    def read() -> float:
        reads.append(time.perf_counter())
        if len(reads) == 3:
            raise ValueError("once")
        time.sleep(0.001)
        return 2.0

    with pytest.raises(KeyboardInterrupt), Meter([rail(read)], interval=0.01) as meter:
        time.sleep(0.3)
        raise KeyboardInterrupt
    (account,) = meter.accounts
    assert len(reads) >= 5  # on a busy machine fewer than the thirty that fit
    assert account.joules == pytest.approx(2 * account.seconds)
    assert len(account.watts) == len(reads) - 2  # one gap, and the first has no interval
    assert 0.3 <= meter.seconds < 5 and 0 < meter.reading < 1
    count = len(reads)
    time.sleep(0.05)
    assert len(reads) == count


def test_this_machine_tells_or_says_why_not() -> None:
    rails = find_rails()
    assert rails.rails or rails.notes
    for found in rails.rails:
        assert found.read() >= 0
    names = {found.name for found in rails.rails if found.in_total}
    assert bool(names) == bool(rails.covers)
