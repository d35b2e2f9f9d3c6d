"""OpenVINO on the CPU: an intermediate representation (IR) saved and run."""

from __future__ import annotations

import contextlib
import re
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.backends import _profile
from gnet_opt.backends._boundary import check_input, failure, probe_package, translated
from gnet_opt.backends._lrn import lowered
from gnet_opt.errors import BackendError, GnetOptError, require
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import (
    Artifact,
    ExecutedNode,
    FloatArray,
    InputArray,
    NodeKind,
    Probe,
    Profile,
    Runner,
)
from gnet_opt.target import Target
from gnet_opt.telemetry import import_openvino

_XML = "model.xml"
_BIN = "model.bin"

_KINDS: dict[str, NodeKind] = {
    "Concatenation": "concat",
    "Convert": "elementwise",
    "Convolution": "layer",
    "Eltwise": "elementwise",
    "FakeQuantize": "quantize",
    "FullyConnected": "layer",
    "Gather": "reorder",
    "Lrn": "lrn",
    "MatMul": "layer",
    "Pooling": "pool",
    "Reduce": "pool",
    "Reorder": "reorder",
    "Softmax": "softmax",
    "Subgraph": "elementwise",
    "Transpose": "reorder",
}
"""The kind of a node by its `layerType` in the runtime model. A global average pool is a Reduce."""

_NOT_SIMPLIFIED = (
    "This version of OpenVINO does not offer its common transformations to others, so model.xml is "
    "larger than usual and loads more slowly. What it computes is the same."
)

_NO_WORK = ("Const", "Input", "Output")


