"""Environments for the peers of `runtimes.py`: one folder each, with pinned packages.

An environment lies on top of the one that runs this program: what is installed here (torch,
onnxruntime, openvino) is seen there too, and pip adds only what is missing or pinned to another
version. That keeps all six below three gigabytes, and all peers on the same torch where their pins
allow. What cannot be installed is recorded with pip's reason, and the others are made all the
same.

    pip install -e '.[build,openvino]'
    python benchmarks/environments.py
    python benchmarks/environments.py ncnn mnn
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gnet_opt.files import dump_json, write_text
from processes import watch

FOLDER = Path(__file__).resolve().parents[1] / "build" / "environments"

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "executorch": ("executorch==1.5.1", "torchao==0.18.0"),
    "litert": ("litert-torch==0.10.0", "ai-edge-litert==2.3.0", "ai-edge-quantizer==0.10.0"),
    "mnn": ("mnn==3.6.1",),
    "ncnn": ("ncnn==1.0.20261020", "pnnx==20261020"),
    "openvino": ("nncf==3.4.0",),
    "torch": ("torchao==0.18.0",),
}
"""What pip installs into each environment."""

SECONDS = 900
"""How long pip may take for one environment."""

_RECORD = "environment.json"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One peer's environment.

    Attributes:
        name: One of `REQUIREMENTS`.
        python: Its interpreter.
        requirements: What pip was asked for.
        problem: Why it cannot be used, empty where it can.
    """

    name: str
    python: Path
    requirements: tuple[str, ...]
    problem: str

    @classmethod
    def open(cls, folder: Path, name: str) -> Environment:
        """The environment of a name, as far as it was made.

        Args:
            folder: Where the environments lie.
            name: One of `REQUIREMENTS`.
        """
        wanted = REQUIREMENTS[name]
        record = folder / name / _RECORD
        advice = f"python benchmarks/environments.py {name} makes it"
        problem = f"there is no environment: {advice}"
        if record.is_file():
            made = json.loads(record.read_text(encoding="utf-8"))
            problem = made["problem"]
            if not problem and made["requirements"] != list(wanted):
                problem = f"its environment has other versions: {advice}"
        python = folder / name / _programs() / _executable()
        return cls(name=name, python=python, requirements=wanted, problem=problem)


def make(folder: Path, name: str) -> Environment:
    """Make an environment anew, and record how that went.

    Args:
        folder: Where the environments lie; what was there under this name is removed.
        name: One of `REQUIREMENTS`.
    """
    where = folder / name
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    log = where / "install.log"
    wanted = REQUIREMENTS[name]
    python = where / _programs() / _executable()
    problem = _run([sys.executable, "-m", "venv", where], log)
    if not problem:
        layer(where, _here())
        pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
        problem = _run([*pip, *wanted], log)
    record = {"problem": problem, "requirements": list(wanted)}
    write_text(where / _RECORD, dump_json(record))
    return Environment.open(folder, name)


def layer(environment: Path, below: Sequence[Path]) -> None:
    """Let an environment see packages that are installed elsewhere, behind its own.

    Args:
        environment: A folder made by `venv`, for this version of Python.
        below: Folders of packages.
    """
    scheme = "nt" if sys.platform == "win32" else "posix_prefix"
    packages = sysconfig.get_path("purelib", scheme, vars={"base": str(environment)})
    write_text(Path(packages) / "below.pth", "".join(f"{path}\n" for path in below))


def _here() -> list[Path]:
    """The folders of packages of this environment, and of what it lies on itself."""
    return [Path(path) for path in sys.path if path.endswith("-packages") and Path(path).is_dir()]


def _run(command: Sequence[str | Path], log: Path) -> str:
    """Run a step of the installation; why it failed, empty where it did not."""
    return watch(command, log, timeout=SECONDS, memory=float("inf")).problem(log)


def _programs() -> str:
    return "Scripts" if sys.platform == "win32" else "bin"


def _executable() -> str:
    return "python.exe" if sys.platform == "win32" else "python"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(REQUIREMENTS))
    parser.add_argument("--environments", type=Path, default=FOLDER, metavar="DIR")
    options = parser.parse_args()
    for name in options.names:
        if name not in REQUIREMENTS:
            parser.error(f"{name!r} is none of {', '.join(REQUIREMENTS)}")
    for name in options.names or REQUIREMENTS:
        print(f"{name}: installing {', '.join(REQUIREMENTS[name])}", flush=True)
        made = make(options.environments.resolve(), name)
        print(f"{name}: {made.problem or 'ready'}", flush=True)


if __name__ == "__main__":
    main()
