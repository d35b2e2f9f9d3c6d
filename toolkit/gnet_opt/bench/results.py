"""What `gnet-opt bench` found, as values and as the document `results.json`.

Raw samples are kept, and every figure beside them is computed from them when the document is
written. `gnet_opt.bench.results_file` has the schema, and reads and checks a document.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gnet_opt.bench import control
from gnet_opt.bench.figures import Speedup, percentile_ms, spread
from gnet_opt.bench.host import HostState
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.results_file import SCHEMA


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Queries back to back: single-stream, and multi-stream where a query has more pictures.

    Attributes:
        rounds: The time of each query of each round, in nanoseconds.
        query_pictures: Pictures in a query.
        batch: Pictures that were computed at a time.
        device_rounds: What the device itself tells of each query, such as the time between two CUDA
            events, without the copies; empty where it tells nothing.
        control_rounds: Times of the control load beside each round, in nanoseconds; empty where it
            was not measured.
    """

    rounds: tuple[tuple[int, ...], ...]
    query_pictures: int = 1
    batch: int = 1
    device_rounds: tuple[tuple[int, ...], ...] = ()
    control_rounds: tuple[tuple[int, ...], ...] = ()

    @property
    def samples_ns(self) -> list[int]:
        """All rounds together."""
        return [sample for samples in self.rounds for sample in samples]

    @property
    def rounds_ms(self) -> list[float]:
        """The median of each round."""
        return [statistics.median(samples) / 1e6 for samples in self.rounds]

    def to_dict(self) -> dict[str, Any]:
        """The scenario as it stands in the document."""
        metric = "p90_ms" if self.query_pictures == 1 else "p99_ms"
        figures = {
            f"p{percent}_ms": percentile_ms(self.samples_ns, percent) for percent in (50, 90, 99)
        }
        device = [sample for samples in self.device_rounds for sample in samples]
        rounds: list[dict[str, Any]] = [{"samples_ns": list(samples)} for samples in self.rounds]
        _add(rounds, "device_ns", self.device_rounds)
        _add(rounds, "control_ns", self.control_rounds)
        return {
            **figures,
            **({"device_p50_ms": percentile_ms(device, 50)} if device else {}),
            "batch": self.batch,
            "metric": {"better": "lower", "name": metric, "value": figures[metric]},
            "n": len(self.samples_ns),
            "query_pictures": self.query_pictures,
            "rounds": rounds,
            "rounds_ms": self.rounds_ms,
            "spread": spread(self.rounds_ms),
        }


@dataclass(frozen=True, kw_only=True)
class Offline:
    """All pictures at once.

    Attributes:
        rounds: Pictures and nanoseconds of each round.
        batch: Pictures that were computed at a time.
        control_rounds: As of `Stream`.
    """

    rounds: tuple[tuple[int, int], ...]
    batch: int = 1
    control_rounds: tuple[tuple[int, ...], ...] = ()

    @property
    def rates(self) -> list[float]:
        """Pictures a second of each round."""
        return [1e9 * pictures / elapsed for pictures, elapsed in self.rounds]

    def to_dict(self) -> dict[str, Any]:
        """The scenario as it stands in the document."""
        rounds: list[dict[str, Any]] = [
            {"elapsed_ns": elapsed, "pictures": pictures} for pictures, elapsed in self.rounds
        ]
        _add(rounds, "control_ns", self.control_rounds)
        return {
            "batch": self.batch,
            "metric": {
                "better": "higher",
                "name": "pictures_per_second",
                "value": statistics.median(self.rates),
            },
            "rounds": rounds,
            "spread": spread(self.rates),
        }


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One rate of the server scenario.

    Attributes:
        offered_qps: Queries a second that arrived.
        samples_ns: From the arrival of each query to its end.
        late: How many exceeded the bound.
        within: Whether no more than one in a hundred did.
    """

    offered_qps: float
    samples_ns: tuple[int, ...]
    late: int
    within: bool

    def to_dict(self) -> dict[str, Any]:
        """The trial as it stands in the document."""
        return {
            "late": self.late,
            "offered_qps": self.offered_qps,
            "samples_ns": list(self.samples_ns),
            "within": self.within,
        }


@dataclass(frozen=True, kw_only=True)
class Server:
    """Queries that arrive by chance.

    Attributes:
        rounds: Each rate that was tried, in the order tried.
        bound_ms: The latency bound, in milliseconds.
    """

    rounds: tuple[Trial, ...]
    bound_ms: float

    @property
    def best(self) -> Trial | None:
        """The highest rate within the bound, None where none was."""
        within = [trial for trial in self.rounds if trial.within]
        return max(within, key=lambda trial: trial.offered_qps, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The scenario as it stands in the document."""
        best = self.best
        return {
            "bound_ms": self.bound_ms,
            "metric": {
                "better": "higher",
                "name": "qps_within_bound",
                "value": best.offered_qps if best else 0.0,
            },
            "rounds": [trial.to_dict() for trial in self.rounds],
        }


