"""Load a trained model from whatever the user has, and settle what travels with it.

`stages/checkpoint.py` reads the files. What does not fit is reported with the file and the first
keys; nothing is loaded halfway.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.cards import ModelCard
from gnet_opt.errors import ConfigError, ModelError, require
from gnet_opt.files import sha256_file
from gnet_opt.model import Architecture, Model
from gnet_opt.paths import demo_card
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.stages.checkpoint import (
    check_values,
    close_names,
    essential_names,
    existing_file,
    first_names,
    fit,
    hash_tensors,
    read_state_dict,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

CAFFE = Preprocess(channels="bgr", mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0))
"""What the Caffe model zoo's GoogLeNet was trained with: BGR minus the mean pixel."""

_PUBLISHED_HASH = "1378be20"
"""How the SHA-256 of torchvision's published googlenet-1378be20.pth starts."""

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

_ASSUMED_IMAGENET = (
    "No preprocess was given: ImageNet mean and standard deviation are assumed; a model card can "
    "say otherwise."
)
_ASSUMED_NO_TRANSFORM = (
    "The weights are not torchvision's published file, so transform_input is taken to be off; "
    "a model card can say otherwise."
)
_RECOGNISED = (
    "No preprocess was given: the weights are torchvision's published file, so ImageNet mean and "
    "standard deviation, followed by transform_input, are used."
)
_ASSUMED_CAFFE = (
    "No preprocess was given: the Caffe model zoo's (BGR minus 104, 117, 123) is assumed; a model "
    "card can say otherwise."
)


def load(spec: str | Path | None, *, card: str | Path | None = None) -> Model:
    """Load a model.

    Args:
        spec: None for the embedded demo model; the word `torchvision` for torchvision's ImageNet
            weights, which torchvision downloads; a model card `.toml`; a state dict `.pth`,
            `.pt` or `.safetensors` with the names of torchvision's GoogLeNet or of the Caffe
            original; or `package.module:factory` for any `nn.Module`.
        card: A model card that describes `spec` where that is not a card itself: name, labels,
            classes and preprocess. The card's own `weights` are not read then.

    Raises:
        ModelError: The model cannot be read, or is not what it is said to be.
        ConfigError: The card cannot be used.
        MissingDependencyError: torch or another package is not installed.
    """
    for package in ("torch", "torchvision", "safetensors"):
        require(package, "build", "load a model")
    described = None if card is None else ModelCard.open(Path(card))
    if spec is None:
        return _load_card(ModelCard.open(demo_card()) if described is None else described)
    text = str(spec)
    if text.endswith(".toml"):
        if described is not None:
            raise ConfigError(f"{text} is a model card already. Pass one card, not two.")
        return _load_card(ModelCard.open(existing_file(Path(text))))
    if text == "torchvision":
        return _load_torchvision(described)
    if _FACTORY.fullmatch(text) and not Path(text).exists():
        return _load_factory(text, described)
    return _load_checkpoint(existing_file(Path(text)), described)


def from_module(
    module: nn.Module,
    *,
    name: str = "",
    preprocess: Preprocess | None = None,
    labels: Sequence[str] = (),
) -> Model:
    """Take a network from memory. The caller's module is copied, not changed.

    Args:
        module: Any image classifier: (N, 3, H, W) in, logits (N, classes) out, or a tuple, list
            or dict with them. Its `transform_input`, where it has one, is folded into the
            preprocess.
        name: A short name; the class name where none is given.
        preprocess: What `module` expects as its input (before its own `transform_input`);
            ImageNet's where none is given.
        labels: Class names by index.

    Raises:
        ModelError: The network fails, has no logits, is not deterministic in eval mode or has
            weights that are not finite; or `labels` do not match its classes.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{type(module).__name__} is not a torch.nn.Module. Pass the network itself."
        )
    name = name or type(module).__name__
    return _take(
        _Loaded(
            module=module,
            where=f"The module {name}",
            name=name,
            architecture=_architecture(module),
            sha256=None,
            source=f"{type(module).__module__}.{type(module).__qualname__}, from memory",
        ),
        preprocess=preprocess,
        labels=tuple(labels),
    )


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A network before its preprocess, classes and labels are settled."""

    module: nn.Module
    where: str
    name: str
    architecture: Architecture
    sha256: str | None
    source: str
    assumptions: tuple[str, ...] = ()
    classes: int | None = None
    """Known where the network was built here; else it is found by running the network."""


