"""What the files of real machines hold, for the readers of power and heat.

Each tree says where its layout and, where people published them, its values come from.
"""

from __future__ import annotations

from pathlib import Path


def write_tree(root: Path, *trees: dict[str, str]) -> Path:
    """Write trees of path and content below a folder."""
    for tree in trees:
        for name, text in tree.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")
    return root


def below(folder: str, text: str) -> dict[str, str]:
    """A tree from lines of `file content`."""
    pairs = (line.split(maxsplit=1) for line in text.strip().splitlines())
    return {f"{folder}/{name}": value for name, value in pairs}


# Zones as in the kernel's Documentation/power/powercap/powercap.rst, here those of a server with
# two sockets; the range is that of the recorded package in mlco2/codecarbon's tests.
RAPL_TWO_SOCKETS = {
    "proc/cpuinfo": "vendor_id\t: GenuineIntel",
    **below("sys/class/powercap/intel-rapl", "enabled 1"),
    **{
        path: value
        for zone, name, energy in (
            ("intel-rapl:0", "package-0", 10_360_237_493),
            ("intel-rapl:0:0", "dram", 2_000_000_000),
            ("intel-rapl:1", "package-1", 9_000_000_000),
            ("intel-rapl:1:0", "dram", 1_000_000_000),
        )
        for path, value in below(
            f"sys/class/powercap/{zone}",
            f"name {name}\nenergy_uj {energy}\nmax_energy_range_uj 65532610987\nenabled 0",
        ).items()
    },
}

# The domain hierarchy that `cpupower powercap-info` shows of a laptop, with psys and with the
# second window to the same package (commit message of intel-lab-lkp/linux bdc275ee9ce3).
RAPL_LAPTOP = {
    "proc/cpuinfo": "vendor_id\t: GenuineIntel",
    **{
        path: value
        for zone, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "uncore"),
            ("intel-rapl:1", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        )
        for path, value in below(
            f"sys/class/powercap/{zone}",
            f"name {name}\nenergy_uj 5000000\nmax_energy_range_uj 262143328850",
        ).items()
    },
}

# A Threadripper 1950X, whose dies both tell the package's energy (mlco2/codecarbon, docs: 68 W and
# 68 W idle, 166 W and 166 W busy where the plug shows 131 W more than idle).
RAPL_TWO_DIES = {
    "proc/cpuinfo": "vendor_id\t: AuthenticAMD",
    **{
        path: value
        for die in (0, 1)
        for path, value in below(
            f"sys/class/powercap/intel-rapl:{die}",
            f"name package-0-die-{die}\nenergy_uj 10360237493\nmax_energy_range_uj 65532610987",
        ).items()
    },
}

# Jetson Orin Nano and NX, JetPack 5 and later: labels of NVIDIA's "Jetson Linux Developer Guide",
# layout of Documentation/hwmon/ina3221.rst; in7 is a sum of shunt voltages in µV.
JETSON_ORIN_NANO = {
    **below(
        "sys/class/hwmon/hwmon1",
        """
name ina3221
in1_label VDD_IN
in1_input 4984
in1_enable 1
curr1_input 1856
in2_label VDD_CPU_GPU_CV
in2_input 4976
curr2_input 120
in3_label VDD_SOC
in3_input 4976
curr3_input 304
in4_input 9280
in7_label sum of shunt voltages
in7_input 11400
curr4_input 2280
""",
    ),
    **below(
        "sys/class/hwmon/hwmon3",
        "name soctherm_oc\noc1_event_cnt 1\noc2_event_cnt 0\noc3_event_cnt 2\noc1_throt_en 1",
    ),
    **below("sys/class/thermal/thermal_zone0", "type cpu-thermal\ntemp 51187"),
    **below("sys/class/thermal/thermal_zone1", "type gpu-thermal\ntemp 50218"),
    **below("sys/class/thermal/thermal_zone10", "type tj-thermal\ntemp 51187"),
    # Zones of parts without power cannot be read.
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal",
    **below("sys/devices/system/cpu/cpu0/cpufreq", "scaling_cur_freq 1510400"),
    **below("sys/devices/system/cpu/cpu10/cpufreq", "scaling_cur_freq 729600"),
}

# AGX Orin: two INA3221, unused channels called NC (published reading of hwmon3 and hwmon4; the
# second as newer kernels show it, below the driver as well).
JETSON_AGX_ORIN = {
    path: value
    for folder in ("sys/class/hwmon", "sys/bus/i2c/drivers/ina3221/1-0040/hwmon")
    for path, value in {
        **below(
            f"{folder}/hwmon3",
            """
name ina3221
in1_label VDD_GPU_SOC
in1_input 18792
curr1_input 140
in2_label VDD_CPU_CV
in2_input 18784
curr2_input 20
in3_label VIN_SYS_5V0
in3_input 4968
curr3_input 953
in7_label sum of shunt voltages
in7_input 360
""",
        ),
        **below(
            f"{folder}/hwmon4",
            """
name ina3221
in1_label NC
in1_input 0
curr1_input 0
in2_label VDDQ_VDD2_1V8AO
in2_input 4968
curr2_input 80
""",
        ),
    }.items()
}

