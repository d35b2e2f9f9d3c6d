"""Which candidate ships: the fastest within the accuracy budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnet_opt.bench.latency import LatencyReport
from gnet_opt.errors import GnetOptError

NAMES = {"fp16": "FP16", "fp32": "Float", "int8": "INT8", "mixed": "Mixed precision"}

SAME = 0.03
"""Share of the time by which two candidates must differ to count as different. One model timed as
two subjects of one run came out at 0.98 to 1.02 of itself. Of equals, the preferred one ships."""


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


def decide(
    candidates: Sequence[Figures], max_drop: float, report: LatencyReport | None
) -> tuple[str, dict[str, Any]]:
    """Choose the candidate that ships.

    Args:
        candidates: In the order of preference, which decides between equals, and where no latency
            was measured. Float is among them, so that one is always within the budget.
        max_drop: The most top-1 that may be lost, in percentage points.
        report: Latency of those within the budget, the target's own float first; None where it
            cannot be measured here.

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
    else:
        speed = {figures.name: report.speedup(figures.name).median for figures in within}
        enough = (1.0 - SAME) * max(speed.values())
        chosen = next(figures for figures in within if speed[figures.name] >= enough)
    rows = []
    for figures in candidates:
        row: dict[str, Any] = {
            "accuracy": figures.accuracy,
            "backend": figures.backend,
            "float_layers": list(figures.float_layers),
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
            if figures is not chosen:
                row["why_not"] = _slower(figures, chosen, report)
        elif figures is not chosen and not row["why_not"]:
            row["why_not"] = "Not first in the order of preference."
        rows.append(row)
    return chosen.name, {
        "candidates": rows,
        "reason": _reason(chosen, candidates, refusals, max_drop, report),
        "rule": "The fastest within the accuracy budget ships.",
        "ships": chosen.name,
    }


def _slower(figures: Figures, chosen: Figures, report: LatencyReport) -> str:
    own, best = (report.speedup(one.name).median for one in (figures, chosen))
    if own >= best:
        return f"Less than {100 * SAME:.0f} % faster than {chosen.name}, which is preferred."
    return f"{best / own:.2f} times the time of {chosen.name}."


def _reason(
    chosen: Figures,
    candidates: Sequence[Figures],
    refusals: Mapping[str, str],
    max_drop: float,
    report: LatencyReport | None,
) -> str:
    parts = []
    integer = [figures for figures in candidates if figures.precision == "int8"]
    if chosen.precision != "int8" and integer:
        first = integer[0]
        if refusals[first.name]:
            parts.append(f"INT8 does not ship: {refusals[first.name]}")
        elif report is not None:
            ratio = report.speedup(first.name).median
            parts.append(
                f"INT8 does not ship: it is not the fastest here ({ratio:.2f} times as fast as "
                "float)."
            )
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
        )
    return " ".join(parts)
