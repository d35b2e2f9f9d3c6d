"""One convolution that tells whether eight-bit products overflow in a runtime's kernels.

Kernels that add two u8·s8 products in 16 bits (x86's vpmaddubsw) saturate: a sum of theirs reaches
65,025 and 16 bits end at 32,767. With activations in the upper half of u8 and weights of all sizes
most outputs then come out wrong; kernels with 32-bit sums give every output exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gnet_opt.files import atomic_path
from gnet_opt.runtime import FloatArray

CHANNELS = 192
OUTPUTS = 64
SIDE = 6
STEP = 16384.0
"""Scale of the output: a power of two, so that float32 has every value exactly."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The convolution, in Q/DQ form.

    Attributes:
        model: An ONNX file: u8 activations, s8 weights, all scales powers of two.
        inputs: float32 of shape (1, CHANNELS, SIDE, SIDE), whole numbers from 128 to 255.
        expected: What exact arithmetic gives: float32 of shape (1, OUTPUTS, SIDE, SIDE).
    """

    model: Path
    inputs: FloatArray
    expected: FloatArray


def make_probe(path: Path) -> Probe:
    """Write the probe with seeded numbers; the same bytes each time."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    inputs = random.integers(128, 256, (1, CHANNELS, SIDE, SIDE))
    weights = random.integers(-127, 128, (OUTPUTS, CHANNELS, 1, 1))
    constants = {
        "one": np.float32(1),
        "step": np.float32(STEP),
        "s8_zero": np.int8(0),
        "u8_middle": np.uint8(128),
        "u8_zero": np.uint8(0),
        "weights": weights.astype(np.int8),
    }
    steps = [
        ("QuantizeLinear", ["input", "one", "u8_zero"], "input_quantized"),
        ("DequantizeLinear", ["input_quantized", "one", "u8_zero"], "input_dequantized"),
        ("DequantizeLinear", ["weights", "one", "s8_zero"], "weights_dequantized"),
        ("Conv", ["input_dequantized", "weights_dequantized"], "sums"),
        ("QuantizeLinear", ["sums", "step", "u8_middle"], "sums_quantized"),
        ("DequantizeLinear", ["sums_quantized", "step", "u8_middle"], "output"),
    ]
    shape = (1, OUTPUTS, SIDE, SIDE)
    graph = helper.make_graph(
        [helper.make_node(kind, names, [out], name=out) for kind, names, out in steps],
        "probe",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, inputs.shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    sums = np.einsum("oc,ncyx->noyx", weights[:, :, 0, 0], inputs)
    # NumPy and QuantizeLinear both round half to even.
    levels = np.clip(np.round(sums / STEP), -128, 127)
    return Probe(
        model=path,
        inputs=inputs.astype(np.float32),
        expected=(levels * STEP).astype(np.float32),
    )
