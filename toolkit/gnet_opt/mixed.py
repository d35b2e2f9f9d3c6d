"""INT8 with some layers in float: which ones, chosen on calibration images that are held back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gnet_opt.candidates import Candidate, Context, Maker
from gnet_opt.quantizer import Quantizer
from gnet_opt.scoring import Scorer
from gnet_opt.search import MOST_JUDGES, fewest_float_layers, loss


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What the search for layers gave.

    Attributes:
        candidate: The one to put before the gate, None where there is none.
        held_back: Its accuracy on the images held back, as it stands in a manifest.
        note: Why there is none, a sentence; empty where there is one.
    """

    candidate: Candidate | None = None
    held_back: Mapping[str, Any] | None = None
    note: str = ""


def find_mixed(
    refused: Candidate, context: Context, quantizer: Quantizer, maker: Maker, scorer: Scorer
) -> Mixed:
    """Keep as little work in float as the budget needs on the images held back.

    Candidates are scored by the target's own kernels where this machine has them. The budget is
    held against what `gnet_opt.search.loss` measures, as it is: with few images one of them is
    several points, so that the search rather keeps a layer too many in float. The gate has the last
    word, and has it once.

    Args:
        refused: The INT8 candidate that the gate refused.
        context: Of the build.
        quantizer: Of the build.
        maker: Of the build.
        scorer: Of the build.

    Returns:
        A candidate whose ranges are fitted to all calibration images, with `kept_in_float` and
        `search` among its facts; or why there is none.
    """
    assert refused.scheme is not None
    where = f"Mixed precision on {refused.backend.name}"
    held = quantizer.held.spread(MOST_JUDGES)
    if not len(held):
        count = len(context.job.calibration)
        return Mixed(
            note=f"{where} was not tried: {count} calibration images are too few to hold some back."
        )
    with context.timed("calibrate"):
        quantizer.fitted  # noqa: B018 (this may run the images once more)
    tried: dict[frozenset[str], Mapping[str, Any]] = {}

    def passes(kept: frozenset[str]) -> bool:
        precision = "mixed" if kept else "int8"
        backend, scheme = refused.backend, refused.scheme
        candidate = maker.make(precision, backend, scheme, kept, to_score=True)
        measured = scorer.score([candidate], held)[candidate.name]
        assert measured is not None
        tried[kept] = measured
        return loss(measured) <= context.job.options.max_drop

    if passes(frozenset()):
        return Mixed(
            note=f"{where} was not tried: on the {len(held)} calibration images that were held "
            "back INT8 is within the budget, so they do not tell which layers to keep in float. "
            "More calibration images might."
        )
    with context.timed("sensitivity"):
        costs = quantizer.costs
    kept = fewest_float_layers(costs, passes)
    if len(kept) == len(costs):
        return Mixed(
            note=f"{where} was tried: on the {len(held)} calibration images that were held back "
            "no choice of layers in float but all of them is within the budget."
        )
    candidate = maker.make("mixed", refused.backend, refused.scheme, kept)
    reasons = {
        cost.name: {"agreement": cost.agreement, "macs": cost.macs, "sqnr_db": cost.sqnr_db}
        for cost in costs
        if cost.name in kept
    }
    search = {
        "images": len(held),
        "labels": held.labels is not None,
        "loss": loss(tried[kept]),
        "loss_int8": loss(tried[frozenset()]),
        "semantics": tried[kept]["semantics"],
        "tried": len(tried),
    }
    facts = {**candidate.facts, "kept_in_float": reasons, "search": search}
    return Mixed(candidate=replace(candidate, facts=facts), held_back=tried[kept])
