"""`benchmarks/runtimes.py` and its parts: environments, processes, what is kept, and tables."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnet_opt import backends
from gnet_opt.bench.process import Subject
from gnet_opt.bench.session import Plan
from gnet_opt.errors import BackendError
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import Artifact
from latencies import made_up

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOOLKIT = BENCHMARKS.parent / "toolkit"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as for a script, whose folder comes first
        yield importlib.import_module


class TestVariants:
    def test_every_one_can_be_made_and_run(self, load: Callable[[str], ModuleType]) -> None:
        runtimes, converters, runners = load("runtimes"), load("converters"), load("runners")
        environments = load("environments")
        names = [variant.name for variant in runtimes.VARIANTS]

        assert len(set(names)) == len(names)
        for variant in runtimes.VARIANTS:
            assert variant.precision in ("float32", "int8")
            assert variant.name.endswith(variant.precision)
            assert variant.runner in {*runners.names(), *backends.names()}
            assert variant.environment in {"", *environments.REQUIREMENTS}
            assert variant.described
            assert variant.ours == (not variant.files)
        used = {variant.recipe for variant in runtimes.VARIANTS if not variant.ours}
        assert used == set(converters.RECIPES)
        assert {v.environment for v in runtimes.VARIANTS} - {""} == set(environments.REQUIREMENTS)

    def test_every_requirement_is_pinned(self, load: Callable[[str], ModuleType]) -> None:
        for requirements in load("environments").REQUIREMENTS.values():
            assert all(requirement.count("==") == 1 for requirement in requirements)


class TestEnvironments:
    def test_what_was_not_made_says_how(
        self, load: Callable[[str], ModuleType], tmp_path: Path
    ) -> None:
        found = load("environments").Environment.open(tmp_path, "ncnn")

        assert found.problem == (
            "there is no environment: python benchmarks/environments.py ncnn makes it"
        )

    @pytest.mark.parametrize(
        ("requirements", "problem", "expected"),
        [
            (("mnn==3.6.1",), "", ""),
            (("mnn==1.0",), "", "its environment has other versions"),
            (("mnn==3.6.1",), "ended with exit code 1: no wheel", "exit code 1: no wheel"),
        ],
    )
    def test_record_decides(
        self,
        load: Callable[[str], ModuleType],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        requirements: tuple[str, ...],
        problem: str,
        expected: str,
    ) -> None:
        environments = load("environments")
        monkeypatch.setitem(environments.REQUIREMENTS, "mnn", ("mnn==3.6.1",))
        record = {"problem": problem, "requirements": list(requirements)}
        (tmp_path / "mnn").mkdir()
        (tmp_path / "mnn" / "environment.json").write_text(json.dumps(record), encoding="utf-8")

        found = environments.Environment.open(tmp_path, "mnn")

        assert expected in found.problem
        assert bool(found.problem) == bool(expected)

    def test_own_packages_come_before_those_below(
        self, load: Callable[[str], ModuleType], tmp_path: Path
    ) -> None:
        where, below = tmp_path / "above", tmp_path / "below"
        command = [sys.executable, "-m", "venv", "--without-pip", str(where)]
        subprocess.run(command, check=True)
        below.mkdir()
        for name in ("only_below", "in_both"):
            (below / f"{name}.py").write_text("where = 'below'", encoding="utf-8")

        load("environments").layer(where, [below])

        # lib64 is a link to lib where there is one.
        packages = next(path for path in where.rglob("site-packages") if path.is_dir())
        (packages / "in_both.py").write_text("where = 'above'", encoding="utf-8")
        python = where / ("Scripts" if os.name == "nt" else "bin") / "python"
        code = "import in_both, only_below; print(in_both.where, only_below.where)"
        done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout == "above below\n"

    def test_failed_installation_is_recorded(
        self, load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        environments = load("environments")
        absent = f"{tmp_path}/absent-1.0-py3-none-any.whl"
        monkeypatch.setitem(environments.REQUIREMENTS, "mnn", (absent,))

        made = environments.make(tmp_path / "all", "mnn")

        assert made.problem.startswith("ended with exit code 1:")
        assert "absent-1.0" in made.problem
        assert environments.Environment.open(tmp_path / "all", "mnn") == made


class TestNetwork:
    def test_process_reaches_nothing(self, load: Callable[[str], ModuleType]) -> None:
        prefix = load("processes").without_network()
        if not prefix:
            pytest.skip("this machine gives processes no network of their own")
        code = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)"
        with socket.create_server(("127.0.0.1", 0)) as server:
            command = [sys.executable, "-c", code, str(server.getsockname()[1])]
            with_network = subprocess.run(command, check=False, capture_output=True)
            without = subprocess.run([*prefix, *command], check=False, capture_output=True)

        assert with_network.returncode == 0
        assert b"OSError" in without.stderr


RUNTIME = """
import contextlib, os
import numpy as np

