"""Which candidate ships: the fastest within the accuracy budget, of equals the most accurate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gnet_opt.bench.figures import median_interval
from gnet_opt.bench.latency import LatencyReport
from gnet_opt.errors import GnetOptError

NAMES = {"fp16": "FP16", "fp32": "Float", "int8": "INT8", "mixed": "Mixed precision"}

SAME = 0.03
"""Share of the time by which two candidates must differ to count as different. From one start of
the processes to the next, the ratio of two models with one execution graph was 0.99 to 1.03."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of a candidate.

    Attributes:
        name: Precision and backend, unique in a build.
        precision: `int8`, `mixed`, `fp16` or `fp32`.
        backend: The backend's name.
        accuracy: As it stands in a manifest, None where there were no pictures.
        float_layers: Layers that were kept in float, for `mixed`.
        macs_int8_share: Share of the multiply-accumulates in INT8.
    """

    name: str
    precision: str
    backend: str
    accuracy: Mapping[str, Any] | None
    float_layers: tuple[str, ...] = ()
    macs_int8_share: float = 0.0

    @property
    def drop(self) -> float | None:
        """Top-1 lost against float in percentage points, None without labels."""
        drop = self.accuracy and self.accuracy["drop"]
        return float(drop["value"]) if drop else None


def refusal(figures: Figures, max_drop: float) -> str:
    """Why the accuracy gate refuses a candidate, or nothing."""
    if figures.accuracy is None or figures.drop is None or figures.drop <= max_drop:
        return ""
    low, high = figures.accuracy["drop"]["ci95"]
    return (
        f"{NAMES[figures.precision]} loses {figures.drop:.2f} points of top-1 (95 % interval "
        f"{low:.2f} to {high:.2f}, {figures.accuracy['images']} pictures); --max-drop allows "
        f"{max_drop:g}."
    )


def tied(names: Sequence[str], report: LatencyReport) -> list[str]:
    """Those that are as fast as the fastest but for `SAME`, by the medians over all starts."""
    speed = {name: report.speedup(name).median for name in names}
    enough = (1.0 - SAME) * max(speed.values())
    return [name for name in names if speed[name] >= enough]


def undecided(names: Sequence[str], report: LatencyReport) -> bool:
    """Whether chance may still say which of these are `tied`: more starts would tell.

    Args:
        names: Of the candidates.
        report: Their latency, with a new process in each round.
    """
    fastest = max(names, key=lambda name: report.speedup(name).median)
    edge = 1.0 / (1.0 - SAME)
    for name in names:
        own, least = report[name].rounds_ms, report[fastest].rounds_ms
        low, high = median_interval([a / b for a, b in zip(own, least, strict=True)])
        if low < edge < high:
            return True
    return False


def decide(
    candidates: Sequence[Figures],
    max_drop: float,
    report: LatencyReport | None,
    held_back: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Choose the candidate that ships.

    Args:
        candidates: In the order of preference, which decides where nothing else does. Float is
            among them, so that one is always within the budget.
        max_drop: The most top-1 that may be lost, in percentage points.
        report: Latency of those within the budget, the target's own float first; None where it
            cannot be measured here.
        held_back: The accuracy of those that `tied` names on calibration images held back, as it
            stands in a manifest; of equally fast ones the one whose logits are nearest to those of
            float ships. Empty where there are no such images.

    Returns:
        The name of the candidate, and `decision` for the manifest: all candidates, their figures,
        why each does not ship, and why the chosen one does.
    """
    refusals = {figures.name: refusal(figures, max_drop) for figures in candidates}
    within = [figures for figures in candidates if not refusals[figures.name]]
    if not within:
        raise GnetOptError("No candidate is within the budget, not even float. Please report it.")
    if report is None:
        chosen = within[0]
        equals = _Equals(names=(chosen.name,))
    else:
        equals = _Equals(
            names=tuple(tied([figures.name for figures in within], report)),
            accuracy=held_back or {},
        )
        chosen = next(figures for figures in within if figures.name == equals.nearest)
    rows = []
    for figures in candidates:
        row: dict[str, Any] = {
            "accuracy": figures.accuracy,
            "backend": figures.backend,
            "float_layers": list(figures.float_layers),
            "held_back": (held_back or {}).get(figures.name),
            "latency": None,
            "macs_int8_share": figures.macs_int8_share,
            "name": figures.name,
            "precision": figures.precision,
            "ships": figures is chosen,
            "why_not": refusals[figures.name],
        }
        if report is not None and not row["why_not"]:
            row["latency"] = {
                **report[figures.name].to_dict(),
                "speedup": report.speedup(figures.name).to_dict(),
            }
            if figures.name in equals.names and figures is not chosen:
                row["why_not"] = equals.why_not(figures.name)
            elif figures is not chosen:
                own, best = (report.speedup(one.name).median for one in (figures, chosen))
                row["why_not"] = f"{best / own:.2f} times the time of {chosen.name}."
        elif figures is not chosen and not row["why_not"]:
            row["why_not"] = "Not first in the order of preference."
        rows.append(row)
    return chosen.name, {
        "candidates": rows,
        "reason": _reason(chosen, candidates, refusals, max_drop, report, equals),
        "rule": "The fastest within the accuracy budget ships; of equally fast ones, the most "
        "accurate.",
        "ships": chosen.name,
    }


