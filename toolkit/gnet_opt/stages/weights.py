"""Find the weights of a network in what a checkpoint file holds, and take nothing else.

`stages/networks_in_file.py` finds the networks. Here the weights of one are taken: what is missing
in them, what stands beside them and how they are stored is told or refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown
from gnet_opt.stages.networks_in_file import (
    Candidate,
    candidates_of,
    choose,
    inside_of,
    quantized,
    short_name,
    tables_of,
)
from gnet_opt.stages.reparametrized import OBSERVERS, UNKNOWN, is_plain

if TYPE_CHECKING:
    from torch import Tensor

_AUXILIARY = ("aux", "AuxLogits.", "loss1/", "loss2/")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weights of one network.

    Attributes:
        tensors: By the network's own names.
        notes: What was chosen, computed or left out, in sentences for the user.
        transform_input: Whether the network applies torchvision's `transform_input`; None where
            the file does not say, which only a whole pickled network does.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    transform_input: bool | None = None


def find_weights(
    path: str | Path, content: Any, known: Mapping[Any, Collection[str]], choice: str | None
) -> Checkpoint:
    """Find the weights of one network.

    Args:
        path: The file, or what the content came from, for messages.
        content: What it holds: tables, lists, tensors and stand-ins of layers.
        known: The networks to look for, each with the names that it has to have.
        choice: Which weights to take where there are several: `ema`, or a part of the way to them.

    Returns:
        The weights. Where none of the networks is there, those of the largest table, so that the
        caller can say what is wrong with them.

    Raises:
        ModelError: There are no weights or several networks, or the choice is none of them.
    """
    tables, refused = tables_of(path, content)
    found = [candidate for table in tables for candidate in candidates_of(table, known)]
    if not found and refused is not None:
        raise refused
    if not tables:
        raise _no_weights(path, content)
    if not found:
        largest = max(tables, key=lambda table: len(table.tensors))
        _refuse_quantized(path, largest.tensors)
        if choice is not None:
            raise ModelError(
                f"{path} has no network that is known, so there is none to choose as "
                f"{shown(choice)}. Leave --weights out to see what is in it."
            )
        return Checkpoint(tensors=largest.tensors, transform_input=largest.transform_input)
    candidate, notes = choose(path, found, choice)
    return _take(path, candidate, found, notes, chosen=choice is not None)


def _take(
    path: str | Path,
    candidate: Candidate,
    found: list[Candidate],
    notes: tuple[str, ...],
    *,
    chosen: bool,
) -> Checkpoint:
    inside = inside_of(candidate, found)
    _refuse_quantized(path, inside)
    inside, observers = _without_observers(inside)
    if observers:
        notes += (
            f"{observers} tensors of torch's quantization observers were left out: the float "
            "weights are taken, and calibration finds the ranges anew.",
        )
    notes += _computed_notes(candidate)
    strange = [name for name in inside if name not in candidate.names and UNKNOWN.search(name)]
    if strange:
        raise ModelError(
            f"{path} holds {shown(strange[0])}, a part from which torch computes a weight in a way "
            "that is not known here. Remove the parametrization (torch.nn.utils.parametrize."
            "remove_parametrizations, or remove_spectral_norm), and save the state dict again."
        )
    prefixes = tuple(c.prefix for c in found if c.table is candidate.table)
    outside = {
        name: tensor
        for name, tensor in candidate.table.tensors.items()
        # torch.optim.swa_utils.AveragedModel counts beside its `module.`.
        if not name.startswith(prefixes) and name != "n_averaged"
    }
    if outside:
        inside, left = _with_classifier(inside, outside)
        notes += _outside_notes(path, candidate, found, inside, left, chosen=chosen)
    _refuse_unusable(path, inside)
    return Checkpoint(tensors=inside, notes=notes, transform_input=candidate.table.transform_input)


def _without_observers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    kept = {name: tensor for name, tensor in tensors.items() if not OBSERVERS.search(name)}
    return kept, len(tensors) - len(kept)


def _computed_notes(candidate: Candidate) -> tuple[str, ...]:
    kinds: dict[str, list[str]] = {}
    for name, kind in candidate.table.computed.items():
        if name.startswith(candidate.prefix):
            kinds.setdefault(kind, []).append(name)
    notes: tuple[str, ...] = ()
    if names := kinds.get("pruning"):
        weights = [candidate.table.tensors[name] for name in names]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        share = 100 * zeros / max(1, sum(weight.numel() for weight in weights))
        notes += (
            f"{len(names)} pruned weights were multiplied with their masks; {share:.1f} % of their "
            "values are zero.",
        )
    if names := kinds.get("weight normalisation"):
        notes += (
            f"{len(names)} weights were computed from the lengths and directions that weight "
            "normalisation keeps.",
        )
    return notes


def _classifiers(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The weights of linear layers, but for those of auxiliary heads."""
    return [
        tensor
        for name, tensor in tensors.items()
        # Batch norms converted from old Caffe files are (1, channels).
        if tensor.dim() == 2 and not name.startswith(_AUXILIARY) and "_bn." not in name
    ]


