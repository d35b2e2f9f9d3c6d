"""Model cards: a small TOML file that says what a checkpoint is.

`models/README.md` documents the format.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from gnet_opt.errors import ConfigError
from gnet_opt.model import Architecture
from gnet_opt.preprocess import Preprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

HEAD_LAYERS = (
    "linear",
    "batchnorm",
    "relu",
    "leaky_relu",
    "gelu",
    "silu",
    "tanh",
    "dropout",
    "flatten",
)
"""What the key `head` may name, each with torch's defaults."""

_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "architecture": (str,),
    "weights": (str,),
    "weights_key": (str,),
    "factory": (str,),
    "head": (list,),
    "output": (str,),
    "classes": (int,),
    "labels": (str, list),
    "license": (str,),
    "source": (str,),
    "transform_input": (bool,),
    "preprocess": (dict,),
}
_TYPE_NAMES = {
    str: "a string",
    int: "an integer",
    list: "a list",
    bool: "a boolean",
    dict: "a table",
}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card says, with every path resolved against the card's folder.

    Attributes:
        path: The card itself.
        name: The model's name.
        architecture: A network of the family that is built here, or `module`.
        weights: The checkpoint, or None in a card that only describes (a checkpoint is passed
            beside it, or the factory brings its weights).
        weights_key: Which weights to take of a checkpoint that has several, such as `ema`.
        factory: `package.module:factory`, which returns the network of architecture `module`, or
            for the others their weights; else None.
        head: The classifier's layers in their order, from `HEAD_LAYERS`, where the names in the
            checkpoint leave them open; or empty.
        output: The name of the network's output that holds the logits, where it has several.
        classes: The number of classes, or None to take it from the weights.
        labels: Class names by index, or empty.
        license: The licence of the weights.
        source: Where the weights came from.
        preprocess: How a picture becomes the input, or None where the card does not say.
        transform_input: Whether torchvision's `transform_input` follows `preprocess`, or None
            where the card does not say.
        extra: Tables that gnet-opt does not read, as they stand.
    """

    path: Path
    name: str
    architecture: Architecture
    weights: Path | None = None
    weights_key: str | None = None
    factory: str | None = None
    head: tuple[str, ...] = ()
    output: str | None = None
    classes: int | None = None
    labels: tuple[str, ...] = ()
    license: str = ""
    source: str = ""
    preprocess: Preprocess | None = None
    transform_input: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> ModelCard:
        """Read a card and the labels that it names.

        Raises:
            ConfigError: The file cannot be read, is not TOML, or says something impossible. The
                message starts with the file and names the dotted path of the value.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist. Pass the path of a model card.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a model card: {error}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from error
        return cls.from_dict(values, path=path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: Path) -> ModelCard:
        """Check the values of a card and resolve its paths.

        Args:
            values: The parsed TOML.
            path: The card's file, for messages and as the base of relative paths.

        Raises:
            ConfigError: A key is missing, unknown or of the wrong type.
        """
        _check_keys(values, path)
        architecture = values["architecture"]
        if architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{path}: architecture is {architecture!r}; it must be one of "
                f"{', '.join(ARCHITECTURES)}."
            )
        _check_network(values, path)
        classes = values.get("classes")
        if classes is not None and classes < 1:
            raise ConfigError(f"{path}: classes is {classes}; it must be at least 1.")
        return cls(
            path=path,
            name=values["name"],
            architecture=architecture,
            weights=path.parent / values["weights"] if "weights" in values else None,
            weights_key=values.get("weights_key"),
            factory=values.get("factory"),
            head=tuple(values.get("head", ())),
            output=values.get("output"),
            classes=classes,
            labels=_labels(values.get("labels", []), path),
            license=values.get("license", ""),
            source=values.get("source", ""),
            preprocess=_preprocess(values.get("preprocess"), path),
            transform_input=values.get("transform_input"),
            extra={key: value for key, value in values.items() if key not in _TYPES},
        )


def _check_keys(values: Mapping[str, Any], path: Path) -> None:
    for key, value in values.items():
        if key not in _TYPES:
            if isinstance(value, dict):
                continue
            close = difflib.get_close_matches(key, _TYPES, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"The keys are {', '.join(_TYPES)}."
            raise ConfigError(
                f"{path}: {key} is not known. {hint} Notes of your own go into a table, "
                "for example [notes]."
            )
        # bool is an int in Python, but `classes = true` is a mistake.
        fits = isinstance(value, _TYPES[key]) and not (
            isinstance(value, bool) and bool not in _TYPES[key]
        )
        if not fits:
            wanted = " or ".join(_TYPE_NAMES[kind] for kind in _TYPES[key])
            raise ConfigError(f"{path}: {key} is {value!r}; it must be {wanted}.")
    for key in ("name", "architecture"):
        if not values.get(key):
            raise ConfigError(f'{path}: {key} is missing. Add a line {key} = "...".')


def _check_network(values: Mapping[str, Any], path: Path) -> None:
    """Check that what describes the network goes together."""
    architecture = values["architecture"]
    if architecture == "module" and "factory" not in values:
        raise ConfigError(
            f"{path}: architecture 'module' needs a factory, which builds the network. "
            'Write factory = "package.module:factory".'
        )
    if architecture != "module" and "factory" in values and "weights" in values:
        raise ConfigError(
            f"{path}: weights and factory both say where the weights of {architecture!r} come "
            'from. Remove one, or write architecture = "module" for a factory that returns a '
            "network."
        )
    transformed = ("googlenet", "inception-v3")
    if values.get("transform_input", False) and architecture not in transformed:
        raise ConfigError(
            f"{path}: transform_input belongs to architecture {' or '.join(map(repr, transformed))}"
            ". Remove it, and give the network's real mean and std under [preprocess]."
        )
    head = values.get("head")
    if head is None:
        return
    if architecture == "module":
        raise ConfigError(f"{path}: head is for networks built here; the factory builds its own.")
    unknown = [layer for layer in head if layer not in HEAD_LAYERS]
    if unknown or "linear" not in head:
        raise ConfigError(
            f"{path}: head is {head!r}; it lists the classifier's layers in their order, at least "
            f"one of them linear, out of {', '.join(HEAD_LAYERS)}."
        )


def _labels(value: str | list[Any], path: Path) -> tuple[str, ...]:
    if isinstance(value, str):
        return read_labels(path.parent / value, wanted_by=f"{path}: labels")
    for index, label in enumerate(value):
        if not isinstance(label, str):
            raise ConfigError(f"{path}: labels[{index}] is {label!r}; it must be a string.")
    return tuple(value)


def read_labels(path: Path, *, wanted_by: str) -> tuple[str, ...]:
    """Read class names, one a line in index order; empty lines at the end are not names.

    Args:
        path: A UTF-8 text file.
        wanted_by: Who names the file, as the start of the error message.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{wanted_by} names {path}, which cannot be read ({error}). "
            "Correct the path; it is relative to the card."
        ) from error
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _preprocess(values: Mapping[str, Any] | None, path: Path) -> Preprocess | None:
    if values is None:
        return None
    try:
        return Preprocess.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