class OpenVinoBackend:
    """Compiles to OpenVINO's IR and runs it on the CPU plugin.

    The portable Q/DQ file needs no lowering of its own: OpenVINO's low precision passes carry the
    one scale through MaxPool and Concat, and on GoogLeNet all 57 convolutions, 13 pools and 9
    concats execute as u8 or i8, with no requantization between them.
    """

    name = "openvino"
    extra = "openvino"
    takes_pixels = True

    def probe(self) -> Probe:
        """Whether OpenVINO is installed; it is not imported."""
        return probe_package("openvino", ("openvino",), self.extra)

    def compile(self, model: Path, target: Target, out: Path) -> Artifact:
        """Convert an ONNX file, save `model.xml` and `model.bin`, and load the saved files.

        Weights keep their type (int8 stays int8, float stays float32). Equal inputs give equal
        bytes with one version of OpenVINO; the version stands in the file.

        Args:
            model: The ONNX file, float or in Q/DQ form.
            target: What to compile for; nothing of it is needed, the CPU plugin decides on load.
            out: An existing folder.

        Raises:
            MissingDependencyError: OpenVINO is not installed.
            BackendError: OpenVINO refused the model.
        """
        require("openvino", "openvino", f"compile {model.name}")
        artifact = self.artifact(out)
        with translated(
            f"Converting {model} with OpenVINO",
            "Check the file with `gnet-opt inspect`, or export the model again.",
        ):
            openvino = import_openvino()
            converted = _read(openvino.Core(), model)
            simplified = _simplify(converted)
            _name_nodes(converted)
            with tempfile.TemporaryDirectory(dir=out, prefix=".openvino-") as folder:
                openvino.save_model(converted, Path(folder) / _XML, compress_to_fp16=False)
                for name in (_BIN, _XML):
                    (Path(folder) / name).replace(out / name)
        with self.open(artifact):
            pass
        return artifact if simplified else replace(artifact, notes=(_NOT_SIMPLIFIED,))

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Runner]:
        """Load an IR for the lowest latency of a single picture.

        Layers that are not integer compute in float32. By itself OpenVINO runs a float model in
        bfloat16 where the CPU can (AVX512-BF16, AMX), and then `float` would not be float, neither
        its logits nor its latency (GoogLeNet on AMX, one thread: 19 ms in float32, 3.5 in
        bfloat16, 2.3 in INT8). So the float layers of an INT8 model compute the same on every
        CPU; that costs nothing, or 7 % with the two LRN layers of the 2014 network.

        Threads stay pinned to cores, OpenVINO's default: measured, it makes no difference.

        Raises:
            MissingDependencyError: OpenVINO is not installed.
            BackendError: A file is missing or damaged, or OpenVINO refused it.
        """
        runner = _Runner(_compiled(artifact, threads), artifact.path)
        try:
            yield runner
        finally:
            runner.close()

    def profile(
        self,
        artifact: Artifact,
        batch: InputArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """Tell what the CPU plugin executes: its runtime model and its counters.

        A counter gives the mean over all runs since the model was compiled, in whole microseconds,
        and cannot be set back. So every round compiles anew and takes the difference between the
        end of its warm-up and its own end; a node's time is the median over rounds, which a burst
        of something else on the machine does not move. Each run of a node is rounded down to a
        microsecond: short nodes take up to one more than is said.

        Raises:
            MissingDependencyError: OpenVINO is not installed.
            BackendError: A file is missing or damaged, or OpenVINO refused it.
        """
        count = _profile.rounds(runs)
        counted: list[dict[str, float]] = []
        for _ in progress(count, "Timing layers", len(count)):
            compiled = _compiled(artifact, threads, counting=True)
            counted.append(_counted_round(compiled, artifact.path, batch))
        with translated(
            f"Reading the runtime model of {artifact.path}", "Install a current OpenVINO."
        ):
            nodes = _executed(compiled.get_runtime_model(), counted)
        kept = {node.name for node in nodes}
        return Profile(
            backend=self.name,
            version=self.probe().version,
            threads=threads,
            runs=_profile.RUNS * len(count),
            nodes=nodes,
            rounds=tuple(
                sum(time for name, time in times.items() if name in kept) for times in counted
            ),
        )

    def artifact(self, folder: Path) -> Artifact:
        """The IR in `folder`."""
        path = folder / _XML
        files = (("openvino-ir", path), ("openvino-weights", folder / _BIN))
        return Artifact(backend=self.name, path=path, files=files)


def _compiled(artifact: Artifact, threads: int | None, *, counting: bool = False) -> Any:
    """Load an IR as `OpenVinoBackend.open` describes it, with counters on request."""
    require("openvino", "openvino", f"run {artifact.path.name}")
    config: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    if counting:
        config["PERF_COUNT"] = True
    weights = artifact.path.with_suffix(".bin")
    for path in (artifact.path, weights):
        if not path.is_file():
            raise BackendError(
                f"{path} does not exist, and the OpenVINO model needs it. Build the bundle again."
            )
    with translated(
        f"Loading {artifact.path} with OpenVINO",
        "The file or its model.bin may be damaged: check with `gnet-opt verify`, or build "
        "the bundle again.",
    ):
        openvino = import_openvino()
        return openvino.Core().compile_model(artifact.path, "CPU", config)


def _counted_round(compiled: Any, path: Path, batch: InputArray) -> dict[str, float]:
    """The mean time of each node over a round's runs, in microseconds, by the node's name."""
    runner = _Runner(compiled, path)
    for _ in range(_profile.WARM_UP):
        runner.run(batch)
    before = runner.counters()
    for _ in range(_profile.RUNS):
        runner.run(batch)
    after = runner.counters()
    first, last = _profile.WARM_UP, _profile.WARM_UP + _profile.RUNS
    runner.close()
    return {
        name: max(0.0, (last * mean - first * before[name]) / _profile.RUNS)
        for name, mean in after.items()
    }


def _executed(model: Any, counted: list[dict[str, float]]) -> tuple[ExecutedNode, ...]:
    """The nodes of a runtime model that do something, in the order of execution."""
    found: list[tuple[int, ExecutedNode]] = []
    for node in model.get_ops():
        facts = node.get_rt_info()

        def said(key: str, facts: Any = facts) -> str:
            return str(facts[key].astype(str))

        name, operator = node.get_friendly_name(), said("layerType")
        time = statistics.median(times.get(name, 0.0) for times in counted)
        kind = _KINDS.get(operator, "other")
        # What takes no time is done in place or ahead of time. A layer is always told of.
        if operator in _NO_WORK or (time == 0.0 and kind != "layer"):
            continue
        if kind == "elementwise" and _changes_to_or_from_integers(node):
            kind = "quantize"
        executed = ExecutedNode(
            name=name,
            operator=operator,
            kind=kind,
            precision=_profile.precision(said("runtimePrecision")),
            microseconds=time,
            covers=tuple(filter(None, said("originalLayersNames").split(","))),
            kernel=said("primitiveType"),
        )
        found.append((int(said("execOrder")), executed))
    return tuple(node for _, node in sorted(found, key=lambda pair: pair[0]))


def _changes_to_or_from_integers(node: Any) -> bool:
    """Whether one side of a node of the runtime model is of eight bits and the other is not."""
    source = node.input_value(0).get_element_type().get_type_name()
    result = node.get_output_element_type(0).get_type_name()
    return (source in ("i8", "u8")) != (result in ("i8", "u8"))


class _Runner:
    """One infer request, which reads the caller's own memory; see `gnet_opt.runtime.Runner`."""

    def __init__(self, compiled: Any, path: Path) -> None:
        if len(compiled.inputs) != 1 or len(compiled.outputs) != 1:
            raise BackendError(
                f"{path} has {len(compiled.inputs)} inputs and {len(compiled.outputs)} outputs; "
                "a classifier has one of each. Export it with `gnet-opt export`."
            )
        self._path = path
        self._request = compiled.create_infer_request()
        shape = compiled.inputs[0].get_partial_shape()
        self._shape = tuple(d.get_length() if d.is_static else None for d in shape)
        self._type = compiled.inputs[0].get_element_type()
        # What no caller can pass: nothing was given yet.
        self._batch: object = self
        self._shared: InputArray | None = None

    def run(self, batch: InputArray) -> FloatArray:
        if self._request is None:
            raise BackendError(f"{self._path} was closed; run it inside its `with` block.")
        try:
            # The request still has what it was given last.
            if batch is not self._batch:
                self._give(batch)
            # The values are copies: the request writes its next result into the same memory.
            return np.asarray(self._request.infer().to_tuple()[0], np.float32)
        except GnetOptError:
            raise
        except Exception as error:
            doing = f"Running {self._path} with OpenVINO"
            raise failure(error, doing, "Check the bundle with `gnet-opt verify`.") from error

    def _give(self, batch: InputArray) -> None:
        """Let the request read the caller's memory.

        Nothing is copied but what may not be written to, which OpenVINO does not share. The request
        keeps no array alive.
        """
        checked = check_input(batch, self._shape, str(self._path), self._type.to_dtype().name)
        self._shared = checked if checked.flags.writeable else checked.copy()
        tensor = import_openvino().Tensor(self._shared, shared_memory=True)
        self._request.set_input_tensor(0, tensor)
        self._batch = batch if self._shared is batch else self

    def counters(self) -> dict[str, float]:
        """The mean time of each node over all runs so far, in microseconds, by its name."""
        with translated(
            f"Reading the counters of {self._path} from OpenVINO", "Install a current OpenVINO."
        ):
            return {
                info.node_name: info.real_time.total_seconds() * 1e6
                for info in self._request.get_profiling_info()
            }

    def close(self) -> None:
        self._request = None
        self._batch, self._shared = self, None


def _read(core: Any, model: Path) -> Any:
    """Read an ONNX file, with LRN nodes lowered that OpenVINO would compute wrongly.

    The CPU plugin takes an LRN's bias as an integer (seen in 2026.4): 1.5 gives what 1 does, and
    0.5 what 0 does.
    """
    read = core.read_model(model)
    norms = [node for node in read.get_ops() if node.get_type_name() == "LRN"]
    if all(float(node.get_attributes()["bias"]).is_integer() for node in norms):
        return read
    return core.read_model(lowered(model))


def _simplify(model: Any) -> bool:
    """Run OpenVINO's common transformations before saving, as its own converter does.

    They fold what the ONNX reader leaves (shape arithmetic for every bias, ReLU in front of a
    u8 range): GoogLeNet's XML shrinks from 1.0 to 0.34 MB and loads in 0.2 instead of 0.4 s. The
    plugin runs them on load in any case, so a version of OpenVINO without this entry (it is not
    part of the documented API; `openvino.convert_model` would be, but sends telemetry) gives the
    same network, only larger on disk.

    Returns:
        Whether this version of OpenVINO has the entry.
    """
    try:
        from openvino._offline_transformations import apply_moc_transformations
    except ImportError:
        return False
    apply_moc_transformations(model, cf=False)
    return True


def _name_nodes(model: Any) -> None:
    """Give nodes that OpenVINO named by a counter of the process a name of the graph's own.

    Two conversions in one process would otherwise differ: `Constant_82889`, `Reshape_12819` (a
    constant keeps the name of the operation that it was folded from).
    """
    for index, node in enumerate(model.get_ordered_ops()):
        if re.fullmatch(r"[A-Z][A-Za-z0-9]*_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
