"""Two runs of `gnet-opt bench` against each other: equal, faster or slower.

Ratios within a run are taken within its rounds, where both sides meet the same machine. Two runs
have no rounds in common, and the machine is never quite the same again. So the band of noise has
two parts, added as independent errors are:

- what each run says itself: the ratio is the median of all ratios of a round of one run to a round
  of the other (the estimate of J. L. Hodges and E. L. Lehmann, "Estimates of location based on rank
  tests", Annals of Mathematical Statistics 34 (1963), 598-611), and its interval comes from drawing
  rounds again, with a fixed seed;
- what no single run can say: how far the level of a run is from that of the next one (`DRIFT`).

Much of both is the machine's, and `gnet_opt.bench.control` has seen it. Where both runs have the
times of the same control load, under the same conditions, they are the covariate of an analysis of
covariance (R. A. Fisher, "Statistical Methods for Research Workers", 4th edition, 1932): how much
the rounds of a run follow their control tells by how much the runs differ for its sake, and that is
taken out. The resampling estimates this anew each time, so that the band knows what is not known of
it; and the more the control explains, the smaller is what is left of the drift (`STEADIED_DRIFT`).

Runs whose conditions differ are refused by the name of what differs, unless that is allowed. The
latency bound belongs to the server scenario alone: where it differs only that scenario is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import ConfigError

DRIFT = 0.02
"""Standard deviation of the level of a run, as a share of it, from one start to the next.

Measured where one result was started anew six or eight times: with what moves within a start taken
out, 0.010 to 0.026 on two shared cores (benchmarks/results/openvino_paths-*-1t.json and
quantizers-x86-vnni.json; tests/unit/bench/test_compare.py computes it from them). Two other cores
had more, see `STEADIED_DRIFT`: without times of the control load `--drift` may be needed.
"""

STEADIED_DRIFT = 0.01
"""The same where all that moves within runs is explained by the control load.

Where it explains a share, the variances of the two are mixed by it: what does not follow the
control load within a run has not become steadier between runs.

It lies below the 0.017 that a run had in 20 pairs of runs of one bundle on two shared cores, as the
noise of its rounds is in that, too; without the control load it had 0.036
(benchmarks/results/compare_repeats-x86-vnni.json; test_compare.py computes it).
"""

STEEPEST = 3.0
"""The times of no model follow the control load more than so (1: by the same share).

Between the runs of compare_repeats-x86-vnni*.json they followed it at 2.1 (test_compare.py).
"""

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

_RESAMPLES = 1000
_AT_A_TIME = 1_000_000
"""Differences in memory at a time; a run may have many rounds."""

_SEED = 0
_NOTHING = 1e-18
"""A sum of squares of logarithms that is no larger is of equal values."""

_Z95 = 1.96
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
class Ratio:
    """How many times as long the second run takes; above 1 it is slower.

    Attributes:
        value: The estimate.
        low: Lower end of the band of noise around it (95 %).
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["equal", "faster", "slower"]:
        """What the second run is; `equal` where the band holds 1."""
        if self.low <= 1.0 <= self.high:
            return "equal"
        return "slower" if self.low > 1.0 else "faster"

    @property
    def resolution(self) -> float:
        """The least slow-down that the band would not have swallowed, as a share."""
        return self.value / self.low - 1.0


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
            `DRIFT`, and for less the more the control load explains, down to `STEADIED_DRIFT`.

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


def ratio_of(
    a: Sequence[float],
    b: Sequence[float],
    controls: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    drift: float | None = None,
) -> Ratio:
    """The ratio of the times of two runs, with the band of noise that the module describes.

    Args:
        a: The times of the first run, one a round.
        b: Those of the second run.
        controls: The times of the control load in the same rounds of both, None where not known.
        drift: As for `compare`.
    """
    # Without a control load it has always taken the same time.
    logs_a, logs_b = (
        np.log([times, [1.0] * len(times) if controls is None else controls[index]])
        for index, times in enumerate((a, b))
    )
    whole = logs_a[:, None], logs_b[:, None]
    (centre,) = _shifts(*whole)
    if drift is None:
        share = _explained(*whole)
        drift = math.sqrt(share * STEADIED_DRIFT**2 + (1 - share) * DRIFT**2)
    chance = np.random.default_rng(_SEED)
    drawn: list[float] = []
    while len(drawn) < _RESAMPLES:
        count = max(1, min(_RESAMPLES - len(drawn), _AT_A_TIME // (len(a) * len(b))))
        drawn_a = chance.choice(logs_a, (count, len(a)), axis=1)
        drawn += list(_shifts(drawn_a, chance.choice(logs_b, (count, len(b)), axis=1)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return _banded(float(centre), float(low), float(high), drift)


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


_Logs = npt.NDArray[np.float64]
_Subject = Mapping[str, Any]
_Pairs = list[tuple[_Subject, _Subject]]


def _shifts(a: _Logs, b: _Logs) -> _Logs:
    """Hodges and Lehmann's estimate of how far each row of `b` is above that of `a`.

    Args:
        a: Logarithms of times and of the control load beside them, of shape (2, rows, rounds).
        b: The same of the second run, with as many rows.
    """
    slope = _slopes(a, b)[:, None]
    times_a, times_b = a[0] - slope * a[1], b[0] - slope * b[1]
    differences = times_b[:, :, None] - times_a[:, None, :]
    return np.asarray(np.median(differences.reshape(len(slope), -1), axis=1))


def _slopes(a: _Logs, b: _Logs) -> _Logs:
    """How strongly times follow the control load within both runs together, from 0 to `STEEPEST`.

    By least squares; 0 where the control load does not change.
    """
    both, _, control = _within(a, b)
    return np.clip(_divided(both, control), 0.0, STEEPEST)


def _explained(a: _Logs, b: _Logs) -> float:
    """Share of the variance of times within both runs that the control load explains, 0 to 1."""
    both, times, control = _within(a, b)
    return float(_divided(np.maximum(both, 0.0) ** 2, times * control)[0])


def _within(a: _Logs, b: _Logs) -> tuple[_Logs, _Logs, _Logs]:
    """Sums within both runs: of products, of squares of times, of squares of the control load."""
    parts = (run - run.mean(axis=2, keepdims=True) for run in (a, b))
    sums = sum(np.einsum("irn,jrn->ijr", part, part) for part in parts)
    return sums[0, 1], sums[0, 0], sums[1, 1]


def _divided(above: _Logs, below: _Logs) -> _Logs:
    """The quotient, 0 where nothing but rounding is below."""
    return np.divide(above, below, where=below > _NOTHING, out=np.zeros_like(above))


def _banded(centre: float, low: float, high: float, drift: float) -> Ratio:
    """A ratio from logarithms, its interval widened by the drift of both runs."""
    more = _Z95 * math.sqrt(2) * drift
    return Ratio(
        value=math.exp(centre),
        low=math.exp(centre - math.hypot(centre - low, more)),
        high=math.exp(centre + math.hypot(high - centre, more)),
    )


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
    ratio = _banded(
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