# --- from a card, from torchvision, from a checkpoint, from a factory -------------------------


def _load_card(card: ModelCard) -> Model:
    if card.factory is not None:
        return _load_factory(card.factory, card, weights=card.weights)
    if card.weights is None:
        raise ConfigError(
            f"{card.path}: weights is missing. Name the checkpoint, relative to the card, or pass "
            "the checkpoint as MODEL and this file as its card."
        )
    if not card.weights.exists():
        raise ModelError(
            f"{card.path}: weights names {card.weights}, which does not exist."
            f"{close_names(card.weights)} Correct the path; it is relative to the card."
        )
    return _load_checkpoint(card.weights, card)


def _load_torchvision(card: ModelCard | None) -> Model:
    import torch
    from torchvision.models import GoogLeNet_Weights

    weights = GoogLeNet_Weights.IMAGENET1K_V1
    try:
        # torchvision's own download and hash check, but without its free unpickling.
        state = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"torchvision cannot download its GoogLeNet weights ({error}). Check the network, or "
            f"fetch {weights.url} elsewhere and pass the file as MODEL."
        ) from error
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    sha256 = sha256_file(cached) if cached.is_file() else hash_tensors(state)
    where = "torchvision's GoogLeNet weights"
    module, notes = _build_googlenet(where, state)
    # The transform belongs to these weights, unless a card describes their input otherwise.
    module.transform_input = card is None or card.preprocess is None or card.transform_input
    loaded = _Loaded(
        module=module,
        where=where,
        name="torchvision-googlenet",
        architecture="googlenet",
        sha256=sha256,
        source=f"torchvision GoogLeNet_Weights.IMAGENET1K_V1, {weights.url}",
        assumptions=notes,
        classes=module.fc.out_features,
    )
    return _take(loaded, preprocess=IMAGENET, labels=_published_labels(), card=card)


def _load_checkpoint(path: Path, card: ModelCard | None) -> Model:
    tensors = read_state_dict(path)
    architecture = _recognise(str(path), tensors) if card is None else card.architecture
    sha256 = sha256_file(path)
    published = sha256.startswith(_PUBLISHED_HASH)
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    module: Any
    if architecture == "googlenet-caffe":
        module = _build_caffe(str(path), tensors)
        classes = module.classifier.out_features
        default, assumed = CAFFE, _ASSUMED_CAFFE
    elif architecture == "googlenet":
        module, notes = _build_googlenet(str(path), tensors)
        classes = module.fc.out_features
        default, assumed = IMAGENET, _ASSUMED_IMAGENET
        undescribed = card is None or card.preprocess is None
        module.transform_input = (published and undescribed) or (
            card is not None and card.transform_input
        )
        if published:
            labels, assumed = _published_labels(), _RECOGNISED
        elif card is None:
            notes += (_ASSUMED_NO_TRANSFORM,)
    else:
        raise ModelError(
            f"{path} is a state dict, and {card.path if card else 'its card'} says architecture "
            "'module'. Pass the card itself, so that its factory builds the network."
        )
    loaded = _Loaded(
        module=module,
        where=str(path),
        name=path.stem,
        architecture=architecture,
        sha256=sha256,
        source=f"the file {path.name}",
        assumptions=notes,
        classes=classes,
    )
    return _take(loaded, labels=labels, card=card, default=default, assumed=assumed)


def _published_labels() -> tuple[str, ...]:
    from torchvision.models import GoogLeNet_Weights

    return tuple(GoogLeNet_Weights.IMAGENET1K_V1.meta["categories"])


