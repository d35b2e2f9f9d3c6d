"""What Jetsons print and what their files say, word for word, and trees of such files.

Each text says where it was printed. Trees put texts of one board together; what no recording has
(the least number of lines of /proc and /sys) is written in the form that the kernel documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

RELEASES = {
    # pokusew/ros-setup, nvidia-jetson-tx2/L4T.md
    "32.5.1": "# R32 (release), REVISION: 5.1, GCID: 26202423, BOARD: t186ref, EABI: aarch64, "
    "DATE: Fri Feb 19 16:50:29 UTC 2021\n",
    # dusty-nv/jetson-containers, jetson_containers/l4t_version.py
    "32.7.1": "# R32 (release), REVISION: 7.1, GCID: 29689809, BOARD: t186ref, EABI: aarch64, "
    "DATE: Wed Feb  2 21:33:23 UTC 2022\n",
    "35.3.1": "# R35 (release), REVISION: 3.1, GCID: 32790763, BOARD: t186ref, EABI: aarch64, "
    "DATE: Wed Mar 15 07:54:12 UTC 2023\n",
    # xulei-leon/particleML, its guide to debugging on a Jetson Orin Nano Super
    "36.4.3": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
    "TARGET_USERSPACE_LIB_DIR=nvidia\n"
    "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n",
    # a Jetson AGX Thor with JetPack 7.0, in a public record of its system
    "38.2.0": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Aug 22 00:55:42 UTC 2025\n# KERNEL_VARIANT: oot\n"
    "TARGET_USERSPACE_LIB_DIR=nvidia\n"
    "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\nINSTALL_TYPE=\n",
    # a Jetson Orin Nano with JetPack 7.2.1, in a public tutorial of that release
    "39.2.1": "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Aug 7 05:54:22 AM UTC 2026\n# KERNEL_VARIANT: oot\n"
    "TARGET_USERSPACE_LIB_DIR=nvidia\n"
    "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n",
}

POWER_MODES = {
    # `nvpmodel -q`: xulei-leon/particleML, an Orin Nano Super with Jetson Linux 36.4.3
    ("25W", 1): "NV Power Mode: 25W\n1\n",
    # a Xavier with an earlier release, which names the fan as well
    ("MAXN", 0): "NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n",
    # `nvpmodel -q --verbose` on a Xavier NX: its first lines
    (
        "MODE_15W_6CORE",
        2,
    ): "NVPM VERB: Config file: /etc/nvpmodel.conf\nNVPM VERB: parsing done for "
    "/etc/nvpmodel.conf\nNV Fan Mode:quiet\nNVPM VERB: Current mode: NV Power Mode: "
    "MODE_15W_6CORE\n2\nNVPM VERB: PARAM CPU_ONLINE: ARG CORE_0: PATH "
    "/sys/devices/system/cpu/cpu0/online: REAL_VAL: 1 CONF_VAL: 1\n",
    # without root, a Xavier goes on with errors
    ("MODE_15W_DESKTOP", 7): "NV Fan Mode:quiet\nNV Power Mode: MODE_15W_DESKTOP\n7\n"
    "NVPM ERROR: Error opening /sys/kernel/nvpmodel_emc_cap/emc_iso_cap: 13\n",
}

NANO_MODES = """\
###########################
#                         #
# POWER_MODEL DEFINITIONS #
#                         #
###########################

# MAXN is the NONE power model to release all constraints
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_ONLINE CORE_2 1
CPU_ONLINE CORE_3 1
CPU_A57 MIN_FREQ  0
CPU_A57 MAX_FREQ -1
GPU_POWER_CONTROL_ENABLE GPU_PWR_CNTL_EN on
GPU MIN_FREQ  0
GPU MAX_FREQ -1
GPU_POWER_CONTROL_DISABLE GPU_PWR_CNTL_DIS auto
EMC MAX_FREQ 0

< POWER_MODEL ID=1 NAME=5W >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_ONLINE CORE_2 0
CPU_ONLINE CORE_3 0
CPU_A57 MIN_FREQ  0
CPU_A57 MAX_FREQ 918000
GPU_POWER_CONTROL_ENABLE GPU_PWR_CNTL_EN on
GPU MIN_FREQ 0
GPU MAX_FREQ 640000000
GPU_POWER_CONTROL_DISABLE GPU_PWR_CNTL_DIS auto
EMC MAX_FREQ 1600000000

# mandatory section to configure the default mode
< PM_CONFIG DEFAULT=0 >
"""
"""/etc/nvpmodel.conf of the first Nano: jfey/SmallThings, jetson-nano.md; its last lines from
NVIDIA's guide to the power management of the Nano."""

ORIN_NANO_MODES = """\
< POWER_MODEL ID=0 NAME=15W >
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< POWER_MODEL ID=3 NAME=7W >
"""
"""The names in /etc/nvpmodel.conf of an Orin Nano Super, as owners of the board print them."""

XAVIER_NX_MODES = """\
< PM_CONFIG DEFAULT=2 >
< POWER_MODEL ID=0 NAME=MODE_15W_2CORE >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
< POWER_MODEL ID=2 NAME=MODE_15W_6CORE >
< POWER_MODEL ID=7 NAME=MODE_20W_4CORE >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_ONLINE CORE_2 1
CPU_ONLINE CORE_3 1
CPU_ONLINE CORE_4 0
CPU_ONLINE CORE_5 0
< POWER_MODEL ID=8 NAME=MODE_20W_6CORE >
CPU_ONLINE CORE_0 1
CPU_ONLINE CORE_1 1
CPU_ONLINE CORE_2 1
CPU_ONLINE CORE_3 1
CPU_ONLINE CORE_4 1
CPU_ONLINE CORE_5 1
"""
"""Some of a Xavier NX's modes in Jetson Linux 35: no MAXN, names by budget and cores."""

