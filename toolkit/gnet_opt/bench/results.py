"""What `gnet-opt bench` found, as values and as the document `results.json`.

The document has the schema "gnet-opt/bench/1". Raw samples are kept, and every figure beside them
is computed from them when the document is written; reading takes the samples alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnet_opt.bench.host import HostState
from gnet_opt.bench.latency import Speedup, percentile_ms, spread
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.scenarios import MULTI_STREAM, OFFLINE, SCENARIOS, SERVER, SINGLE_STREAM
from gnet_opt.errors import ConfigError

SCHEMA = "gnet-opt/bench/1"

_NUMBER = (int, float)
_NONE = type(None)
_HOST = {
    "frequencies_mhz": dict,
    "governors": list,
    "load1": (*_NUMBER, _NONE),
    "memory_available_bytes": (int, _NONE),
    "temperatures_c": dict,
    "throttle_count": (int, _NONE),
    "turbo": (bool, _NONE),
}
_SUBJECT: dict[str, Any] = {
    "accuracy": (dict, _NONE),
    "artifact_sha256": dict,
    "backend": str,
    "backend_version": str,
    "file_bytes": int,
    "model": str,
    "model_sha256": str,
    "name": str,
    "native": bool,
    "precision": str,
    "target": str,
    "threads": (int, _NONE),
}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Queries back to back: single-stream, and multi-stream where a query has more pictures.

    Attributes:
        rounds: The time of each query of each round, in nanoseconds.
        query_pictures: Pictures in a query.
        batch: Pictures that were computed at a time.
        device_rounds: What the device itself tells of each query, such as the time between two CUDA
            events, without the copies; empty where it tells nothing.
    """

    rounds: tuple[tuple[int, ...], ...]
    query_pictures: int = 1
    batch: int = 1
    device_rounds: tuple[tuple[int, ...], ...] = ()

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
        rounds = [{"samples_ns": list(samples)} for samples in self.rounds]
        for entry, samples in zip(rounds, self.device_rounds, strict=False):
            entry["device_ns"] = list(samples)
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Stream:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: A value is missing or does not fit; its dotted path is named.
        """
        rounds = _rounds(values, where)
        return cls(
            rounds=tuple(_samples(entry, where_) for where_, entry in rounds),
            device_rounds=tuple(
                _samples(entry, where_, "device_ns")
                for where_, entry in rounds
                if "device_ns" in entry
            ),
            query_pictures=_get(values, "query_pictures", int, where, least=1),
            batch=_get(values, "batch", int, where, least=1),
        )


@dataclass(frozen=True, kw_only=True)
class Offline:
    """All pictures at once.

    Attributes:
        rounds: Pictures and nanoseconds of each round.
        batch: Pictures that were computed at a time.
    """

    rounds: tuple[tuple[int, int], ...]
    batch: int = 1

    @property
    def rates(self) -> list[float]:
        """Pictures a second of each round."""
        return [1e9 * pictures / elapsed for pictures, elapsed in self.rounds]

    def to_dict(self) -> dict[str, Any]:
        """The scenario as it stands in the document."""
        return {
            "batch": self.batch,
            "metric": {
                "better": "higher",
                "name": "pictures_per_second",
                "value": statistics.median(self.rates),
            },
            "rounds": [
                {"elapsed_ns": elapsed, "pictures": pictures} for pictures, elapsed in self.rounds
            ],
            "spread": spread(self.rates),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Offline:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: A value is missing or does not fit; its dotted path is named.
        """
        return cls(
            rounds=tuple(
                (
                    _get(entry, "pictures", int, where_, least=1),
                    _get(entry, "elapsed_ns", int, where_, least=1),
                )
                for where_, entry in _rounds(values, where)
            ),
            batch=_get(values, "batch", int, where, least=1),
        )


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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Server:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: A value is missing or does not fit; its dotted path is named.
        """
        return cls(
            rounds=tuple(
                Trial(
                    offered_qps=_get(entry, "offered_qps", _NUMBER, where_, least=0),
                    samples_ns=_samples(entry, where_),
                    late=_get(entry, "late", int, where_, least=0),
                    within=_get(entry, "within", bool, where_),
                )
                for where_, entry in _rounds(values, where)
            ),
            bound_ms=_get(values, "bound_ms", _NUMBER, where, least=0),
        )


Scenario = Stream | Offline | Server
_KINDS: dict[str, type[Stream] | type[Offline] | type[Server]] = {
    SINGLE_STREAM: Stream,
    MULTI_STREAM: Stream,
    OFFLINE: Offline,
    SERVER: Server,
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a subject's processes were measured to do.

    Attributes:
        cold_start_ms: From the start of a process to the first result, one a process.
        load_ms: Importing the runtime and loading the artifact, one a process.
        first_ms: The first picture after loading, one a process.
        peak_rss_bytes: The most memory that the process had in RAM, None where not known.
        warm_up: `count` and `seconds` of the warm-up, and whether times were `steady` then.
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Measured:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: A value is missing or does not fit; its dotted path is named.
        """

        def milliseconds(key: str) -> tuple[float, ...]:
            return tuple(_numbers(_get(values, key, list, where), f"{where}.{key}"))

        scenarios: dict[str, Scenario] = {}
        for name in _get(values, "scenarios", dict, where):
            inside = f"{where}.scenarios.{name}"
            if name not in _KINDS:
                raise ConfigError(f"{inside} is not known; known are {', '.join(SCENARIOS)}.")
            scenarios[name] = _KINDS[name].from_dict(
                _get(values["scenarios"], name, dict, f"{where}.scenarios"), inside
            )
        warm_up = _get(values, "warm_up", dict, where)
        for key, kind in (("count", int), ("seconds", _NUMBER), ("steady", bool)):
            _get(warm_up, key, kind, f"{where}.warm_up")
        return cls(
            cold_start_ms=milliseconds("cold_start_ms"),
            load_ms=milliseconds("load_ms"),
            first_ms=milliseconds("first_ms"),
            peak_rss_bytes=_get(values, "peak_rss_bytes", (int, _NONE), where),
            warm_up=warm_up,
            scenarios=scenarios,
            end_to_end=_get(values, "end_to_end", (dict, _NONE), where),
            energy=_get(values, "energy", (dict, _NONE), where),
            soak=_get(values, "soak", (dict, _NONE), where),
        )


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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> SubjectResult:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: A value is missing or does not fit; its dotted path is named.
        """
        parts = {key: _get(values, key, (dict, _NONE), where) for key in ("profile", "sweep")}
        return cls(
            identity={key: _get(values, key, kind, where) for key, kind in _SUBJECT.items()},
            measured=Measured.from_dict(values, where),
            notes=tuple(_texts(_get(values, "notes", list, where), f"{where}.notes")),
            **parts,
        )


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
            "end": self.end.to_dict(),
            "machine": dict(self.machine),
            **({} if self.remote is None else {"remote": dict(self.remote)}),
            "start": self.start.to_dict(),
            "tools": dict(self.tools),
            "unstable": list(self.unstable),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Environment:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: A value is missing or does not fit; its dotted path is named.
        """
        constraint = _get(values, "constraint", (dict, _NONE), where)
        if constraint is not None:
            inside = f"{where}.constraint"
            cpus = _get(constraint, "cpus", (list, _NONE), inside)
            _integers(cpus or [], f"{inside}.cpus")
            _get(constraint, "memory_bytes", (int, _NONE), inside, least=1)
            constraint = Constraint.from_dict(constraint)
        return cls(
            machine=_get(values, "machine", dict, where),
            tools=_get(values, "tools", dict, where),
            affinity=tuple(_integers(_get(values, "affinity", list, where), f"{where}.affinity")),
            constraint=constraint,
            start=_host(values, "start", where),
            end=_host(values, "end", where),
            unstable=tuple(_texts(_get(values, "unstable", list, where), f"{where}.unstable")),
            remote=_get(values, "remote", dict, where) if "remote" in values else None,
        )


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

    @classmethod
    def from_dict(cls, values: Any, where: str = "results") -> Results:
        """Read a document.

        Args:
            values: What JSON gave.
            where: What to call it in messages.

        Raises:
            ConfigError: It is of another schema, or a value is missing or does not fit; its dotted
                path is named.
        """
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ConfigError(
                f"{where} has the schema {schema!r}; this version of gnet-opt reads {SCHEMA!r}. "
                "Pass a results.json that `gnet-opt bench` wrote."
            )
        subjects = _get(values, "subjects", list, where)
        if not subjects:
            raise ConfigError(f"{where}.subjects is empty. Measure a bundle with `gnet-opt bench`.")
        found = tuple(
            SubjectResult.from_dict(
                _table(entry, f"{where}.subjects[{i}]"), f"{where}.subjects[{i}]"
            )
            for i, entry in enumerate(subjects)
        )
        if len({subject.name for subject in found}) != len(found):
            raise ConfigError(f"{where}.subjects has two of one name. Measure the bundles again.")
        return cls(
            created=_get(values, "created", str, where),
            version=_get(values, "version", str, where),
            settings=_get(values, "settings", dict, where),
            environment=Environment.from_dict(
                _get(values, "environment", dict, where), f"{where}.environment"
            ),
            subjects=found,
        )

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read `results.json`.

        Raises:
            ConfigError: The file cannot be read, or is no such document.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}). Pass a results.json that `gnet-opt bench` wrote."
            ) from error
        return cls.from_dict(values, str(path))

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


