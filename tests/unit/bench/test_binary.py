from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx.helper as oh
import pytest
from hypothesis import given

from gnet_opt.bench import accuracy, binary
from gnet_opt.errors import CalibrationError


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def model(folder: Path, *operators: str) -> Path:
    """An ONNX file that ends in these operators."""
    names = ["input", *operators[:-1], "logits"]
    nodes = [
        oh.make_node(op, [before], [after], **({"to": 1} if op == "Cast" else {}))
        for op, before, after in zip(operators, names, names[1:], strict=False)
    ]
    ends = [
        oh.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 1]) for n in ("input", "logits")
    ]
    graph = oh.make_graph(nodes, "g", ends[:1], ends[1:])
    onnx.save(oh.make_model(graph), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("operators", "expected"),
    [
        (["Relu"], 0.0),
        (["Sigmoid"], 0.5),
        (["Sigmoid", "Flatten"], 0.5),
        (["Sigmoid", "Identity", "Cast"], 0.5),
        (["Sigmoid", "Relu"], 0.0),
        (["Identity"], 0.0),
    ],
)
def test_the_last_operator_decides(operators: list[str], expected: float, tmp_path: Path) -> None:
    path = model(tmp_path, *operators)
    assert binary.threshold(path) == expected
    assert binary.threshold(path, 2) == 0.0
    assert ("sigmoid over 7 outputs" in binary.note(path, 7, ())) == (expected == 0.5)


def test_the_note_names_the_second_class(tmp_path: Path) -> None:
    assert binary.note(model(tmp_path, "Relu"), 1, ("no", "yes")) == (
        "The network has one output, a logit: above 0 an image counts as class 1 (yes), else as "
        "class 0."
    )
    assert binary.note(model(tmp_path, "Sigmoid"), 1, ()) == (
        "The network has one output, a probability: above 0.5 an image counts as class 1, else as "
        "class 0."
    )


def test_one_logit_is_scored_by_its_sign() -> None:
    logits = column(-2.0, 3.0, 0.5, -0.1, 0.0)
    assert accuracy.score(logits, [0, 1, 0, 1, 0]) == accuracy.Score(top1=60.0, top5=None)
    # Once the greatest of one was always right.
    assert accuracy.score(logits, [0, 0, 0, 0, 0]).top1 == 60.0
    with pytest.raises(CalibrationError, match=r"the model has 2 classes \(0\.\.1\)"):
        accuracy.score(logits, [0, 1, 2, 0, 0])


def test_one_logit_is_compared_by_its_sign() -> None:
    before, after = column(-1.0, 2.0, 0.3, -0.2), column(-1.0, 2.0, -0.1, 0.1)
    result = accuracy.compare(before, after, [0, 1, 1, 1], semantics="native")
    assert result.agreement == 50.0
    assert result.float_score == accuracy.Score(top1=75.0, top5=None)
    assert result.quantized_score == accuracy.Score(top1=75.0, top5=None)
    assert result.drop is not None
    assert result.drop.value == 0.0
    # The noise is that of the logit itself, without the threshold.
    assert result.sqnr_db == accuracy.sqnr_db(before, after)


QUARTERS = st.integers(-36, 36).map(lambda quarters: quarters / 4)


@given(st.lists(st.tuples(QUARTERS, QUARTERS), min_size=1))
def test_a_probability_decides_as_its_logit(pairs: list[tuple[float, float]]) -> None:
    before, after = (column(*side) for side in zip(*pairs, strict=True))
    labels = [index % 2 for index in range(len(pairs))]
    one = accuracy.compare(before, after, labels, semantics="native")
    other = accuracy.compare(
        *(1 / (1 + np.exp(-values.astype(np.float64))) for values in (before, after)),
        labels, semantics="native", threshold=binary.PROBABILITY,
    )  # fmt: skip
    assert (one.agreement, one.float_score, one.drop) == (
        other.agreement,
        other.float_score,
        other.drop,
    )
