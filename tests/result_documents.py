"""Documents as `gnet-opt bench` writes them, made up: what is in them is not measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from gnet_opt.bench.results_file import SCHEMA

MODULES = ("conv1", "inception3a", "inception4a", "inception5b", "fc")


def host() -> dict[str, Any]:
    return {
        "frequencies_mhz": {"cpu0": 2400.0},
        "governors": ["performance"],
        "load1": 0.1,
        "memory_available_bytes": 4 << 30,
        "temperatures_c": {"package": 48.0},
        "throttle_count": 0,
        "turbo": False,
    }


def remote() -> dict[str, Any]:
    """What `gnet-opt bench --on` adds to the environment."""
    return {
        "board": "A board",
        "host": "device.example:2222",
        "name": "bench-7",
        "notes": ["The power mode is 15W."],
        "power_mode": "15W",
        "python": "3.11.2",
        "reconnections": 0,
        "results_sha256": "ab" * 32,
    }


def stream(rounds: Sequence[Sequence[float]], *, pictures: int = 1) -> dict[str, Any]:
    """A scenario from the times of its rounds, in milliseconds."""
    samples = [[round(time * 1e6) for time in times] for times in rounds]
    flat = sorted(time for times in samples for time in times)
    figures = {
        f"p{percent}_ms": flat[max(0, math.ceil(percent / 100 * len(flat)) - 1)] / 1e6
        for percent in (50, 90, 99)
    }
    medians = [statistics.median(times) / 1e6 for times in samples]
    name = "p90_ms" if pictures == 1 else "p99_ms"
    return {
        **figures,
        "batch": 1,
        "metric": {"better": "lower", "name": name, "value": figures[name]},
        "n": len(flat),
        "query_pictures": pictures,
        "rounds": [{"samples_ns": times} for times in samples],
        "rounds_ms": medians,
        "spread": (max(medians) - min(medians)) / statistics.median(medians),
    }


def times(ms: float, *, seed: int = 0, rounds: int = 5, count: int = 40) -> list[list[float]]:
    """Times around a median, with some noise and a tail."""
    chance = np.random.default_rng(seed)
    return [
        [float(ms * (1 + 0.02 * x + 0.1 * y)) for x, y in chance.exponential(size=(count, 2)) ** 2]
        for _ in range(rounds)
    ]


def profile(ms: float, precision: str) -> dict[str, Any]:
    kind = "u8" if precision == "int8" else "f32"
    share = 1e3 * ms / (len(MODULES) + 2)
    return {
        "groups": [
            {"kind": "pool", "microseconds": share, "title": "Pooling"},
            {"kind": "lrn", "microseconds": share, "title": "LRN"},
        ],
        "layers": [
            {"microseconds": share, "name": f"{module}.conv", "precision": kind}
            for module in MODULES
        ],
        "macs_int8_share": 1.0 if precision == "int8" else 0.0,
        "runs": 30,
        "sentences": ["A sentence on what holds it back."],
    }


def subject(
    ms: float,
    *,
    precision: str = "int8",
    backend: str = "openvino",
    name: str = "",
    top1: float = 93.4,
    seed: int = 0,
    rounds: int = 5,
    scenarios: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    nanoseconds = [round(ms * 1e6)] * 8
    found = {
        "accuracy": {
            "agreement": 99.8,
            "drop": {"ci95": [-0.4, 0.4], "value": 93.4 - top1},
            "float": {"top1": 93.4, "top5": 99.8},
            "images": 500,
            "quantized": {"top1": top1, "top5": 99.8},
            "semantics": "native",
            "set": "evaluation",
            "sqnr_db": 40.0,
        },
        "artifact_sha256": {"model.bin": "b" * 64},
        "backend": backend,
        "backend_version": "2026.4.1",
        "cold_start_ms": [600.0, 610.0, 590.0],
        "end_to_end": {
            "decode_ns": [900_000] * 8,
            "infer_ns": nanoseconds,
            "normalize_ns": [300_000] * 8,
            "pictures": 8,
            "resize_ns": [500_000] * 8,
            "source": "golden pictures",
        },
        "energy": None,
        "file_bytes": 6_000_000 if precision == "int8" else 22_500_000,
        "first_ms": [5.0, 6.0, 5.5],
        "load_ms": [300.0, 310.0, 320.0],
        "model": "demo",
        "model_sha256": "a" * 64,
        "name": name or f"demo-{precision} {backend}",
        "native": True,
        "notes": [],
        "peak_rss_bytes": 140_000_000,
        "precision": precision,
        "profile": profile(ms, precision),
        "scenarios": scenarios or {"single-stream": stream(times(ms, seed=seed, rounds=rounds))},
        "soak": None,
        "sweep": None,
        "target": "x86-vnni",
        "threads": 2,
        "warm_up": {"count": 20, "seconds": 0.7, "steady": True},
    }
    return {**found, **more}


def document(*subjects: dict[str, Any], **environment: Any) -> dict[str, Any]:
    first = subjects[0]
    comparison: dict[str, Any] = {"over": first["name"]}
    base = first["scenarios"].get("single-stream")
    for other in subjects[1:]:
        own = other["scenarios"].get("single-stream")
        if base and own:
            ratios = [a / b for a, b in zip(base["rounds_ms"], own["rounds_ms"], strict=True)]
            comparison.setdefault("single-stream", {})[other["name"]] = {
                "high": max(ratios),
                "low": min(ratios),
                "median": statistics.median(ratios),
            }
    return {
        "comparison": comparison,
        "created": "2026-11-25T12:00:00+00:00",
        "environment": {
            "affinity": [0, 1],
            "constraint": None,
            "end": host(),
            "machine": {
                "architecture": "x86_64",
                "board": "",
                "cores": 2,
                "cpu": "A CPU",
                "instructions": ["avx2", "avx_vnni"],
                "system": "Linux 6.1",
            },
            "start": host(),
            "tools": {"gnet-opt": "0.1.0", "openvino": "2026.4.1"},
            "unstable": [],
            **environment,
        },
        "schema": SCHEMA,
        "settings": {
            "count": 5,
            "latency_bound_ms": None,
            "rounds": 5,
            "scenarios": sorted(first["scenarios"]),
            "seconds": 1.0,
            "seed": 0,
            "threads": 2,
        },
        "subjects": list(subjects),
        "version": "0.1.0",
    }


def soak(ms: float, *, seconds: float = 600.0) -> dict[str, Any]:
    """A run that is slowed down for heat after a third of the time."""
    bins = []
    for index in range(60):
        hot = index >= 20
        bins.append(
            {
                "count": 500,
                "frequency_mhz": 1800.0 if hot else 2400.0,
                "p50_ms": ms * (1.12 if hot else 1.0),
                "p99_ms": ms * (1.3 if hot else 1.1),
                "start_s": index * seconds / 60,
                "temperature_c": min(85.0, 50.0 + 2 * index),
                "throttle_count": max(0, index - 19) // 10,
            }
        )
    return {"bins": bins, "seconds": seconds, "verdict": "Throttled after 3 min 20 s."}


def full() -> dict[str, Any]:
    """A document with everything that a report can show; four have the same accuracy."""
    rounds = [
        {"late": 0, "offered_qps": 200.0, "samples_ns": [4_000_000] * 100},
        {"late": 9, "offered_qps": 300.0, "samples_ns": [9_000_000] * 100},
    ]

    def scenarios(ms: float, seed: int) -> dict[str, Any]:
        return {
            "multi-stream": stream(times(8 * ms, seed=seed + 10, count=12), pictures=8),
            "offline": {
                "batch": 1,
                "metric": {"better": "higher", "name": "pictures_per_second", "value": 1e3 / ms},
                "rounds": [{"elapsed_ns": round(1e8 * ms), "pictures": 100}] * 5,
                "spread": 0.01,
            },
            "server": {
                "bound_ms": 8.0,
                "metric": {"better": "higher", "name": "qps_within_bound", "value": 200.0},
                "rounds": rounds,
            },
            "single-stream": stream(times(ms, seed=seed)),
        }

    rail = {
        "busy_watts": 14.0,
        "idle_watts": 4.0,
        "joules_per_inference": 0.021,
        "name": "package-0",
        "source": "/sys/class/powercap/intel-rapl:0",
    }
    settings = [
        {
            "batch": 1,
            "p90_ms": [2.1, 2.2],
            "pictures_per_second": [450.0, 460.0],
            "streams": 1,
            "threads": threads,
        }
        for threads in (1, 2)
    ]
    return document(
        subject(10.1, precision="fp32", seed=1, scenarios=scenarios(10.1, 1)),
        subject(11.0, precision="fp32", backend="onnxruntime", scenarios=scenarios(11.0, 2)),
        subject(
            1.8,
            seed=3,
            scenarios=scenarios(1.8, 3),
            soak=soak(1.8),
            energy={"note": "The rail package-0 is the total.", "rails": [rail]},
            sweep={"settings": settings},
        ),
        subject(2.4, backend="onnxruntime", top1=93.2, scenarios=scenarios(2.4, 4)),
    )
