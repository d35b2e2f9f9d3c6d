"""Every place in a checkpoint file where a known network stands, and the choice of one.

Nothing goes by lists of wrapping keys and prefixes. Every table in the file is looked at, and a
network is where at least half of its names stand, behind whatever prefix. So two networks in one
file are seen as two, and what stands beside the network is seen to be no part of it.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown
from gnet_opt.stages.reparametrized import compute, plain_names
from gnet_opt.stages.unpickle import PickledModule
from gnet_opt.stages.whole_network import take_weights

if TYPE_CHECKING:
    from torch import Tensor

_SHARE = 0.5
"""A network is where at least this share of its names is."""

_DEPTH = 8
_AVERAGED = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|avg|shadow|polyak)(?:[^a-z]|$)")
_UNNAMED = "plain"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The tensors that stand together in a file, and the keys that lead to them."""

    path: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    computed: Mapping[str, str] = field(default_factory=dict)
    transform_input: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One network in a file: its table, and the prefix of its names there."""

    table: Table
    prefix: str
    names: Collection[str]
    matches: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys and parts of the prefix that lead to it, as `--weights` takes them."""
        return (*self.table.path, *self.prefix.split(".")[:-1])

    @property
    def label(self) -> str:
        """All of them, as `--weights` takes them."""
        return ".".join(self.parts) or _UNNAMED

    @property
    def averaged(self) -> bool:
        """Whether it goes by a name of averaged weights, such as `state_dict_ema`."""
        return _AVERAGED.search(self.label.lower()) is not None


# --- looking through the file -----------------------------------------------------------------


def tables_of(path: str | Path, content: Any) -> tuple[list[Table], ModelError | None]:
    """Every table with tensors, once; a file can make a table hold itself.

    Returns:
        The tables, and why the first of those that cannot be used was passed over.
    """
    import torch

    tables: list[Table] = []
    refused: ModelError | None = None
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    while waiting:
        way, value = waiting.popleft()
        if id(value) in seen or len(way) > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, PickledModule):
            if value.origin.startswith("torch.nn.modules.loss."):
                continue
            try:
                tables.append(_table(way, *take_weights(path, value)))
            except ModelError as error:
                refused = refused or error
            continue
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if not isinstance(value, Mapping):
            continue
        # Text and numbers alone: a key of another kind is no name, and can take ages to print.
        items = {str(key): item for key, item in value.items() if isinstance(key, (str, int))}
        tensors = {key: item for key, item in items.items() if isinstance(item, torch.Tensor)}
        if any("_packed_params" in key for key in items):
            refused = refused or quantized(path)
        elif tensors:
            tables.append(_table(way, tensors))
        waiting.extend(
            ((*way, key), item)
            for key, item in items.items()
            if isinstance(item, (Mapping, list, tuple, PickledModule))
        )
    return tables, refused


def _table(
    way: tuple[str, ...], tensors: Mapping[str, Tensor], transform_input: bool | None = None
) -> Table:
    import torch

    # The bare tensor: attributes and hooks that the file gives to one are left behind. The method
    # is the class's own, as an attribute of the same name would come from the file.
    bare = {name: torch.Tensor.detach(tensor) for name, tensor in plain_names(tensors).items()}
    plain, computed = compute(bare)
    return Table(path=way, tensors=plain, computed=computed, transform_input=transform_input)


def candidates_of(table: Table, known: Mapping[Any, Collection[str]]) -> Iterator[Candidate]:
    """Each prefix of a table behind which a known network stands."""
    best: dict[str, Candidate] = {}
    for names in known.values():
        wanted = frozenset(names)
        if len(table.tensors) < _SHARE * len(wanted):
            continue
        depth = max((name.count(".") for name in wanted), default=0) + 1
        counts: Counter[str] = Counter()
        for name in table.tensors:
            parts = name.rsplit(".", depth)
            for size in range(1, len(parts) + 1):
                own = ".".join(parts[-size:])
                if own in wanted:
                    counts[name[: len(name) - len(own)]] += 1
        for prefix, matches in counts.items():
            if matches < _SHARE * len(wanted):
                continue
            made = Candidate(table=table, prefix=prefix, names=wanted, matches=matches)
            if prefix not in best or matches > best[prefix].matches:
                best[prefix] = made
    yield from best.values()


