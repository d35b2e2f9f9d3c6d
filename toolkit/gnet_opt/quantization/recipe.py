"""How a float graph becomes an INT8 one, beside the target's own integer form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

METHODS = ("entropy", "lp", "minmax", "mse", "percentile")
DEFAULT_METHOD = "minmax"
"""The method unless another is asked for. No method is the best everywhere; `auto` measures.

SQNR of the logits in dB by minmax, lp and mse, calibrated on 100 pictures (the 2014 original) and
128 (the demo model):

    2014 original, TensorRT's form   29.7  30.5  29.6   (agreement 98.5, 97.5 and 97.8 %)
    2014 original, x86-vnni          33.1  33.2  32.7   (98.5, 98.8 and 98.5 %)
    demo model, TensorRT's form      38.5  35.3  31.1
    demo model, x86-vnni             42.0  39.1  35.3
"""


def needs_histograms(method: str) -> bool:
    """Whether a method, or the choice of one, goes by how often values occur."""
    return method != "minmax"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What can be chosen without asking the target.

    Attributes:
        method: How a range is chosen from what calibration saw; one of `METHODS`.
        bias_correction: Whether biases undo the mean error of the rounded weights.
        weight_search: Whether the scale of a weight may clip its largest values, where that makes
            the mean squared error smaller. Measured on the 2014 original it does not help (35.9
            against 36.0 dB with eight bits, 28.7 against 29.3 with seven, all else in float), so
            it is off unless asked for.
        keep_float: Names of Conv and Gemm nodes that stay in float.
    """

    method: str = DEFAULT_METHOD
    bias_correction: bool = True
    weight_search: bool = False
    keep_float: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it stands in a manifest."""
        return {
            "bias_correction": self.bias_correction,
            "keep_float": sorted(self.keep_float),
            "method": self.method,
            "weight_search": self.weight_search,
        }