def _with_classifier(
    inside: dict[str, Tensor], outside: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take a head from beside the body, as in `self.backbone = ...; self.head = nn.Linear(...)`."""
    if _classifiers(inside):
        return inside, outside
    heads = {
        name.partition(".")[0]
        for name, tensor in outside.items()
        if tensor.dim() == 2 and name.endswith(".weight") and not _is_loss(name)
    }
    taken = {name: t for name, t in outside.items() if name.partition(".")[0] in heads}
    return {**inside, **taken}, {n: t for n, t in outside.items() if n not in taken}


def _is_loss(name: str) -> bool:
    return re.search(r"loss|criterion|metric", name.partition(".")[0].lower()) is not None


def _outside_notes(
    path: str | Path,
    candidate: Candidate,
    found: list[Candidate],
    inside: Mapping[str, Tensor],
    outside: Mapping[str, Tensor],
    *,
    chosen: bool,
) -> tuple[str, ...]:
    """Say what is left out, and refuse to leave out what may belong to the computation.

    Raises:
        ModelError: A layer stands beside the network that takes its logits or makes its input.
    """
    if not outside:
        return ()
    way = candidate.prefix.removesuffix(".")
    classes = {weight.shape[0] for weight in _classifiers(inside)}
    first = next((tensor for tensor in inside.values() if tensor.dim() == 4), None)
    planes = None if first is None else first.shape[1]
    attached = [
        name
        for name, tensor in outside.items()
        if name.endswith("weight")
        and not _is_loss(name)
        and (
            (tensor.dim() == 2 and tensor.shape[1] in classes)
            or (tensor.dim() == 4 and tensor.shape[0] == planes)
        )
    ]
    if attached and not chosen:
        raise ModelError(
            f"{path}: beside the network {shown(way)} there is {shown(attached[0])}, which takes "
            "what the network gives or gives what it takes, so it may belong to the model. To "
            f"take the network alone, pass --weights {short_name(candidate, found)}; to keep both, "
            "pass package.module:factory."
        )
    groups = Counter(name.partition(".")[0] for name in outside)
    listed = ", ".join(f"{shown(group)} {n}" for group, n in groups.most_common(_SHOWN))
    more = ", ..." if len(groups) > _SHOWN else ""
    count = "1 tensor" if len(outside) == 1 else f"{len(outside)} tensors"
    notes: tuple[str, ...] = (
        f"Left out: {count} beside the network {shown(way)} ({listed}{more}).",
    )
    scales = [
        name
        for name, tensor in outside.items()
        if re.search(r"(?:^|[._])(?:mean|std)$", name) and tensor.numel() == planes
    ]
    if scales:
        notes += (
            f"Among them is {shown(scales[0])}, which seems to normalise the network's input: "
            "state it as mean and std under [preprocess] in a model card.",
        )
    return notes


# --- refusing ---------------------------------------------------------------------------------


def _no_weights(path: str | Path, content: Any) -> ModelError:
    if not isinstance(content, Mapping):
        return ModelError(
            f"{path} holds a {type(content).__name__}, not a state dict. Save the weights with "
            "torch.save(model.state_dict(), ...)."
        )
    # The innermost keys say more than those that wrap them.
    for _ in range(_SHOWN):
        inner = next(iter(content.values())) if len(content) == 1 else None
        content = inner if isinstance(inner, Mapping) else content
    keys = ", ".join(shown(str(key)) for key in list(content)[:_SHOWN]) or "none"
    return ModelError(
        f"{path} holds no weights (its keys: {keys}). Save the state dict of the network, with "
        "torch.save(model.state_dict(), ...)."
    )


def _refuse_quantized(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    if any(tensor.is_quantized for tensor in tensors.values()):
        raise quantized(path)
    fused = [name for name in tensors if re.search(r"\.conv\.0\.(weight|bias)$", name)]
    if len(fused) > 2 and not any(".bn." in name for name in tensors):
        raise ModelError(
            f"{path} holds a network whose batch norms are fused into its convolutions "
            f"({shown(fused[0])}). Pass the checkpoint from before fuse_model()."
        )


def _refuse_unusable(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no plain array in memory, or claims more values than the file holds."""
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            kind, layout = (
                str(what).removeprefix("torch.") for what in (tensor.dtype, tensor.layout)
            )
            raise ModelError(
                f"{path}: {shown(name)} is stored as {kind} ({layout}, {tensor.device.type}) and "
                f"claims {tensor.numel()} values, which cannot be read. Save it as a plain tensor "
                "in float32, float16 or bfloat16."
            )