# --- choosing ---------------------------------------------------------------------------------


def choose(
    path: str | Path, found: list[Candidate], choice: str | None
) -> tuple[Candidate, tuple[str, ...]]:
    """The network to take, and a note where there are averaged weights of it, too.

    Raises:
        ModelError: There are several and no choice, or the choice is none of them.
    """
    if choice is not None:
        chosen = _chosen(path, found, choice)
        return chosen, (f"Of the weights in the file, {short_name(chosen, found)} was taken.",)
    plain = [candidate for candidate in found if not candidate.averaged]
    usual = plain or found
    if len(usual) > 1:
        if plain and _all_equal(plain):
            usual = plain[:1]
        else:
            raise ModelError(
                f"{path} holds {len(usual)} networks: {_names(usual, found)}. Choose one with "
                f"--weights {short_name(usual[0], found)}, or with weights_key in a model card."
            )
    others = [candidate for candidate in found if candidate.averaged and plain]
    if not others:
        return usual[0], ()
    word = "ema" if len(others) == 1 else short_name(others[0], found)
    return usual[0], (
        f"The file holds averaged weights, too ({_names(others, found)}), and "
        f"{short_name(usual[0], found)} was taken. To take the averaged ones, pass "
        f"--weights {word}, or set weights_key in a model card.",
    )


def _chosen(path: str | Path, found: list[Candidate], choice: str) -> Candidate:
    fitting = [candidate for candidate in found if choice == candidate.label]
    fitting = fitting or [candidate for candidate in found if choice in candidate.parts]
    if choice == "ema" and not fitting:
        fitting = [candidate for candidate in found if candidate.averaged]
    if len(fitting) == 1:
        return fitting[0]
    what = f"has no weights {shown(choice)}" if not fitting else f"has several {shown(choice)}"
    raise ModelError(f"{path} {what}. It holds {_names(found, found)}; pass one of these names.")


def _names(some: list[Candidate], found: list[Candidate]) -> str:
    return ", ".join(short_name(candidate, found) for candidate in some[:8])


def short_name(candidate: Candidate, found: list[Candidate]) -> str:
    """The shortest word that `--weights` takes for it."""
    together = all(other.table is candidate.table for other in found)
    parts = candidate.parts[len(candidate.table.path) :] if together else candidate.parts
    for part in parts:
        if sum(part in other.parts for other in found) == 1:
            return shown(part)
    return shown(candidate.label)


def _all_equal(found: list[Candidate]) -> bool:
    """Whether these are one network under several names, as `model` and `best` can be."""
    import torch

    first, *others = (inside_of(candidate, found) for candidate in found)
    return all(
        set(first) == set(other)
        and all(
            tensor.shape == other[name].shape
            and tensor.dtype == other[name].dtype
            and torch.equal(tensor, other[name])
            for name, tensor in first.items()
        )
        for other in others
    )


def inside_of(candidate: Candidate, found: list[Candidate]) -> dict[str, Tensor]:
    """The tensors behind the candidate's prefix, but for those of a network inside of it."""
    prefix = candidate.prefix
    deeper = tuple(
        other.prefix
        for other in found
        if other.table is candidate.table
        and other.prefix.startswith(prefix)
        and other.prefix != prefix
    )
    return {
        name[len(prefix) :]: tensor
        for name, tensor in candidate.table.tensors.items()
        if name.startswith(prefix) and not name.startswith(deeper)
    }


# --- refusing -------------------------------------------------------------------------------


def quantized(path: str | Path) -> ModelError:
    """The error for a network in integers."""
    return ModelError(
        f"{path} holds a network that torch has quantized to integers. Pass the float checkpoint "
        "that it was made from; gnet-opt quantizes it itself."
    )
