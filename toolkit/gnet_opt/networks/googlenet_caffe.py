"""The GoogLeNet of 2014 as the Caffe model zoo published it (bvlc_googlenet).

It differs from torchvision's in local response normalisation, true 5x5 convolutions in the third
branch, biases instead of batch norm, and a 3x3 fourth pool. Source: Szegedy et al., "Going Deeper
with Convolutions", CVPR 2015, and BVLC's `models/bvlc_googlenet/deploy.prototxt`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Channels of each Inception module: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
_INCEPTIONS: dict[str, tuple[int, int, int, int, int, int]] = {
    "inception_3a": (64, 96, 128, 16, 32, 32),
    "inception_3b": (128, 128, 192, 32, 96, 64),
    "inception_4a": (192, 96, 208, 16, 48, 64),
    "inception_4b": (160, 112, 224, 24, 64, 64),
    "inception_4c": (128, 128, 256, 24, 64, 64),
    "inception_4d": (112, 144, 288, 32, 64, 64),
    "inception_4e": (256, 160, 320, 32, 128, 128),
    "inception_5a": (256, 160, 320, 32, 128, 128),
    "inception_5b": (384, 192, 384, 48, 128, 128),
}

# Caffe's name of each convolution inside a module, and ours.
_BRANCHES = {
    "1x1": "conv1x1",
    "3x3_reduce": "reduce3x3",
    "3x3": "conv3x3",
    "5x5_reduce": "reduce5x5",
    "5x5": "conv5x5",
    "pool_proj": "pool_proj",
}

_STEM = {"conv1/7x7_s2": "conv1", "conv2/3x3_reduce": "reduce2", "conv2/3x3": "conv2"}


def caffe_names() -> dict[str, str]:
    """Caffe's parameter names mapped to those of `GoogLeNetCaffe.state_dict()`.

    The names of a converted caffemodel are `<layer>.weight` and `<layer>.bias`, for example
    `inception_3a/5x5_reduce.weight`; the shapes are the same.
    """
    return {
        f"{layer}.{kind}": f"{module}.{kind}"
        for layer, module in _layers()
        for kind in ("weight", "bias")
    }


def _layers() -> Iterator[tuple[str, str]]:
    yield from _STEM.items()
    for module in _INCEPTIONS:
        for layer, ours in _BRANCHES.items():
            yield f"{module}/{layer}", f"{module}.{ours}"
    yield "loss3/classifier", "classifier"


class Inception(nn.Module):
    """One Inception module: four branches, each ending in a ReLU, concatenated by channel."""

    def __init__(self, channels_in: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, projection = widths
        self.conv1x1 = nn.Conv2d(channels_in, one, 1)
        self.reduce3x3 = nn.Conv2d(channels_in, reduce3, 1)
        self.conv3x3 = nn.Conv2d(reduce3, three, 3, padding=1)
        self.reduce5x5 = nn.Conv2d(channels_in, reduce5, 1)
        self.conv5x5 = nn.Conv2d(reduce5, five, 5, padding=2)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pool_proj = nn.Conv2d(channels_in, projection, 1)
        self.channels = one + three + five + projection

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels, H, W)."""
        one = torch.relu(self.conv1x1(x))
        three = torch.relu(self.conv3x3(torch.relu(self.reduce3x3(x))))
        five = torch.relu(self.conv5x5(torch.relu(self.reduce5x5(x))))
        pooled = torch.relu(self.pool_proj(self.pool(x)))
        return torch.cat((one, three, five, pooled), 1)


class GoogLeNetCaffe(nn.Module):
    """The deployed network: no auxiliary heads, and logits instead of the final softmax.

    Caffe rounds the size of a pooled map up, hence `ceil_mode`; its dropout scales in training,
    so that nothing is left of it here. Its LRN divides alpha by the window's size, as torch does.

    Args:
        classes: The number of logits.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.reduce2 = nn.Conv2d(64, 64, 1)
        self.conv2 = nn.Conv2d(64, 192, 3, padding=1)
        self.norm2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.pool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        channels = 192
        for name, widths in _INCEPTIONS.items():
            module = Inception(channels, widths)
            self.add_module(name, module)
            channels = module.channels
        self.pool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.pool4 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        # Caffe averages 7x7, which is the whole map at the published input size of 224.
        self.pool5 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (N, 3, H, W) to logits (N, classes)."""
        x = self.norm1(self.pool1(torch.relu(self.conv1(x))))
        x = torch.relu(self.conv2(torch.relu(self.reduce2(x))))
        x = self.pool2(self.norm2(x))
        for name in _INCEPTIONS:
            x = self.get_submodule(name)(x)
            if name == "inception_3b":
                x = self.pool3(x)
            elif name == "inception_4e":
                x = self.pool4(x)
        return self.classifier(torch.flatten(self.pool5(x), 1))  # type: ignore[no-any-return]