Scenario = Stream | Offline | Server


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a subject's processes were measured to do.

    Attributes:
        cold_start_ms: From the start of a process to the first result, one a process.
        load_ms: Importing the runtime and loading the artifact, one a process.
        first_ms: The first picture after loading, one a process.
        peak_rss_bytes: The most memory that the process had in RAM when it was warm, with as many
            pictures at a time as the scenarios have; None where not known.
        warm_up: `count` and `seconds` of all warm-ups, and whether times were `steady` after each.
        scenarios: By name.
        end_to_end: Nanoseconds of each step by picture, and their `source`; None where left out.
        energy: `gnet_opt.bench.power.Energy.to_dict`; None where left out.
        soak: `gnet_opt.bench.soak.Soak.to_dict`, a sustained run; None where not asked for.
    """

    cold_start_ms: tuple[float, ...]
    load_ms: tuple[float, ...]
    first_ms: tuple[float, ...]
    peak_rss_bytes: int | None
    warm_up: Mapping[str, Any]
    scenarios: Mapping[str, Scenario]
    end_to_end: Mapping[str, Any] | None = None
    energy: Mapping[str, Any] | None = None
    soak: Mapping[str, Any] | None = None

    def spreads(self) -> dict[str, float]:
        """The spread of the rounds, by scenario."""
        found = {}
        for name, scenario in self.scenarios.items():
            if isinstance(scenario, Stream):
                found[name] = spread(scenario.rounds_ms)
            elif isinstance(scenario, Offline):
                found[name] = spread(scenario.rates)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The part of a subject that was measured."""
        return {
            "cold_start_ms": list(self.cold_start_ms),
            "end_to_end": self.end_to_end and dict(self.end_to_end),
            "energy": self.energy and dict(self.energy),
            "first_ms": list(self.first_ms),
            "load_ms": list(self.load_ms),
            "peak_rss_bytes": self.peak_rss_bytes,
            "scenarios": {name: found.to_dict() for name, found in self.scenarios.items()},
            "soak": self.soak and dict(self.soak),
            "warm_up": dict(self.warm_up),
        }


