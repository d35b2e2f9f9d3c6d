"""CPUs that this machine is not, made ready to run Python with the packages of a device.

Arm cores are emulated by Debian's qemu-user; it, an arm64 Python and that Python's packages are
fetched into one folder, with apt's and pip's own checks of signatures and hashes, and nothing of
the system is changed. An x86-64 CPU that ends at AVX2 is this machine itself with its newer
instructions hidden (`hide_vnni.c`), and qemu's Haswell proves that this is the same.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gnet_opt
from gnet_opt.files import dump_json, publish, sha256_file, staging_directory, write_text
from gnet_opt.machine import this_machine

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE = "bookworm"
ARCHIVE = "http://deb.debian.org/debian"
QEMU = ("qemu-user-static:amd64",)
PYTHON = "3.11"
ARM_PYTHON = (
    "libbz2-1.0:arm64",
    "libc6:arm64",
    "libcrypt1:arm64",
    "libexpat1:arm64",
    "libffi8:arm64",
    "libgcc-s1:arm64",
    "liblzma5:arm64",
    f"libpython{PYTHON}-minimal:arm64",
    f"libpython{PYTHON}-stdlib:arm64",
    "libssl3:arm64",
    "libstdc++6:arm64",
    "libuuid1:arm64",
    f"python{PYTHON}-minimal:arm64",
    "zlib1g:arm64",
)
PACKAGES = (
    "click",
    "markdown-it-py",
    "mdurl",
    "numpy",
    "onnxruntime",
    "pillow",
    "pygments",
    "rich",
    "threadpoolctl",
)
"""What `gnet-opt[onnxruntime]` needs on a device, in the versions that are installed here."""

PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")

ARM_CORES = {"cortex-a53": 0xD03, "cortex-a76": 0xD0B}
"""Part numbers of Arm's cores (MIDR_EL1, bits 4 to 15), from their reference manuals."""

HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
"""Names of AT_HWCAP's bits in /proc/cpuinfo (Linux, arch/arm64/include/uapi/asm/hwcap.h)."""

HASWELL = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"
"""AVX2 without VNNI; left out is what qemu-user cannot do and would warn of."""

_STAMP = "contents.json"
_NEWER = frozenset({"avx512f", "avx_vnni"})
_INSTRUCTION = re.compile(r"0x[0-9a-f]+:\s+([0-9a-f]{8})\s")
"""A line of qemu's log: address, code, text."""


