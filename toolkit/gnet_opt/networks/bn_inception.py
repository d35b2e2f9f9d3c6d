"""BN-Inception (Inception v2), with the layer names of its Caffe original.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, and the public port in pretrainedmodels (`bninception`), whose
state dicts have these names: `conv1_7x7_s2`, `inception_3a_double_3x3_1_bn`, ..., `last_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Channels of each module: 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, pool projection.
# The two modules without the first and the last branch halve the map: their last convolutions and
# their pool have a stride of 2. The second of the double convolutions is as wide as the first.
_INCEPTIONS: dict[str, tuple[int, int, int, int, int, int]] = {
    "inception_3a": (64, 64, 64, 64, 96, 32),
    "inception_3b": (64, 64, 96, 64, 96, 64),
    "inception_3c": (0, 128, 160, 64, 96, 0),
    "inception_4a": (224, 64, 96, 96, 128, 128),
    "inception_4b": (192, 96, 128, 96, 128, 128),
    "inception_4c": (160, 128, 160, 128, 160, 128),
    "inception_4d": (96, 128, 192, 160, 192, 128),
    "inception_4e": (0, 128, 192, 192, 256, 0),
    "inception_5a": (352, 192, 320, 160, 224, 128),
    "inception_5b": (352, 192, 320, 192, 224, 128),
}
_LAST = "inception_5b"


class BNInception(nn.Module):
    """The network, with logits as its output.

    Its layers lie flat under their original names, so that its state dict is the original's. Each
    convolution has a bias and a batch norm, `<layer>_bn`, and ends in a ReLU.

    Args:
        classes: The number of logits.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        channels = 192
        for name, (one, reduce3, three, reduce_double, double, projection) in _INCEPTIONS.items():
            stride = 1 if one else 2
            if one:
                self._add(f"{name}_1x1", channels, one, 1)
            self._add(f"{name}_3x3_reduce", channels, reduce3, 1)
            self._add(f"{name}_3x3", reduce3, three, 3, stride=stride)
            self._add(f"{name}_double_3x3_reduce", channels, reduce_double, 1)
            self._add(f"{name}_double_3x3_1", reduce_double, double, 3)
            self._add(f"{name}_double_3x3_2", double, double, 3, stride=stride)
            if projection:
                self._add(f"{name}_pool_proj", channels, projection, 1)
            channels = one + three + double + (projection or channels)
        self.max_pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.average = nn.AvgPool2d(3, stride=1, padding=1)
        # The last module's pool takes the maximum, as in the original.
        self.last_pool = nn.MaxPool2d(3, stride=1, padding=1)
        # The original averages 7x7, which is the whole map at its input size of 224.
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.last_linear = nn.Linear(channels, classes)

    def _add(self, name: str, before: int, after: int, size: int, *, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(before, after, size, stride=stride, padding=size // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(after))

    def _run(self, name: str, x: Tensor) -> Tensor:
        normalized: Tensor = self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x))
        return torch.relu(normalized)

    def _inception(self, name: str, x: Tensor) -> Tensor:
        halves = not _INCEPTIONS[name][0]
        three = self._run(f"{name}_3x3", self._run(f"{name}_3x3_reduce", x))
        double = self._run(f"{name}_double_3x3_reduce", x)
        double = self._run(f"{name}_double_3x3_2", self._run(f"{name}_double_3x3_1", double))
        if halves:
            return torch.cat((three, double, self.max_pool(x)), 1)
        pool = self.last_pool if name == _LAST else self.average
        projected = self._run(f"{name}_pool_proj", pool(x))
        return torch.cat((self._run(f"{name}_1x1", x), three, double, projected), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes)."""
        x = self.max_pool(self._run("conv1_7x7_s2", x))
        x = self._run("conv2_3x3", self._run("conv2_3x3_reduce", x))
        x = self.max_pool(x)
        for name in _INCEPTIONS:
            x = self._inception(name, x)
        return self.last_linear(torch.flatten(self.global_pool(x), 1))  # type: ignore[no-any-return]
