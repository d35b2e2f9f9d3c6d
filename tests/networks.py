"""Networks to test with: random, but with weights and statistics like those of trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torchvision.models import GoogLeNet, GoogLeNetOutputs
from torchvision.models.googlenet import BasicConv2d, Inception

SMALL_SIZE = 64
"""The input size of the small networks, in pixels."""


def pictures(count: int = 2, size: int = SMALL_SIZE, seed: int = 0, planes: int = 3) -> np.ndarray:
    """Smooth random pictures, normalised: float32 of shape (count, planes, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((count, planes, 8, 8), generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    fine = torch.randn((count, planes, size, size), generator=generator)
    return (smooth + 0.2 * fine).numpy()


def make_lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights that keep its signal alive, and batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                fan_in = part.weight[0].numel()
                noise = torch.randn(part.weight.shape, generator=generator)
                part.weight.copy_(noise * (2 / fan_in) ** 0.5)
                if part.bias is not None:
                    uniform(part.bias, -0.1, 0.1)
            elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                if part.affine:
                    uniform(part.weight, 0.5, 1.5)
                    uniform(part.bias, -0.3, 0.3)
                uniform(part.running_mean, -0.3, 0.3)
                uniform(part.running_var, 0.5, 1.5)
    return module.eval()


def torchvision_googlenet(
    classes: int = 10, *, aux: bool = True, transform_input: bool = False, seed: int = 0
) -> GoogLeNet:
    """torchvision's GoogLeNet in full size; its input is 224 pixels."""
    module = GoogLeNet(
        num_classes=classes, aux_logits=aux, transform_input=transform_input, init_weights=False
    )
    return make_lively(module, seed)


class SmallNet(nn.Module):
    """A stem, one Inception module, an aux head for training: the family in half a second."""

    def __init__(self, classes: int = 5, *, transform_input: bool = False, planes: int = 3) -> None:
        super().__init__()
        self.transform_input = transform_input
        self.stem = BasicConv2d(planes, 8, kernel_size=7, stride=2, padding=3)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm = nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=1.0)
        self.inception = Inception(8, 8, 4, 8, 4, 8, 8)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
        self.average = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.4)
        self.fc = nn.Linear(32, classes)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.transform_input:
            x = GoogLeNet._transform_input(self, x)
        stem = self.norm(self.pool(self.stem(x)))
        x = self.average(self.inception(stem))
        return self.fc(self.dropout(torch.flatten(x, 1))), stem

    def forward(self, x: Tensor) -> Any:
        logits, stem = self.features(x)
        if self.training:
            return logits, self.aux(stem)
        return logits


class SmallNetWithAuxOutputs(SmallNet):
    """Returns its aux logits in eval mode too, as torchvision's scripted GoogLeNet does."""

    def forward(self, x: Tensor) -> GoogLeNetOutputs:
        logits, stem = self.features(x)
        return GoogLeNetOutputs(logits, self.aux(stem), None)


def small_net(
    classes: int = 5, *, seed: int = 0, transform_input: bool = False, planes: int = 3
) -> SmallNet:
    return make_lively(SmallNet(classes, transform_input=transform_input, planes=planes), seed)


def small_net_with_aux_outputs(classes: int = 5, *, seed: int = 0) -> SmallNetWithAuxOutputs:
    return make_lively(SmallNetWithAuxOutputs(classes), seed)


def _block(channels_in: int, channels: int, size: int, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, size, **options),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class _ReimplementedInception(nn.Module):
    def __init__(self, channels_in: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, projection = widths
        self.b1 = _block(channels_in, one, 1)
        self.b2 = nn.Sequential(
            _block(channels_in, reduce3, 1), _block(reduce3, three, 3, padding=1)
        )
        self.b3 = nn.Sequential(
            _block(channels_in, reduce5, 1), _block(reduce5, five, 5, padding=2)
        )
        self.b4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), _block(channels_in, projection, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1)


