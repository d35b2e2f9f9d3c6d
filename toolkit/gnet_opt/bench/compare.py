"""Two runs of `gnet-opt bench` against each other: equal, faster or slower.

Each scenario of each subject is judged by `gnet_opt.bench.noise`: from the times of its rounds, and
from those of the control load beside them where both runs had the same.

Runs whose conditions differ are refused by the name of what differs, unless that is allowed. The
latency bound belongs to the server scenario alone: where it differs only that scenario is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gnet_opt.bench.noise import DRIFT, Ratio, banded, ratio_of
from gnet_opt.errors import ConfigError

MOVED = 0.03
"""A difference of the machine itself between two runs from which on it is told."""

BLIND = 0.1
"""A slow-down of this share that the noise would have hidden is worth a sentence."""

LEAST_ROUNDS = 3
"""With fewer rounds nothing is known of the noise of a run."""

CONDITIONS = (
    "affinity",
    "architecture",
    "batch",
    "board",
    "constraint",
    "cores",
    "cpu",
    "governors",
    "instructions",
    "latency-bound",
    "threads",
    "turbo",
)
"""What must be the same in both runs, by the names that `allowed` takes."""

Match = Literal["name", "index"]

_BOUND = "latency-bound"
"""By default it is a multiple of a measured time, so no two runs have quite the same."""

_MACHINE = ("architecture", "board", "cores", "cpu", "instructions")
_IDENTITY = (
    "model",
    "target",
    "precision",
    "backend",
    "backend_version",
    "model_sha256",
    "artifact_sha256",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What two runs do not have in common.

    Attributes:
        name: Of `CONDITIONS`, or of what was measured, such as `backend_version`.
        a: In the first run.
        b: In the second.
        subject: Whose it is, empty for the whole run.
    """

    name: str
    a: Any
    b: Any
    subject: str = ""

    def __str__(self) -> str:
        return self.told("A", "B")

    def told(self, first: str, second: str) -> str:
        """The difference in words, with what the two runs are to be called."""
        of = f" of {self.subject}" if self.subject else ""
        a, b = self.a, self.b
        if isinstance(a, list) and isinstance(b, list) and set(a) != set(b):
            # Of two long lists the few that differ are what one looks for.
            a, b = [each for each in a if each not in b], [each for each in b if each not in a]
        return f"{self.name}{of}: {_shown(a)} in {first}, {_shown(b)} in {second}"

    def to_dict(self) -> dict[str, Any]:
        """The difference for `--json`."""
        return {"a": self.a, "b": self.b, "name": self.name, "subject": self.subject}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One subject in one scenario.

    Attributes:
        subject: Its name in the first run.
        other: Its name in the second run.
        scenario: The scenario.
        a_ms: Time of a query, or of a picture in the offline scenario, in the first run; the median
            of its rounds. In the server scenario the time between two queries at the best rate.
        b_ms: The same in the second run.
        ratio: The second against the first.
        control: How many times as long the control load took beside the second run, which `ratio`
            takes into account; None where it does not.
        metric: Name of the scenario's own figure, which is shown and not judged: the tail of a
            shared machine belongs to its neighbours.
        metric_a: That figure in the first run.
        metric_b: That figure in the second run.
    """

    subject: str
    other: str
    scenario: str
    a_ms: float
    b_ms: float
    ratio: Ratio
    control: float | None
    metric: str
    metric_a: float
    metric_b: float

    def to_dict(self) -> dict[str, Any]:
        """The row for `--json`."""
        return {
            "a_ms": self.a_ms,
            "b_ms": self.b_ms,
            "control": self.control,
            "metric": {"a": self.metric_a, "b": self.metric_b, "name": self.metric},
            "other": self.other,
            "ratio": {"high": self.ratio.high, "low": self.ratio.low, "value": self.ratio.value},
            "scenario": self.scenario,
            "subject": self.subject,
            "verdict": self.ratio.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs against each other.

    Attributes:
        rows: A row for each subject and scenario of both runs.
        differences: What differs in what was measured: that is what one compares.
        allowed: What differs in the conditions and was allowed to.
        notes: Sentences on what is left out and what is to be doubted.
    """

    rows: tuple[Compared, ...]
    differences: tuple[Difference, ...]
    allowed: tuple[Difference, ...]
    notes: tuple[str, ...]

    def slower_than(self, limit: float) -> list[Compared]:
        """Rows that are slower beyond the noise, and by more than `limit` (0.05 for 5 %)."""
        return [
            row
            for row in self.rows
            if row.ratio.verdict == "slower" and row.ratio.value > 1.0 + limit
        ]

    def to_dict(self) -> dict[str, Any]:
        """The comparison for `--json`."""
        return {
            "allowed": [difference.to_dict() for difference in self.allowed],
            "differences": [difference.to_dict() for difference in self.differences],
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
        }


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    match: Match = "name",
    allowed: Collection[str] = (),
    drift: float | None = None,
) -> Comparison:
    """Compare two documents that `gnet_opt.bench.results_file.read` gave.

    Args:
        a: The run to compare with.
        b: The run that may be slower.
        match: Whether subjects belong together by name or by their place in the list.
        allowed: Names of `CONDITIONS` that may differ.
        drift: Standard deviation of the level of a run on this machine, as a share of it; None for
            what `gnet_opt.bench.noise` expects.

    Raises:
        ConfigError: The runs have no subject or no scenario in common, were measured under
            different conditions, or have too few rounds.
    """
    pairs, notes = _pairs(a, b, match)
    found = list(_conditions(a, b, pairs))
    refused = [each for each in found if each.name not in {*allowed, _BOUND}]
    if refused:
        names = dict.fromkeys(difference.name for difference in refused)
        raise ConfigError(
            "These runs cannot be compared, because they were measured under different "
            f"conditions. {'. '.join(map(str, refused))}. Measure both alike, or pass "
            f"{' '.join(f'--allow {name}' for name in names)} to compare them nevertheless."
        )
    rows: list[Compared] = []
    work, other_work = (document["environment"].get("control") for document in (a, b))
    # On another machine, or on more threads, the control load takes another time by itself.
    alike = all(difference.name == _BOUND for difference in found)
    steadied = alike and work is not None and work == other_work
    for one, other in pairs:
        rows += _rows(one, other, allowed, drift, notes, steadied=steadied)
    if not rows:
        raise ConfigError(
            "These runs have no scenario in common that can be judged. "
            f"{' '.join(notes) or 'Measure both with the same --scenario.'}"
        )
    if alike and work and other_work and not steadied:
        notes.append(
            f"The control load is other work in each run ({work} in A, {other_work} in B): slow "
            "phases of the machine are not taken out of the changes. Measure both with the same "
            "NumPy and BLAS."
        )
    notes += _blind(rows)
    notes += _machine(rows)
    notes += _doubts(a, b)
    return Comparison(
        rows=tuple(rows),
        differences=tuple(_differences(a, b, pairs)),
        allowed=tuple(each for each in found if each.name in allowed),
        notes=tuple(notes),
    )


