from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gnet_opt import benchmark
from gnet_opt.bench import report, results_file
from gnet_opt.bench.host import HostState
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.power import Energy, RailEnergy
from gnet_opt.bench.results import (
    Environment,
    Measured,
    Offline,
    Results,
    Server,
    Stream,
    SubjectResult,
    Trial,
)
from gnet_opt.bench.session import Plan
from gnet_opt.bench.soak import Bin, Soak
from gnet_opt.cli import bench_tables
from gnet_opt.errors import IntegrityError
from gnet_opt.files import dump_json
from gnet_opt.machine import this_machine


def subject(name: str, factor: int = 1) -> SubjectResult:
    """A subject whose times are `factor` ms and some more."""
    unit = 1_000_000 * factor
    return SubjectResult(
        identity={
            "accuracy": {
                "agreement": 99.5,
                "drop": None,
                "float": {"top1": 93.5, "top5": 99.0},
                "images": 200,
                "quantized": {"top1": 93.4, "top5": 99.0},
                "semantics": "native",
            },
            "artifact_sha256": {"model.onnx": "ab" * 32},
            "backend": "onnxruntime",
            "backend_version": "1.32.0",
            "file_bytes": 5_800_000,
            "model": "demo",
            "model_sha256": "ab" * 32,
            "name": name,
            "native": True,
            "precision": "int8",
            "target": "x86-vnni",
            "threads": None,
        },
        measured=Measured(
            cold_start_ms=(500.0, 480.0, 490.0),
            load_ms=(200.0, 180.0, 190.0),
            first_ms=(20.0, 21.0, 22.0),
            peak_rss_bytes=100_000_000,
            warm_up={"count": 25, "seconds": 0.2, "steady": True},
            scenarios={
                "single-stream": Stream(rounds=((unit, 2 * unit, 3 * unit), (2 * unit,) * 7)),
                "multi-stream": Stream(rounds=((8 * unit,), (9 * unit,)), query_pictures=8),
                "offline": Offline(rounds=((100, 100 * unit), (50, 100 * unit))),
                "server": Server(
                    rounds=(
                        Trial(offered_qps=80.0, samples_ns=(unit,), late=0, within=True),
                        Trial(offered_qps=90.0, samples_ns=(9 * unit,), late=1, within=False),
                    ),
                    bound_ms=4.0,
                ),
            },
            end_to_end={
                "decode_ns": [1],
                "infer_ns": [2],
                "normalize_ns": [3],
                "pictures": 1,
                "resize_ns": [4],
                "source": "--images",
            },
        ),
        notes=("A note.",),
    )