def _load_factory(spec: str, card: ModelCard | None, weights: Path | None = None) -> Model:
    module = _call_factory(spec)
    sha256 = None
    if weights is not None:
        tensors = read_state_dict(weights, module.state_dict())
        fit(str(weights), f"the network of {spec}", module, tensors)
        sha256 = sha256_file(weights)
    loaded = _Loaded(
        module=module,
        where=spec,
        name=spec.rsplit(":", 1)[-1],
        architecture=_architecture(module),
        sha256=sha256,
        source=spec if weights is None else f"{spec} with {weights.name}",
    )
    return _take(loaded, card=card)


def _take(
    loaded: _Loaded,
    *,
    preprocess: Preprocess | None = None,
    labels: tuple[str, ...] = (),
    card: ModelCard | None = None,
    default: Preprocess = IMAGENET,
    assumed: str = _ASSUMED_IMAGENET,
) -> Model:
    """Settle preprocess, classes and labels, and check that the network runs.

    Args:
        loaded: The network as read.
        preprocess: As given by the caller or fixed by the weights; a card's goes before it.
        labels: Likewise.
        card: The card that describes the network.
        default: The preprocess where nobody gives one.
        assumed: The sentence that says so.
    """
    notes = loaded.assumptions
    if card is not None:
        preprocess = card.preprocess or preprocess
        labels = card.labels or labels
    if preprocess is None:
        preprocess = default
        notes = (assumed, *notes)
    if preprocess.input != "float32":
        raise ConfigError(
            f"preprocess.input is {preprocess.input!r}, but {loaded.where} is a network, which "
            "takes float32. Leave it out, and ask for a model that takes pixels with --input uint8."
        )
    module = _ready(loaded)
    preprocess, folded = _fold_transform_input(module, loaded, preprocess)
    notes += folded
    classes = loaded.classes
    if classes is None:
        classes, found = _probe(module, loaded.where, preprocess.crop)
        notes += found
    if card is not None and card.classes is not None and card.classes != classes:
        raise ModelError(
            f"{card.path}: classes is {card.classes}, but {loaded.where} has {classes} classes. "
            "Correct the card, or name other weights."
        )
    if labels and len(labels) != classes:
        raise ModelError(
            f"{loaded.where} has {classes} classes, but "
            f"{card.path if card is not None and card.labels else 'the caller'} gives "
            f"{len(labels)} labels. Give one label a class, in index order."
        )
    return Model(
        module=module,
        name=card.name if card is not None else loaded.name,
        architecture=loaded.architecture,
        classes=classes,
        labels=labels,
        preprocess=preprocess,
        sha256=loaded.sha256 or hash_tensors(module.state_dict()),
        source=(card.source if card is not None else "") or loaded.source,
        assumptions=notes,
    )


# --- building networks ------------------------------------------------------------------------