def environment_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs in the machines of two documents and in what they allowed a process."""
    here, there = a["environment"], b["environment"]
    pairs = [(name, here["machine"][name], there["machine"][name]) for name in _MACHINE]
    pairs += [(name, here[name], there[name]) for name in ("affinity", "constraint")]
    # Not every system tells these two; what is not known does not differ.
    for name, unknown in (("governors", []), ("turbo", None)):
        one, other = here["start"][name], there["start"][name]
        if unknown not in (one, other):
            pairs.append((name, one, other))
    for name, one, other in sorted(pairs, key=lambda pair: pair[0]):
        if one != other:
            yield Difference(name=name, a=one, b=other)


_Subject = Mapping[str, Any]
_Pairs = list[tuple[_Subject, _Subject]]


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any], match: Match) -> tuple[_Pairs, list[str]]:
    """The subjects that belong together, and who is alone."""
    ours, theirs = list(a["subjects"]), list(b["subjects"])
    if match == "index":
        pairs = list(zip(ours, theirs, strict=False))
        alone = [("A", ours[len(pairs) :]), ("B", theirs[len(pairs) :])]
    else:
        by_name = {subject["name"]: subject for subject in theirs}
        pairs = [(one, by_name[one["name"]]) for one in ours if one["name"] in by_name]
        both = {one["name"] for one, _ in pairs}
        alone = [
            (run, [subject for subject in subjects if subject["name"] not in both])
            for run, subjects in (("A", ours), ("B", theirs))
        ]
    if not pairs:
        raise ConfigError(
            f"These runs have no subject in common: {_names(ours)} in A, {_names(theirs)} in B. "
            "Pass --match index to compare them in the order of the files."
        )
    notes = [f"Only in {run}: {_names(subjects)}." for run, subjects in alone if subjects]
    return pairs, notes


def _conditions(a: Mapping[str, Any], b: Mapping[str, Any], pairs: _Pairs) -> Iterator[Difference]:
    """What differs and makes times of two runs something else."""
    yield from environment_differences(a, b)
    for one, other in pairs:
        name = str(one["name"])
        if one["threads"] != other["threads"]:
            yield Difference(name="threads", a=one["threads"], b=other["threads"], subject=name)
        for scenario, ours in one["scenarios"].items():
            theirs = other["scenarios"].get(scenario)
            if theirs is None:
                continue
            for condition, key in (
                ("batch", "query_pictures"),
                ("batch", "batch"),
                ("latency-bound", "bound_ms"),
            ):
                if ours.get(key) != theirs.get(key):
                    yield Difference(
                        name=condition,
                        a=ours.get(key),
                        b=theirs.get(key),
                        subject=f"{name}, {scenario}",
                    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], pairs: _Pairs) -> Iterator[Difference]:
    """What differs in what was measured, and with what."""
    if a["version"] != b["version"]:
        yield Difference(name="gnet-opt", a=a["version"], b=b["version"])
    here, there = a["environment"]["tools"], b["environment"]["tools"]
    for tool in sorted((set(here) | set(there)) - {"gnet-opt"}):
        if here.get(tool) != there.get(tool):
            yield Difference(name=tool, a=here.get(tool), b=there.get(tool))
    for key in ("rounds", "scenarios", "seconds", "seed"):
        if a["settings"][key] != b["settings"][key]:
            yield Difference(name=key, a=a["settings"][key], b=b["settings"][key])
    for one, other in pairs:
        for key in _IDENTITY:
            if one[key] != other[key]:
                yield Difference(name=key, a=one[key], b=other[key], subject=str(one["name"]))


def _rows(
    one: _Subject,
    other: _Subject,
    allowed: Collection[str],
    drift: float | None,
    notes: list[str],
    *,
    steadied: bool,
) -> Iterator[Compared]:
    """A row for each scenario of both; notes on the others."""
    name = one["name"]
    for scenario in sorted({*one["scenarios"], *other["scenarios"]}):
        ours, theirs = one["scenarios"].get(scenario), other["scenarios"].get(scenario)
        if ours is None or theirs is None:
            notes.append(f"{name}, {scenario}: only in {'B' if ours is None else 'A'}.")
            continue
        controls = None
        if scenario == "server":
            if ours["bound_ms"] != theirs["bound_ms"] and _BOUND not in allowed:
                notes.append(
                    f"{name}, server: left out, as the latency bound was {ours['bound_ms']:.4g} ms "
                    f"in A and {theirs['bound_ms']:.4g} ms in B. Measure both with the same "
                    f"--latency-bound, or pass --allow {_BOUND}."
                )
                continue
            judged = _server(ours, theirs, DRIFT if drift is None else drift)
            if judged is None:
                notes.append(f"{name}, server: a run found no rate within its latency bound.")
                continue
            a_ms, b_ms, ratio = judged
        else:
            times_a, times_b = _times_ms(ours), _times_ms(theirs)
            rounds = min(len(times_a), len(times_b))
            if rounds < LEAST_ROUNDS:
                raise ConfigError(
                    f"{name}, {scenario}: {rounds} round(s) say nothing about the noise of a run. "
                    f"Measure again with --rounds {LEAST_ROUNDS} or more."
                )
            a_ms, b_ms = statistics.median(times_a), statistics.median(times_b)
            controls = _controls(ours, theirs) if steadied else None
            if steadied and controls is None:
                notes.append(
                    f"{name}, {scenario}: slow phases of the machine are not taken out, as rounds "
                    "have no times of the control load (limited memory, or a BLAS that "
                    "threadpoolctl does not know)."
                )
            ratio = ratio_of(times_a, times_b, controls, drift=drift)
        yield Compared(
            subject=name,
            other=other["name"],
            scenario=scenario,
            a_ms=a_ms,
            b_ms=b_ms,
            ratio=ratio,
            control=controls and statistics.median(controls[1]) / statistics.median(controls[0]),
            metric=ours["metric"]["name"],
            metric_a=ours["metric"]["value"],
            metric_b=theirs["metric"]["value"],
        )


def _times_ms(scenario: Mapping[str, Any]) -> list[float]:
    """The time of each round, from its raw samples: of a query, or of a picture offline."""
    return [
        statistics.median(entry["samples_ns"]) / 1e6
        if "samples_ns" in entry
        else entry["elapsed_ns"] / entry["pictures"] / 1e6
        for entry in scenario["rounds"]
    ]


def _controls(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[Sequence[float], Sequence[float]] | None:
    """The median time of the control load beside each round, None where a round has none."""
    runs = [[entry.get("control_ns", []) for entry in scenario["rounds"]] for scenario in (a, b)]
    if not all(samples for run in runs for samples in run):
        return None
    first, second = ([statistics.median(samples) for samples in run] for run in runs)
    return first, second


def _server(
    a: Mapping[str, Any], b: Mapping[str, Any], drift: float
) -> tuple[float, float, Ratio] | None:
    """The highest rates; each is known to lie between the last good one and the first bad one."""
    limits = [_good_and_bad(scenario["rounds"]) for scenario in (a, b)]
    if None in (limits[0], limits[1]):
        return None
    (good_a, bad_a), (good_b, bad_b) = (limit for limit in limits if limit is not None)
    ratio = banded(
        math.log(good_a / good_b), math.log(good_a / bad_b), math.log(bad_a / good_b), drift
    )
    return 1e3 / good_a, 1e3 / good_b, ratio


def _good_and_bad(trials: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The highest rate with at most one late query in a hundred, and the lowest rate above it."""
    within = {
        trial["offered_qps"]: trial["late"] * 100 <= len(trial["samples_ns"]) for trial in trials
    }
    good = max((rate for rate, held in within.items() if held), default=None)
    if good is None:
        return None
    above = [rate for rate, held in within.items() if not held and rate > good]
    # Where no higher rate was tried, the interval ends with the rate itself.
    return good, min(above, default=good)


