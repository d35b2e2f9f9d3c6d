"""What runs on the device itself: this file alone, sent to its Python over the connection.

Called as `python - COMMAND ...`, or as a file by itself. Standard library only, and nothing of
gnet-opt. The command `probe` runs from Python 3.6 on, so that an old Python can be told from none:
that is why annotations are in quotes here.

    probe WORKDIR MODULE...    what the device has, as JSON
    missing FOLDER             which files of parcel.json are not there yet, or not whole
    start FOLDER               start the job in a session of its own, once however often it is asked
    supervise FOLDER           run the job and note how it ended; called by `start`
    status FOLDER              whether the job is absent, waiting, running, ended or lost
    collect FOLDER             how the job ended, and the files that it wrote
    remove FOLDER              end the job if it runs, and remove the folder

FOLDER holds `parcel.json` (`files`: SHA-256 by path; `command`: the words after Python's name),
`package.tar.gz` and the inputs. The job adds `pid` (a link whose target is the number of its
supervisor's process), `job` (its own), `stdout`, `log`, `out` and, last, `ended.json`.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

MARK = "GNET_OPT_REMOTE"
"""In the environment of the job and of all that it starts, with the folder as its value."""

NAME = r"gnet-opt-[0-9a-f]{32}"
"""What the folder is called; nothing else is ever removed."""

_PATIENCE = 10.0
"""How long the job may take to end when it is asked to, in seconds."""


def probe(workdir: str, *modules: str) -> "dict[str, object]":
    """What the device has, read without changing anything."""
    places = [workdir] if workdir else ["/var/tmp", "/tmp"]
    usable = [p for p in places if Path(p).is_dir() and os.access(p, os.W_OK | os.X_OK)]
    free = None
    if usable:
        found = os.statvfs(usable[0])
        free = found.f_bavail * found.f_frsize
    meminfo = _read("/proc/meminfo")
    load = _read("/proc/loadavg").split()
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "architecture": platform.machine(),
        "board": _read("/proc/device-tree/model").strip("\0\n "),
        "cpus": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "disk_free": free,
        "governors": sorted(
            {_read(path).strip() for path in _paths("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
        ),
        "load1": float(load[0]) if load else None,
        "memory_available": _kilobytes(meminfo, "MemAvailable"),
        "memory_total": _kilobytes(meminfo, "MemTotal"),
        "modules": _modules(modules),
        "power_mode": _power_mode(),
        "python": list(sys.version_info[:3]),
        "swap_free": _kilobytes(meminfo, "SwapFree"),
        "swap_total": _kilobytes(meminfo, "SwapTotal"),
        "system": platform.system(),
        "workdir": usable[0] if usable else None,
    }


def _modules(names: "tuple[str, ...]") -> "dict[str, str | None]":
    """Versions of importable modules, None for one that is not there; nothing is imported."""
    try:
        from importlib.metadata import PackageNotFoundError, packages_distributions, version
        from importlib.util import find_spec
    except ImportError:  # Python before 3.10, which will not do anyway
        return {}

    owners = packages_distributions()
    found = dict.fromkeys(names)  # type: "dict[str, str | None]"
    for name in names:
        try:
            if find_spec(name) is not None:
                found[name] = ""
                found[name] = version(owners[name][0])
        except (ImportError, KeyError, PackageNotFoundError, ValueError):
            continue
    return found


def _power_mode() -> str:
    """What NVIDIA's Jetson tool says of the power mode, empty where there is none."""
    tool = shutil.which("nvpmodel") or shutil.which("nvpmodel", path="/usr/sbin:/sbin")
    if tool is None:
        return ""
    try:
        done = subprocess.run(
            [tool, "-q"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    named = re.search(r"NV Power Mode:\s*(\S.*)", done.stdout.decode("utf-8", "replace"))
    return named.group(1).strip() if named else ""


def missing(folder: str) -> "list[str]":
    """Paths of the parcel's files that are not there, or do not have their SHA-256."""
    root = Path(folder)
    files = json.loads((root / "parcel.json").read_text("utf-8"))["files"]
    found = []
    for path, digest in sorted(files.items()):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if not (root / path).is_file() or _sha256(root / path) != digest:
            found.append(path)
    return found


def start(folder: str) -> "dict[str, object]":
    """Start the supervisor, and wait until it, or an earlier one, has taken the job."""
    root = Path(folder)
    if not (root / "pid").is_symlink():
        subprocess.Popen(
            [sys.executable, "-B", str(root / "device.py"), "supervise", folder],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    end = time.monotonic() + 60
    while not (root / "pid").is_symlink() and time.monotonic() < end:
        time.sleep(0.05)
    return status(folder)


def supervise(folder: str) -> None:
    """Unpack the package, run the job, and note how it ended."""
    root = Path(folder)
    try:
        # Whoever makes this link runs the job; a second supervisor finds it and goes. A link, so
        # that the process is told in the same step.
        (root / "pid").symlink_to(str(os.getpid()))
    except FileExistsError:
        return
    began = time.monotonic()
    code, failure = None, ""
    try:
        (root / "tmp").mkdir()
        with tarfile.open(str(root / "package.tar.gz")) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(str(root / "package"), filter="data")
            else:
                archive.extractall(str(root / "package"))
        command = json.loads((root / "parcel.json").read_text("utf-8"))["command"]
        with (root / "stdout").open("wb") as out, (root / "log").open("wb") as log:
            job = subprocess.Popen(
                [sys.executable, "-B", *command],
                cwd=folder,
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,
            )
            _write(root / "job", str(job.pid))
            code = job.wait()
    except (OSError, ValueError, tarfile.TarError) as error:
        failure = str(error)
    ended = {"code": code, "error": failure, "seconds": time.monotonic() - began}
    _write(root / "ended.json", json.dumps(ended))


def _environment(folder: str) -> "dict[str, str]":
    """The environment of the job: our package first, and all that it writes below the folder."""
    package = str(Path(folder) / "package")
    others = os.environ.get("PYTHONPATH")
    return dict(
        os.environ,
        GNET_OPT_CACHE=str(Path(folder) / "cache"),
        GNET_OPT_PROGRESS="lines",
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONPATH=os.pathsep.join([package, others]) if others else package,
        PYTHONUNBUFFERED="1",
        TMPDIR=str(Path(folder) / "tmp"),
        XDG_CACHE_HOME=str(Path(folder) / "cache"),
        **{MARK: folder},
    )


def status(folder: str) -> "dict[str, object]":
    """Whether the job is `absent`, `waiting`, `running`, `ended` or `lost`, and its process."""
    root = Path(folder)
    if not root.is_dir():
        return {"phase": "absent", "pid": None}
    if (root / "ended.json").exists():
        return {"phase": "ended", "pid": None}
    if not (root / "pid").is_symlink():
        return {"phase": "waiting", "pid": None}
    pid = int(os.readlink(str(root / "pid")))  # noqa: PTH115 - pathlib has it from 3.9 on
    if pid in _marked(folder):
        return {"phase": "running", "pid": pid}
    # It may have ended between the two looks.
    return {"phase": "ended" if (root / "ended.json").exists() else "lost", "pid": None}


def collect(folder: str) -> "dict[str, object]":
    """How the job ended, with the size and SHA-256 of each file in `out`, and its last words."""
    root = Path(folder)
    out = root / "out"
    ended = _read(str(root / "ended.json"))
    return {
        "ended": json.loads(ended) if ended else None,
        "files": {
            path.relative_to(out).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in sorted(out.rglob("*"))
            if path.is_file()
        },
        "log": _read(str(root / "log"))[-4000:],
    }


def remove(folder: str) -> "dict[str, object]":
    """End the job with all that it started, and remove the folder."""
    root = Path(folder)
    if not re.fullmatch(NAME, root.name):
        raise ValueError(f"{folder} is not a folder of gnet-opt")
    end = time.monotonic() + _PATIENCE
    job = int(_read(str(root / "job")) or 0)
    if job in _marked(folder):
        _signal(job, signal.SIGTERM)
    while job in _marked(folder) and time.monotonic() < end:
        time.sleep(0.05)
    # The supervisor, too: it has nothing left to do.
    while _marked(folder):
        for pid in _marked(folder):
            _signal(pid, signal.SIGKILL)
        time.sleep(0.05)
    if root.exists():
        shutil.rmtree(folder)
    return {"removed": not root.exists()}


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
        os.kill(pid, number)


def _marked(folder: str) -> "list[int]":
    """Live processes of the job, from Linux's /proc; other processes are not ours to touch."""
    mark = os.fsencode(f"{MARK}={folder}")
    found = []
    # Not with the file in the pattern: looking for it fails where a process ends meanwhile.
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        try:
            ours = mark in (process / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        if ours and pid != os.getpid():
            found.append(pid)
    return found


def _write(path: "Path", text: str) -> None:
    """Write a file that a reader finds whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _sha256(path: "Path") -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _paths(pattern: str) -> "list[str]":
    return [str(path) for path in sorted(Path("/sys/devices/system/cpu").glob(pattern))]


def _kilobytes(text: str, name: str) -> "int | None":
    found = re.search(f"^{name}:\\s*(\\d+) kB", text, re.M)
    return int(found.group(1)) * 1024 if found else None


# Their arguments differ, so that a checker sees no common type.
COMMANDS = {
    "collect": collect,
    "missing": missing,
    "probe": probe,
    "remove": remove,
    "start": start,
    "status": status,
    "supervise": supervise,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])) + "\n")  # type: ignore[operator]