def _recognise(where: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """Tell torchvision's names from Caffe's; at least half of the names must be there."""
    from gnet_opt.networks.googlenet_caffe import caffe_names

    names: dict[Architecture, set[str]] = {
        "googlenet": set(essential_names(_new_googlenet(1, None).state_dict())),
        "googlenet-caffe": set(caffe_names()),
    }
    share = {key: len(known & set(tensors)) / len(known) for key, known in names.items()}
    best = max(share, key=lambda key: share[key])
    if share[best] < 0.5:
        known = names[best]
        surplus = [name for name in tensors if name not in known]
        missing = [name for name in known if name not in tensors]
        raise ModelError(
            f"{where} is not a GoogLeNet: of {len(known)} names it has "
            f"{len(known) - len(missing)}. Keys not known: {first_names(surplus)}; missing: "
            f"{first_names(sorted(missing))}. For another network pass package.module:factory."
        )
    return best


def _new_googlenet(classes: int, aux_classes: int | None) -> Any:
    """torchvision's network with weights that are still to be loaded."""
    import torch
    from torchvision.models import GoogLeNet

    # On the meta device no time is spent on random weights.
    with torch.device("meta"):
        module = GoogLeNet(
            num_classes=classes, aux_logits=aux_classes is not None, init_weights=False
        )
        if aux_classes is not None:
            for head in (module.aux1, module.aux2):
                head.fc2 = torch.nn.Linear(head.fc2.in_features, aux_classes)
    module = module.to_empty(device="cpu").eval()
    for name, buffer in module.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return module


def _build_googlenet(where: str, tensors: Mapping[str, Tensor]) -> tuple[Any, tuple[str, ...]]:
    """torchvision's GoogLeNet with these weights, with aux heads where the file has whole ones.

    After fine-tuning, the aux heads often keep another number of classes than the network;
    they are stripped later on, so that is fine.
    """
    classes = _rows(tensors.get("fc.weight"), 1000)
    heads = {key: value for key, value in tensors.items() if key.startswith(("aux1.", "aux2."))}
    body = {key: value for key, value in tensors.items() if key not in heads}
    if heads:
        module = _new_googlenet(classes, _rows(heads.get("aux1.fc2.weight"), 1000))
        expected = module.state_dict()
        wanted = [key for key in essential_names(expected) if key.startswith(("aux1.", "aux2."))]
        if all(key in heads and heads[key].shape == expected[key].shape for key in wanted):
            fit(where, "torchvision's GoogLeNet", module, {**body, **heads})
            return module, ()
    module = _new_googlenet(classes, None)
    fit(where, "torchvision's GoogLeNet", module, body)
    if not heads:
        return module, ()
    return module, (
        "The auxiliary heads in the file are incomplete or of another shape; they are not used "
        "after training and were left out.",
    )


def _build_caffe(where: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The 2014 original from Caffe layer names; the auxiliary losses 1 and 2 are left out."""
    import torch

    from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe, caffe_names

    classes = _rows(tensors.get("loss3/classifier.weight"), 1000)
    with torch.device("meta"):
        module = GoogLeNetCaffe(classes)
    module = module.to_empty(device="cpu").eval()
    body = {k: v for k, v in tensors.items() if not k.startswith(("loss1/", "loss2/"))}
    fit(where, "the Caffe GoogLeNet", module, body, names=caffe_names())
    return module


def _rows(tensor: Tensor | None, otherwise: int) -> int:
    return int(tensor.shape[0]) if tensor is not None and tensor.dim() == 2 else otherwise


def _call_factory(spec: str) -> nn.Module:
    from torch import nn

    module_name, attribute = spec.split(":")
    with _importable_cwd():
        try:
            value: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise ModelError(
                    f"{spec}: {module_name} needs the module {error.name}, which is not "
                    "installed. Install it."
                ) from error
            raise ModelError(
                f"{spec}: there is no module {error.name}. Run from the folder that holds it, or "
                "install it."
            ) from error
        except Exception as error:
            raise ModelError(
                f"{spec}: importing {module_name} fails with {type(error).__name__}: {error}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(value, part):
                close = difflib.get_close_matches(part, dir(value), n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ModelError(f"{spec}: {module_name} has no {attribute}.{hint}")
            value = getattr(value, part)
        if isinstance(value, nn.Module):
            return value
        if not callable(value):
            raise ModelError(
                f"{spec} is a {type(value).__name__}, neither a network nor a function."
            )
        try:
            built = value()
        except Exception as error:
            raise ModelError(
                f"{spec}: calling {attribute}() fails with {type(error).__name__}: {error}"
            ) from error
    if not isinstance(built, nn.Module):
        raise ModelError(
            f"{spec} returns a {type(built).__name__}. Return a torch.nn.Module with its weights."
        )
    return built


@contextlib.contextmanager
def _importable_cwd() -> Iterator[None]:
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


# --- settling ---------------------------------------------------------------------------------


def _architecture(module: nn.Module) -> Architecture:
    from torchvision.models import GoogLeNet

    from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe

    if type(module) is GoogLeNet:
        return "googlenet"
    return "googlenet-caffe" if type(module) is GoogLeNetCaffe else "module"


def _ready(loaded: _Loaded) -> nn.Module:
    """A copy of the network in eval mode, on the CPU, in float32, with finite weights."""
    try:
        module = copy.deepcopy(loaded.module).cpu().float().eval().requires_grad_(False)
    except Exception as error:
        raise ModelError(
            f"{loaded.where} cannot be copied to the CPU as float32: "
            f"{type(error).__name__}: {error}"
        ) from error
    check_values(loaded.where, module.state_dict())
    return module


def _fold_transform_input(
    module: nn.Module, loaded: _Loaded, preprocess: Preprocess
) -> tuple[Preprocess, tuple[str, ...]]:
    """Move a network's `transform_input` into the preprocess, and switch it off in the network.

    Folding it into the first convolution instead would be wrong at the borders: the convolution
    pads with zeros after the transform, and an offset folded into its bias shifts them.

    Returns:
        The preprocess for the changed network, and what is to be said about it. A module whose
        transform has other constants than torchvision's keeps it, and that is said.
    """
    import torch

    from gnet_opt.networks.outputs import main_logits

    if getattr(module, "transform_input", False) is not True:
        return preprocess, ()
    folded = compose_transform_input(preprocess)
    if loaded.architecture == "googlenet":
        module.transform_input = False  # type: ignore[assignment]
        return folded, ()
    size = preprocess.crop
    noise = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)) * 255
    transformed = (_normalized(noise, preprocess), _normalized(noise, folded))
    before = main_logits(_run(module, loaded.where, transformed[0]))
    module.transform_input = False  # type: ignore[assignment]
    after = main_logits(_run(module, loaded.where, transformed[1]))
    scale = float(before.max() - before.min())
    if float((before - after).abs().max()) <= 1e-4 * scale:
        return folded, ()
    module.transform_input = True  # type: ignore[assignment]
    return preprocess, (
        "The network's transform_input differs from torchvision's, so it stays a part of the "
        "network instead of the preprocess.",
    )


def compose_transform_input(preprocess: Preprocess) -> Preprocess:
    """One exact step for `preprocess` followed by torchvision's `transform_input`.

    That transform is `x * (s / 0.5) + (m - 0.5) / 0.5` with ImageNet's mean m and deviation s of
    the channel's position (torchvision/models/googlenet.py). In decimal arithmetic ImageNet's
    preprocess becomes `x / 127.5 - 1`, without rounding.
    """
    half = Fraction(1, 2)
    means: list[float] = []
    stds: list[float] = []
    constants = (("0.485", "0.229"), ("0.456", "0.224"), ("0.406", "0.225"))
    for (m, s), mean, std in zip(constants, preprocess.mean, preprocess.std, strict=True):
        scale = Fraction(s) / half
        offset = (Fraction(m) - half) / half
        exact_mean, exact_std = Fraction(repr(float(mean))), Fraction(repr(float(std)))
        means.append(float(exact_mean - offset * exact_std / scale))
        stds.append(float(exact_std / scale))
    composed = preprocess.to_dict() | {"mean": means, "std": stds}
    return Preprocess.from_dict(composed)


def _normalized(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    import torch

    mean = torch.tensor(preprocess.mean).reshape(1, 3, 1, 1)
    std = torch.tensor(preprocess.std).reshape(1, 3, 1, 1)
    return (pixels - mean) / std


def _probe(module: nn.Module, where: str, size: int) -> tuple[int, tuple[str, ...]]:
    """Run the network once to find its classes and what its output looks like."""
    import torch

    from gnet_opt.networks.outputs import logits_candidates, main_logits

    noise = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    output = _run(module, where, noise)
    logits = main_logits(output)
    if not torch.equal(logits, main_logits(_run(module, where, noise))):
        raise ModelError(
            f"{where} gives different logits for the same input in eval mode. Perhaps it calls "
            "F.dropout without training=self.training."
        )
    notes: tuple[str, ...] = ()
    count = len(logits_candidates(output))
    if count > 1:
        notes += (
            f"The network returns {count} outputs of shape (N, classes) in eval mode: the first "
            "is taken as the logits.",
        )
    sums = logits.double().sum(1)
    if float(logits.min()) >= 0 and float((sums - 1).abs().max()) < 1e-4:
        notes += (
            "The network's output sums to 1: it seems to end in a softmax, which is kept in float.",
        )
    return int(logits.shape[1]), notes


def _run(module: nn.Module, where: str, images: Tensor) -> Any:
    import torch

    try:
        with torch.no_grad():
            return module(images.clone())
    except Exception as error:
        raise ModelError(
            f"{where} fails on an input of shape {tuple(images.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