@dataclass(frozen=True, kw_only=True)
class SubjectResult:
    """One bundle on one backend.

    Attributes:
        identity: What it is: `name`, `model`, `target`, `precision`, `backend`, `backend_version`,
            `threads`, `native`, `model_sha256`, `artifact_sha256`, `file_bytes`, `accuracy`.
        measured: What was measured.
        profile: `gnet_opt.bench.layers.Report.to_dict`, None where it cannot be told.
        sweep: Times by threads, streams and batch, None where not asked for.
        notes: Sentences to read beside the figures.
    """

    identity: Mapping[str, Any]
    measured: Measured
    profile: Mapping[str, Any] | None = None
    sweep: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The subject's name, unique in its document."""
        return str(self.identity["name"])

    def to_dict(self) -> dict[str, Any]:
        """The subject as it stands in the document."""
        return {
            **self.identity,
            **self.measured.to_dict(),
            "notes": list(self.notes),
            "profile": self.profile,
            "sweep": self.sweep,
        }


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and under what conditions it was measured.

    Attributes:
        machine: `gnet_opt.machine.Machine.to_dict`.
        tools: Versions by name.
        affinity: The CPUs that measured processes could run on; empty where not known.
        constraint: What was taken away from them, None for nothing.
        start: The machine before the first process was started.
        end: The machine after the last one ended.
        unstable: Why the figures are to be doubted; empty for a stable run.
        remote: Where it ran when it was another machine than the one that asked.
    """

    machine: Mapping[str, Any]
    tools: Mapping[str, str]
    affinity: tuple[int, ...]
    constraint: Constraint | None
    start: HostState
    end: HostState
    unstable: tuple[str, ...] = ()
    remote: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The environment as it stands in the document."""
        return {
            "affinity": list(self.affinity),
            "constraint": self.constraint and self.constraint.to_dict(),
            "control": control.identity(),
            "end": self.end.to_dict(),
            "machine": dict(self.machine),
            **({} if self.remote is None else {"remote": dict(self.remote)}),
            "start": self.start.to_dict(),
            "tools": dict(self.tools),
            "unstable": list(self.unstable),
        }


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything of one run.

    Attributes:
        created: When, in ISO 8601.
        version: gnet-opt's.
        settings: What was asked for.
        environment: Where it ran.
        subjects: What was measured, in the order asked for; their names differ.
    """

    created: str
    version: str
    settings: Mapping[str, Any]
    environment: Environment
    subjects: tuple[SubjectResult, ...] = field(default=())

    def comparison(self) -> dict[str, Any]:
        """How many times as fast each subject is as the first, by scenario, paired by rounds."""
        first, *others = self.subjects
        found: dict[str, Any] = {"over": first.name}
        for scenario, base in first.measured.scenarios.items():
            ratios = {
                other.name: _speedup(base, other.measured.scenarios.get(scenario))
                for other in others
            }
            shown = {name: ratio.to_dict() for name, ratio in ratios.items() if ratio}
            if shown:
                found[scenario] = shown
        return found

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        return {
            "comparison": self.comparison(),
            "created": self.created,
            "environment": self.environment.to_dict(),
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "subjects": [subject.to_dict() for subject in self.subjects],
            "version": self.version,
        }

    def to_csv(self) -> str:
        """A table with a row for each subject and scenario."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        constraint = self.environment.constraint
        for subject in self.subjects:
            measured = subject.measured
            accuracy = subject.identity["accuracy"] or {}
            top1 = (accuracy.get("quantized") or {}).get("top1")
            for name, scenario in measured.scenarios.items():
                values = scenario.to_dict()
                row = {
                    **subject.identity,
                    **values,
                    "cold_start_ms": statistics.median(measured.cold_start_ms),
                    "constraint": json.dumps(constraint.to_dict()) if constraint else None,
                    "cpu": self.environment.machine.get("cpu"),
                    "first_ms": statistics.median(measured.first_ms),
                    "load_ms": statistics.median(measured.load_ms),
                    "metric": values["metric"]["name"],
                    "peak_rss_bytes": measured.peak_rss_bytes,
                    "scenario": name,
                    "subject": subject.name,
                    "top1": top1,
                    "unstable": " ".join(self.environment.unstable),
                    "value": values["metric"]["value"],
                }
                writer.writerow(row)
        return stream.getvalue()


# fmt: off
_COLUMNS = (
    "subject", "scenario", "metric", "value", "p50_ms", "p90_ms", "p99_ms", "n", "spread", "batch",
    "bound_ms", "model", "target", "precision", "backend", "backend_version", "threads", "native",
    "top1", "cold_start_ms", "load_ms", "first_ms", "peak_rss_bytes", "file_bytes", "model_sha256",
    "cpu", "constraint", "unstable",
)
# fmt: on


def _add(rounds: list[dict[str, Any]], key: str, found: Sequence[Sequence[int]]) -> None:
    """Add to each round what was measured beside it, where it was."""
    for entry, samples in zip(rounds, found, strict=False):
        if samples:
            entry[key] = list(samples)


def _speedup(base: Scenario, own: Scenario | None) -> Speedup | None:
    """How many times as fast, where both have the same rounds."""
    if isinstance(base, Stream) and isinstance(own, Stream):
        times = (base.rounds_ms, own.rounds_ms)
    elif isinstance(base, Offline) and isinstance(own, Offline):
        times = ([1 / rate for rate in base.rates], [1 / rate for rate in own.rates])
    else:
        return None
    return Speedup.of(*times) if len(times[0]) == len(times[1]) else None
