"""The programs under benchmarks/: what they keep, when they stop, and what tables they write."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data import shared_data
from gnet_opt import target
from gnet_opt.images import ImageSet

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as for a script, whose folder comes first
        yield importlib.import_module


@pytest.fixture(scope="module")
def processes(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("processes")


@pytest.fixture(scope="module")
def quantizers(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("quantizers")


@pytest.fixture(scope="module")
def tables(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tables")


class TestOnce:
    def test_keeps_what_was_made_from_the_same_key(
        self, processes: ModuleType, tmp_path: Path
    ) -> None:
        record = tmp_path / "record.json"
        made: list[int] = []

        def make() -> dict[str, Any]:
            made.append(len(made))
            return {"number": made[-1]}

        key = {"model": "a", "files": ("x", "y")}
        assert processes.once(record, key, make, force=False) == ({"number": 0}, False)
        assert processes.once(record, key, make, force=False) == ({"number": 0}, True)
        assert processes.once(record, {**key, "model": "b"}, make, force=False) == (
            {"number": 1},
            False,
        )
        assert processes.once(record, {**key, "model": "b"}, make, force=True) == (
            {"number": 2},
            False,
        )

    def test_interruption_leaves_no_record_to_believe(
        self, processes: ModuleType, tmp_path: Path
    ) -> None:
        record = tmp_path / "record.json"
        processes.once(record, {"version": 1}, lambda: {"number": 1}, force=False)

        def interrupted() -> dict[str, Any]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            processes.once(record, {"version": 2}, interrupted, force=False)

        # The files beside it may be half of version 2, so version 1 must not count either.
        assert not record.exists()


class TestWatch:
    def run(self, processes: ModuleType, log: Path, code: str, **options: Any) -> Any:
        limits = {"memory": 4e9, "timeout": 60.0, **options}
        return processes.watch([sys.executable, "-c", code], log, **limits)

    def test_success(self, processes: ModuleType, tmp_path: Path) -> None:
        log = tmp_path / "a.log"

        ended = self.run(
            processes,
            log,
            "import os, sys; print(os.environ['WORD']); print('note', file=sys.stderr)",
            environment={"WORD": "result"},
        )

        assert (ended.code, ended.stopped, ended.problem(log)) == (0, "", "")
        assert log.read_text(encoding="utf-8") == "note\n"
        assert log.with_suffix(".out").read_text(encoding="utf-8") == "result\n"

    def test_failure_has_the_last_words(self, processes: ModuleType, tmp_path: Path) -> None:
        log = tmp_path / "a.log"

        ended = self.run(processes, log, "raise ValueError('no such operator')")

        assert ended.problem(log) == "ended with exit code 1: ValueError: no such operator"

    def test_silent_death_by_a_signal(self, processes: ModuleType, tmp_path: Path) -> None:
        log = tmp_path / "a.log"

        ended = self.run(processes, log, "import os; os.kill(os.getpid(), 9)")

        assert ended.problem(log) == "ended with signal 9: it said nothing"

    def test_stops_what_takes_too_long(self, processes: ModuleType, tmp_path: Path) -> None:
        log = tmp_path / "a.log"

        ended = self.run(processes, log, "import time; time.sleep(600)", timeout=0.5)

        assert ended.problem(log) == "stopped after 0.5 s"
        assert 0.5 <= ended.seconds < 60

    @pytest.mark.skipif(
        not Path("/proc/self/status").is_file(), reason="no /proc/self/status to read memory from"
    )
    def test_measures_memory_and_stops_what_takes_too_much(
        self, processes: ModuleType, tmp_path: Path
    ) -> None:
        log = tmp_path / "a.log"
        code = "import time; a = bytearray({}); a[::4096] = b'x' * len(a[::4096]); time.sleep({})"

        small = self.run(processes, log, code.format("200 * 2**20", "0.3"))
        assert small.stopped == ""
        # The interpreter and the slice of single bytes come on top of it.
        assert 200 * 2**20 < small.peak_rss_bytes < 300 * 2**20

        large = self.run(processes, log, code.format("200 * 2**20", "600"), memory=1e8)
        assert large.problem(log) == "stopped at 0.1 GB of memory"
        assert large.peak_rss_bytes > 1e8


class TestQuantizers:
    def test_every_variant_can_be_asked(
        self, quantizers: ModuleType, load: Callable[[str], ModuleType]
    ) -> None:
        peers = load("peers")
        names = [variant.name for variant in quantizers.VARIANTS]

        assert len(set(names)) == len(names)
        assert names[0] == "float"
        for variant in quantizers.VARIANTS[1:]:
            if variant.target:
                assert target.find(variant.target).precisions[0] == "int8"
                assert variant.needs == ""
            else:
                assert variant.needs in peers.PACKAGES
            assert variant.described
        used = {variant.recipe for variant in quantizers.VARIANTS if variant.recipe}
        assert used == set(peers.RECIPES)

    def test_openvino_alone_runs_its_own_format(
        self, quantizers: ModuleType, tmp_path: Path
    ) -> None:
        (tmp_path / "model.xml").touch()
        assert quantizers.runtimes(tmp_path, "x86_64") == ["openvino", "openvino-avx2"]

        (tmp_path / "model.onnx").touch()
        assert quantizers.runtimes(tmp_path, "x86_64") == list(quantizers.RUNTIMES)
        assert quantizers.runtimes(tmp_path, "aarch64") == ["reference", "openvino", "onnxruntime"]

    def test_summary_is_of_medians(self, quantizers: ModuleType) -> None:
        rows = [
            {
                "label": "A",
                "name": "a",
                "peak_rss_bytes": memory,
                "process_seconds": 2 * seconds,
                "seconds": seconds,
                "status": "done",
            }
            for seconds, memory in ((3.0, 10), (1.0, 30), (9.0, None))
        ]

        assert quantizers.summary(rows) == {
            "label": "A",
            "name": "a",
            "peak_rss_bytes": {"high": 30, "low": 10, "median": 20, "n": 2},
            "process_seconds": {"high": 18.0, "low": 2.0, "median": 6.0, "n": 3},
            "seconds": {"high": 9.0, "low": 1.0, "median": 3.0, "n": 3},
            "status": "done",
        }

    def test_one_failed_run_decides(self, quantizers: ModuleType) -> None:
        good = {"label": "A", "name": "a", "peak_rss_bytes": 10, "process_seconds": 1.0}
        rows = [
            {**good, "seconds": 1.0, "status": "done"},
            {**good, "peak_rss_bytes": 90, "reason": "stopped after 5 s", "status": "failed"},
        ]

        found = quantizers.summary(rows)

        assert (found["status"], found["reason"]) == ("failed", "stopped after 5 s")
        assert "seconds" not in found
        assert found["peak_rss_bytes"]["high"] == 90

    def test_sets_of_the_real_network(self, load: Callable[[str], ModuleType]) -> None:
        shared_data()

        network = load("steps").Network.open("bvlc")

        sizes = [len(s) for s in (network.calibration, network.evaluation, network.more)]
        assert sizes == [100, 400, 200]
        assert set(network.calibration.hashes).isdisjoint(network.evaluation.hashes)
        assert set(network.calibration.hashes) < set(network.more.hashes)

    def test_thinned_sets_are_spread_over_the_whole(
        self, load: Callable[[str], ModuleType]
    ) -> None:
        images = ImageSet(
            name="set", files=tuple(Path(f"{i}.jpg") for i in range(10)), labels=tuple(range(10))
        )
        thinned = load("steps").thinned

        assert thinned(images, 4).labels == (0, 2, 5, 7)
        assert thinned(images, 10) is images
        assert thinned(images, None) is images

    def test_readers_give_every_picture_once(
        self, load: Callable[[str], ModuleType], tmp_path: Path
    ) -> None:
        peers = load("peers")
        for index in (1, 0, 2):
            np.save(tmp_path / f"{index:04}.npy", np.full((1, 3, 2, 2), index, np.float32))
        (tmp_path / "labels.json").write_text("[7, 8, 9]", encoding="utf-8")

        task = peers.Task.open(Path("float.onnx"), tmp_path, tmp_path)
        reader = peers.Reader(task)

        for _ in range(2):
            assert reader.get_first()["input"].max() == 0
            read = list(iter(reader.get_next, None))
            assert [int(item["input"].max()) for item in read] == [0, 1, 2]
            reader.rewind()
        assert task.labels == (7, 8, 9)

    @pytest.mark.full
    def test_real_run_on_few_pictures_and_again(self, tmp_path: Path) -> None:
        command = [sys.executable, str(BENCHMARKS / "quantizers.py"), "--networks", "demo"]
        command += ["--only", "ort-minmax,modelopt-max,ours-jetson", "--at-most", "4"]
        command += ["--sittings", "1", "--rounds", "1", "--work", str(tmp_path)]

        environment = {**os.environ, "GNET_OPT_CACHE": str(tmp_path / "cache")}

        def run() -> str:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, env=environment
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        first = run()
        result = json.loads((tmp_path / "tried.json").read_text(encoding="utf-8"))
        network = result["networks"]["demo"]
        rows = {row["name"]: row for row in network["variants"]}
        assert list(rows) == ["float", "ort-minmax", "modelopt-max", "ours-jetson"]
        # The development environment has no ModelOpt, and none was named.
        assert rows["modelopt-max"]["status"] == "not run"
        for name in ("ort-minmax", "ours-jetson"):
            measured = rows[name]["accuracy"]["reference"]
            assert measured["images"] == 4
            assert 10 < measured["sqnr_db"] < 80
            assert rows[name]["int8_convolutions"]["reference"] == network["convolutions"] == 57
            assert rows[name]["seconds"] > 0
            assert network["latency"]["results"][f"{name} by onnxruntime"]["p50_ms"] > 0
        assert rows["float"]["accuracy"]["onnxruntime"]["sqnr_db"] > 90

        # Statistics of an earlier run would make the seconds of ours too few.
        assert not (tmp_path / "cache").exists()

        second = run()
        assert "(kept)" not in first
        again = json.loads((tmp_path / "tried.json").read_text(encoding="utf-8"))
        assert {**again, "created": ""} == {**result, "created": ""}
        assert second.count("(kept)") > 2


def scored(top1: float, sqnr: float | None) -> dict[str, Any]:
    return {
        "agreement": 98.25,
        "ci95": [top1 - 4, top1 + 4],
        "quantized": {"top1": top1, "top5": 90.0},
        "sqnr_db": sqnr,
    }


def row(name: str, label: str, **accuracy: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": {key.replace("_", "-"): value for key, value in accuracy.items()},
        "bytes": 7_200_000,
        "int8_convolutions": {"onnxruntime": 30, "openvino": 57},
        "label": label,
        "name": name,
        "peak_rss_bytes": 900_000_000,
        "process_seconds": 25.04,
        "seconds": 20.55,
        "status": "done",
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """A made-up result file of `quantizers.py`."""
    plain = scored(75.0, None)
    float_row = {**row("float", "float32", reference=plain, openvino=plain), "bytes": 28_000_000}
    for key in ("peak_rss_bytes", "process_seconds", "seconds"):
        del float_row[key]
    variants = [
        float_row,
        row(
            "ort-default",
            "ONNX Runtime, defaults",
            openvino=scored(60.0, 9.0),
            openvino_avx2=scored(61.0, 8.0),
        ),
        row(
            "ort-minmax",
            "ONNX Runtime, min-max",
            reference=scored(74.0, 27.0),
            openvino=scored(74.5, 27.06),
            openvino_avx2=scored(50.0, 7.0),
        ),
        row(
            "ort-minmax-7bit",
            "ONNX Runtime, min-max, 7-bit",
            openvino=scored(74.0, 24.0),
            openvino_avx2=scored(74.0, 24.0),
        ),
        row(
            "ort-percentile",
            "ONNX Runtime, percentile",
            openvino=scored(73.0, 20.0),
            openvino_avx2=scored(50.0, 6.0),
        ),
        {
            "label": "ModelOpt, max",
            "name": "modelopt-max",
            "reason": "nvidia-modelopt is not installed",
            "status": "not run",
        },
        {
            **row("ours-cpu", "gnet-opt, cpu", openvino=scored(75.0, 32.0)),
            "target": "x86-vnni",
        },
    ]
    cost = {
        "images": 200,
        "variants": [
            {
                "label": "ONNX Runtime, entropy",
                "name": "ort-entropy",
                "peak_rss_bytes": {"high": 16.2e9, "low": 16.1e9, "median": 16.15e9, "n": 2},
                "process_seconds": {"high": 90.0, "low": 80.0, "median": 85.0, "n": 2},
                "reason": "stopped at 16 GB of memory",
                "status": "failed",
            },
            {
                "label": "gnet-opt, cpu",
                "name": "ours-cpu",
                "peak_rss_bytes": {"high": 1.2e9, "low": 1.1e9, "median": 1.15e9, "n": 2},
                "process_seconds": {"high": 22.0, "low": 20.0, "median": 21.0, "n": 2},
                "seconds": {"high": 6.0, "low": 5.0, "median": 5.5, "n": 2},
                "status": "done",
                "target": "x86-vnni",
            },
        ],
    }
    timed = {"n": 40, "p50_ms": 3.84, "rounds_ms": [3.8, 3.84, 3.9]}
    slower = {"n": 9, "p50_ms": 7.68, "rounds_ms": [7.6, 7.68, 9.9]}
    return {
        "created": "2026-11-25T10:00:00+00:00",
        "machine": {"cores": 2, "cpu": "CPU 9", "instructions": ["avx2", "avx512_vnni"]},
        "networks": {
            "bvlc": {
                "calibration": {"images": 100},
                "convolutions": 57,
                "cost": cost,
                "evaluation": {"images": 400},
                "latency": {
                    "results": {
                        "ours-cpu by openvino": timed,
                        "float by openvino": slower,
                    },
                    "rounds": 9,
                    "sittings": 3,
                    "threads": 1,
                },
                "model": "bvlc-googlenet",
                "variants": variants,
            }
        },
        "tools": {"nncf": "3.4.0", "onnxruntime": "1.32.0", "openvino": "2026.4.1"},
        "tools_of_modelopt": {"nvidia-modelopt": "0.47.0", "onnxruntime": "1.24.4"},
    }


class TestTables:
    def test_accuracy(self, tables: ModuleType, result: dict[str, Any]) -> None:
        lines = tables.quantizers_accuracy(result["networks"]["bvlc"]).splitlines()

        assert len({line.count("|") for line in lines}) == 1
        assert lines[2] == (
            "| float32 | 57, 30 of 57 | 75.00 % [71.0, 79.0], 98.2 %, identical "
            "| 75.00 % [71.0, 79.0], 98.2 %, identical | – | – |"
        )
        assert lines[4].startswith("| ONNX Runtime, min-max | 57, 30 of 57 | 74.00 % [70.0, 78.0]")
        assert lines[7] == ("| ModelOpt, max | not run: nvidia-modelopt is not installed | | | | |")
        assert lines[8].startswith("| **gnet-opt, `x86-vnni`** |")

    def test_speed(self, tables: ModuleType, result: dict[str, Any]) -> None:
        lines = tables.quantizers_speed(result["networks"]["bvlc"]).splitlines()

        assert len({line.count("|") for line in lines}) == 1
        assert lines[2] == "| float32 | 7.68 ms, 2.00 | – | – | – | – | 28.0 MB |"
        assert lines[-1] == (
            "| **gnet-opt, `x86-vnni`** | 3.84 ms, 1.00 | – | 20.6 s | 25.0 s | 0.90 GB | 7.2 MB |"
        )
        assert not any("ModelOpt" in line for line in lines)

    def test_cost(self, tables: ModuleType, result: dict[str, Any]) -> None:
        lines = tables.quantizers_cost(result["networks"]["bvlc"]["cost"]).splitlines()

        assert lines[0].startswith("| made by, 200 pictures |")
        assert lines[2:] == [
            "| ONNX Runtime, entropy | failed: stopped at 16 GB of memory | 85.0 s [80.0, 90.0] "
            "| 16.20 GB |",
            "| **gnet-opt, `x86-vnni`** | 5.5 s [5.0, 6.0] | 21.0 s [20.0, 22.0] | 1.20 GB |",
        ]

    def test_short_list_keeps_each_peers_best(
        self, tables: ModuleType, result: dict[str, Any]
    ) -> None:
        short = tables.short_list(result["networks"]["bvlc"]["variants"])

        # The best of OpenVINO and the best of AVX2; percentile is neither, ModelOpt did not run.
        assert [row["name"] for row in short] == [
            "float",
            "ort-default",
            "ort-minmax",
            "ort-minmax-7bit",
            "ours-cpu",
        ]

    def test_quoted(self, tables: ModuleType, result: dict[str, Any]) -> None:
        text = tables.quantizers_quoted(result, "benchmarks/results/quantizers-x.json")

        assert (
            "| bvlc-googlenet | ONNX Runtime, min-max | 27.0 dB "
            "| 74.50 % [70.5, 78.5], 98.2 %, 27.1 dB | 50.00 %, 7.0 dB | – |"
        ) in text
        assert (
            "Measured on 2026-11-25 with 2 cores of an CPU 9 (avx512_vnni), OpenVINO 2026.4.1, "
            "ONNX Runtime 1.32.0, NNCF 3.4.0, ModelOpt 0.47.0. bvlc-googlenet: 100 pictures to "
            "calibrate, 400 others to evaluate. Latency: batch 1, 1 thread, 9 interleaved rounds "
            "in 3 sittings, in each of which every result has a new process of its own, n = 9 to "
            "40, the middle half of the rounds within 15 %; ratios are medians over rounds. "
            "Source: [`benchmarks/results/quantizers-x.json`]"
            "(benchmarks/results/quantizers-x.json)."
        ) in text

    def test_without_latency(self, tables: ModuleType, result: dict[str, Any]) -> None:
        result["networks"]["bvlc"]["latency"] = None

        text = tables.quantizers_all(result, "results/quantizers-x.json")

        assert "### bvlc-googlenet" in text
        assert "Latency:" not in text

    def test_writes_both_readmes_between_their_markers(
        self,
        tables: ModuleType,
        result: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        (results / "quantizers-x86-vnni.json").write_text(json.dumps(result), encoding="utf-8")
        readmes = (tmp_path / "README.md", tmp_path / "benchmarks" / "README.md")
        for path in readmes:
            path.write_text(
                "before\n<!-- quantizers -->\nold\n<!-- /quantizers -->\nafter\n", encoding="utf-8"
            )
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        monkeypatch.setattr(tables, "RESULTS", results)

        tables.write_tables()

        short, full = (path.read_text(encoding="utf-8") for path in readmes)
        for text in (short, full):
            assert text.startswith("before\n<!-- quantizers -->\n")
            assert text.endswith("\n<!-- /quantizers -->\nafter\n")
            assert "old" not in text
        assert "(benchmarks/results/quantizers-x86-vnni.json)" in short
        assert "(results/quantizers-x86-vnni.json)" in full
        assert "ONNX Runtime, percentile" in full and "ONNX Runtime, percentile" not in short

        readmes[1].write_text("no markers\n", encoding="utf-8")
        with pytest.raises(SystemExit, match="<!-- quantizers -->"):
            tables.write_tables()


class TestInputInGraph:
    @pytest.fixture
    def program(self, load: Callable[[str], ModuleType]) -> ModuleType:
        return load("input_in_graph")

    @pytest.fixture
    def found(self, program: ModuleType, tmp_path: Path) -> list[Any]:
        """Both inputs, and the usual expression, of one model."""
        from conformance import models
        from gnet_opt import backends
        from gnet_opt.preprocess import Preprocess
        from gnet_opt.stages.pixels import take_pixels

        size: Any = {"channels": "bgr", "crop": models.SIDE, "resize": models.SIDE}
        plain = models.save(models.float_net(), tmp_path / "plain.onnx")
        take_pixels(plain, tmp_path / "p.onnx", Preprocess(**size), models.pixel_pictures(1))
        made = []
        for kind in (program.PLAIN, program.USUAL, program.PIXELS):
            pixels = kind == program.PIXELS
            out = tmp_path / kind
            out.mkdir()
            file = tmp_path / "p.onnx" if pixels else plain
            made.append(
                program.Way(
                    backend="onnxruntime",
                    precision="float",
                    input=kind,
                    artifact=backends.get("onnxruntime").compile(file, target.find("arm64"), out),
                    preprocess=Preprocess(**size, input="uint8" if pixels else "float32"),
                )
            )
        return made

    def test_all_ways_give_the_model_the_same(self, found: list[Any]) -> None:
        from conformance import models

        (pixels,) = models.pixel_pictures(1)
        plain, usual, taken = [way.values(pixels) for way in found]
        assert np.array_equal(plain, usual)
        assert np.array_equal(taken, pixels)

    def test_measures_every_way_in_every_round(
        self, program: ModuleType, found: list[Any], tmp_path: Path
    ) -> None:
        from PIL import Image

        files = []
        for index in range(3):
            files.append(tmp_path / f"{index}.png")
            Image.new("RGB", (30 + index, 40), (9, 8, 7)).save(files[-1])
        turns = program.measure(found, tuple(files), 1, sittings=1, rounds=2)
        assert list(turns) == [way.name for way in found]
        assert {len(taken) for taken in turns.values()} == {2}
        assert {len(steps) for taken in turns.values() for steps in taken} == {3}
        assert all(
            time > 0 for taken in turns.values() for steps in taken for one in steps for time in one
        )

    def test_sums_up_within_rounds(self, program: ModuleType, found: list[Any]) -> None:
        plain, usual, taken = [way.name for way in found]
        million = 1_000_000
        turns = {
            plain: [[(million, million, 2 * million, 4 * million)] * 3, [(0, 0, 0, 8 * million)]],
            usual: [[(million, million, 5 * million, 4 * million)] * 3, [(0, 0, 0, 9 * million)]],
            taken: [[(million, million, 0, 4 * million)] * 3, [(0, 0, 0, 4 * million)]],
        }
        result = program.summary(found, turns)
        assert result["ways"][plain]["n"] == 4
        assert result["ways"][plain]["rounds_ms"]["picture"] == [8.0, 8.0]
        assert result["ways"][taken]["median_ms"]["infer"] == 4.0
        assert result["ways"][taken]["spread"] == 0.4
        over_plain, over_usual = result["gains"]
        assert (over_plain["over"], over_usual["over"]) == (program.PLAIN, program.USUAL)
        assert over_plain["saved_ms"] == {"high": 3.5, "low": 2.5, "median": 3.0}
        assert over_usual["saved_ms"]["median"] == 5.0
        assert over_plain["times_as_fast"]["median"] == (8 / 6 + 8 / 4) / 2