class Opened:
    def __init__(self, kind):
        self.kind, self.count = kind, 0

    def run(self, batch):
        self.count += 1
        if self.kind == "dies" and self.count > 20:
            os._exit(3)
        return batch.sum((2, 3))

class Backend:
    @contextlib.contextmanager
    def open(self, artifact, *, threads):
        if artifact.backend == "refuses":
            raise RuntimeError("operator LRN is not known")
        assert threads == 2
        yield Opened(artifact.backend)

def get(name):
    return Backend()
"""


class TestContenders:
    @pytest.fixture
    def contender(self, load: Callable[[str], ModuleType], tmp_path: Path) -> Callable[[str], Any]:
        (tmp_path / "runtime_of_the_test.py").write_text(RUNTIME, encoding="utf-8")
        path = os.pathsep.join(map(str, (tmp_path, TOOLKIT)))

        def make(kind: str) -> Any:
            model = tmp_path / "model"
            artifact = Artifact(backend=kind, path=model, files=(("model", model),))
            subject = Subject(name=kind, artifact=artifact, resolve="runtime_of_the_test:get")
            return load("contenders").Contender(
                subject=subject, python=Path(sys.executable), environment={"PYTHONPATH": path}
            )

        return make

    def test_others_go_on_where_one_fails(
        self,
        load: Callable[[str], ModuleType],
        contender: Callable[[str], Any],
        tmp_path: Path,
    ) -> None:
        contenders = load("contenders")
        np.save(tmp_path / "picture.npy", np.ones((1, 3, 4, 4), np.float32))
        plan = Plan(rounds=2, turns=3, seconds=0.0, count=5, warm_up=0.1, threads=2, timeout=60)

        done, failed = contenders.measure(
            [contender(kind) for kind in ("works", "refuses", "dies")],
            tmp_path / "picture.npy",
            plan,
            tmp_path,
        )

        assert list(done) == ["works"]
        timed = done["works"]
        assert [len(samples) for samples in timed.stream.rounds] == [5] * 6
        # A start has the whole of Python in it, a run is one sum.
        found = contenders.row(timed)
        assert len(found["cold_start_ms"]) == 2
        assert min(found["cold_start_ms"]) > found["p50_ms"] > 0
        assert found["n"] == 30
        assert found["pictures_per_second"] > 0
        assert "operator LRN is not known" in failed["refuses"]
        assert "exit code 3" in failed["dies"]

    def test_logits_of_every_picture(
        self,
        load: Callable[[str], ModuleType],
        contender: Callable[[str], Any],
        tmp_path: Path,
    ) -> None:
        pictures = np.arange(4 * 48, dtype=np.float32).reshape(4, 3, 4, 4)
        np.save(tmp_path / "evaluation.npy", pictures)
        np.save(tmp_path / "picture.npy", pictures[:1])

        load("contenders").logits(
            contender("works"),
            tmp_path / "evaluation.npy",
            tmp_path / "logits.npy",
            2,
            tmp_path / "log",
            60,
        )

        np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), pictures.sum((2, 3)))

    def test_ratios_are_taken_within_rounds(self, load: Callable[[str], ModuleType]) -> None:
        found = load("contenders").ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])

        assert found == {"high": 4.0, "low": 2.0, "median": 3.0}


class TestPreparation:
    @given(data=st.data(), channels=st.sampled_from(["rgb", "bgr"]))
    def test_pixels_undo_the_normalisation(
        self, load: Callable[[str], ModuleType], data: st.DataObject, channels: str
    ) -> None:
        numbers = st.floats(0.5, 255, width=32)
        mean = data.draw(st.tuples(numbers, numbers, numbers).filter(lambda m: max(m) > 1))
        std = data.draw(st.tuples(numbers, numbers, numbers).filter(lambda s: max(s) > 1))
        settings = Preprocess(channels=channels, mean=mean, std=std)  # type: ignore[arg-type]
        seed = data.draw(st.integers(0, 9))
        picture = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)

        planes = picture.transpose(2, 0, 1)[:: 1 if channels == "rgb" else -1].astype(np.float32)
        shape = (3, 1, 1)
        normal = (planes - np.reshape(np.float32(mean), shape)) / np.reshape(np.float32(std), shape)

        np.testing.assert_array_equal(load("runtimes").pixels(normal, settings), picture)

    @pytest.mark.skipif(os.name == "nt", reason="the tools of this test are shell scripts")
    def test_tools_of_ncnn_are_asked_as_documented(
        self,
        load: Callable[[str], ModuleType],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        converters = load("converters")
        source, out, tools = tmp_path / "source", tmp_path / "out", tmp_path / "tools"
        for folder in (source / "crops", source / "inputs", out, tools):
            folder.mkdir(parents=True)
        for index in range(2):
            (source / "crops" / f"000{index}.png").touch()
        np.save(source / "inputs" / "0000.npy", np.zeros((1, 3, 224, 192), np.float32))
        settings = {"channels": "bgr", "mean": [104.0, 117.0, 123.0], "std": [1.0, 2.0, 4.0]}
        (source / "preprocess.json").write_text(json.dumps(settings), encoding="utf-8")
        # They write down what they were asked, and the files that the next step needs.
        said = tmp_path / "said"
        for name, makes in (("ncnn2table", "$4"), ("ncnn2int8", '"$3" "$4"')):
            script = f'#!/bin/sh\necho "{name} $*" >> {said}\necho {name} | tee {makes}\n'
            (tools / name).write_text(script, encoding="utf-8")
            (tools / name).chmod(0o755)
        monkeypatch.setenv("NCNN_TOOLS", str(tools))

        def float_model(source: Path, out: Path, clock: Any) -> None:
            for name in ("model.param", "model.bin"):
                (out / name).write_text("float", encoding="utf-8")

        monkeypatch.setattr(converters, "ncnn_float", float_model)
        converters.ncnn_int8(source, out, converters.Clock())

        assert said.read_text(encoding="utf-8").splitlines() == [
            "ncnn2table model.param model.bin pictures.txt model.table mean=[104,117,123] "
            "norm=[1,0.5,0.25] shape=[192,224,3] pixel=BGR thread=2 method=kl",
            "ncnn2int8 model.param model.bin int8.param int8.bin model.table",
        ]
        assert sorted(path.name for path in out.iterdir()) == ["model.bin", "model.param"]
        assert (out / "model.bin").read_text(encoding="utf-8") == "ncnn2int8\n"

    def test_error_of_a_runtime_becomes_one_line(
        self, load: Callable[[str], ModuleType], tmp_path: Path
    ) -> None:
        path = tmp_path / "module.pt"
        path.write_bytes(b"no pickle")
        artifact = Artifact(backend="torch-eager", path=path, files=(("pt", path),))

        with (
            pytest.raises(BackendError, match=r"^torch-eager cannot load the model: \w+: "),
            load("runners").get("torch-eager").open(artifact, threads=1),
        ):
            pass

    @given(
        values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=9),
        scale=st.floats(0.0078125, 2.0, width=32),
        zero_point=st.integers(-128, 127),
    )
    def test_integers_of_litert(
        self,
        load: Callable[[str], ModuleType],
        values: list[float],
        scale: float,
        zero_point: int,
    ) -> None:
        runners = load("runners")
        tensor = {"dtype": np.int8, "quantization": (scale, zero_point)}
        given_ = np.array(values, np.float32)

        kept = runners._to_integers(given_, tensor)
        back = runners._from_integers(kept, tensor)

        low, high = (np.float32(scale) * (limit - zero_point) for limit in (-128, 127))
        assert kept.dtype == np.int8
        # Within half a step of what can be represented at all.
        assert np.abs(back - np.clip(given_, low, high)).max() <= 0.501 * scale
        as_they_are = {"dtype": np.float32, "quantization": (0.0, 0)}
        assert runners._to_integers(given_, as_they_are) is given_


def measured(p50: float, starts: list[float], ratio: float) -> dict[str, Any]:
    return {
        "cold_start_ms": starts,
        "n": 120,
        "p50_ms": p50,
        "p90_ms": 1.1 * p50,
        "peak_rss_bytes": 150_000_000,
        "pictures_per_second": 1000 / p50,
        "rounds_ms": [p50, 1.02 * p50, 0.99 * p50, p50],
        "times_ours": {"high": 1.1 * ratio, "low": 0.9 * ratio, "median": ratio},
    }


def variant(name: str, label: str, precision: str, **more: Any) -> dict[str, Any]:
    accuracy = {
        "agreement": 99.4,
        "ci95": [91.0, 95.0],
        "quantized": {"top1": 93.25, "top5": 99.0},
        "sqnr_db": 40.7,
    }
    row = {"accuracy": accuracy, "bytes": 6_000_000, "label": label, "name": name}
    return {**row, "ours": False, "precision": precision, "status": "done", **more}


@pytest.fixture
def result() -> dict[str, Any]:
    """A made-up result file of `runtimes.py`."""
    gone = {"reason": "there is no | environment", "status": "not run"}
    return {
        "created": "2026-11-25T10:00:00+00:00",
        "environments": {
            "ncnn": {
                "problem": "",
                "requirements": ["ncnn==1.0", "pnnx==2.0"],
                "versions": {"ncnn": "1.0", "pnnx": "2.0", "torch": "2.14.1"},
            }
        },
        "load": {"after": 1.96, "before": 0.04},
        "machine": {"cores": 2, "cpu": "CPU 9", "instructions": ["avx2", "avx512_vnni"]},
        "networks": {
            "demo": {
                "calibration": {"images": 128},
                "evaluation": {"images": 500},
                "model": "demo-machine-parts",
                "ours": "ours",
                "rounds": 4,
                "sittings": 3,
                "threads": {
                    "1": {
                        "failed": {"slow": "it died"},
                        "results": {
                            "ours": measured(2.5, [600.0, 500.0, 550.0], 1.0),
                            "compiled": measured(10.0, [40000.0, 9000.0, 9100.0], 4.0),
                        },
                    },
                    "2": {
                        "failed": {},
                        "results": {
                            "ours": measured(1.5, [610.0], 1.0),
                            "compiled": measured(6.0, [9000.0], 4.0),
                            "slow": measured(30.0, [700.0], 20.0),
                        },
                    },
                },
                "variants": [
                    variant("ours", "gnet-opt, OpenVINO", "int8", ours=True),
                    variant("compiled", "torch.compile", "float32"),
                    variant("slow", "ExecuTorch", "int8"),
                    {**variant("absent", "ncnn", "int8"), **gone},
                ],
            }
        },
        "tools": {"onnxruntime": "1.32.0", "openvino": "2026.4.1", "torch": "2.14.1"},
    }


class TestTables:
    def test_table(self, load: Callable[[str], ModuleType], result: dict[str, Any]) -> None:
        lines = load("runtime_tables").table(result["networks"]["demo"]).splitlines()

        assert len({line.count("|") for line in lines}) == 1
        assert lines[2] == (
            "| **gnet-opt, OpenVINO** | int8 | 93.25 % [91.0, 95.0], 99.4 %, 40.7 dB "
            "| 2.50 / 2.75 ms | 1.00 [0.90, 1.10] | 400.0 "
            "| 1.50 / 1.65 ms | 1.00 [0.90, 1.10] | 666.7 | 0.55 s | 0.15 GB | 6.0 MB |"
        )
        assert "| 9.10 s (first 40.0 s) |" in lines[3]
        assert "| failed: it died |  |  | 30.00 / 33.00 ms |" in lines[4]
        assert lines[5].startswith("| ncnn | int8 | not run: there is no / environment |")

    def test_conditions(self, load: Callable[[str], ModuleType], result: dict[str, Any]) -> None:
        text = load("runtime_tables").conditions(result, "results/runtimes-x.json")

        assert text == (
            "Measured on 2026-11-25 with 2 cores of an CPU 9 (avx512_vnni), ONNX Runtime 1.32.0, "
            "OpenVINO 2026.4.1, PyTorch 2.14.1, ncnn 1.0, pnnx 2.0. demo-machine-parts: 128 "
            "pictures to calibrate, 500 others to evaluate. Batch 1, 4 interleaved rounds in each "
            "of 3 sittings, n = 120 to 120; the middle half of the rounds lies within 1 % for "
            "every row. Load of the machine before and after: 0.0, 2.0. Source: "
            "[`results/runtimes-x.json`](results/runtimes-x.json)."
        )

    def test_chart_has_bars_as_long_as_times(
        self, load: Callable[[str], ModuleType], result: dict[str, Any]
    ) -> None:
        text = load("runtime_tables").chart(result["networks"]["demo"])

        root = ET.fromstring(text)
        space = "{http://www.w3.org/2000/svg}"
        bars = root.findall(f"{space}rect")
        widths = [float(bar.attrib["width"]) for bar in bars]
        # Two runtimes with one thread, three with two, fastest first.
        assert len(widths) == 5
        assert widths[1] / widths[0] == pytest.approx(10 / 2.5, rel=1e-2)
        assert widths[4] / widths[3] == pytest.approx(30 / 6, rel=1e-2)
        assert bars[0].attrib["class"] == "int8 ours-bar"
        height = float(root.attrib["height"])
        ends = [float(bar.attrib["y"]) + float(bar.attrib["height"]) for bar in bars]
        assert ends == sorted(ends)
        assert ends[-1] <= height
        assert "prefers-color-scheme: dark" in text
        assert "href" not in text

    def test_written_between_markers_with_pictures_beside(
        self,
        load: Callable[[str], ModuleType],
        result: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tables = load("tables")
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        (results / "runtimes-x86.json").write_text(json.dumps(result), encoding="utf-8")
        (tmp_path / "README.md").write_text("project\n", encoding="utf-8")
        own = tmp_path / "benchmarks" / "README.md"
        own.write_text("a\n<!-- runtimes -->\nold\n<!-- /runtimes -->\nb\n", encoding="utf-8")
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        monkeypatch.setattr(tables, "RESULTS", results)

        tables.write_tables()

        text = own.read_text(encoding="utf-8")
        assert text.startswith("a\n<!-- runtimes -->\n### demo-machine-parts by runtime\n")
        assert "old" not in text
        assert text.endswith("\n<!-- /runtimes -->\nb\n")
        assert "](runtimes-x86-demo.svg)" in text
        ET.parse(own.with_name("runtimes-x86-demo.svg"))


class TestRun:
    def test_ratio_needs_our_own_result(self, load: Callable[[str], ModuleType]) -> None:
        runtimes = load("runtimes")

        def timed(name: str, *rounds: int) -> Any:
            return made_up(name, "x", *[[ns] for ns in rounds])

        both = {"ours": timed("ours", 10, 20), "other": timed("other", 30, 80)}

        found = runtimes.compared(both, "ours")
        assert found["other"]["times_ours"] == {"high": 4.0, "low": 3.0, "median": 3.5}
        assert found["other"]["pictures_per_second"] == pytest.approx((1e9 / 30 + 1e9 / 80) / 2)
        assert "times_ours" not in runtimes.compared(both, "absent")["other"]

    @pytest.mark.full
    def test_real_run_on_few_pictures_and_again(self, tmp_path: Path) -> None:
        only = "ours-openvino-int8,ours-onnxruntime-float32,onnxruntime-float32,onnxruntime-int8"
        command = [sys.executable, str(BENCHMARKS / "runtimes.py"), "--at-most", "4"]
        command += ["--only", f"{only},ncnn-float32,ncnn-int8", "--threads", "1"]
        command += ["--sittings", "1", "--rounds", "2", "--work", str(tmp_path)]
        command += ["--environments", str(tmp_path / "none")]

        def run() -> dict[str, Any]:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            text = (tmp_path / "tried.json").read_text(encoding="utf-8")
            return dict(json.loads(text)["networks"]["demo"])

        network = run()
        rows = {row["name"]: row for row in network["variants"]}
        assert set(rows) == {*only.split(","), "ncnn-float32", "ncnn-int8"}
        assert rows["ncnn-float32"]["status"] == rows["ncnn-int8"]["status"] == "not run"
        times = network["threads"]["1"]["results"]
        assert set(times) == set(only.split(","))
        for name in only.split(","):
            assert rows[name]["status"] == "done"
            sqnr = rows[name]["accuracy"]["sqnr_db"]
            assert (sqnr > 90) == name.endswith("float32")
            assert times[name]["p50_ms"] > 0
            assert len(times[name]["rounds_ms"]) == 2
            assert times[name]["cold_start_ms"][0] > times[name]["first_ms"]
        assert rows["onnxruntime-int8"]["bytes"] < rows["onnxruntime-float32"]["bytes"] / 3

        files = sorted(tmp_path.glob("demo/*/convert.json"))
        before = [file.stat().st_mtime_ns for file in files]
        again = run()
        assert [row["accuracy"] for row in again["variants"] if "accuracy" in row] == [
            row["accuracy"] for row in network["variants"] if "accuracy" in row
        ]
        assert files
        assert [file.stat().st_mtime_ns for file in files] == before
