"""ONNX Runtime on the CPU: native kernels, and the reference semantics of an INT8 model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.backends import _half, _lrn, _profile
from gnet_opt.backends._boundary import check_input, failure, probe_package, translated
from gnet_opt.errors import BackendError, require
from gnet_opt.files import atomic_path
from gnet_opt.machine import this_machine
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

_FILE = "model.onnx"
_LOWERED = "model.onnxruntime.onnx"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_ADVICE = "Check the file with `gnet-opt inspect`, or build the bundle again."

_KINDS: dict[str, NodeKind] = {
    "Add": "elementwise",
    "AveragePool": "pool",
    "Cast": "elementwise",
    "Clip": "elementwise",
    "Concat": "concat",
    "Conv": "layer",
    "ConvInteger": "layer",
    "DequantizeLinear": "quantize",
    "Div": "elementwise",
    "DynamicQuantizeLinear": "quantize",
    "DynamicQuantizeMatMul": "layer",
    "FusedConv": "layer",
    "FusedGemm": "layer",
    "FusedMatMul": "layer",
    "Gather": "reorder",
    "Gemm": "layer",
    "GlobalAveragePool": "pool",
    "LRN": "lrn",
    "MatMul": "layer",
    "MatMulInteger": "layer",
    "MatMulIntegerToFloat": "layer",
    "MaxPool": "pool",
    "Mul": "elementwise",
    "NhwcFusedConv": "layer",
    "NhwcMaxPool": "pool",
    "Pow": "elementwise",
    "QGemm": "layer",
    "QLinearAdd": "elementwise",
    "QLinearAveragePool": "pool",
    "QLinearConcat": "concat",
    "QLinearConv": "layer",
    "QLinearGlobalAveragePool": "pool",
    "QLinearMatMul": "layer",
    "QLinearMul": "elementwise",
    "QuantizeLinear": "quantize",
    "Relu": "elementwise",
    "ReorderInput": "reorder",
    "ReorderOutput": "reorder",
    "Softmax": "softmax",
    "Sqrt": "elementwise",
    "Sub": "elementwise",
    "Transpose": "reorder",
}
"""The kind of a node by its operator, those of ONNX and of ONNX Runtime's own domain."""

_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
"""Types of an input as ONNX Runtime and as NumPy calls them."""

_DECORATION = re.compile(r"(_nchwc|_nhwc|_token_\d+)+$")
"""What layout optimizations append to the name of the node that they replace."""