class ReimplementedGoogLeNet(nn.Module):
    """As the web teaches it: LRN *and* batch norm, true 5x5, no aux heads, two linear layers."""

    def __init__(self, classes: int = 10, *, divide: int = 1, pool: int = 7) -> None:
        super().__init__()
        table = (
            (64, 96, 128, 16, 32, 32),
            (128, 128, 192, 32, 96, 64),
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
            (256, 160, 320, 32, 128, 128),
            (384, 192, 384, 48, 128, 128),
        )
        self.stem = nn.Sequential(
            _block(3, 64 // divide, 7, stride=2, padding=3),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5),
            _block(64 // divide, 64 // divide, 1),
            _block(64 // divide, 192 // divide, 3, padding=1),
            nn.LocalResponseNorm(5),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        body: list[nn.Module] = []
        channels = 192 // divide
        for index, row in enumerate(table):
            widths = tuple(max(width // divide, 1) for width in row)
            body.append(_ReimplementedInception(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
            if index in (1, 6):
                body.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.body = nn.Sequential(*body)
        self.pool = nn.AvgPool2d(kernel_size=pool, stride=1)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(channels, 1024 // divide),
            nn.ReLU(inplace=True),
            nn.Dropout(0.4),
            nn.Linear(1024 // divide, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.body(self.stem(x))))


def reimplemented_googlenet(classes: int = 10, *, seed: int = 0) -> ReimplementedGoogLeNet:
    """In full size; its input is 224 pixels."""
    return make_lively(ReimplementedGoogLeNet(classes), seed)


def small_reimplemented_googlenet(classes: int = 5, *, seed: int = 0) -> ReimplementedGoogLeNet:
    """All nine modules, an eighth as wide; its input is 64 pixels."""
    return make_lively(ReimplementedGoogLeNet(classes, divide=8, pool=2), seed)


def scale_channels(
    writer: BasicConv2d,
    readers: Sequence[tuple[nn.Conv2d | nn.Linear, int]],
    channels: Sequence[int],
    factor: float,
) -> None:
    """Make channels of a block larger, and undo it where they are read: the function stays.

    What is between may be ReLU, pools and concatenations, which keep positive factors. A common
    scale of the tensor then loses all channels but these.

    Args:
        writer: The block.
        readers: Every layer that reads its output, each with the number of channels before it.
        channels: Which of them.
        factor: How many times as large.
    """
    with torch.no_grad():
        for channel in channels:
            writer.bn.weight[channel] *= factor
            writer.bn.bias[channel] *= factor
            for reader, offset in readers:
                reader.weight[:, offset + channel] /= factor


def ruin_weights(writer: BasicConv2d, reader: nn.Conv2d | nn.Linear, channel: int = 0) -> None:
    """Silence a channel, and give it weights beside which all others are rounded to nothing.

    What is multiplied by zero does not matter in float. No factor can repair it, because the
    channel has no range to be put in line with.

    Args:
        writer: The block that writes the channel.
        reader: The layer whose weights are ruined; the channel is the same in its input.
        channel: Which one.
    """
    with torch.no_grad():
        writer.bn.weight[channel] = 0.0
        writer.bn.bias[channel] = -1.0
        reader.weight[:, channel] = 1000.0


def hostile_googlenet(module: GoogLeNet, factor: float = 50.0) -> GoogLeNet:
    """Scale channels in three places of a GoogLeNet: within a branch, through a Concat, its last.

    Its logits are what they were.
    """
    inside = module.inception4b.branch2
    scale_channels(inside[0], [(inside[1].conv, 0)], (3, 40, 77), factor)
    after = module.inception3b
    readers = [after.branch1, after.branch2[0], after.branch3[0], after.branch4[1]]
    scale_channels(
        module.inception3a.branch1, [(reader.conv, 0) for reader in readers], (0, 31), factor
    )
    scale_channels(module.inception5b.branch1, [(module.fc, 0)], (5, 300), factor)
    return module


def ruined_googlenet(module: GoogLeNet) -> GoogLeNet:
    """Ruin the weights of one layer through which everything goes, `conv3`."""
    ruin_weights(module.conv2, module.conv3.conv)
    return module