NANO_CLOCKS = """\
SOC family:tegra210  Machine:jetson-nano
Online CPUs: 0-3
CPU Cluster Switching: Disabled
cpu0: Online=1 Governor=schedutil MinFreq=102000 MaxFreq=1428000 CurrentFreq=1428000 IdleStates: \
WFI=1 c7=1
cpu1: Online=1 Governor=schedutil MinFreq=102000 MaxFreq=1428000 CurrentFreq=1428000 IdleStates: \
WFI=1 c7=1
GPU MinFreq=76800000 MaxFreq=921600000 CurrentFreq=153600000
EMC MinFreq=204000000 MaxFreq=1600000000 CurrentFreq=1600000000 FreqOverride=0
Fan: speed=0
NV Power Mode: MAXN
"""
"""`sudo jetson_clocks --show` on a Nano: jfey/SmallThings, jetson-nano.md, less two equal CPUs."""

NANO_FIXED_CLOCKS = """\
cpu0: Online=1 Governor=schedutil MinFreq=1479000 MaxFreq=1479000 CurrentFreq=1479000 IdleStates: \
WFI=0 c7=0
GPU MinFreq=921600000 MaxFreq=921600000 CurrentFreq=921600000
EMC MinFreq=204000000 MaxFreq=1600000000 CurrentFreq=1600000000 FreqOverride=1
Fan: PWM=0
NV Power Mode: MAXN
"""
"""The same after `sudo jetson_clocks`, as another owner printed it."""

ORIN_NANO_CLOCKS = """\
SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=729600 IdleStates: \
WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=1190400 IdleStates: \
WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=69
NV Power Mode: 25W
"""
"""The same on an Orin Nano Super in mode 25W, Jetson Linux 36.4.3, less four equal CPUs."""

ORIN_NANO_PACKAGES = """\
Package: nvidia-l4t-core
Status: install ok installed
Architecture: arm64
Version: 36.4.3-20250107174145
Description: NVIDIA Core Package

Package: nvidia-jetpack
Status: install ok installed
Version: 6.2.1+b38
Description: NVIDIA Jetpack Meta Package

Package: libnvinfer10
Status: install ok installed
Version: 10.3.0.30-1+cuda12.5
Description: TensorRT runtime libraries
 Version: 9.9 is no field of this package

Package: libnvinfer8
Status: deinstall ok config-files
Version: 8.5.2-1+cuda11.4

Package: libnvinfer-samples
Status: install ok installed
Version: 10.3.0.30-1+cuda12.5
"""
"""/var/lib/dpkg/status with the versions of xulei-leon/particleML, and TensorRT's as dpkg lists it
on JetPack 6.2; an earlier TensorRT that was removed."""

MEMORY = """\
MemTotal:        7802928 kB
MemFree:         4927488 kB
MemAvailable:    {available} kB
Buffers:           52312 kB
SwapTotal:       3901456 kB
"""
"""/proc/meminfo of an Orin Nano with 8 GB (xulei-leon/particleML prints it in GiB)."""

SWAPS = """\
Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/zram0                              partition\t650240\t\t0\t\t5
/swapfile                               file\t\t4194300\t\t1048576\t\t-2
"""
"""/proc/swaps: one of the areas of zram that Jetson Linux makes, and a file."""

ORIN_NANO: Mapping[str, str] = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0"
    "nvidia,tegra234\0",
    "etc/nv_tegra_release": RELEASES["36.4.3"],
    "etc/nvpmodel.conf": ORIN_NANO_MODES,
    "var/lib/nvpmodel/status": "pmode:0001 fmode:fan_mode_quiet\n",
    "var/lib/dpkg/status": ORIN_NANO_PACKAGES,
    "usr/src/tensorrt/bin/trtexec": "",
    "proc/meminfo": MEMORY.format(available=5976884),
    "proc/swaps": SWAPS,
    "proc/1/comm": "systemd\n",
    "proc/812/comm": "gnome-shell\n",
    "dev/nvgpu/igpu0/ctrl": "",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1344000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1190400\n",
    "sys/class/devfreq/17000000.gpu/governor": "nvhost_podgov\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/15340000.vic/min_freq": "115200000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "49468\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "99000\n",
    "sys/class/thermal/thermal_zone0/trip_point_1_type": "critical\n",
    "sys/class/thermal/thermal_zone0/trip_point_1_temp": "104500\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
}
"""An Orin Nano Super as its owner finds it: not in its largest mode, clocks free, a desktop."""

READY: Mapping[str, str] = {
    **{path: text for path, text in ORIN_NANO.items() if path != "proc/812/comm"},
    "var/lib/nvpmodel/status": "pmode:0002 fmode:fan_mode_quiet\n",
    "var/lib/dpkg/status": ORIN_NANO_PACKAGES.replace("10.3.0.30", "10.16.2.10")
    + "\nPackage: python3-libnvinfer\nStatus: install ok installed\nVersion: 10.16.2.10-1\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "1344000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "918000000\n",
}
"""The same, with everything as the advice wants it."""


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Write a tree of files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def answers(printed: Mapping[str, str]) -> Callable[[Sequence[str]], str]:
    """Run commands as a board that prints these texts, and nothing else."""
    return lambda command: printed.get(" ".join(command), "")
