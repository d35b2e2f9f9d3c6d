"""TensorRT: an engine belongs to one GPU and one version, so the device builds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from gnet_opt.backends._boundary import probe_package
from gnet_opt.backends._half import is_half
from gnet_opt.backends._trtexec import build_command, build_script
from gnet_opt.errors import BackendError, require
from gnet_opt.files import write_text
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, Deferred, FloatArray, Probe, Profile, Runner
from gnet_opt.target import Target

_ENGINE = "model.engine"
_SCRIPT = "build_engine.sh"


class TensorRtBackend:
    """Defers the build to the device and says exactly what to run there.

    The portable model needs no lowering, LRN included. TensorRT has a float32 layer for it (an odd
    window up to 15, up to 9 on a DLA), which divides alpha by the window's size as ONNX does, and
    its parser makes one of every LRN node:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/LRN.html. Tried with
    TensorRT-RTX 1.7, strongly typed, for compute capabilities 8.0, 8.6, 8.9, 12.0 and 12.1: the
    2014 GoogLeNet builds with its two nodes, in float and in INT8. With LRN lowered as ONNX
    Runtime likes it best, it does not build for 7.5, which has no 3-D convolution in float32.
    """

    name = "tensorrt"
    extra = "tensorrt"

    def probe(self) -> Probe:
        """Whether TensorRT's Python package is installed; it is not imported."""
        # JetPack brings the plain distribution, pip one a CUDA version.
        return probe_package("tensorrt", ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"), self.extra)

    def compile(self, model: Path, target: Target, out: Path) -> Deferred:
        """Write `build_engine.sh` into `out` and tell what it runs.

        Args:
            model: The ONNX file; it must be (or become) `out/model.onnx`.
            target: What to compile for; `options.tensorrt` is the device's TensorRT version.
            out: An existing folder.

        Raises:
            ConfigError: The target does not say its TensorRT version, or not a known one.
        """
        quantized, half = _is_quantized(model), is_half(model)
        command = build_command(target, quantized=quantized, half=half)
        script = out / _SCRIPT
        write_text(script, build_script(target, model, quantized=quantized, half=half))
        script.chmod(script.stat().st_mode | 0o111)
        return Deferred(
            backend=self.name,
            reason=(
                "A TensorRT engine fits one GPU and one TensorRT version, "
                f"so it is built on the device ({target.name})."
            ),
            command=command,
            expected=_ENGINE,
            files=(("script", script),),
        )

    def open(
        self, artifact: Artifact, *, threads: int | None = None
    ) -> AbstractContextManager[Runner]:
        """Refuse in one sentence: this version of gnet-opt runs no engine.

        Raises:
            MissingDependencyError: TensorRT is not installed.
            BackendError: Always otherwise.
        """
        return _refuse(artifact)

    def profile(
        self,
        artifact: Artifact,
        batch: FloatArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """Refuse, and say what tells the time of each layer on the device.

        Raises:
            BackendError: Always.
        """
        engine = artifact.path.name
        raise BackendError(
            f"{artifact.path}: a TensorRT engine runs only on the device that it was built on, and "
            "this version of gnet-opt does not run engines itself. Build it there with "
            f"./{_SCRIPT}, then time its layers in the bundle's folder with trtexec "
            f"--loadEngine={engine} --dumpProfile --separateProfileRun."
        )

    def artifact(self, folder: Path) -> Artifact:
        """The engine in `folder`, once the device has built it."""
        path = folder / _ENGINE
        return Artifact(backend=self.name, path=path, files=(("tensorrt-engine", path),))


@contextmanager
def _refuse(artifact: Artifact) -> Iterator[Runner]:
    require("tensorrt", "tensorrt", f"run {artifact.path.name}")
    raise BackendError(
        f"{artifact.path}: a TensorRT engine runs only on the device that it was built on, and "
        "this version of gnet-opt does not run engines itself. Run it there with "
        f"trtexec --loadEngine={artifact.path.name}."
    )
    yield


def _is_quantized(model: Path) -> bool:
    """Whether an ONNX file has QuantizeLinear nodes.

    An operator's name stands in the file as plain text, so a device needs no ONNX package to see.
    """
    try:
        return b"QuantizeLinear" in model.read_bytes()
    except OSError as error:
        raise BackendError(f"{model} cannot be read ({error}). Build the bundle again.") from error