class UnavailableError(Exception):
    """This machine cannot do it; the message is one sentence with the reason."""


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A CPU that runs Python.

    Attributes:
        name: As results name it.
        python: The command that starts its Python.
        environment: The whole environment of that command.
        facts: What it is made of, for the result file.
    """

    name: str
    python: tuple[str, ...]
    environment: Mapping[str, str]
    facts: Mapping[str, Any]


def arm(folder: Path, core: str) -> Cpu:
    """An emulated Arm core.

    Args:
        folder: Where everything is kept.
        core: One of `ARM_CORES`.

    Raises:
        UnavailableError: This machine cannot emulate one, or something cannot be fetched.
    """
    _require_linux_on_x86()
    qemu, qemu_facts = _qemu(folder)
    root, debian = part(folder / "arm64-python", {"packages": ARM_PYTHON}, _unpack_packages)
    wheels = _versions()
    site, _ = part(folder / "arm64-site", {"python": PYTHON, "wheels": wheels}, _install_wheels)
    emulator = (str(qemu / "qemu-aarch64-static"), "-cpu", core, "-L")
    python = str(root / "usr" / "bin" / f"python{PYTHON}")
    environment = _environment(
        folder, PYTHONHOME=str(root / "usr"), PYTHONPATH=os.pathsep.join((str(site), _package()))
    )
    capabilities = _output(
        (*emulator, str(root), python, "-c", _PRINT_HWCAP), environment, "reading the core's HWCAP"
    )
    features = hwcap_names(int(capabilities))
    prefix, _ = part(
        folder / core,
        {"core": core, "cores": os.cpu_count(), "features": features, "root": debian},
        lambda staging: _write_prefix(staging, root, cpuinfo(core, features, os.cpu_count() or 1)),
    )
    return Cpu(
        name=core,
        python=(*emulator, str(prefix), python),
        environment=environment,
        facts={
            "debian": debian,
            "emulator": qemu_facts,
            "features": features,
            "how": f"qemu-user, -cpu {core}",
            "python": wheels,
        },
    )


def without_vnni(folder: Path) -> Cpu:
    """This x86-64 machine as one whose newest vector instructions are AVX2.

    Raises:
        UnavailableError: It has no AVX2, or nothing can hide what is newer.
    """
    _require_linux_on_x86()
    machine = this_machine()
    if "avx2" not in machine.instructions:
        raise UnavailableError(f"this CPU ({machine.cpu}) has no AVX2")
    environment = _environment(folder, PYTHONPATH=_package())
    how = "this CPU as it is"
    if machine.instructions & _NEWER:
        source = Path(__file__).with_name("hide_vnni.c")
        recipe = {"source": sha256_file(source)}
        built, _ = part(folder / "hide-vnni", recipe, lambda staging: _compile(source, staging))
        environment["LD_PRELOAD"] = str(built / "hide_vnni.so")
        how = "this CPU, with everything after AVX2 hidden by faults of CPUID"
    seen = _output(
        (sys.executable, "-c", _PRINT_NUMPY_FEATURES), environment, "hiding VNNI"
    ).split()
    if "AVX2" not in seen or any(name.startswith("AVX512") for name in seen):
        raise UnavailableError(f"hiding VNNI did not work: NumPy still sees {' '.join(seen)}")
    return Cpu(
        name="avx2",
        python=(sys.executable,),
        environment=environment,
        facts={"features": seen, "how": how, "processor": machine.cpu},
    )


def haswell(folder: Path) -> Cpu:
    """An emulated Haswell with this environment's own Python; slow, but nothing of it is real.

    Raises:
        UnavailableError: This machine cannot emulate one, or qemu cannot be fetched.
    """
    _require_linux_on_x86()
    qemu, facts = _qemu(folder)
    return Cpu(
        name="haswell",
        python=(str(qemu / "qemu-x86_64-static"), "-cpu", HASWELL, sys.executable),
        environment=_environment(folder, PYTHONPATH=_package()),
        facts={"emulator": facts, "how": f"qemu-user, -cpu {HASWELL}"},
    )


def traced(cpu: Cpu, log: Path) -> Cpu:
    """The same emulated CPU, which writes every instruction that it meets to `log`, once each."""
    emulator, *rest = cpu.python
    return replace(cpu, python=(emulator, "-d", "in_asm", "-D", str(log), *rest))


def count_dot_products(lines: Iterable[str]) -> dict[str, int]:
    """Count Arm's dot product instructions in the log of a `traced` CPU.

    The disassembler of qemu 7.2 does not know them, so they are told by their codes: SDOT and UDOT,
    vector and by element, in the Arm Architecture Reference Manual (DDI 0487), C7.2.

    Returns:
        The number of places in the code that have one, by name.
    """
    found = {"sdot": 0, "udot": 0}
    for line in lines:
        if match := _INSTRUCTION.match(line):
            code = int(match[1], 16)
            for name, unsigned in (("sdot", 0), ("udot", 1)):
                vector = code & 0xBFE0FC00 == 0x0E809400 | unsigned << 29
                by_element = code & 0xBFC0F400 == 0x0F80E000 | unsigned << 29
                found[name] += vector or by_element
    return found


def part(
    path: Path, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> tuple[Path, Mapping[str, Any]]:
    """Give a folder that is made once, and again when its recipe changes; whole or not at all.

    Args:
        path: The folder.
        recipe: What it is made from; JSON.
        make: Fills an empty folder and tells what it holds now; JSON.

    Returns:
        The folder, and what `make` told when it was made.
    """
    wanted = json.loads(dump_json(recipe))
    if not (path / _STAMP).is_file() or _stamp(path)["recipe"] != wanted:
        print(f"Preparing {path} ...", flush=True)
        with staging_directory(path) as staging:
            made = make(staging)
            write_text(staging / _STAMP, dump_json({"contents": made, "recipe": wanted}))
            publish(staging, path)
    return path, contents(path)


def contents(path: Path) -> Mapping[str, Any]:
    """What `make` told of a `part` when it was made."""
    told: Mapping[str, Any] = _stamp(path)["contents"]
    return told


def hwcap_names(value: int) -> list[str]:
    """The names of an AT_HWCAP's bits, as the kernel's /proc/cpuinfo spells them."""
    return [name for bit, name in enumerate(HWCAP.split()) if value >> bit & 1]


def cpuinfo(core: str, features: Sequence[str], count: int) -> str:
    """The text of /proc/cpuinfo on a machine with `count` of the Arm core.

    qemu-user of Debian 12 shows programs the host's file instead. ONNX Runtime chooses its kernels
    by this file: with an x86 one its import crashes (1.32) or it guesses.
    """
    entry = [
        f"Features\t: {' '.join(features)}",
        "CPU implementer\t: 0x41",
        "CPU architecture: 8",
        "CPU variant\t: 0x0",
        f"CPU part\t: {ARM_CORES[core]:#x}",
        "CPU revision\t: 0",
    ]
    return "".join("\n".join([f"processor\t: {i}", *entry, "", ""]) for i in range(count))


_PRINT_HWCAP = """
import ctypes
getauxval = ctypes.CDLL(None).getauxval
getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
print(getauxval(16))  # AT_HWCAP
"""
_PRINT_NUMPY_FEATURES = """
try:
    from numpy._core._multiarray_umath import __cpu_features__ as features