def _speedup(base: Scenario, own: Scenario | None) -> Speedup | None:
    """How many times as fast, where both have the same rounds."""
    if isinstance(base, Stream) and isinstance(own, Stream):
        times = (base.rounds_ms, own.rounds_ms)
    elif isinstance(base, Offline) and isinstance(own, Offline):
        times = ([1 / rate for rate in base.rates], [1 / rate for rate in own.rates])
    else:
        return None
    return Speedup.of(*times) if len(times[0]) == len(times[1]) else None


def _get(
    values: Mapping[str, Any], key: str, kind: Any, where: str, *, least: int | None = None
) -> Any:
    """A value of a table, of the right type."""
    if key not in values:
        raise ConfigError(f"{where}.{key} is missing.")
    value = values[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # In Python True is a number, too.
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{where}.{key} is of the wrong type.")
    if least is not None and value is not None and value < least:
        raise ConfigError(f"{where}.{key} is {value}; it must be at least {least}.")
    return value


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a table.")
    return value


def _rounds(values: Mapping[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """The rounds of a scenario with their dotted paths; at least one."""
    found = _get(values, "rounds", list, where)
    if not found:
        raise ConfigError(f"{where}.rounds is empty.")
    paths = [f"{where}.rounds[{index}]" for index in range(len(found))]
    return [(path, _table(entry, path)) for path, entry in zip(paths, found, strict=True)]


def _samples(values: Mapping[str, Any], where: str, key: str = "samples_ns") -> tuple[int, ...]:
    """Times in nanoseconds; at least one."""
    found = tuple(_integers(_get(values, key, list, where), f"{where}.{key}"))
    if not found or min(found) <= 0:
        raise ConfigError(f"{where}.{key} must be times, at least one.")
    return found


def _integers(values: Sequence[Any], where: str) -> Sequence[int]:
    if not all(type(value) is int for value in values):
        raise ConfigError(f"{where} must be a list of integers.")
    return values


def _numbers(values: Sequence[Any], where: str) -> Sequence[float]:
    if not all(type(value) in _NUMBER and math.isfinite(value) for value in values):
        raise ConfigError(f"{where} must be a list of finite numbers.")
    return values


def _texts(values: Sequence[Any], where: str) -> Sequence[str]:
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{where} must be a list of texts.")
    return values


def _host(values: Mapping[str, Any], key: str, where: str) -> HostState:
    table = _get(values, key, dict, where)
    found = {name: _get(table, name, kind, f"{where}.{key}") for name, kind in _HOST.items()}
    for name in ("frequencies_mhz", "temperatures_c"):
        _numbers(list(found[name].values()), f"{where}.{key}.{name}")
    found["governors"] = tuple(_texts(found["governors"], f"{where}.{key}.governors"))
    return HostState(**found)
