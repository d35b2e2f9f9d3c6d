"""The INT8 form that keeps most of the accuracy: method, repair, and layers in float.

Whatever is chosen is chosen on calibration images that are held back: the ranges of what is scored
are fitted to the others. What ships is then fitted to all of them. Evaluation images only ever
decide whether a result is within the budget, so that what they say of it stays unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bench import accuracy, binary
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import FloatArray
from gnet_opt.runtime import run_all
from gnet_opt.sensitivity import LayerCost

HELD_BACK = 5
"""Every fifth calibration image is held back to choose by; of fewer different ones, none is."""

MOST_JUDGES = 64
"""Pictures that a judgement is made on at most."""

_PUT_BACK = 8
"""Layers that are tried in INT8 again, after enough layers were found to keep in float."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How near an INT8 model is to the float model on the judge's pictures.

    Attributes:
        sqnr_db: Signal to quantization noise ratio of the logits, infinite where they are equal.
        agreement: Percent of pictures with the same top-1.
    """

    sqnr_db: float
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """The verdict as it stands in a manifest."""
        finite = bool(np.isfinite(self.sqnr_db))
        return {"agreement": self.agreement, "sqnr_db": self.sqnr_db if finite else None}


class Judge:
    """Compares INT8 models with their float model on the same pictures, by reference semantics."""

    def __init__(
        self, model: Path, pictures: Sequence[FloatArray], threads: int | None = None
    ) -> None:
        """Run the float model.

        Args:
            model: The float ONNX file.
            pictures: Preprocessed, float32 of shape (planes, height, width) each.
            threads: CPU threads, or None for the runtime's own choice.
        """
        self._pictures = pictures
        self._threads = threads
        self._float_logits = self.run(model)
        self._threshold = binary.threshold(model, self._float_logits.shape[1])

    @property
    def images(self) -> int:
        """The number of pictures."""
        return len(self._pictures)

    def __call__(self, model: Path) -> Verdict:
        """Judge one INT8 file."""
        return self.verdict(self.run(model))

    def verdict(self, logits: FloatArray) -> Verdict:
        """Judge what `run` gave."""
        compared = accuracy.compare(
            self._float_logits, logits, None, semantics="reference", threshold=self._threshold
        )
        sqnr = float("inf") if compared.sqnr_db is None else compared.sqnr_db
        return Verdict(sqnr_db=sqnr, agreement=compared.agreement)

    def run(self, model: Path) -> FloatArray:
        """The logits of a file for all pictures, float32 of shape (pictures, classes)."""
        with open_reference(model, self._threads) as runner:
            return run_all(runner, self._pictures)


def split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Calibration pictures to fit ranges with, and every fifth, which is held back.

    Copies of a picture count as one and stay together: what was fitted to does not judge.
    """
    order = {digest: index for index, digest in enumerate(dict.fromkeys(images.hashes))}
    fit: list[int] = []
    held: list[int] = []
    for index, digest in enumerate(images.hashes):
        (held if order[digest] % HELD_BACK == HELD_BACK - 1 else fit).append(index)
    return images.take(fit), images.take(held)


def loss(measured: Mapping[str, Any]) -> float:
    """What a candidate loses on held-back images, in percent of them.

    Args:
        measured: `gnet_opt.bench.accuracy.Accuracy.to_dict`.

    Returns:
        Top-1 lost against float where there are labels; where not, the share of the images to which
        the candidate gives another answer than float, which is never less.
    """
    drop = measured["drop"]
    return float(drop["value"]) if drop else 100.0 - float(measured["agreement"])


def best_method(verdicts: Mapping[str, Verdict], images: int) -> str:
    """The method with the greatest SQNR among those that agree with float as often as the best.

    One picture of difference in agreement is chance and does not count.

    Args:
        verdicts: By method.
        images: The number of pictures that they were judged on.
    """
    most = max(verdict.agreement for verdict in verdicts.values())
    near = [m for m, v in verdicts.items() if v.agreement >= most - 100.0 / images - 1e-9]
    return max(near, key=lambda method: verdicts[method].sqnr_db)


def fewest_float_layers(
    costs: Sequence[LayerCost], passes: Callable[[frozenset[str]], bool]
) -> frozenset[str]:
    """Keep as little work in float as the budget needs.

    Layers come in the order of the noise that they take away for each multiply-accumulate that
    then runs in float. The shortest beginning of that order that passes is found by doubling and
    bisection; then its largest layers are tried in INT8 again.

    Args:
        costs: Of every layer, each alone.
        passes: Whether a network with these layers in float is within the budget. All layers in
            INT8 was measured before and did not pass; all layers in float does.

    Returns:
        Names of the layers; all of them where nothing less passes.
    """
    order = [c.name for c in sorted(costs, key=lambda c: (-c.noise / max(c.macs, 1), c.name))]
    macs = {cost.name: cost.macs for cost in costs}
    low, high = 0, 1
    while high < len(order) and not passes(frozenset(order[:high])):
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        if passes(frozenset(order[:middle])):
            high = middle
        else:
            low = middle
    kept = frozenset(order[:high])
    # The last one of the beginning is needed: without it the budget was not met.
    for name in sorted(order[: high - 1], key=lambda name: (-macs[name], name))[:_PUT_BACK]:
        if passes(kept - {name}):
            kept -= {name}
    return kept
