"""Targets as data: what a device is, which backend serves it and how it wants its integers."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from gnet_opt.errors import ConfigError
from gnet_opt.machine import Machine, this_machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("int8", "fp16", "fp32")
_FOLDER = Path(__file__).with_name("targets")
_T = TypeVar("_T")

# fmt: off
_TYPES = {
    "activations": str, "aliases": list, "alternatives": dict, "any_of": list,
    "architecture": str, "backend": str, "bias": str, "board": str, "claim": str,
    "compile": str, "date": str, "device": dict, "name": str, "none_of": list,
    "options": dict, "per_channel": bool, "precisions": list, "results": bool,
    "saturating_pairs": bool, "source": str, "summary": str, "symmetric": bool, "weight_bits": int,
}
# fmt: on
_TYPE_NAMES = {
    bool: "true or false",
    dict: "a table",
    int: "an integer",
    list: "a list of strings",
    str: "a string",
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a target represents numbers in INT8.

    Attributes:
        activations: `u8` (affine, 0..255) or `s8` (-128..127).
        symmetric: Whether activations have zero point 0 (for `s8`) instead of a free one.
        signed: The type of activations with values below zero, the network's input above all:
            the same as the others, or `s8` with zero point 0 where kernels have no zero points.
        weight_bits: 8, or 7 where the instruction set adds two products in 16 bits and saturates.
        saturating_pairs: Whether it does so and weights have eight bits all the same: then no two
            neighbouring ones may add up to more than the 16 bits hold.
        results: Whether the result of a layer is quantized though only float arithmetic reads it,
            for runtimes that compute a layer in INT8 only then.
        per_channel: Whether each output channel of a weight has a scale of its own.
        bias: `float`, added after dequantization; the one form that every backend here fuses.
    """

    activations: Literal["u8", "s8"]
    symmetric: bool
    weight_bits: Literal[7, 8]
    saturating_pairs: bool = False
    signed: Literal["same", "s8"] = "same"
    results: bool = False
    per_channel: bool = True
    bias: Literal["float"] = "float"

    def to_dict(self) -> dict[str, Any]:
        """The scheme as it stands in a target file and in a manifest."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Match:
    """How a machine is recognised as a target.

    Attributes:
        architecture: `x86_64` or `aarch64`.
        any_of: The machine has at least one of these instruction set flags; empty means any.
        none_of: The machine has none of these.
        board: A part of the board's name in the device tree; empty means any.
    """

    architecture: str
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    board: str = ""

    def __call__(self, machine: Machine) -> bool:
        """Whether the machine is one of these."""
        return (
            machine.architecture == self.architecture
            and (not self.any_of or bool(machine.instructions & set(self.any_of)))
            and not machine.instructions & set(self.none_of)
            and self.board in machine.board
        )


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Where a fact about a target comes from."""

    claim: str
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """One device, or one class of devices that want the same bundle.

    Attributes:
        name: What the user types.
        aliases: Other names for it.
        summary: One line for the list of targets.
        backend: The name of the backend that runs the bundle there.
        compile: `host`, compiled where the bundle is made, or `device`, finished on the device.
        precisions: Best first; those that make sense there.
        scheme: The integer form.
        alternatives: Other backends that run there, each with its integer form, which differs
            from `scheme` in what the target file says; `--precision auto` measures them as well.
        match: How a machine is recognised as this target; None means it never is by itself.
        options: Passed to the backend.
        device: Facts about the device for people and for deferred builds.
        evidence: Where the choices come from.
        file: The TOML file it was read from.
    """

    name: str
    summary: str
    backend: str
    compile: Literal["host", "device"]
    precisions: tuple[str, ...]
    scheme: Scheme
    evidence: tuple[Evidence, ...]
    aliases: tuple[str, ...] = ()
    alternatives: Mapping[str, Scheme] = field(default_factory=dict)
    match: Match | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    file: Path = Path()

    @classmethod
    def read(cls, path: Path) -> Target:
        """Read a target file.

        Raises:
            ConfigError: The file cannot be read, or a key is missing, unknown or does not fit;
                the message names the file and the dotted path of the key.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"The target file {path} cannot be read: {error}.") from error
        values: dict[str, Any] = dict(table)
        values["scheme"] = _build(Scheme, table.get("scheme"), "scheme", path)
        values["alternatives"] = _alternatives(table, path)
        if "match" in table:
            values["match"] = _build(Match, table["match"], "match", path)
        evidence = table.get("evidence", [])
        if not isinstance(evidence, list):
            raise ConfigError(f"{path}: evidence is {evidence!r}; it must be a list of tables.")
        values["evidence"] = tuple(
            _build(Evidence, entry, f"evidence[{i}]", path) for i, entry in enumerate(evidence)
        )
        if "file" in table:
            raise ConfigError(f"{path}: file is not known.")
        values["file"] = path
        target = _build(cls, values, "", path)
        _check(target)
        return target

    def is_this_machine(self) -> bool:
        """Whether this machine computes as the target does, so that native figures are its own."""
        return self.match is not None and self.match(this_machine())

    def to_dict(self) -> dict[str, Any]:
        """The target as it is printed by `gnet-opt targets NAME --json`."""
        return {
            "aliases": list(self.aliases),
            "alternatives": {name: s.to_dict() for name, s in self.alternatives.items()},
            "backend": self.backend,
            "compile": self.compile,
            "device": dict(self.device),
            "evidence": [dataclasses.asdict(entry) for entry in self.evidence],
            "name": self.name,
            "options": dict(self.options),
            "precisions": list(self.precisions),
            "scheme": self.scheme.to_dict(),
            "summary": self.summary,
            "this_machine": self.is_this_machine(),
        }


@cache
def shipped() -> tuple[Target, ...]:
    """Every target that gnet-opt ships, by name."""
    return tuple(Target.read(path) for path in sorted(_FOLDER.glob("*.toml")))


def find(name: str) -> Target:
    """Find a target by name, alias or path of a TOML file; `cpu` is this machine's own.

    Raises:
        ConfigError: There is no such target (the nearest is suggested), or the file is unusable.
    """
    if name.endswith(".toml") or "/" in name:
        return Target.read(Path(name))
    if name == "cpu":
        return detect()
    names = {alias: target for target in shipped() for alias in (target.name, *target.aliases)}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name.lower(), [*names, "cpu"], n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"There is no target {name!r}.{hint} `gnet-opt targets` lists them; a path to a TOML "
        "file of your own works too."
    )


def detect() -> Target:
    """The target file that describes this machine's CPU: what `--target cpu` means.

    Raises:
        ConfigError: No shipped target matches.
    """
    machine = this_machine()
    # Only files that name instructions decide; a board or a whole family would match as well.
    for target in shipped():
        match = target.match
        if match is None or match.board or not (match.any_of or match.none_of):
            continue
        if match(machine):
            return target
    raise ConfigError(
        f"No shipped target matches this CPU ({machine.architecture}, {machine.cpu}). "
        "Name one with --target, or write a TOML file; `gnet-opt targets` lists what there is."
    )


def _build(kind: type[_T], table: Any, where: str, path: Path) -> _T:
    """Make a dataclass of a TOML table, with errors that name the file and the dotted path."""
    prefix = f"{where}." if where else ""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: the table [{where}] is missing. Compare a shipped target.")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: {prefix}{key} is not known.{hint}")
    for key, entry in fields.items():
        required = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        if required and key not in table:
            raise ConfigError(f"{path}: {prefix}{key} is missing. Compare a shipped target.")
        if key in table and key in _TYPES:
            _check_type(f"{path}: {prefix}{key}", table[key], _TYPES[key])
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})


def _alternatives(table: Mapping[str, Any], path: Path) -> dict[str, Scheme]:
    """The integer form of each other backend: the target's own with what its table changes."""
    found = table.get("alternatives", {})
    for name in found if isinstance(found, Mapping) else ():
        if not isinstance(found[name], Mapping):
            raise ConfigError(
                f"{path}: alternatives.{name} is {found[name]!r}; it must be a table."
            )
    _check_type(f"{path}: alternatives", found, dict)
    return {
        name: _build(Scheme, {**table["scheme"], **changes}, f"alternatives.{name}", path)
        for name, changes in found.items()
    }