def _blind(rows: Sequence[Compared]) -> Iterator[str]:
    """Where `equal` only means that nothing can be seen."""
    hidden = [row for row in rows if row.ratio.verdict == "equal" and row.ratio.resolution > BLIND]
    if hidden:
        worst = max(hidden, key=lambda row: row.ratio.resolution)
        yield (
            f"{len(hidden)} of {len(rows)} rows are too noisy to show a slow-down of "
            f"{100 * BLIND:.0f} %; the noisiest is {worst.subject}, {worst.scenario}, where it "
            f"takes {100 * worst.ratio.resolution:.0f} %. Measure on a quiet machine, with more "
            "--rounds."
        )


def _machine(rows: Sequence[Compared]) -> Iterator[str]:
    """Where the machine was not the same, and the ratio is not that of the times shown."""
    ratios = {row.control: row for row in rows if row.control is not None}
    ratio = max(ratios, key=lambda each: abs(math.log(each)), default=1.0)
    if abs(math.log(ratio)) >= MOVED:
        yield (
            f"The machine itself was {'slower' if ratio > 1 else 'faster'} in B: beside "
            f"{ratios[ratio].other}, {ratios[ratio].scenario}, the control load took {ratio:.2f} "
            "times as long. As far as times follow it, it is taken out of the changes."
        )


def _doubts(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """What a run says against its own figures."""
    for run, document in (("A", a), ("B", b)):
        unstable = document["environment"]["unstable"]
        if unstable:
            more = f" ({len(unstable) - 1} more in the file)" if len(unstable) > 1 else ""
            yield f"{run} is an unstable run: {unstable[0]}{more}"


def _names(subjects: Iterable[_Subject]) -> str:
    return ", ".join(subject["name"] for subject in subjects)


def _shown(value: Any) -> str:
    """A value for a sentence: hashes and long lists are cut."""
    if isinstance(value, dict):
        value = ", ".join(f"{key} {_shown(inside)}" for key, inside in sorted(value.items()))
    elif isinstance(value, list):
        value = " ".join(map(str, value))
    text = "none" if value is None or value == "" else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
