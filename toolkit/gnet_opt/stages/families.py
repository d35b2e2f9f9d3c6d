"""The networks of the GoogLeNet family that are known by the names in their state dicts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.model import Architecture
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.stages.checkpoint import essential_names, first_names

if TYPE_CHECKING:
    from torch import nn

CAFFE = Preprocess(channels="bgr", mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0))
"""What the Caffe model zoo's GoogLeNet was trained with: BGR minus the mean pixel."""

INCEPTION_V3 = Preprocess(resize=342, crop=299)
"""What torchvision evaluates its Inception v3 with, before the network's own `transform_input`
(`Inception_V3_Weights.IMAGENET1K_V1.transforms`)."""

BN_INCEPTION = Preprocess(channels="bgr", mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0))
"""What pretrainedmodels gives for its `bninception` weights."""

ASSUMED_IMAGENET = (
    "No preprocess was given: ImageNet mean and standard deviation are assumed; a model card can "
    "say otherwise."
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What must be known of a network to build it from a state dict.

    Attributes:
        title: Its name in messages.
        create: Builds it with 1000 classes, three input channels and, where it has them, its
            auxiliary heads.
        first: Module name of its first convolution.
        head: Module name of its classifier, one linear layer.
        features: Inputs of the classifier.
        heads: Its auxiliary heads, each with the module name of its classifier.
        dropped: How names in a file start that are of use in training only.
        names: Names in a file mapped to the network's own, or None where they are the same.
        preprocess: How an image becomes its input, where nobody says otherwise.
        assumed: The sentence that says so.
        published: How the SHA-256 of torchvision's published file starts, or nothing.
        weights: The name of torchvision's weights in that file.
    """

    title: str
    create: Callable[[], Any]
    first: str
    head: str
    features: int
    heads: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    names: Callable[[], Mapping[str, str]] | None = None
    preprocess: Preprocess = IMAGENET
    assumed: str = ASSUMED_IMAGENET
    published: str = ""
    weights: str = ""

    def labels(self) -> tuple[str, ...]:
        """The class names of the published weights."""
        from torchvision.models import get_weight

        return tuple(get_weight(self.weights).meta["categories"])


def _googlenet() -> Any:
    from torchvision.models import GoogLeNet

    return GoogLeNet(init_weights=False)


def _inception_v3() -> Any:
    from torchvision.models import Inception3

    return Inception3(init_weights=False)


def _caffe() -> Any:
    from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe

    return GoogLeNetCaffe()


def _caffe_names() -> Mapping[str, str]:
    from gnet_opt.networks.googlenet_caffe import caffe_names

    return caffe_names()


def _bn_inception() -> Any:
    from gnet_opt.networks.bn_inception import BNInception

    return BNInception()


FAMILIES: Mapping[Architecture, Family] = {
    "googlenet": Family(
        title="torchvision's GoogLeNet",
        create=_googlenet,
        first="conv1.conv",
        head="fc",
        features=1024,
        heads={"aux1": "aux1.fc2", "aux2": "aux2.fc2"},
        published="1378be20",
        weights="GoogLeNet_Weights.IMAGENET1K_V1",
    ),
    "googlenet-caffe": Family(
        title="the Caffe GoogLeNet",
        create=_caffe,
        first="conv1",
        head="classifier",
        features=1024,
        dropped=("loss1/", "loss2/"),
        names=_caffe_names,
        preprocess=CAFFE,
        assumed=(
            "No preprocess was given: the Caffe model zoo's (BGR minus 104, 117, 123) is assumed; "
            "a model card can say otherwise."
        ),
    ),
    "inception-v3": Family(
        title="torchvision's Inception v3",
        create=_inception_v3,
        first="Conv2d_1a_3x3.conv",
        head="fc",
        features=2048,
        heads={"AuxLogits": "AuxLogits.fc"},
        preprocess=INCEPTION_V3,
        assumed=(
            "No preprocess was given: Inception v3's 299 pixels (resized to 342) and ImageNet mean "
            "and standard deviation are assumed; a model card can say otherwise."
        ),
        published="0cc3c7bd",
        weights="Inception_V3_Weights.IMAGENET1K_V1",
    ),
    "bn-inception": Family(
        title="BN-Inception",
        create=_bn_inception,
        first="conv1_7x7_s2",
        head="last_linear",
        features=1024,
        preprocess=BN_INCEPTION,
        assumed=(
            "No preprocess was given: that of the BN-Inception in pretrainedmodels (BGR minus 104, "
            "117, 128) is assumed; a model card can say otherwise."
        ),
    ),
}


@functools.cache
def known_names() -> Mapping[Architecture, frozenset[str]]:
    """The names that a state dict of each network has, but for those of classifiers.

    Auxiliary heads may be there or not, and the classifier has many names after fine-tuning.
    """
    import torch

    known: dict[Architecture, frozenset[str]] = {}
    for architecture, family in FAMILIES.items():
        with torch.device("meta"):
            own = family.create().state_dict()
        apart = tuple(f"{name}." for name in (family.head, *family.heads))
        files = {name: name for name in own} if family.names is None else family.names()
        body = {file: name for file, name in files.items() if not name.startswith(apart)}
        known[architecture] = frozenset(essential_names(body))
    return known


def recognise(where: str, names: Collection[str]) -> Architecture:
    """Tell by its names which network of the family a state dict is of.

    Raises:
        ModelError: Less than half of the names of any network are there.
    """
    present = set(names)
    share = {key: len(known & present) / len(known) for key, known in known_names().items()}
    best = max(share, key=lambda key: share[key])
    if share[best] < 0.5:
        known = known_names()[best]
        surplus = [name for name in names if name not in known]
        missing = sorted(known - present)
        raise ModelError(
            f"{where} is not a GoogLeNet: of {len(known)} names it has "
            f"{len(known) - len(missing)}. Keys not known: {first_names(surplus)}; missing: "
            f"{first_names(missing)}. For another network pass package.module:factory."
        )
    return best


def family_of(module: nn.Module) -> Family | None:
    """The family whose names a network has, apart from its classifier; None for any other."""
    names = set(module.state_dict())
    return next((FAMILIES[key] for key, known in known_names().items() if known <= names), None)


def architecture_of(module: nn.Module) -> Architecture:
    """Which network of the family a module is, by its class."""
    from torchvision.models import GoogLeNet, Inception3

    from gnet_opt.networks.bn_inception import BNInception
    from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe

    classes: tuple[tuple[type, Architecture], ...] = (
        (GoogLeNet, "googlenet"),
        (GoogLeNetCaffe, "googlenet-caffe"),
        (Inception3, "inception-v3"),
        (BNInception, "bn-inception"),
    )
    return next((name for kind, name in classes if type(module) is kind), "module")