except ImportError:  # NumPy 1
    from numpy.core._multiarray_umath import __cpu_features__ as features
print(*sorted(name for name, there in features.items() if there))
"""


def _stamp(path: Path) -> Any:
    return json.loads((path / _STAMP).read_text(encoding="utf-8"))


def _require_linux_on_x86() -> None:
    if (platform.system(), this_machine().architecture) != ("Linux", "x86_64"):
        raise UnavailableError(
            f"it needs Linux on x86-64, and this is {platform.system()} on "
            f"{this_machine().architecture}"
        )


def _package() -> str:
    """The folder to import gnet_opt from."""
    return str(Path(gnet_opt.__file__).resolve().parents[1])


def _environment(folder: Path, **more: str) -> dict[str, str]:
    """This process's environment without what would steer Python or the dynamic linker."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_"))}
    return {**kept, "PYTHONPYCACHEPREFIX": str(folder / "pycache"), **more}


def _output(command: Sequence[str], environment: Mapping[str, str], doing: str) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"{doing} failed: {_reason(done)}")
    return done.stdout


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a command said, on one line."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("E:", "ERROR:"))] or lines
    return telling[-1].rstrip(".") if telling else f"exit code {done.returncode}"


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UnavailableError(f"{name} is not installed")
    return found


def _qemu(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    def unpack(staging: Path) -> Mapping[str, Any]:
        contents = _unpack_packages(staging, QEMU)
        programs = staging / "usr" / "bin"
        for name in ("qemu-aarch64-static", "qemu-x86_64-static"):
            (programs / name).replace(staging / name)
        shutil.rmtree(staging / "usr")
        shutil.rmtree(staging / "etc", ignore_errors=True)
        told = _output((str(staging / "qemu-aarch64-static"), "--version"), {}, "starting qemu")
        return {"packages": contents, "version": told.splitlines()[0]}

    return part(folder / "qemu", {"packages": QEMU}, unpack)


def _unpack_packages(staging: Path, packages: Sequence[str] = ARM_PYTHON) -> Mapping[str, Any]:
    """Fetch Debian packages with apt and unpack them.

    apt gets a configuration, a state and a cache of its own, so neither the system's sources nor
    its architectures matter, and Debian's signature is checked all the same.

    Returns:
        The SHA-256 of each package by its file name, which has the version.
    """
    apt, unpack = _tool("apt-get"), _tool("dpkg-deb")
    if not KEYRING.is_file():
        raise UnavailableError(f"{KEYRING} is missing (Debian's package debian-archive-keyring)")
    own = staging / "apt"
    for name in ("cache/archives/partial", "empty.d", "fetched", "state/lists/partial"):
        (own / name).mkdir(parents=True)
    (own / "status").touch()
    source = f"deb [arch=amd64,arm64 signed-by={KEYRING}] {ARCHIVE} {SUITE} main\n"
    (own / "sources.list").write_text(source, encoding="utf-8")
    (own / "apt.conf").write_text(apt_configuration(own), encoding="utf-8")
    environment = {**os.environ, "APT_CONFIG": str(own / "apt.conf"), "LC_ALL": "C"}
    # By itself `apt-get update` calls it a success when it could fetch nothing.
    strict = ("-o", "APT::Update::Error-Mode=any")
    for arguments in (("update", *strict), ("download", *packages)):
        done = subprocess.run(
            (apt, *arguments),
            cwd=own / "fetched",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UnavailableError(f"apt-get {arguments[0]} of {SUITE} failed: {_reason(done)}")
    fetched = sorted((own / "fetched").glob("*.deb"))
    if len(fetched) != len(packages):
        raise UnavailableError(f"apt-get gave {len(fetched)} of {len(packages)} packages")
    contents = {path.name: sha256_file(path) for path in fetched}
    for path in fetched:
        _output((unpack, "-x", str(path), str(staging)), os.environ, f"unpacking {path.name}")
    shutil.rmtree(own)
    return contents


def apt_configuration(own: Path) -> str:
    """apt's configuration that keeps it inside the folder `own` and off the system's files."""
    settings = {
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "Dir::Cache": own / "cache",
        "Dir::Etc": own,
        "Dir::Etc::Main": own / "apt.conf",
        "Dir::Etc::Parts": own / "empty.d",
        "Dir::Etc::Preferences": own / "preferences",
        "Dir::Etc::PreferencesParts": own / "empty.d",
        "Dir::Etc::SourceList": own / "sources.list",
        "Dir::Etc::SourceParts": own / "empty.d",
        "Dir::Etc::Trusted": own / "trusted.gpg",
        "Dir::Etc::TrustedParts": own / "empty.d",
        "Dir::Log": own / "log",
        "Dir::State": own / "state",
        "Dir::State::Status": own / "status",
    }
    lines = [f'{key} "{value}";' for key, value in settings.items()]
    return "\n".join([*lines, 'APT::Architectures { "amd64"; "arm64"; };', ""])


def _versions() -> dict[str, str]:
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed here") from error


def _install_wheels(staging: Path) -> Mapping[str, Any]:
    """Install the Arm packages with this environment's pip, which checks PyPI's hashes."""
    wanted = [f"{name}=={number}" for name, number in _versions().items()]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    options += ["--python-version", PYTHON, "--implementation", "cp"]
    options += [f"--platform={name}" for name in PLATFORMS]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(staging), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"pip could not fetch the Arm packages: {_reason(done)}")
    return {"wheels": wanted}


def _write_prefix(staging: Path, root: Path, text: str) -> Mapping[str, Any]:
    """The folder that qemu shows a program in front of the host's files."""
    for name in ("lib", "usr"):
        (staging / name).symlink_to(Path(os.path.relpath(root / name, staging)))
    (staging / "proc").mkdir()
    (staging / "proc" / "cpuinfo").write_text(text, encoding="utf-8")
    return {}


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise UnavailableError("hiding VNNI needs a C compiler (cc), and there is none")


def _compile(source: Path, staging: Path) -> Mapping[str, Any]:
    library = staging / "hide_vnni.so"
    command = (_compiler(), "-O2", "-shared", "-fPIC", "-o", str(library), str(source))
    _output(command, os.environ, f"compiling {source.name}")
    return {"library": sha256_file(library)}
