"""Read files of `torch.save` without building anything of what they ask for but tensors.

`torch.load` with `weights_only=True` builds tensors and plain containers, and refuses every other
class. Checkpoints have such classes beside the weights: paths, dates, NumPy scalars, arguments of
the command line, the network itself. Here they are read with a stand-in for each: an empty class
of ours takes the place of the class that the file names. The class itself is neither imported nor
called, so nothing of it can run, and it need not even be installed. Stand-ins exist only for
names that are known to be plain data or layers; a file that asks for any other name is refused.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown
from gnet_opt.stages.file_kind import unreadable

_SHOWN = 3
_StandIn = Callable[..., Any] | tuple[Callable[..., Any], str]

_TENSORS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.(storage\.)?\w+Storage|torch\.(Size|device|Tensor|nn\.parameter\.Parameter)"
    r"|torch\.(bool|half|q?u?int\w+|b?float\w+|complex\w+)|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|complex|set)"
)
"""What torch itself allows in files of weights."""

_LAYERS = re.compile(
    r"torch\.nn\.modules\.\w+\.\w+"
    r"|torch\.nn\.parallel\.(data_parallel|distributed)\.\w+"
    r"|torch\.nn\.utils\.(prune|weight_norm|spectral_norm)\.\w+"
    r"|torchvision\.models\.(googlenet|inception)\.\w+"
)
"""Layers, and the networks of the family, of which a whole pickled network consists."""

_MAPPINGS = re.compile(
    r"collections\.defaultdict"
    r"|[\w.]+\.AttributeDict"  # Lightning, by whatever name of its package
    r"|easydict\.EasyDict|yacs\.config\.CfgNode|(fvcore|detectron2)\.[\w.]*\.?CfgNode"
    r"|addict\.(addict\.)?Dict|box\.box\.Box|(mmcv\.utils|mmengine\.config)\.config\.ConfigDict"
)
"""Classes that are dicts; their items are read, as weights can be among them."""

_LISTS = re.compile(r"collections\.deque")

_PLAIN = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
    r"|datetime\.\w+|zoneinfo\.ZoneInfo(\._unpickle)?"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
    r"|typing\.\w+"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\w*|float\w*|complex\w*|str_|bytes_|longlong|ulonglong)"
    r"|numpy\.dtypes\.\w+|numpy\._?core\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)"
    r"|numpy\.random\.\w+\.\w+"
    r"|torch\.torch_version\.TorchVersion|torch\.optim\.[\w.]+|torch\.(cuda\.)?amp\.grad_scaler\.\w+"
    r"|omegaconf\.[\w.]+"
    r"|(pytorch_lightning|lightning|lightning_fabric|torchmetrics)\.[\w.]+"
    r"|mm(engine|cv)\.[\w.]+"
)
"""Plain data beside the weights. Nothing of it is used, so that its stand-ins drop it."""


class PickledModule:
    """Stands in for an instance of a layer or network; holds the pickled attributes as data.

    Attributes:
        origin: The full name of the class that the file asks for.
        state: The attributes as the file has them.
    """

    __slots__ = ("state",)
    origin = ""
    state: Mapping[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> PickledModule:
        """Take whatever arguments the file has for the class, and leave them."""
        made = object.__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes as they are; a state of another kind has none."""
        self.state = state if isinstance(state, Mapping) else {}


class _Plain:
    """Stands in for plain data, and drops it."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> _Plain:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Mapping:
    """Stands in for a kind of dict: making one gives a plain dict, which takes the items."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _List:
    """Stands in for a kind of list, likewise."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


def read_torch(path: Path) -> Any:
    """Read a file of `torch.save`; layers in it become `PickledModule`.

    Raises:
        ModelError: The file is damaged, or asks for what is neither tensors, plain data nor
            layers; nothing of it was run.
    """
    zipped = zipfile.is_zipfile(path)
    try:
        return _load(path, zipped, [])
    except pickle.UnpicklingError:
        names = _names(path, zipped)
        stand_ins: list[_StandIn] = [
            (made, name) for name in names if (made := _stand_in(name)) is not None
        ]
    # A broken file fails in as many ways as there are places to break it.
    except Exception as error:
        raise unreadable(path, _reason(error)) from error
    try:
        return _load(path, zipped, stand_ins)
    except pickle.UnpicklingError as error:
        refuse(path, names)
        raise _not_unpickled(path, zipped, error) from error
    # As above.
    except Exception as error:
        raise unreadable(path, _reason(error)) from error


def refuse_pickle(path: Path) -> ModelError:
    """The error for a pickle that `torch.save` did not write; it is not read."""
    # What pickle writes for tensors; torch reads that by unpickling freely.
    names = [name for name in _names(path, False) if name != "torch.storage._load_from_bytes"]
    try:
        refuse(path, names)
    except ModelError as error:
        return error
    return ModelError(
        f"{path} was written with pickle or another library, and reading that means running code "
        "from the file; nothing of it was run. Save the weights with "
        "torch.save(model.state_dict(), ...), and pass that file."
    )


def refuse(path: Path, names: list[str]) -> None:
    """Raise where a file asks for more than tensors, plain data and layers.

    Raises:
        ModelError: It does; the message names the first few.
    """
    unsafe = [name for name in names if _stand_in(name) is None]
    if unsafe and any(_LAYERS.fullmatch(name) for name in names):
        raise whole_network(path, f" (with {_listed(unsafe)})")
    if unsafe:
        raise ModelError(
            f"{path} asks for {_listed(unsafe)} to be run or built while it is read. That is not "
            "needed for weights and can be an attack; nothing of it was run. Get the weights from "
            "a source you trust, saved with torch.save(model.state_dict(), ...), or as "
            ".safetensors."
        )


def whole_network(path: str | Path, why: str = "") -> ModelError:
    """The error for a whole pickled network that is not of torchvision's own classes."""
    return ModelError(
        f"{path} holds a whole pickled network{why}, and reading one means running code from the "
        "file; nothing of it was run. Save the weights alone, with "
        "torch.save(model.state_dict(), ...), and pass that file."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:_SHOWN])