class OnnxRuntimeBackend:
    """Runs the portable model itself, with ONNX Runtime's own integer kernels.

    There is little to compile: ONNX Runtime turns Q/DQ pairs into integer kernels whenever it
    loads the model, for the CPU that it finds (about 40 ms for GoogLeNet). Its optimized graph
    could be saved, but then it would be bound to one version and one instruction set. Only LRN
    nodes get another form (`gnet_opt.backends._lrn`), in a file of their own beside the portable
    model: with it the 2014 GoogLeNet takes a third of the time in INT8.
    """

    name = "onnxruntime"
    extra = "onnxruntime"
    takes_pixels = True
    _lowers_lrn = True

    def probe(self) -> Probe:
        """Whether ONNX Runtime is installed; it is not imported."""
        return probe_package("onnxruntime", _DISTRIBUTIONS, self.extra)

    def compile(self, model: Path, target: Target, out: Path) -> Artifact:
        """Prove that ONNX Runtime loads the model, and see that what it runs lies in `out`.

        For a model with LRN nodes that is `out/model.onnxruntime.onnx`, in which they are lowered.
        Any other model runs as it is: where `model` is `out/model.onnx` already (the pipeline
        compiles inside the bundle) nothing is written, otherwise it is copied there.

        Args:
            model: The ONNX file, float or in Q/DQ form, weights inside.
            target: What to compile for; nothing of it is needed.
            out: An existing folder.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed, or onnx-ir, which LRN nodes need.
            BackendError: ONNX Runtime refused the model.
        """
        self._prove(model)
        if self._lowers_lrn:
            lowered = out / _LOWERED
            with translated(f"Lowering the LRN nodes of {model}", _ADVICE):
                content = _lrn.lowered(model)
            if content is not None:
                with atomic_path(lowered) as temporary:
                    temporary.write_bytes(content)
                    self._prove(temporary)
                return self.artifact(out)
            lowered.unlink(missing_ok=True)  # of another model that was compiled here
        path = out / _FILE
        if not (path.exists() and path.samefile(model)):
            with atomic_path(path) as temporary:
                shutil.copyfile(model, temporary)
        return self.artifact(out)

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Runner]:
        """Load a model for ONNX Runtime's own kernels.

        Threads spin while one picture is computed and stop when it is done, so that a loaded model
        that waits takes nothing from others. GoogLeNet in INT8, two threads on two idle cores:
        4.2 ms with spinning, 5.1 without. Where other programs want the same cores it is the other
        way round (14 against 7 ms), so more threads than cores do not spin.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            BackendError: The file is not there or ONNX Runtime refused it.
        """
        entries = _native_entries(threads)
        yield from _opened(artifact.path, threads, optimize=True, entries=entries)

    def profile(
        self,
        artifact: Artifact,
        batch: InputArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """Tell what ONNX Runtime executes, from the trace that it writes of each run.

        A node's time is the median over all runs, in whole microseconds as the trace has it. The
        trace names operators, not the instructions that they use.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            BackendError: The file is not there or ONNX Runtime refused it.
        """
        count = _profile.rounds(runs)
        entries = _native_entries(threads)
        with tempfile.TemporaryDirectory(prefix="gnet-opt-profile-") as folder:
            trace = Path(folder) / "trace"
            session = _session(artifact.path, threads, optimize=True, entries=entries, trace=trace)
            try:
                runner = _Runner(session, artifact.path)
                for _ in range(_profile.WARM_UP):
                    runner.run(batch)
                for _ in progress(count, "Timing layers", len(count)):
                    for _ in range(_profile.RUNS):
                        runner.run(batch)
            finally:
                # It also closes the file, which some systems need before the folder can go.
                with translated(f"Ending the trace of {artifact.path}", _ADVICE):
                    written = session.end_profiling()
            with translated(
                f"Reading ONNX Runtime's trace of {artifact.path}",
                "Install a current ONNX Runtime.",
            ):
                traced = _runs_of(json.loads(Path(written).read_text(encoding="utf-8")))
        traced = traced[_profile.WARM_UP :]
        totals = [sum(times.values()) for times, _ in traced]
        return Profile(
            backend=self.name,
            version=self.probe().version,
            threads=threads,
            runs=len(traced),
            nodes=_executed(traced),
            rounds=tuple(
                statistics.mean(totals[first : first + _profile.RUNS])
                for first in range(0, len(totals), _profile.RUNS)
            ),
        )

    def artifact(self, folder: Path) -> Artifact:
        """The lowered model in `folder` where there is one, else the portable model."""
        path = folder / _LOWERED
        if self._lowers_lrn and path.is_file():
            return Artifact(backend=self.name, path=path, files=(("onnx-lowered", path),))
        path = folder / _FILE
        return Artifact(backend=self.name, path=path, files=(("onnx", path),))

    def _prove(self, model: Path) -> None:
        """Load a model and let it go."""
        with self.open(Artifact(backend=self.name, path=model, files=(("onnx", model),))):
            pass


class ReferenceBackend(OnnxRuntimeBackend):
    """Reference semantics: every node of the Q/DQ graph by itself, Q and DQ as float arithmetic.

    That is what a target with correct integer arithmetic computes, whatever this host's integer
    kernels do. Graph optimizations are off altogether. Cheaper settings were measured and are
    not the same: weights dequantized beforehand differ in the last bits (134 dB) because the
    Gemm kernel then packs them, and `session.disable_quant_qdq` with optimizations on sums in
    another order (50 dB, a rounding flips here and there). The price is small: about 24 ms a
    picture for GoogLeNet on two threads, where the native float model takes 11.

    Of an FP16 file it rounds every FP16 tensor, which ONNX Runtime by itself does not
    (`gnet_opt.backends._half`).
    """

    name = "reference"
    _lowers_lrn = False

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Runner]:
        """Load a model for reference semantics.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            BackendError: The file is not there or ONNX Runtime refused it.
        """
        # It runs beside other runtimes in one process and is never timed: its threads do not spin.
        entries = {"session.intra_op.allow_spinning": "0"}
        with translated(f"Reading {artifact.path}", _ADVICE):
            content = _half.rounded(artifact.path)
        yield from _opened(artifact.path, threads, optimize=False, entries=entries, content=content)

    def profile(
        self,
        artifact: Artifact,
        batch: InputArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """Refuse: every node runs in float by itself here, on purpose.

        Raises:
            BackendError: Always.
        """
        raise BackendError(
            f"{artifact.path}: reference semantics compute everything in float and no device runs "
            "them, so they have no layers worth timing. Profile it with the backend onnxruntime."
        )


@contextlib.contextmanager
def open_reference(model: Path, threads: int | None = None) -> Iterator[Runner]:
    """Load an ONNX file for reference semantics.

    Args:
        model: The ONNX file, float or in Q/DQ form.
        threads: CPU threads, or None for the runtime's own choice.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        BackendError: The file is not there or ONNX Runtime refused it.
    """
    artifact = Artifact(backend="reference", path=model, files=(("onnx", model),))
    with ReferenceBackend().open(artifact, threads=threads) as runner:
        yield runner


def input_form(model: Path) -> tuple[str, int | None]:
    """The input that an ONNX file takes.

    Returns:
        Its type, as NumPy calls it: `float32`, or `uint8` for pixels; and the number of its
        planes, None where the file leaves that open.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        BackendError: The file is not there, ONNX Runtime refused it or it is no classifier.
    """
    runner = _Runner(_session(model, 1, optimize=False, entries={}), model)
    axis = -1 if runner.dtype == "uint8" else 1
    return runner.dtype, runner.shape[axis] if len(runner.shape) == 4 else None


class _Runner:
    """A session; see `gnet_opt.runtime.Runner`."""

    def __init__(self, session: Any, path: Path) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(
                f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; a classifier has "
                "one of each. Export it with `gnet-opt export`."
            )
        self._session = session
        self._path = path
        self._input = inputs[0].name
        self._outputs = [outputs[0].name]
        # What no caller can pass: nothing was checked yet.
        self._checked: object = self
        # A dimension is a number, or a name (or None) where it is free.
        self.shape = tuple(d if isinstance(d, int) else None for d in inputs[0].shape)
        # What it cannot name, such as a sequence, no array fits.
        self.dtype: str = _DTYPES.get(inputs[0].type, inputs[0].type)

    def run(self, batch: InputArray) -> FloatArray:
        if self._session is None:
            raise BackendError(f"{self._path} was closed; run it inside its `with` block.")
        if batch is not self._checked:
            checked = check_input(batch, self.shape, str(self._path), self.dtype)
            self._checked = batch if checked is batch else self
            batch = checked
        try:
            # ONNX Runtime gives memory of its own to every result.
            return np.asarray(self._session.run(self._outputs, {self._input: batch})[0], np.float32)
        except Exception as error:
            raise failure(error, f"Running {self._path} with ONNX Runtime", _ADVICE) from error

    def close(self) -> None:
        self._session = None
        self._checked = self


def _native_entries(threads: int | None) -> dict[str, str]:
    """How native threads wait; see `OnnxRuntimeBackend.open`."""
    spin = threads is None or threads <= this_machine().cores
    return {
        "session.force_spinning_stop": "1",
        "session.intra_op.allow_spinning": "1" if spin else "0",
    }


def _opened(
    path: Path,
    threads: int | None,
    *,
    optimize: bool,
    entries: dict[str, str],
    content: bytes | None = None,
) -> Iterator[Runner]:
    session = _session(path, threads, optimize=optimize, entries=entries, content=content)
    runner = _Runner(session, path)
    try:
        yield runner
    finally:
        runner.close()


def _session(
    path: Path,
    threads: int | None,
    *,
    optimize: bool,
    entries: dict[str, str],
    content: bytes | None = None,
    trace: Path | None = None,
) -> Any:
    """Make a session, of `content` instead of the file where there is one.

    With `trace` it writes one to a file of that beginning.
    """
    require("onnxruntime", "onnxruntime", f"run {path.name}")
    with translated(f"Loading {path} with ONNX Runtime", _ADVICE):
        import onnxruntime

        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        )
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors only: a warning on every load helps nobody
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace)
        # Its own fallback would print to stdout and try the same provider again.
        return onnxruntime.InferenceSession(
            content or str(path),
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,
        )