def _check_type(where: str, value: object, kind: type) -> None:
    items = value if kind is list and isinstance(value, list) else ()
    if type(value) is not kind or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{where} is {value!r}; it must be {_TYPE_NAMES[kind]}.")


def _check(target: Target) -> None:
    """Refuse values that no backend could honour."""
    schemes = {
        "scheme": target.scheme,
        **{f"alternatives.{name}": scheme for name, scheme in target.alternatives.items()},
    }
    allowed: list[tuple[str, object, tuple[object, ...]]] = [
        ("compile", target.compile, ("host", "device")),
        *(("precisions", precision, PRECISIONS) for precision in target.precisions),
    ]
    for where, scheme in schemes.items():
        allowed += [
            (f"{where}.activations", scheme.activations, ("u8", "s8")),
            (f"{where}.symmetric", scheme.symmetric, (True, False)),
            (f"{where}.signed", scheme.signed, ("same", "s8")),
            (f"{where}.weight_bits", scheme.weight_bits, (7, 8)),
            (f"{where}.saturating_pairs", scheme.saturating_pairs, (True, False)),
            (f"{where}.results", scheme.results, (True, False)),
            (f"{where}.per_channel", scheme.per_channel, (True, False)),
            (f"{where}.bias", scheme.bias, ("float",)),
        ]
    for where, value, choices in allowed:
        if value not in choices:
            listed = ", ".join(str(choice) for choice in choices)
            raise ConfigError(f"{target.file}: {where} is {value!r}; it must be one of {listed}.")
    for where, name in (("name", target.name), *(("aliases", a) for a in target.aliases)):
        # Names become parts of file names and stand in the build script.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
            raise ConfigError(
                f"{target.file}: {where} is {name!r}; a name starts with a letter or digit and "
                "has only letters, digits and _ . + - in it."
            )
    if target.backend in target.alternatives:
        raise ConfigError(
            f"{target.file}: alternatives.{target.backend} is the backend of the target itself; "
            "its integer form stands in [scheme]."
        )
    if len(set(target.precisions)) != len(target.precisions):
        raise ConfigError(f"{target.file}: precisions names one twice.")
    if not target.precisions:
        raise ConfigError(f"{target.file}: precisions is empty; name at least fp32.")
    for where, scheme in schemes.items():
        if scheme.activations == "u8" and scheme.symmetric:
            raise ConfigError(
                f"{target.file}: {where}.symmetric needs {where}.activations = 's8': "
                "an unsigned type has no zero point 0 in its middle."
            )
    if not target.evidence:
        raise ConfigError(f"{target.file}: evidence is empty; say where the choices come from.")
