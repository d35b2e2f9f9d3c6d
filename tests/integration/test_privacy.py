"""Nothing is sent anywhere, and nobody but gnet-opt itself leaves anything in the user's home."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import running
from world import World

ROOT = Path(__file__).parents[2]

PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from gnet_opt import scoring
from gnet_opt.cli import run
from gnet_opt.remote import job
from gnet_opt.sensitivity import LayerCost, draw

scoring.TIMING = dataclasses.replace(
    scoring.TIMING, rounds=2, seconds=0.01, count=2, warm_up=0.05
)
job.POLL_SECONDS = 0.1
commands, plot = json.loads(sys.argv[1])
for words in commands:
    assert run(words) == 0, words
cost = LayerCost(name="conv", agreement=100.0, macs=1, noise=0.01)
assert draw([cost], Path(plot), title="small")
"""


def fresh_environment(home: Path) -> dict[str, str]:
    """The environment of a new user, who has switched nothing off."""
    ours = ("CI", "GNET_OPT_CACHE", "JENKINS_URL", "MPLCONFIGDIR", "TF_BUILD")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("ORT_", "XDG_"))
    }
    folders = {
        "HOME": home,
        "XDG_CACHE_HOME": home / ".cache",
        "XDG_CONFIG_HOME": home / ".config",
        "XDG_DATA_HOME": home / ".local" / "share",
        "XDG_STATE_HOME": home / ".local" / "state",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    # The package that is tested, also where another one is installed.
    paths = [str(ROOT / "toolkit"), os.environ["PYTHONPATH"]]
    kept["PYTHONPATH"] = os.pathsep.join(paths)
    return kept | {name: str(folder) for name, folder in folders.items()}


@pytest.mark.slow  # Four commands, one of them on a device, by two runtimes.
def test_nobody_else_leaves_a_file_in_the_home(
    world: World, quantize_arguments: list[str], tmp_path: Path
) -> None:
    """ONNX Runtime keeps a device's identifier and queued events there, OpenVINO a client's."""
    home = tmp_path / "home"
    bundles = [str(tmp_path / name) for name in ("openvino-cpu", "raspberry-pi-5")]
    bench = ["bench", *bundles, "--threads", "1", "--rounds", "2", "--seconds", "0.05"]
    with running(tmp_path / "sshd") as server:
        keys = ["--identity", str(server.identity), "--known-hosts", str(server.known_hosts)]
        on = ["--on", server.url, *keys, "--python", sys.executable, "--workdir", str(server.work)]
        commands = [
            *([*quantize_arguments, "--target", Path(b).name, "-o", b] for b in bundles),
            *(["verify", bundle] for bundle in bundles),
            bench,
            [*bench, *on],
        ]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps([commands, str(tmp_path / "costs.svg")])],
            env=fresh_environment(home),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not list(server.home.rglob("*"))
    left = [path for path in home.rglob("*") if path.is_file()]
    own = home / ".cache" / "gnet-opt"
    assert any(own in path.parents for path in left), "gnet-opt's own cache is empty"
    assert not [path for path in left if own not in path.parents]


@pytest.mark.parametrize("code", ["import gnet_opt", "import peers", "import converters"])
@pytest.mark.parametrize("setting", [None, "0"])
def test_telemetry_is_off_before_a_runtime_can_be_imported(code: str, setting: str | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    if setting is not None:
        environment["ORT_DISABLE_TELEMETRY"] = setting
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "toolkit"), str(ROOT / "benchmarks")])
    told = (
        f"{code}\nimport os, sys\n"
        "assert not {'onnxruntime', 'openvino'} & set(sys.modules)\n"
        "blocked = sys.modules.get('openvino_telemetry', 'gnet-opt') is None\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], blocked)"
    )
    done = subprocess.run(
        [sys.executable, "-c", told], env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"1 {code != 'import gnet_opt'}\n", done.stderr


def imported(path: Path, *, at_top: bool = False) -> set[str]:
    """The modules that a file imports anywhere, or only where it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("folder", ["toolkit", "benchmarks", "calibration", "models", "tests"])
def test_openvino_is_imported_in_one_place(folder: str) -> None:
    bare = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*.py")
        if "openvino" in imported(path)
    }
    # These two hide its telemetry for the whole process, as the test above has it.
    assert bare <= {"benchmarks/converters.py", "benchmarks/peers.py"}


RUNTIMES = {"modelopt", "nncf", "onnxruntime", "onnxscript", "torch"}
"""Whoever imports these may come to import ONNX Runtime."""


@pytest.mark.parametrize("folder", ["benchmarks", "calibration", "models"])
def test_programs_switch_telemetry_off_first(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        top = {name.split(".")[0] for name in imported(path, at_top=True)}
        assert not top & RUNTIMES, f"{path}: import them inside functions"
        if roots & RUNTIMES and path.name != "peers.py":
            assert top & {"gnet_opt", "peers"}, f"{path} switches nothing off"
