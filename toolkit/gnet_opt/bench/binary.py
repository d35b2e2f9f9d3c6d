"""One output for two classes, as a network that is trained with a sigmoid has it.

Above the threshold an image counts as class 1, else as class 0: above 0 where the output is a
logit, above 0.5 where the network itself ends in a sigmoid and gives a probability; the two are the
same decision.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gnet_opt.errors import require
from gnet_opt.runtime import FloatArray

LOGIT, PROBABILITY = 0.0, 0.5
"""The threshold of a logit, and of what a sigmoid makes of it."""

_KEEP_VALUES = frozenset(
    {"Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Squeeze"}
)
"""Operators after which a probability is one still."""


def threshold(model: Path, classes: int = 1) -> float:
    """The threshold of an ONNX file, by the operator that it ends in.

    Args:
        model: The file.
        classes: How many outputs it has for a picture; with more than one there is no threshold,
            `LOGIT` is returned and nothing is read.

    Raises:
        MissingDependencyError: onnx-ir is not installed.
    """
    return PROBABILITY if classes == 1 and ends_in_sigmoid(model) else LOGIT


def ends_in_sigmoid(model: Path) -> bool:
    """Whether the last operator of an ONNX file that computes something is a sigmoid.

    Raises:
        MissingDependencyError: onnx-ir is not installed.
    """
    require("onnx_ir", "build", f"see what {model.name} ends in")
    import onnx_ir as ir

    node = ir.load(model, format="protobuf").graph.outputs[0].producer()
    while node is not None and node.op_type in _KEEP_VALUES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Sigmoid"


def as_classes(outputs: FloatArray, threshold: float) -> FloatArray:
    """Outputs with a column a class: as they are, or two columns of one, the threshold first.

    Which of two columns is greater is then which class it is; a tie is class 0.

    Args:
        outputs: float32 of shape (pictures, classes), or (pictures, 1).
        threshold: What decides where there is one column.
    """
    if outputs.shape[1] != 1:
        return outputs
    return np.concatenate([np.full_like(outputs, threshold), outputs], axis=1)


def sentence(threshold: float, classes: tuple[str, ...]) -> str:
    """What is to be known of accuracy, for people.

    Args:
        threshold: That of the model.
        classes: The names of the two classes where they are known.
    """
    what = "a probability" if threshold == PROBABILITY else "a logit"
    name = f" ({classes[1]})" if len(classes) == 2 else ""
    return (
        f"The network has one output, {what}: above {threshold:g} an image counts as class 1"
        f"{name}, else as class 0."
    )


def note(model: Path, classes: int, names: tuple[str, ...]) -> str:
    """What is to be known of the outputs of an ONNX file before accuracy is read, or nothing.

    Args:
        model: The file.
        classes: How many outputs it has for a picture.
        names: The names of the classes where they are known.

    Raises:
        MissingDependencyError: onnx-ir is not installed.
    """
    if classes == 1:
        return sentence(threshold(model), names)
    if ends_in_sigmoid(model):
        return (
            f"The network ends in a sigmoid over {classes} outputs, as one for several labels an "
            "image does: top-1 is how often the one label that an image has is the greatest."
        )
    return ""