def _without_attributes(content: Any) -> Any:
    """Take the attributes off every ordered dict, which torch sets to whatever a file says.

    One named `items` or `get` would stand in the place of the method.
    """
    seen: set[int] = set()
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, PickledModule):
            waiting.append(value.state)
        elif isinstance(value, dict):
            if isinstance(value, OrderedDict):
                vars(value).clear()
            waiting.extend(dict.values(value))
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)
    return content


def _load(path: Path, zipped: bool, stand_ins: list[_StandIn]) -> Any:
    return _without_attributes(_load_raw(path, zipped, stand_ins))


def _load_raw(path: Path, zipped: bool, stand_ins: list[_StandIn]) -> Any:
    import torch

    with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
        warnings.simplefilter("ignore")
        if path.suffix == ".safetensors":
            # torch goes by this ending, unless it is given no name.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _stand_in(name: str) -> Callable[..., Any] | None:
    for pattern, made in ((_MAPPINGS, _Mapping), (_LISTS, _List), (_PLAIN, _Plain)):
        if pattern.fullmatch(name):
            # One class a name: torch keeps them in a set.
            return type(made.__name__, (made,), {"__slots__": ()})
    if _LAYERS.fullmatch(name):
        return type("PickledModule", (PickledModule,), {"__slots__": (), "origin": name})
    return None


def _names(path: Path, zipped: bool) -> list[str]:
    """The classes and functions that a file asks for beyond plain tensors, read without running."""
    # The old format is five pickles in a row, of which the fourth is the content; what comes after
    # them is raw bytes.
    if zipped:
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            content = io.BytesIO(archive.read(inside))
        count = 1
    else:
        content, count = io.BytesIO(path.read_bytes()), 5
    names: set[str] = set()
    # A broken pickle ends in whatever its decoding runs into; what was found until then counts.
    with contextlib.suppress(Exception):
        for _ in range(count):
            names |= set(_globals_of(content))
    return sorted(name for name in names if not _TENSORS.fullmatch(name))


def _globals_of(content: io.BytesIO) -> Iterator[str]:
    """What one pickle names, in either of the forms that pickles have for it."""
    memo: dict[int, str | None] = {}
    strings: list[str] = []
    last: str | None = None
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if argument is None else int(argument)] = last
            continue
        last = None
        if opcode.name == "GLOBAL":
            yield _today(*str(argument).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":
            yield _today(*strings[-2:])
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            last = memo.get(int(argument or 0))
        elif isinstance(argument, str):
            last = argument
        if last is not None:
            strings.append(last)


def _today(module: str, name: str) -> str:
    """The name in Python 3 of what a pickle from Python 2 asks for, as torch takes it."""
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _not_unpickled(path: Path, zipped: bool, error: Exception) -> ModelError:
    if "Only persistent_load of storage" in str(error):
        return whole_network(path, " in the format of torch before 1.6")
    protocol = 2
    if zipped:
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(inside) as file:
                protocol = file.read(2)[1]
    if 2 < protocol <= pickle.HIGHEST_PROTOCOL and "Unsupported operand" in str(error):
        return ModelError(
            f"{path} was saved with pickle protocol {protocol}, of which torch reads weights "
            "safely only in part. Save it again with torch.save and without pickle_protocol."
        )
    return unreadable(path, _reason(error))


def _reason(error: Exception) -> str:
    """What was wrong, without torch's advice to switch the safe reading off."""
    text = str(error).strip()
    if "WeightsUnpickler error:" in text:
        text = text.split("WeightsUnpickler error:", 1)[1].strip()
    elif "weights_only" in text:
        text = "its pickle is damaged"
    return text or type(error).__name__