# The first Jetson Nano, JetPack 4: NVIDIA's ina3221x driver in mW (values of Kepler's test data).
JETSON_NANO = below(
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0",
    """
name ina3221x
rail_name_0 POM_5V_IN
in_power0_input 2363
in_voltage0_input 5056
in_current0_input 467
rail_name_1 POM_5V_GPU
in_power1_input 0
rail_name_2 POM_5V_CPU
in_power2_input 761
""",
)

# An INA226 on a bench board, from Documentation/hwmon/ina2xx.rst: in0 is the shunt, power1 is µW.
INA226 = below(
    "sys/class/hwmon/hwmon2",
    "name ina226\nin0_input 8\nin1_input 5016\ncurr1_input 820\npower1_input 4113120",
)

# Documentation/hwmon/amd_energy.rst: cores first, sockets after them.
AMD_ENERGY = below(
    "sys/class/hwmon/hwmon0",
    """
name amd_energy
energy1_input 1000000
energy1_label Ecore000
energy2_input 1500000
energy2_label Ecore001
energy3_input 9000000
energy3_label Esocket0
""",
)

# Documentation/ABI/testing/sysfs-class-power: µA and µV, negative while discharging.
BATTERY = {
    **below(
        "sys/class/power_supply/BAT0",
        "type Battery\nstatus Discharging\ncurrent_now -1250000\nvoltage_now 12000000",
    ),
    **below("sys/class/power_supply/AC", "type Mains\nonline 0"),
    **below(
        "sys/class/power_supply/hidpp_battery_0",
        "type Battery\nscope Device\nstatus Discharging\npower_now 1",
    ),
}

# `vcgencmd pmic_read_adc` of a Raspberry Pi 5 Model B Rev 1.0 (2 GB) with four busy cores, as
# published in the tests of ml-energy/zeus.
PMIC = """\
 3V7_WL_SW_A current(0)=0.09368929A
   3V3_SYS_A current(1)=0.08783370A
   1V8_SYS_A current(2)=0.18054710A
  DDR_VDD2_A current(3)=0.22543980A
  DDR_VDDQ_A current(4)=0.06666720A
   1V1_SYS_A current(5)=0.17566740A
    0V8_SW_A current(6)=0.37670900A
  VDD_CORE_A current(7)=6.22421000A
   3V3_DAC_A current(17)=0.00006105A
   3V3_ADC_A current(18)=0.00036630A
   0V8_AON_A current(16)=0.00305250A
      HDMI_A current(22)=0.02417580A
 3V7_WL_SW_V volt(8)=3.69977600V
   3V3_SYS_V volt(9)=3.31003300V
   1V8_SYS_V volt(10)=1.80512600V
  DDR_VDD2_V volt(11)=1.10476100V
  DDR_VDDQ_V volt(12)=0.60146460V
   1V1_SYS_V volt(13)=1.11025500V
    0V8_SW_V volt(14)=0.80146440V
  VDD_CORE_V volt(15)=0.86173300V
   3V3_DAC_V volt(20)=3.31318300V
   3V3_ADC_V volt(21)=3.30677300V
   0V8_AON_V volt(19)=0.80029220V
      HDMI_V volt(23)=5.08664000V
     EXT5V_V volt(24)=5.09066000V
      BATT_V volt(25)=0.00000000V
"""

# A desktop: coretemp and a drive (Documentation/hwmon/coretemp.rst, nvme), two threads of a core
# (Documentation/ABI/testing/sysfs-devices-system-cpu: the package's count is repeated).
DESKTOP = {
    **below(
        "sys/class/hwmon/hwmon0",
        "name coretemp\ntemp1_label Package id 0\ntemp1_input 61000\n"
        "temp2_label Core 0\ntemp2_input 59000",
    ),
    **below("sys/class/hwmon/hwmon1", "name nvme\ntemp1_label Composite\ntemp1_input 71850"),
    **below("sys/class/thermal/thermal_zone0", "type acpitz\ntemp 27800"),
    **below("sys/class/thermal/thermal_zone1", "type acpitz\ntemp 29800"),
    **{
        path: value
        for cpu, count in ((0, 3), (1, 4))
        for path, value in below(
            f"sys/devices/system/cpu/cpu{cpu}/thermal_throttle",
            f"core_throttle_count {count}\npackage_throttle_count 10\n"
            "core_throttle_total_time_ms 55",
        ).items()
    },
}
