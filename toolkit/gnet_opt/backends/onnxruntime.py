"""ONNX Runtime on the CPU: native kernels, and the reference semantics of an INT8 model."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.backends._boundary import check_input, probe_package, translated
from gnet_opt.errors import BackendError, require
from gnet_opt.files import atomic_path
from gnet_opt.machine import this_machine
from gnet_opt.runtime import Artifact, FloatArray, Probe, Runner
from gnet_opt.target import Target

_FILE = "model.onnx"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_ADVICE = "Check the file with `gnet-opt inspect`, or build the bundle again."


class OnnxRuntimeBackend:
    """Runs the portable model itself, with ONNX Runtime's own integer kernels.

    There is nothing to compile: ONNX Runtime turns Q/DQ pairs into integer kernels whenever it
    loads the model, for the CPU that it finds (about 40 ms for GoogLeNet). Its optimized graph
    could be saved, but then it would be bound to one version and one instruction set.
    """

    name = "onnxruntime"
    extra = "onnxruntime"

    def probe(self) -> Probe:
        """Whether ONNX Runtime is installed; it is not imported."""
        return probe_package("onnxruntime", _DISTRIBUTIONS, self.extra)

    def compile(self, model: Path, target: Target, out: Path) -> Artifact:
        """Prove that ONNX Runtime loads the model, and see that it lies in `out`.

        The artifact is the portable model: where `model` is `out/model.onnx` already (the
        pipeline compiles inside the bundle) nothing is written, otherwise it is copied there.

        Args:
            model: The ONNX file, float or in Q/DQ form, weights inside.
            target: What to compile for; nothing of it is needed.
            out: An existing folder.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            BackendError: ONNX Runtime refused the model.
        """
        with self.open(Artifact(backend=self.name, path=model, files=(("onnx", model),))):
            pass
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
        spin = threads is None or threads <= this_machine().cores
        entries = {
            "session.force_spinning_stop": "1",
            "session.intra_op.allow_spinning": "1" if spin else "0",
        }
        yield from _opened(artifact.path, threads, optimize=True, entries=entries)

    def artifact(self, folder: Path) -> Artifact:
        """The portable model in `folder`."""
        path = folder / _FILE
        return Artifact(backend=self.name, path=path, files=(("onnx", path),))


class ReferenceBackend(OnnxRuntimeBackend):
    """Reference semantics: every node of the Q/DQ graph by itself, Q and DQ as float arithmetic.

    That is what a target with correct integer arithmetic computes, whatever this host's integer
    kernels do. Graph optimizations are off altogether. Cheaper settings were measured and are
    not the same: weights dequantized beforehand differ in the last bits (134 dB) because the
    Gemm kernel then packs them, and `session.disable_quant_qdq` with optimizations on sums in
    another order (50 dB, a rounding flips here and there). The price is small: about 24 ms a
    picture for GoogLeNet on two threads, where the native float model takes 11.
    """

    name = "reference"

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Runner]:
        """Load a model for reference semantics.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            BackendError: The file is not there or ONNX Runtime refused it.
        """
        # It runs beside other runtimes in one process and is never timed: its threads do not spin.
        entries = {"session.intra_op.allow_spinning": "0"}
        yield from _opened(artifact.path, threads, optimize=False, entries=entries)


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
        # A dimension is a number, or a name (or None) where it is free.
        self._shape = tuple(d if isinstance(d, int) else None for d in inputs[0].shape)

    def run(self, batch: FloatArray) -> FloatArray:
        if self._session is None:
            raise BackendError(f"{self._path} was closed; run it inside its `with` block.")
        batch = check_input(batch, self._shape, str(self._path))
        with translated(f"Running {self._path} with ONNX Runtime", _ADVICE):
            logits = self._session.run(None, {self._input: batch})[0]
            # ONNX Runtime gives memory of its own to every result.
            return np.asarray(logits, np.float32)

    def close(self) -> None:
        self._session = None


def _opened(
    path: Path, threads: int | None, *, optimize: bool, entries: dict[str, str]
) -> Iterator[Runner]:
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
        # Its own fallback would print to stdout and try the same provider again.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    runner = _Runner(session, path)
    del session
    try:
        yield runner
    finally:
        runner.close()