@dataclass(frozen=True, kw_only=True)
class _Equals:
    """Candidates that are equally fast.

    Attributes:
        names: In the order of preference.
        accuracy: Of each on images held back; empty where there are none.
    """

    names: tuple[str, ...]
    accuracy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def nearest(self) -> str:
        """The one whose logits are nearest to those of float; the first where nobody knows."""
        return max(self.names, key=self._sqnr_db)

    def why_not(self, name: str) -> str:
        """Why one of them does not ship."""
        nearest = self.nearest
        if self._sqnr_db(name) == self._sqnr_db(nearest):
            return f"As fast as {nearest} (within {100 * SAME:.0f} %), which is preferred."
        return (
            f"As fast as {nearest} (within {100 * SAME:.0f} %), and less accurate: "
            f"{self._shown(name)} against {self._shown(nearest)} on {self._images} calibration "
            "images held back."
        )

    def reason(self) -> str:
        """Why the nearest one ships, as the end of a sentence; empty where it has no equal."""
        nearest = self.nearest
        others = [name for name in self.names if name != nearest]
        if not others:
            return ""
        start = f" As fast, within {100 * SAME:.0f} %: {', '.join(others)}; "
        second = max(others, key=self._sqnr_db)
        if self._sqnr_db(second) == self._sqnr_db(nearest):
            return f"{start}{nearest} is preferred."
        return (
            f"{start}{nearest} is the most accurate of them ({self._shown(nearest)} against "
            f"{self._shown(second)} on {self._images} calibration images held back)."
        )

    @property
    def _images(self) -> int:
        return int(self.accuracy[self.nearest]["images"])

    def _sqnr_db(self, name: str) -> float:
        measured = self.accuracy.get(name)
        if measured is None:
            return -math.inf
        # None: the logits are those of float.
        return math.inf if measured["sqnr_db"] is None else float(measured["sqnr_db"])

    def _shown(self, name: str) -> str:
        found = self._sqnr_db(name)
        return f"{found:.1f} dB" if math.isfinite(found) else "equal to float"


def _reason(
    chosen: Figures,
    candidates: Sequence[Figures],
    refusals: Mapping[str, str],
    max_drop: float,
    report: LatencyReport | None,
    equals: _Equals,
) -> str:
    parts = []
    integer = [figures for figures in candidates if figures.precision == "int8"]
    if chosen.precision != "int8" and integer:
        first = integer[0]
        if refusals[first.name]:
            parts.append(f"INT8 does not ship: {refusals[first.name]}")
        elif report is not None:
            ratio = report.speedup(first.name).median
            least = (
                "more accurate ones are as fast"
                if first.name in equals.names
                else ("it is not the fastest here")
            )
            parts.append(f"INT8 does not ship: {least} ({ratio:.2f} times as fast as float).")
    if chosen.precision == "mixed":
        count = len(chosen.float_layers)
        parts.append(
            f"With {count} layer{'s' if count > 1 else ''} in float "
            f"({100 * (1 - chosen.macs_int8_share):.1f} % of the multiply-accumulates) the budget "
            f"of {max_drop:g} points is met."
        )
    if report is None:
        parts.append(
            f"{NAMES[chosen.precision]} ships: the first within the budget; latency cannot be "
            "measured on this machine."
        )
    else:
        ratio = report.speedup(chosen.name).median
        parts.append(
            f"{NAMES[chosen.precision]} on {chosen.backend} ships: the fastest within the budget"
            + (f", {ratio:.2f} times as fast as float." if chosen.precision != "fp32" else ".")
            + equals.reason()
        )
    return " ".join(parts)
