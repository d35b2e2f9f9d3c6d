"""Undo the mean error that quantized weights add to each output channel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def correct_bias(
    bias: FloatArray,
    weight: FloatArray,
    dequantized: FloatArray,
    means: npt.NDArray[np.float64],
) -> FloatArray:
    """Add the expected output error of a Conv or Gemm to its bias.

    For an input with channel means E[x] the rounded weight W' shifts the mean of the output by
    sum(W' - W)·E[x], where the sum runs over the kernel. Subtracting the shift is the bias
    correction of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction" (ICCV 2019), section 4.2, with measured means in place of assumed ones. The zero
    padding at the borders is not counted.

    Args:
        bias: Shape (output channels,).
        weight: The float weight, shape (output channels, input channels / group, ...).
        dequantized: What the runtime computes with, in the same shape.
        means: Mean of each input channel, shape (input channels,).

    Returns:
        The new bias, float32 of shape (output channels,).
    """
    difference = weight.astype(np.float64) - dequantized
    kernel = difference.reshape(*difference.shape[:2], -1).sum(axis=2)
    outputs, inputs = kernel.shape
    groups = means.size // inputs
    grouped = means.reshape(groups, inputs)
    owner = np.arange(outputs) // (outputs // groups)
    shift = np.sum(kernel * grouped[owner], axis=1)
    return np.asarray(bias + shift, np.float32)
