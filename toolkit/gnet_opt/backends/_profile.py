"""What the `profile` methods of the backends share: how rounds are run, and names of precisions."""

from __future__ import annotations

RUNS = 10
"""Runs in a round. A round is short, so that what else the machine does meets few of them."""

WARM_UP = 3
"""Runs in front of each round that are not counted."""

_PRECISIONS = {
    "bfloat16": "bf16",
    "double": "f64",
    "float": "f32",
    "float16": "f16",
    "i8": "s8",
    "int32": "s32",
    "int64": "s64",
    "int8": "s8",
    "uint8": "u8",
}


def precision(name: str) -> str:
    """A runtime's name of a type as `gnet_opt.runtime.ExecutedNode` has it."""
    return _PRECISIONS.get(name, name)


def rounds(runs: int) -> range:
    """Rounds enough for so many runs, three at least, so that a median means something."""
    return range(max(3, -(-runs // RUNS)))