_Key = tuple[str, str, str]
"""A node of a trace: its name, its index in the graph, its operator."""


def _runs_of(
    events: list[dict[str, Any]],
) -> list[tuple[dict[_Key, float], dict[_Key, Mapping[str, Any]]]]:
    """The nodes of each run of a trace, in order: microseconds, and what is said about each.

    An event is written when it ends, so a run's nodes stand in front of its `model_run`.
    """
    runs = []
    times: dict[_Key, float] = {}
    facts: dict[_Key, Mapping[str, Any]] = {}
    for event in events:
        name, said = event["name"], event.get("args", {})
        if event["cat"] == "Node" and name.endswith("_kernel_time"):
            key = (name.removesuffix("_kernel_time"), said.get("node_index", ""), said["op_name"])
            times[key] = times.get(key, 0.0) + float(event["dur"])
            facts[key] = said
        elif name == "model_run":
            runs.append((times, facts))
            times, facts = {}, {}
    return runs


def _executed(
    traced: list[tuple[dict[_Key, float], dict[_Key, Mapping[str, Any]]]],
) -> tuple[ExecutedNode, ...]:
    """The nodes of the last run, with the median of each over all runs."""
    nodes = []
    for key, said in traced[-1][1].items():
        name, _, operator = key
        plain = _DECORATION.sub("", name)
        lrn = _lrn.source(plain)
        nodes.append(
            ExecutedNode(
                name=name,
                operator=operator,
                kind="lrn" if lrn else _KINDS.get(operator, "other"),
                precision=_precision(operator, said),
                microseconds=statistics.median(times.get(key, 0.0) for times, _ in traced),
                covers=(lrn,) if lrn else (name,) if plain == name else (name, plain),
            )
        )
    return tuple(nodes)


def _precision(operator: str, said: Mapping[str, Any]) -> str:
    """The type of the first input that is a tensor; scales and zero points are scalars."""
    if operator == "DynamicQuantizeMatMul":  # takes float and multiplies integers
        return "u8"
    shapes = [*said.get("input_type_shape", ()), *said.get("output_type_shape", ())]
    for shape in shapes:
        for kind, sizes in shape.items():
            if sizes:
                return _profile.precision(kind)
    return ""