def results() -> Results:
    host = HostState(load1=0.1, temperatures_c={"cpu": 50.0}, frequencies_mhz={"cpu0": 2400.0})
    return Results(
        created="2026-11-25T12:00:00+00:00",
        version="0.1.0",
        settings=Plan(rounds=2).settings(),
        environment=Environment(
            machine=this_machine().to_dict(),
            tools={"python": "3.11.7"},
            affinity=(0, 1),
            constraint=Constraint(cpus=(0,), memory_bytes=10**9),
            start=host,
            end=host,
            unstable=("It was busy.",),
        ),
        subjects=(subject("a", 2), subject("b")),
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    document = results().to_dict()
    (tmp_path / "results.json").write_text(dump_json(document))
    assert results_file.read(tmp_path / "results.json") == document


def test_the_figures_come_from_the_samples() -> None:
    first = results().to_dict()["subjects"][0]["scenarios"]
    single = first["single-stream"]
    assert (single["n"], single["p50_ms"], single["p90_ms"], single["p99_ms"]) == (
        10,
        4.0,
        4.0,
        6.0,
    )
    assert single["metric"] == {"better": "lower", "name": "p90_ms", "value": 4.0}
    assert (single["rounds_ms"], single["spread"]) == ([4.0, 4.0], 0.0)
    assert first["multi-stream"]["metric"] == {"better": "lower", "name": "p99_ms", "value": 18.0}
    assert first["offline"]["metric"]["value"] == 375.0  # of 500 and 250
    assert first["offline"]["spread"] == pytest.approx(250 / 375)
    assert first["server"]["metric"] == {
        "better": "higher",
        "name": "qps_within_bound",
        "value": 80.0,
    }


def test_ratios_are_paired_by_round() -> None:
    twice = {"high": 2.0, "low": 2.0, "median": 2.0}
    assert results().comparison() == {
        "multi-stream": {"b": twice},
        "offline": {"b": twice},
        "over": "a",
        "single-stream": {"b": twice},
    }


def test_a_server_without_a_good_rate() -> None:
    trial = Trial(offered_qps=5.0, samples_ns=(9,), late=1, within=False)
    server = Server(rounds=(trial,), bound_ms=1.0)
    assert server.best is None
    assert server.to_dict()["metric"]["value"] == 0.0


def test_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(results().to_csv())))
    assert len(rows) == 8
    row = rows[0]
    assert (row["subject"], row["scenario"], row["metric"]) == ("a", "single-stream", "p90_ms")
    assert float(row["value"]) == float(row["p90_ms"]) == 4.0
    assert (row["top1"], row["cold_start_ms"], row["unstable"]) == ("93.4", "490.0", "It was busy.")
    assert json.loads(row["constraint"])["label"] == "constrained host"
    assert rows[3]["bound_ms"] == "4.0" and rows[3]["p50_ms"] == ""


def test_energy_soak_and_device_times_are_read_back_and_shown(tmp_path: Path) -> None:
    rails = tuple(
        RailEnergy(
            name=name,
            source=f"/sys/{name}",
            in_total=True,
            joules_per_inference=joules,
            idle_watts=1.0,
            busy_watts=2.5,
        )
        for name, joules in (("CPU", 0.0301), ("GPU", -0.0002))
    )
    bins = tuple(
        Bin(
            start_s=float(second),
            count=100,
            p50_ms=2.0,
            p99_ms=3.0,
            temperature_c=None,
            frequency_mhz=1500.0,
            throttle_count=count,
        )
        for second, count in enumerate((1, 1, 2))
    )
    made = subject("full")
    single = made.measured.scenarios["single-stream"]
    assert isinstance(single, Stream)
    made = replace(
        made,
        measured=replace(
            made.measured,
            energy=Energy(rails=rails, note="The total is CPU + GPU: all.").to_dict(),
            soak=Soak(seconds=3.0, bins=bins).to_dict(),
            scenarios={
                "single-stream": replace(single, device_rounds=((1_500_000,) * 3,) * 2),
            },
        ),
    )
    # `bare` has neither of them.
    found = replace(results(), subjects=(made, subject("bare")))
    document = found.to_dict()
    document["settings"]["scenarios"] = ["single-stream"]
    path = tmp_path / "results.json"
    path.write_text(dump_json(document))
    assert results_file.read(path) == json.loads(path.read_text())
    page = report.render([document])
    assert "<td>total</td><td>29.9</td>" in page
    assert "<small>1.50 on the device</small>" in page
    # The first stretch has an event of its own, and the third one.
    drawn = page[page.index("Under sustained load") :]
    assert drawn.count('class="event"') == 4  # on a screen and on a phone
    console = Console(file=io.StringIO(), width=160)
    for part in bench_tables.shown(document):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert any(line.split()[:3] == ["full", "total", "29.9"] for line in text.splitlines())
    assert "on the device, p50, ms" in text
    assert "full, soak: 3 s are too short" in text


def test_what_a_device_sent_and_is_no_result_is_refused() -> None:
    document = json.loads(dump_json(results().to_dict()))
    assert list(benchmark.report_of(document)) == ["report.html"]
    del document["subjects"][1]["scenarios"]["offline"]["rounds"]
    with pytest.raises(IntegrityError, match=r"no result of this version .*offline\.rounds is mis"):
        benchmark.report_of(document)
