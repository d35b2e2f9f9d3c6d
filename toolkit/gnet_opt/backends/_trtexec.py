"""The trtexec command that builds a TensorRT engine, and the script that runs it on the device.

trtexec comes with every TensorRT, so a device needs nothing of ours. Its options differ by version:
https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/command-line-programs.html and, for
what was removed, the migration guides that `build_command` names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.backends._build_options import BuildOptions
from gnet_opt.errors import ConfigError
from gnet_opt.files import sha256_file
from gnet_opt.target import Target

MODEL = "model.onnx"
ENGINE = "model.engine"
TIMINGS = f"{ENGINE}.timing"
VERSION = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})(\.[0-9]{1,9})*")
"""A version of TensorRT, its major and minor number first."""

_PARTIAL = f"{ENGINE}.partial"


@dataclass(frozen=True, kw_only=True)
class Input:
    """The input of a model that takes any batch.

    Attributes:
        name: As the ONNX file calls it.
        picture: Channels, height and width.
    """

    name: str
    picture: tuple[int, ...]

    @classmethod
    def read(cls, value: object, where: str) -> Input | None:
        """What `to_dict` gave, or None where the batch is fixed.

        Raises:
            ConfigError: It is not of that form.
        """
        if value is None:
            return None
        fits = isinstance(value, Mapping) and set(value) == {"name", "picture"}
        name, picture = (value["name"], value["picture"]) if fits else ("", ())  # type: ignore[index]
        if (
            not (isinstance(name, str) and re.fullmatch(r"[\w./:-]{1,100}", name))
            or not (isinstance(picture, list) and len(picture) == 3)
            or not all(type(size) is int and 0 < size < 1 << 16 for size in picture)
        ):
            raise ConfigError(f"{where}: options.input is no name and size of an input.")
        return cls(name=name, picture=tuple(picture))

    def to_dict(self) -> dict[str, Any]:
        """The input for a manifest; `read` takes it back."""
        return {"name": self.name, "picture": list(self.picture)}


def build_command(
    target: Target,
    *,
    quantized: bool,
    half: bool = False,
    name: str = MODEL,
    free: Input | None = None,
) -> str:
    """The trtexec command that builds the engine, run in the bundle's folder.

    Precision flags by version, from NVIDIA's trtexec: up to 8.x precisions are allowed by flags
    (`--int8` for a Q/DQ model, `--fp16` for an FP16 model). A Q/DQ model gets no `--fp16`: its
    float layers could be taken in FP16 then, LRN with them
    (https://github.com/onnx/onnx-tensorrt/blob/release/8.5-GA/docs/operators.md), whose squares go
    beyond what FP16 holds (https://github.com/NVIDIA/caffe/issues/135). From 9 on the network is
    strongly typed by its ONNX file, which `--stronglyTyped` asks for; in 11 that is the only mode
    and the flags are gone
    (https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html).
    `--skipInference` was called `--buildOnly` before 8.6, `--memPoolSize` `--workspace` before 8.4.
    `--noTF32` is in the sources of trtexec from 8.2 on and is none of the flags that 11 removed:
    without it a float layer rounds its operands to ten bits of mantissa.

    Args:
        target: Names its TensorRT version in `options.tensorrt`, and how to build
            (`gnet_opt.backends._build_options`).
        quantized: Whether the model has Q/DQ nodes.
        half: Whether it has layers in FP16.
        name: The ONNX file's name.
        free: Its input, where it takes any batch.

    Raises:
        ConfigError: The target does not say its TensorRT version, not a known one, or asks for what
            that version does not have.
    """
    made = _arguments(target.options, str(target.file), name, ENGINE, quantized, half, free)
    return shlex.join(["trtexec", *made])


def deferred_command(
    options: Mapping[str, Any], where: str, *, quantized: bool, half: bool, name: str
) -> str:
    """The command of `build_command` again, from what a bundle says of the deferred build.

    A bundle may come from anybody: every value is checked, and its own text of a command is not
    used.

    Args:
        options: `Deferred.options`: those of the target, and `input`.
        where: Where they stand, for messages.
        quantized: Whether the model has Q/DQ nodes.
        half: Whether it has layers in FP16.
        name: The ONNX file's name.

    Raises:
        ConfigError: A value cannot be used.
    """
    free = Input.read(options.get("input"), where)
    made = _arguments(options, where, name, ENGINE, quantized, half, free)
    return shlex.join(["trtexec", *made])


def build_script(
    target: Target,
    model: Path,
    *,
    quantized: bool,
    half: bool = False,
    name: str = MODEL,
    free: Input | None = None,
) -> str:
    """A POSIX shell script that runs `build_command` on the device, beside the model.

    It stops with one sentence where trtexec is missing or of another major version (its options
    and the form of the model would not fit), and where the model is not the one that the bundle was
    made with. The engine gets its name when it is complete; whatever ends the build early, a full
    disk or the kernel's out-of-memory killer too, leaves none that is cut short. The record of an
    engine that `gnet-opt compile` built is removed, because it does not describe the new one.

    Args:
        target: Names its TensorRT version in `options.tensorrt`, and how to build.
        model: The file that the script builds from.
        quantized: Whether the model has Q/DQ nodes.
        half: Whether it has layers in FP16.
        name: The name that the file will have beside the script.
        free: Its input, where it takes any batch.

    Raises:
        ConfigError: As `build_command`.
    """
    major, _ = tensorrt_version(target.options, str(target.file))
    wanted = f"TensorRT {target.options['tensorrt']} ({target.name})"
    return _SCRIPT.format(
        arguments=shlex.join(
            _arguments(target.options, str(target.file), name, _PARTIAL, quantized, half, free)
        ),
        engine=ENGINE,
        major=major,
        model=name,
        partial=_PARTIAL,
        record=f"{ENGINE}.json",
        sha256=sha256_file(model),
        timings=TIMINGS,
        wanted=shlex.quote(wanted),
    )


def tensorrt_version(options: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The version of TensorRT on a target, its major and minor number.

    Args:
        options: The target's.
        where: The file that they stand in, for messages.

    Raises:
        ConfigError: The target does not say it, or not a known one.
    """
    given = options.get("tensorrt", "")
    match = VERSION.fullmatch(str(given))
    if match is None:
        raise ConfigError(
            f"{where}: options.tensorrt is {given!r}; it must be the version of TensorRT "
            'on the device, such as "10.3".'
        )
    version = (int(match[1]), int(match[2]))
    if version < (8, 0):
        raise ConfigError(
            f"{where}: options.tensorrt is {given!r}, but Q/DQ models need TensorRT 8.0 or "
            "later. Update the device's JetPack or TensorRT."
        )
    return version


def _arguments(
    options: Mapping[str, Any],
    where: str,
    model: str,
    engine: str,
    quantized: bool,
    half: bool,
    free: Input | None,
) -> list[str]:
    version = tensorrt_version(options, where)
    how = BuildOptions.read(options, where)
    if version < (9, 0):
        precision = [*(["--int8"] if quantized else []), *(["--fp16"] if half else [])]
    elif version < (11, 0):
        precision = ["--stronglyTyped"]
    else:
        precision = []
    pool = "--memPoolSize=workspace:" if version >= (8, 4) else "--workspace="
    return [
        f"--onnx={model}",
        f"--saveEngine={engine}",
        *precision,
        "--noTF32",
        *(_shapes(free, how.batches) if free else []),
        *_compatibility(version, how, options["tensorrt"], where),
        f"{pool}{how.workspace_mib}",
        "--skipInference" if version >= (8, 6) else "--buildOnly",
        f"--timingCacheFile={TIMINGS}",
    ]


def _shapes(free: Input, batches: Sequence[int]) -> list[str]:
    return [
        f"--{which}Shapes={free.name}:{'x'.join(str(size) for size in (batch, *free.picture))}"
        for which, batch in zip(("min", "opt", "max"), batches, strict=True)
    ]


def _compatibility(
    version: tuple[int, int], how: BuildOptions, given: object, where: str
) -> list[str]:
    flags = {
        "version_compatible": "--versionCompatible" if how.version_compatible else "",
        "hardware_compatibility": "--hardwareCompatibilityLevel=ampere+"
        if how.hardware_compatibility
        else "",
    }
    for option, flag in flags.items():
        if flag and version < (8, 6):
            raise ConfigError(
                f"{where}: options.{option} needs TensorRT 8.6 or later, but "
                f"options.tensorrt is {given}. Leave it out, or update the device."
            )
    return [flag for flag in flags.values() if flag]


# Exit codes are those of gnet-opt (`gnet_opt.errors`), or trtexec's own where trtexec failed.
_SCRIPT = """\
#!/bin/sh
# Builds {engine} from {model} on the device, with the trtexec that is there.
set -eu
wanted={wanted}

fail() {{
    printf '%s\\n' "$2" >&2
    exit "$1"
}}

# JetPack and NVIDIA's packages keep trtexec outside PATH. A relative path is the caller's.
trtexec=$(command -v "${{TRTEXEC:-trtexec}}") || trtexec=${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}
case $trtexec in
    /*) ;;
    *) trtexec=$PWD/$trtexec ;;
esac
case $0 in
    */*) CDPATH='' cd -- "${{0%/*}}/" ;;
esac
if [ ! -f "$trtexec" ] || [ ! -x "$trtexec" ]; then
    fail 3 "trtexec was not found. Install TensorRT's tools, or set TRTEXEC to its path."
fi

if [ ! -f {model} ]; then
    fail 6 "{model} is not beside this script. Copy the whole bundle to the device."
fi
if command -v sha256sum >/dev/null; then
    digest=$(sha256sum <{model})
    if [ "${{digest%% *}}" != {sha256} ]; then
        fail 6 "{model} is not the file that this bundle was made with. Copy the bundle again."
    fi
fi

# trtexec greets with [TensorRT v8201] for 8.2.1 and, since 10, with [TensorRT v100300] for 10.3.0.
found=$("$trtexec" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9.]*\\)\\].*/\\1/p' | sed 1q)
case $found in
    *.*) major=${{found%%.*}} ;;
    ??????*) major=${{found%????}} ;;
    ????*) major=${{found%???}} ;;
    *) major= ;;
esac
if [ -n "$major" ] && [ "$major" != {major} ]; then
    fail 2 "trtexec is of TensorRT $major here, but the bundle was made for $wanted. Install \
TensorRT {major}, or build the bundle again for a target file whose options.tensorrt is the \
version here."
fi

# A cache of timings that is cut short would spoil the next build.
trap 'rm -f {partial} {timings}' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
status=0
"$trtexec" {arguments} || status=$?
if [ "$status" -ne 0 ]; then
    fail "$status" "trtexec failed with exit status $status, and no engine was written. Its last \
lines say why; 137 means that memory ran out: end other programs or add swap space."
fi
if [ ! -s {partial} ]; then
    fail 7 "trtexec ended well, but wrote no engine. See what it printed."
fi
rm -f {record}
mv -f {partial} {engine}
trap - EXIT
"""
