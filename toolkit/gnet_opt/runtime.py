"""What a backend is: methods to make, open and profile an artifact, and to ask if it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from gnet_opt.progress import Progress, silent
from gnet_opt.target import Target

FloatArray = npt.NDArray[np.float32]
InputArray = npt.NDArray[Any]
"""What a model takes: float32 (N, planes, height, width), or uint8 (N, height, width, planes):
pixels, which are RGB, grey or RGBA."""

NodeKind = Literal[
    "layer", "concat", "elementwise", "lrn", "pool", "quantize", "reorder", "softmax", "other"
]
"""What an executed node is for, whatever a runtime calls it.

`layer` multiplies with weights (convolution, Gemm, MatMul); `quantize` changes between integers and
float; `reorder` only moves values to another memory layout.
"""

INTEGERS = ("s8", "u8")
"""The precisions that count as INT8."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model in the form that a backend opens.

    Attributes:
        backend: The backend's name.
        path: The file to open.
        files: Every file that belongs to it, `path` among them, with its kind for the manifest.
        notes: What was done otherwise than usual, in plain sentences for user and manifest.
    """

    backend: str
    path: Path
    files: tuple[tuple[str, Path], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Deferred:
    """A build that only the device itself can finish. It is a success, not an error.

    Attributes:
        backend: The backend's name.
        reason: Why it is not built here.
        command: What to run on the device.
        expected: The file that the command makes, relative to the bundle.
        files: Files written for the build, a script for example, with their kinds.
        options: What `DeviceCompiler.finish` has to know on the device, fit for JSON.
    """

    backend: str
    reason: str
    command: str
    expected: str
    files: tuple[tuple[str, Path], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What came of a deferred build on the device.

    Attributes:
        built: Whether something was built; False where what is there fits this machine.
        engine: What was or had been built.
        reason: Why it was built, or why not.
        version: The version of what built it now, empty where nothing was built.
        device: What it was built for now, empty where nothing was built.
    """

    built: bool
    engine: Path
    reason: str
    version: str = ""
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Whether a backend can be used on this machine.

    Attributes:
        available: It can be imported, as far as that is known without importing it.
        version: The runtime's version, empty where it is not installed.
        detail: What is missing and what would bring it, empty when available.
    """

    available: bool
    version: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class ExecutedNode:
    """One step of a runtime's own plan for a model, which fuses and inserts nodes.

    Attributes:
        name: As the runtime calls it.
        operator: As the runtime calls it, `QLinearConv` or `Convolution` for example.
        kind: What it is for.
        precision: Of its data input while it computes: `u8`, `s8`, `f32`, `bf16`, `f16`, or what
            else the runtime says.
        microseconds: Its time for one picture; the median over rounds.
        covers: Names of the model's nodes that it computes, empty for one that was inserted.
        kernel: Which code runs, as the runtime calls it; empty where it does not tell.
    """

    name: str
    operator: str
    kind: NodeKind
    precision: str
    microseconds: float
    covers: tuple[str, ...] = ()
    kernel: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The node for a report."""
        return {
            "covers": list(self.covers),
            "kernel": self.kernel,
            "kind": self.kind,
            "microseconds": self.microseconds,
            "name": self.name,
            "operator": self.operator,
            "precision": self.precision,
        }


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a runtime really executes for one picture, and for how long.

    Counting itself costs time, so that shares of the time say more than times do. Latency is what
    `gnet_opt.bench.latency` measures.

    Attributes:
        backend: The backend's name.
        version: The runtime's version.
        threads: CPU threads, or None for the runtime's own choice.
        runs: The number of runs that were timed, in all rounds together.
        nodes: What ran, in order; nodes that take no time at all may be left out.
        rounds: The time of all nodes together, in microseconds, one a round.
    """

    backend: str
    version: str
    threads: int | None
    runs: int
    nodes: tuple[ExecutedNode, ...]
    rounds: tuple[float, ...]


class Runner(Protocol):
    """A loaded model, ready to run. A context manager's value.

    One that computes on a device of its own may tell in an attribute `device_ns` how many
    nanoseconds the last run took there, without the copies.
    """

    def run(self, batch: InputArray) -> FloatArray:
        """Compute logits.

        Args:
            batch: float32 of shape (N, planes, height, width), preprocessed, or for a model with
                such an input uint8 pixels of shape (N, height, width, planes). Models of fixed
                batch 1 take N = 1 only.

        Returns:
            float32 of shape (N, classes), not aliased by later calls.
        """
        ...


class Backend(Protocol):
    """One runtime or device compiler.

    One whose runner also takes uint8 pixels says so by an attribute `takes_pixels`, which is True.
    """

    name: str
    extra: str

    def probe(self) -> Probe:
        """Tell whether the backend can be used; never raises, never imports the runtime."""
        ...

    def compile(self, model: Path, target: Target, out: Path) -> Artifact | Deferred:
        """Turn a portable ONNX file into what the target runs.

        Args:
            model: The ONNX file, float or in Q/DQ form.
            target: What to compile for.
            out: An existing folder; files are written here with fixed names.

        Raises:
            MissingDependencyError: The compiler is not installed.
            BackendError: The compiler refused the model.
        """
        ...

    def open(
        self, artifact: Artifact, *, threads: int | None = None
    ) -> AbstractContextManager[Runner]:
        """Load an artifact to run it on this machine.

        Args:
            artifact: What `compile` made.
            threads: CPU threads, or None for the runtime's own choice.

        Raises:
            MissingDependencyError: The runtime is not installed.
            BackendError: The runtime refused the artifact.
        """
        ...

    def profile(
        self,
        artifact: Artifact,
        batch: InputArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """Tell what the runtime executes on this machine: nodes, precisions, kernels and times.

        Args:
            artifact: What `compile` made.
            batch: One real picture as the model takes it; see `Runner.run`.
            threads: CPU threads, or None for the runtime's own choice.
            runs: How often to run it at least, warming up left out.
            progress: Shows the rounds.

        Raises:
            MissingDependencyError: The runtime is not installed.
            BackendError: The runtime refused the artifact, or it cannot tell on this machine.
        """
        ...

    def artifact(self, folder: Path) -> Artifact:
        """The artifact that `compile` wrote into `folder` earlier."""
        ...


@runtime_checkable
class DeviceCompiler(Protocol):
    """A backend that finishes on the device, by itself, what its `compile` deferred."""

    def command(self, folder: Path, options: Mapping[str, Any]) -> str:
        """What does the same as `finish` without gnet-opt, run in the bundle's folder.

        Args:
            folder: The bundle.
            options: `Deferred.options`, as the manifest has them. The bundle may come from anybody:
                nothing of them goes into the command unchecked.

        Returns:
            The command, or nothing where the options do not tell it.

        Raises:
            IntegrityError: The options are damaged.
        """
        ...

    def finish(
        self,
        folder: Path,
        options: Mapping[str, Any],
        *,
        force: bool = False,
        progress: Progress = silent,
    ) -> Finished:
        """Build for this machine what fits it not yet.

        Args:
            folder: The bundle. What is built here is named as `Deferred.expected`, and by-products
                begin with that name and a dot.
            options: `Deferred.options`, as the manifest has them.
            force: Whether to build what fits, too.
            progress: Shows the build.

        Raises:
            MissingDependencyError: The compiler is not installed.
            BackendError: This machine is not fit for it, or the compiler refused the model.
        """
        ...


@runtime_checkable
class TargetReader(Protocol):
    """A backend that takes options from the target, and can tell early whether they are good."""

    def check(self, target: Target) -> None:
        """Refuse what `compile` would refuse after the whole work before it.

        Raises:
            ConfigError: An option is missing or cannot be used.
        """
        ...


@runtime_checkable
class OwnMachines(Protocol):
    """A backend whose artifacts themselves say which machines they are for."""

    def is_native(self, artifact: Artifact) -> bool:
        """Whether this machine is one of them; False, too, where that cannot be told."""
        ...


def run_all(runner: Runner, inputs: Iterable[InputArray]) -> FloatArray:
    """Run single pictures one after the other.

    Args:
        runner: The model.
        inputs: float32 arrays of shape (planes, height, width), or uint8 pixels of shape
            (height, width, planes), as the model takes them.

    Returns:
        float32 of shape (number of inputs, classes).
    """
    return np.concatenate([runner.run(image[None]) for image in inputs])
