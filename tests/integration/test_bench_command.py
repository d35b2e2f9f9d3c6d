"""bench: two backends and two precisions, and what can go wrong."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import content, gnet_opt, marked, started
from world import World

from gnet_opt.bench import results_file
from gnet_opt.bench.scenarios import SCENARIOS
from gnet_opt.bundle import Bundle
from gnet_opt.cli import bench
from gnet_opt.files import sha256_file

Make = Callable[[str], Path]
QUICK = ["--rounds", "2", "--seconds", "0.01", "--threads", "1"]


@pytest.fixture(scope="module")
def float_bundle(quantize_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float") / "float"
    done = gnet_opt(*quantize_arguments, "--precision", "fp32", "--target", "cpu", "-o", out)
    assert done.code == 0, done.err
    return out


@pytest.mark.slow
def test_two_bundles_on_two_backends(bundle: Make, float_bundle: Path, tmp_path: Path) -> None:
    int8, out = bundle("openvino-cpu"), tmp_path / "deep" / "out"
    before = content(int8)
    both = ["--backend", "openvino", "--backend", "onnxruntime"]
    done = gnet_opt(
        "bench", float_bundle, int8, *both, "--scenario", "all", *QUICK, "-o", out, "--json"
    )
    assert (done.code, done.err) == (0, "")
    assert content(int8) == before
    document = done.json
    assert json.loads((out / "results.json").read_text()) == document
    assert results_file.read(out / "results.json") == document
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "results.csv",
        "results.json",
    ]
    assert document["settings"] == {
        "count": 5,
        "latency_bound_ms": None,
        "rounds": 2,
        "scenarios": ["single-stream", "multi-stream", "offline", "server"],
        "seconds": 0.01,
        "seed": 0,
        "soak_seconds": 0.0,
        "threads": 1,
    }
    subjects = document["subjects"]
    assert [subject["name"] for subject in subjects] == [
        "small-fp32 openvino",
        "small-fp32 onnxruntime",
        "small-int8 openvino",
        "small-int8 onnxruntime",
    ]
    for subject in subjects:
        root = float_bundle if subject["precision"] == "fp32" else int8
        assert subject["model_sha256"] == sha256_file(root / "model.onnx")
        own = subject["backend"] == "openvino"
        # Another backend has other integer kernels, and so another accuracy.
        assert subject["accuracy"] == (Bundle.open(root).manifest["accuracy"] if own else None)
        assert set(subject["scenarios"]) == set(document["settings"]["scenarios"])
        assert len(subject["scenarios"]["single-stream"]["rounds"]) == 2
        assert subject["scenarios"]["single-stream"]["n"] >= 10
        assert subject["scenarios"]["multi-stream"]["query_pictures"] == 8
        assert subject["scenarios"]["offline"]["metric"]["value"] > 0
        assert min(subject["cold_start_ms"]) > max(subject["first_ms"])
        assert subject["file_bytes"] > 10_000
        assert subject["end_to_end"]["pictures"] == 16
        assert subject["profile"]["backend"] == subject["backend"]
        integer = subject["profile"]["macs_int8_share"]
        assert (integer > 0) == (subject["precision"] == "int8")
        assert (subject["soak"], subject["sweep"]) == (None, None)
        assert subject["energy"]["note"]
    # OpenVINO ran the bundle's own files, ONNX Runtime what was compiled for it.
    listed = {a["path"]: a["sha256"] for a in Bundle.open(int8).manifest["artifacts"]}
    own = subjects[2]["artifact_sha256"]
    assert own == {name: listed[name] for name in ("model.xml", "model.bin")}
    assert subjects[3]["native"] is False
    assert any("compiled for this run" in note for note in subjects[3]["notes"])
    assert document["comparison"]["over"] == "small-fp32 openvino"
    assert set(document["comparison"]["offline"]) == {s["name"] for s in subjects[1:]}
    environment = document["environment"]
    assert environment["constraint"] is None
    assert environment["machine"]["cores"] >= 1
    assert environment["start"]["load1"] is None or environment["start"]["load1"] >= 0
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 16


def test_for_people(bundle: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [bundle("openvino-cpu"), *QUICK, "--scenario", "all", "-o", out]
    done = gnet_opt("bench", *arguments)
    assert done.code == 0, done.err
    for text in (
        "single-stream: one picture after the other",
        "pictures a second",
        "queries a second",
        "process start to first result, ms",
        "from file to result, medians (golden pictures of 64 x 64 pixels as JPEG)",
        "time by what runs",
        "1 thread, 2 rounds of at least 0.01 s, each subject in a process of its own, "
        "new in each round.",
        "The model takes one picture at a time: eight are eight runs.",
        f"Written: {out}/report.html, {out}/results.csv, {out}/results.json",
    ):
        assert text in done.out
    before = content(out)
    done = gnet_opt("bench", *arguments)
    assert (done.code, done.out) == (2, "")
    assert f"{out} exists already. Pass --force" in done.err
    assert content(out) == before
    assert gnet_opt("bench", *arguments, "--force").code == 0


def test_the_scenarios_of_the_command_are_those_of_the_package() -> None:
    assert bench._SCENARIOS == SCENARIOS


def test_the_same_bundle_twice_has_two_names(bundle: Make, tmp_path: Path) -> None:
    root, other = bundle("openvino-cpu"), tmp_path / "other"
    shutil.copytree(root, other)
    done = gnet_opt("bench", root, other, root, *QUICK, "--rounds", "1", "--json")
    assert done.code == 0, done.err
    assert [subject["name"] for subject in done.json["subjects"]] == [
        "small-int8 openvino in openvino-cpu #1",
        "small-int8 openvino in other",
        "small-int8 openvino in openvino-cpu #3",
    ]


def test_results_can_be_read_whatever_a_name_holds(
    bundle: Make, world: World, tmp_path: Path
) -> None:
    hostile = "\x1b[2Jx\u202e"
    root, images, out = tmp_path / f"b{hostile}", tmp_path / f"i{hostile}", tmp_path / "out"
    shutil.copytree(bundle("openvino-cpu"), root)
    shutil.copytree(world.evaluation, images)
    made = Bundle.open(root)
    names = {key: {**made.manifest[key], "name": hostile} for key in ("model", "target")}
    made.noted(names)
    done = gnet_opt("bench", root, root, "--images", images, *QUICK, "--rounds", "1", "-o", out)
    assert done.code == 0, done.err
    document = results_file.read(out / "results.json")
    assert document["subjects"][0]["model"] == r"\x1b[2Jx\u202e"
    assert all("\x1b" not in path.read_text() for path in out.iterdir())


def test_a_constrained_host(bundle: Make, world: World) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("binding to CPUs needs Linux")
    cpu = min(os.sched_getaffinity(0))
    options = ["--cpus", str(cpu), "--memory", "2G", "--images", world.evaluation]
    done = gnet_opt("bench", bundle("openvino-cpu"), *QUICK[:4], *options, "--json")
    assert done.code == 0, done.err
    assert done.json["environment"]["constraint"] == {
        "cpus": [cpu],
        "label": "constrained host",
        "memory_bytes": 2**31,
    }
    assert done.json["environment"]["affinity"] == [cpu]
    assert done.json["settings"]["threads"] == 1
    assert done.json["subjects"][0]["end_to_end"]["source"] == "pictures of evaluation"
    assert "This is a constrained host" in done.json["subjects"][0]["notes"][-1]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
@pytest.mark.parametrize("size", ["20M", "100M"])
def test_too_little_memory(bundle: Make, size: str) -> None:
    done = gnet_opt("bench", bundle("openvino-cpu"), *QUICK, "--memory", size)
    assert (done.code, done.out) == (7, "")
    assert (
        f"limited to {size[:-1]} MiB; if that is the cause, allow more with --memory." in done.err
    )
    assert "Traceback" not in done.err


def test_a_sweep_is_noted_in_the_bundle(bundle: Make, tmp_path: Path) -> None:
    root = tmp_path / "swept"
    shutil.copytree(bundle("openvino-cpu"), root)
    done = gnet_opt("bench", root, *QUICK, "--sweep", "--write", "--json")
    assert done.code == 0, done.err
    swept = done.json["subjects"][0]["sweep"]
    tuned = Bundle.open(root).manifest["tuned"]
    assert tuned["throughput"] == swept["best"]["throughput"]
    assert tuned["latency"] == swept["best"]["latency"]
    assert tuned["backend"] == "openvino"
    assert gnet_opt("verify", root, "--threads", "1").code == 0
    done = gnet_opt("bench", root, "--write")
    assert (done.code, done.out) == (2, "")
    assert "pass --sweep, too" in done.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--backend", "openvno"], 2, "There is no backend 'openvno'. Did you mean openvino?"),
        (["--backend", "reference"], 2, "Reference semantics compute everything in float"),
        (["--cpus", "zero"], 2, "--cpus is 'zero'"),
        (["--cpus", "99999"], 2, "--cpus names 99999"),
        (["--memory", "lots"], 2, "--memory is 'lots'"),
        (["--images", "nowhere"], 5, "nowhere is not a folder"),
        (["--seconds", "nan"], 2, "A measurement needs at least one round"),
        # Told here, before a device is asked.
        (["--soak", "soon", "--on", "ssh://nowhere.invalid"], 2, "'soon' is no duration"),
    ],
)
def test_options_that_make_no_sense(
    bundle: Make, options: list[str], code: int, message: str
) -> None:
    done = gnet_opt("bench", bundle("openvino-cpu"), *options)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"gnet-opt: {message}")


def test_bundles_that_cannot_be_measured(bundle: Make, tmp_path: Path) -> None:
    jetson = bundle("jetson")
    done = gnet_opt("bench", jetson, *QUICK)
    assert (done.code, done.out) == (7, "")
    assert done.err.startswith(f"gnet-opt: {jetson}: The engine is not built yet. So there is")
    by_script = tmp_path / "by-script"
    shutil.copytree(jetson, by_script)
    (by_script / "model.engine").write_bytes(b"an engine")
    done = gnet_opt("bench", by_script, *QUICK)
    assert (done.code, done.out) == (7, "")
    assert "has no record of where it comes from" in done.err
    assert f"Run `gnet-opt compile {by_script}`" in done.err
    done = gnet_opt("bench", jetson, *QUICK, "--backend", "onnxruntime", "--json")
    assert done.code == 0, done.err
    assert done.json["subjects"][0]["native"] is False
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle("openvino-cpu"), damaged)
    (damaged / "model.bin").write_bytes(b"x")
    done = gnet_opt("bench", bundle("openvino-cpu"), damaged, *QUICK)
    assert (done.code, done.out) == (6, "")
    assert "was changed after the bundle was made" in done.err
    assert gnet_opt("bench", tmp_path).code == 6
    assert gnet_opt("bench").code == 2


def test_an_interrupt_leaves_nothing(bundle: Make, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    out = tmp_path / "out"
    arguments = ["bench", bundle("openvino-cpu"), "--threads", "1", "--seconds", "60", "-o", out]
    with started(*arguments, temporary=temporary) as (process, mark):
        deadline = time.monotonic() + 60
        # Itself, and a worker that has started.
        while len(marked(mark)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "Interrupted. Nothing half-written was left behind."
        assert marked(mark) == []
    assert list(tmp_path.iterdir()) == [temporary]
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_what_the_loop_adds_is_measured(bundle: Make, tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "benchmarks" / "overhead.py"
    out = tmp_path / "overhead.json"
    bundles = [bundle("openvino-cpu"), bundle("raspberry-pi-5")]
    done = subprocess.run(
        [
            *(sys.executable, program, *bundles, "--rounds", "1", "--starts", "1"),
            *("--seconds", "1.5", "-o", out),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    openvino, onnxruntime = found["results"]
    for row in found["results"]:
        turns = row["turns_us"]
        assert set(turns) == {"again", "bare", "ours"}
        ours = np.array(turns["ours"])
        bare = (np.array(turns["bare"]) + np.array(turns["again"])) / 2
        assert len(ours) == len(bare) == row["ours"]["added_us"]["n"] > 1
        # A turn takes at least its samples.
        assert (ours > 0).all() and (bare > 0).all()
        added, over = row["ours"]["added_us"], row["ours"]["p50_over"]
        assert added["median"] == pytest.approx(np.median(ours[:, 1] - bare[:, 1]))
        assert over["median"] == pytest.approx(np.median(ours[:, 0] / bare[:, 0]))
        assert added["low"] <= added["median"] <= added["high"]
    (turn,) = openvino["benchmark_app"]["rounds_us"]
    over = openvino["benchmark_app"]["p50_over"]
    assert over["low"] == over["median"] == turn["ours"] / turn["benchmark_app"]
    # The request's own clock sees less than a caller's, and most of it.
    assert 0 < turn["around"] < turn["ours"] / 2
    alike = openvino["benchmark_app"]["p50_over_by_its_clock"]
    assert alike["median"] == (turn["ours"] - turn["around"]) / turn["benchmark_app"]
    assert "benchmark_app" not in onnxruntime


BARE = """
import sys
from importlib.machinery import PathFinder

MISSING = {missing!r}

class Bare(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.mark.parametrize(
    ("target", "runtime"), [("raspberry-pi-5", "onnxruntime"), ("openvino-cpu", "openvino")]
)
def test_a_device_needs_the_base_install_and_one_runtime(
    bundle: Make, tmp_path: Path, target: str, runtime: str
) -> None:
    heavy = ["matplotlib", "onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "torchvision"]
    missing = [*heavy, *({"onnxruntime", "openvino"} - {runtime})]
    # Read by every Python that starts with this path, workers too.
    (tmp_path / "sitecustomize.py").write_text(BARE.format(missing=missing))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]),
    }

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        code = "import sys; from gnet_opt.cli import main; main(sys.argv[1:])"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )

    probe = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, text=True, env=environment
    )
    assert "No module named 'torch'" in probe.stderr
    done = run("verify", bundle(target), "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("bench", bundle(target), "--scenario", "all", *QUICK, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (subject,) = json.loads(done.stdout)["subjects"]
    assert subject["backend"] == runtime
    assert subject["profile"] is None
    assert any(
        note.startswith("The time of each layer is left out: onnx_ir is needed")
        for note in subject["notes"]
    )
