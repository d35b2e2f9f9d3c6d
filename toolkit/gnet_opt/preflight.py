"""Whether a Jetson is ready to build an engine and to be timed, and what its user may do about it.

Nothing is changed and no command of the advice is run: power mode, clocks and swap are the owner's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt import jetson
from gnet_opt.jetson import SYSTEM, Jetson, Run
from gnet_opt.target import Target, shipped

MEMORY_FOR_BUILD = 2 << 30
"""Bytes of memory that building an engine of this network should have, swap on disk included.

It is not measured here; it rests on what others recorded on boards. TensorRT's library of kernels
takes 430 MiB in 8.5.2, where an Orin Nano begins to build the 2014 GoogLeNet
(https://github.com/dusty-nv/jetson-inference/issues/1630), and 1235 MiB in Jetson Linux 38.4
(https://github.com/OE4T/meta-tegra/issues/2120); CUDA takes some 230 MiB more
(https://github.com/NVIDIA/TensorRT/issues/2217). The rest is for the network: 28 MB of float
weights in several copies, its tensors, and the scratch memory of the kernels that are tried."""

STORAGE_FOR_BUILD = 256 << 20
"""Bytes that the bundle's folder should have free. An engine holds the weights, at most 28 MB in
float; for a moment it lies there twice, beside the timings of its kernels. The rest is reserve."""

_LITTLE_STORAGE = 1 << 30
"""Free bytes on `/` that a system should have for its own logs and packages."""

_SWAP = (
    "sudo fallocate -l 4G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
    "sudo swapon /swapfile"
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        board: What it said of itself; None where this is no Jetson, and there is nothing to say.
        target: The name of the target that was compared with, empty where there is none.
        blockers: Why a build cannot work, each with what to do, in sentences.
        advice: What would make it better or its timings steadier, in sentences.
    """

    board: Jetson | None
    target: str = ""
    blockers: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `gnet-opt doctor --json` prints it."""
        return {
            "advice": list(self.advice),
            "blockers": list(self.blockers),
            "board": None if self.board is None else self.board.to_dict(),
            "target": self.target,
        }


def preflight(
    target: Target | None = None,
    *,
    folder: Path | None = None,
    root: Path = SYSTEM,
    run: Run | None = None,
) -> Report:
    """Look at this machine before an engine is built or timed on it.

    Args:
        target: What the engine is for; the target that describes this board by default.
        folder: Where the engine will be written, a bundle for example.
        root: Where the machine's files are; see `gnet_opt.jetson.read`.
        run: Runs commands that only tell something; see `gnet_opt.jetson.read`.
    """
    board = jetson.read(folder, root=root, run=run)
    return Report(board=None) if board is None else assess(board, target, folder=folder)


def no_room(folder: Path, *, root: Path = SYSTEM) -> tuple[str, ...]:
    """Why a Jetson has too little memory or storage for a build, each with what to do.

    This is for who has found the GPU and TensorRT by using them, which proves more than the files
    that `preflight` looks for.

    Args:
        folder: Where the engine will be written.
        root: Where the machine's files are; see `gnet_opt.jetson.read`.
    """
    board = jetson.read(folder, root=root, run=lambda command: "")
    return () if board is None else (*_no_memory(board), *_no_storage(board, folder))


def assess(board: Jetson, target: Target | None = None, *, folder: Path | None = None) -> Report:
    """Judge what a Jetson said of itself, here or on another machine.

    Args:
        board: What was read there.
        target: What the engine is for; the target that describes the board by default.
        folder: The folder whose storage was read, where the engine will be written.
    """
    target = target or target_of(board)
    return Report(
        board=board,
        target="" if target is None else target.name,
        blockers=(
            *_no_memory(board),
            *_no_storage(board, folder),
            *_no_tensorrt(board),
            *_no_gpu(board),
        ),
        advice=(
            *_power(board),
            *_clocks(board),
            *_little_memory(board),
            *_little_storage(board),
            *_heat(board),
            *_versions(board, target),
            *_python(board),
        ),
    )


def target_of(board: Jetson) -> Target | None:
    """The shipped target that describes a board, by its model in the device tree."""
    for target in shipped():
        match = target.match
        if target.backend == "tensorrt" and match and match.board and match.board in board.model:
            return target
    return None


def _no_memory(board: Jetson) -> Iterator[str]:
    if board.memory is None:
        return
    on_disk = sum(swap.free for swap in board.swaps if not swap.compressed)
    if board.memory.available + on_disk < MEMORY_FOR_BUILD:
        yield (
            f"Memory: {_gib(board.memory.available)} are available and {_gib(on_disk)} of swap on "
            f"disk are free, but building an engine should have {_gib(MEMORY_FOR_BUILD)}; with "
            f"less the kernel may end it. End other programs, or add swap: {_SWAP}"
        )


def _no_storage(board: Jetson, folder: Path | None) -> Iterator[str]:
    free = board.storage.get(str(folder)) if folder is not None else None
    if free is not None and free < STORAGE_FOR_BUILD:
        yield (
            f"Storage: {folder} has {_mib(free)} free, but the engine and what is written beside "
            f"it should have {_mib(STORAGE_FOR_BUILD)}. Make room there, or copy the bundle to "
            "another disk."
        )


def _no_tensorrt(board: Jetson) -> Iterator[str]:
    if not board.tensorrt and not board.tensorrt_python and not board.trtexec:
        yield (
            "TensorRT: neither its libraries nor its Python package nor trtexec were found. "
            "Install it with JetPack: sudo apt install nvidia-jetpack"
        )


def _no_gpu(board: Jetson) -> Iterator[str]:
    if not board.gpu:
        yield (
            "GPU: its device is not there. In a container, start it with --runtime nvidia; "
            "otherwise install JetPack's drivers."
        )


def _power(board: Jetson) -> Iterator[str]:
    now, most = board.power_mode, board.strongest
    if now is None or most is None or not now.budget < most.budget:
        return
    yield (
        f"Power mode: it is {now.name}, not {most.name}, the board's largest. If its supply and "
        f"its cooling allow: sudo nvpmodel -m {most.id} (some modes ask for a restart). Build and "
        "time an engine in the mode in which it will run."
    )


def _clocks(board: Jetson) -> Iterator[str]:
    # Cores that have the same limits are spoken of once.
    moving = {
        (clock.name.rstrip("0123456789"), clock.minimum, clock.maximum): clock
        for clock in reversed(board.clocks)
        if not clock.fixed and clock.name != "emc"
    }
    if moving:
        said = ", ".join(
            f"{clock.name} {clock.minimum / 1e6:.0f} to {clock.maximum / 1e6:.0f} MHz"
            + (f" ({clock.governor})" if clock.governor else "")
            for clock in reversed(moving.values())
        )
        yield (
            f"Clocks: they are not fixed: {said}. Timings vary with them, and TensorRT chooses its "
            "kernels by timings. Until the next start: sudo jetson_clocks"
        )


def _little_memory(board: Jetson) -> Iterator[str]:
    if board.memory is None or board.memory.available >= MEMORY_FOR_BUILD:
        return
    if board.desktop:
        yield (
            f"Desktop: {', '.join(board.desktop)} take memory that the build can use. To end the "
            "desktop until the next start: sudo systemctl isolate multi-user.target"
        )


def _little_storage(board: Jetson) -> Iterator[str]:
    free = board.storage.get("/")
    if free is not None and free < _LITTLE_STORAGE:
        yield f"Storage: / has {_mib(free)} free. Make room before you install or build anything."


def _heat(board: Jetson) -> Iterator[str]:
    for zone in board.zones:
        if zone.throttles_at is not None and zone.celsius >= zone.throttles_at:
            yield (
                f"Heat: {zone.name} is at {zone.celsius:.0f} °C, and from {zone.throttles_at:.0f} "
                "°C on clocks are lowered. Let it cool, or cool it better, before timing anything."
            )


def _versions(board: Jetson, target: Target | None) -> Iterator[str]:
    """Another version than that of which the target file speaks."""
    wanted = _wanted(target)
    here, there = _numbers(board.tensorrt)[:2], _numbers(wanted)[:2]
    if target is None or not here or not there or here == there:
        return
    jetpack = f" (JetPack {board.jetpack})" if board.jetpack else ""
    said = (
        f"TensorRT: {board.tensorrt}{jetpack} is installed, and the target {target.name} speaks of "
        f"{wanted} (JetPack {target.device.get('jetpack', 'not named')}). "
    )
    if here[0] == there[0]:
        yield (
            f"{said}Its bundles build with this one as well; an engine runs only with the version "
            "that built it."
        )
    else:
        version = ".".join(map(str, here))
        yield (
            f"{said}The build_engine.sh of its bundles is for another trtexec. Copy "
            f'{target.file.name} with options.tensorrt = "{version}" and build the bundle for that.'
        )


def _python(board: Jetson) -> Iterator[str]:
    if board.tensorrt and not board.tensorrt_python:
        yield (
            "TensorRT: Python does not find its package, so that engines are built by trtexec and "
            "cannot be run from here. JetPack has it for the system's own Python: sudo apt install "
            "python3-libnvinfer, and make a virtual environment with --system-site-packages."
        )


def _wanted(target: Target | None) -> str:
    """The version of TensorRT that a target's bundles are made for, empty where it has none."""
    return "" if target is None else str(target.options.get("tensorrt", ""))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
