"""How an engine is to be built: the keys of a target's [options] that TensorRT's builders take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gnet_opt.errors import ConfigError

HARDWARE_COMPATIBILITY = ("ampere_plus",)
"""TensorRT's levels in lower case: the engine runs on every GPU from Ampere (8.0) on."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        batches: The least, the usual and the greatest batch of an engine for a model that takes
            any batch. TensorRT chooses kernels that are fast for the usual one, and takes memory
            for the greatest.
        workspace_mib: The most memory that a layer may use beside its tensors, in MiB. TensorRT
            itself allows all that the GPU has, which on a Jetson is the memory of the whole
            system, and TensorRT-RTX 1.7 without a GPU 64 GiB.
        version_compatible: Whether later versions of TensorRT shall run the engine, too.
        hardware_compatibility: Which other GPUs shall run it: one of `HARDWARE_COMPATIBILITY`, or
            empty for none.
    """

    batches: tuple[int, int, int] = (1, 8, 32)
    workspace_mib: int = 1024
    version_compatible: bool = False
    hardware_compatibility: str = ""

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> BuildOptions:
        """Read the options that are given, with defaults for the others.

        Args:
            options: The table [options] of a target; keys of others are left alone.
            where: The file that it stands in, for messages.

        Raises:
            ConfigError: A value cannot be used.
        """
        given = {f.name: options[f.name] for f in dataclasses.fields(cls) if f.name in options}
        rules = {
            "batches": (
                _is_batches,
                "the least, the usual and the greatest batch, such as [1, 8, 32]",
            ),
            "workspace_mib": (lambda value: _is_count(value), "MiB, such as 1024"),
            "version_compatible": (lambda value: isinstance(value, bool), "true or false"),
            "hardware_compatibility": (
                lambda value: value in ("", *HARDWARE_COMPATIBILITY),
                f"one of {', '.join(HARDWARE_COMPATIBILITY)}, or left out",
            ),
        }
        for key, value in given.items():
            fits, wanted = rules[key]
            if not fits(value):
                raise ConfigError(f"{where}: options.{key} is {value!r}; it must be {wanted}.")
        if "batches" in given:
            given["batches"] = tuple(given["batches"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The options for a manifest; `read` takes them back."""
        return {**dataclasses.asdict(self), "batches": list(self.batches)}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_batches(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(_is_count(batch) for batch in value)
        and list(value) == sorted(value)
    )
