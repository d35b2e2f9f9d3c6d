"""A loaded model: the network and everything that must travel with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gnet_opt.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

Architecture = Literal["googlenet", "googlenet-caffe", "inception-v3", "bn-inception", "module"]
"""torchvision's GoogLeNet, the 2014 original, torchvision's Inception v3, BN-Inception (v2) with
the layer names of its original, or any other `nn.Module`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network in eval mode, on the CPU, in float32.

    Attributes:
        module: The network. Its main output is logits of shape (N, classes).
        name: A short name for messages, file names and the manifest.
        architecture: Which family member it is.
        classes: The number of logits.
        labels: Class names by index, or empty where none are known.
        preprocess: How a picture becomes the input of `module`.
        sha256: Of the weights: of the file's bytes, or of names and bytes of the state dict for
            a module that came from memory.
        source: Where the weights came from, in words.
        assumptions: What was assumed because nobody said it, in plain sentences that are printed
            to the user and recorded in the manifest.
    """

    module: nn.Module
    name: str
    architecture: Architecture
    classes: int
    labels: tuple[str, ...]
    preprocess: Preprocess
    sha256: str
    source: str
    assumptions: tuple[str, ...] = ()
