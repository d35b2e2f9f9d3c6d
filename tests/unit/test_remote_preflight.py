from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from gnet_opt import backends
from gnet_opt.remote import preflight
from gnet_opt.remote.preflight import MODULES, RUNTIMES, Facts, Needs, judge

FACTS = Facts(
    architecture="aarch64",
    board="A board",
    cpus=4,
    disk_free=1_000_000_000,
    governors=["performance"],
    load1=0.1,
    memory_available=1_000_000_000,
    memory_total=4_000_000_000,
    modules=dict.fromkeys(MODULES, "9999"),
    power_mode="",
    python=[3, 11, 2],
    swap_free=0,
    swap_total=0,
    system="Linux",
    workdir="/var/tmp",
)
NEEDS = Needs(python="python3", workdir="", bytes=30_000_000, backends=("openvino",))


def test_a_device_that_has_all() -> None:
    report = judge(FACTS, NEEDS)
    assert (report.problems, report.notes) == ((), ())
    assert report.why_unfit("nano") is None
    assert Facts.from_dict(report.to_dict()["facts"]) == FACTS


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"system": "Darwin"}, "It runs Darwin. Only Linux devices are measured from afar"),
        ({"python": [3, 6, 9]}, "Its Python is 3.6.9, and 3.10 or later is needed."),
        ({"workdir": None}, "Neither /var/tmp nor /tmp is a folder that can be written."),
        ({"disk_free": 59_000_000}, "/var/tmp has 59 MB free, and 60 MB is needed. Free some ("),
        ({"memory_available": 29_000_000}, "29 MB of memory is available, less than the 30 MB"),
        (
            {"modules": {**FACTS.modules, "openvino": None}},
            "openvino is not installed for python3 there. Run there, if you want it: "
            "python3 -m pip install openvino",
        ),
        (
            {"modules": {**FACTS.modules, "tomli": None}, "python": [3, 10, 0]},
            "tomli is not installed for python3 there.",
        ),
    ],
)
def test_each_problem(changes: dict[str, object], problem: str) -> None:
    (found,) = judge(replace(FACTS, **changes), NEEDS).problems
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"load1": 1.1}, "Something is running there: the load is 1.10 on 4 CPUs."),
        ({"governors": ["performance", "schedutil"]}, "The CPU governor is schedutil: clocks"),
        ({"power_mode": "15W"}, "The power mode is 15W; figures hold for it alone."),
        ({"swap_total": 1_000_000_000, "swap_free": 1_000_000}, "More than half of its swap is"),
        ({"modules": {**FACTS.modules, "numpy": "1.21.5"}}, "numpy is 1.21.5 there; gnet-opt is"),
    ],
)
def test_each_note(changes: dict[str, object], note: str) -> None:
    report = judge(replace(FACTS, **changes), NEEDS)
    assert report.problems == ()
    (found,) = report.notes
    assert found.startswith(note)


def test_what_the_device_does_not_tell_is_no_problem() -> None:
    silent = replace(
        FACTS,
        cpus=None,
        disk_free=None,
        governors=[],
        load1=None,
        memory_available=None,
        memory_total=None,
        modules={**FACTS.modules, "numpy": ""},
        swap_free=None,
        swap_total=None,
    )
    report = judge(silent, NEEDS)
    assert (report.problems, report.notes) == ((), ())


def test_all_problems_are_told_at_once() -> None:
    report = judge(replace(FACTS, disk_free=0, memory_available=0), NEEDS)
    text = str(report.why_unfit("nano"))
    assert text.count("\n  - ") == len(report.problems) == 2
    assert text.startswith("nano cannot do this yet; nothing was copied to it")


def test_every_backend_of_our_own_has_its_runtime() -> None:
    assert set(RUNTIMES) == set(backends.BUILT_IN)


def test_what_the_device_tells_is_what_is_read() -> None:
    path = Path(str(files("gnet_opt.remote") / "device.py"))
    done = subprocess.run(
        [sys.executable, "-", "probe", "", "numpy", "no_such_module"],
        input=path.read_text(),
        capture_output=True,
        text=True,
        check=True,
    )
    facts = Facts.from_dict(json.loads(done.stdout))
    assert facts.python == list(sys.version_info[:3])
    assert facts.modules["numpy"] and facts.modules["no_such_module"] is None
    assert facts.system == "Linux" and facts.workdir in ("/var/tmp", "/tmp")


def test_an_old_python_can_read_what_it_is_sent() -> None:
    """It has to tell its version; Python 3.6 is the oldest that boards still come with."""
    ast.parse((files("gnet_opt.remote") / "device.py").read_text(), feature_version=(3, 6))
    tree = ast.parse((files("gnet_opt.remote") / "device.py").read_text())
    imported = {
        name.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= set(sys.stdlib_module_names)
    assert "__future__" not in imported  # `annotations` is not known there
    annotations = [
        annotation
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for annotation in (node.returns, *(argument.annotation for argument in node.args.args))
        if annotation is not None
    ]
    assert not [a for a in annotations if isinstance(a, (ast.Subscript, ast.BinOp))]


def test_the_least_versions_are_those_of_our_own_package() -> None:
    least = preflight._least_versions()
    wanted = {"numpy", "pillow", "click", "rich", "threadpoolctl", "onnxruntime", "openvino"}
    assert wanted <= set(least)
