"""TensorRT-RTX: an engine for NVIDIA's RTX GPUs, built ahead of time on any x86-64 machine."""

from __future__ import annotations

import re
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from gnet_opt.backends._boundary import probe_package
from gnet_opt.backends._build_options import BuildOptions
from gnet_opt.backends._engine import EngineRecord, Library, open_engine, record_of
from gnet_opt.backends._engine_build import build_apart
from gnet_opt.backends._gpu import require_gpu
from gnet_opt.errors import BackendError, ConfigError, require
from gnet_opt.files import sha256_file
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, FloatArray, Probe, Profile, Runner
from gnet_opt.target import Target

_ENGINE = "model.engine"
_MODULE = "tensorrt_rtx"
_LIBRARY = Library(
    module=_MODULE,
    title="TensorRT-RTX",
    again="build the bundle again with `gnet-opt quantize`",
)
_BENCHMARKING = (
    "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/performance/benchmarking.html"
)


class TensorRtRtxBackend:
    """Builds an engine without a GPU, and runs it where there is one.

    The library compiles in two steps. Here the ONNX file becomes an engine for the GPUs that the
    target names, on any machine; where the engine is loaded, the library makes the kernels of the
    GPU that is there. So one file serves several GPUs, and loading takes seconds:
    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/installing-tensorrt-rtx/installation-overview.html.
    An engine is no engine of TensorRT's, nor the other way round.

    The portable model needs no lowering, LRN included: see `gnet_opt.backends.tensorrt`. Version
    1.7 makes engines of it in which all 57 convolutions take integers, by its own list of their
    layers; earlier versions build no convolution in INT8.
    """

    name = "tensorrt-rtx"
    extra = "tensorrt-rtx"

    def probe(self) -> Probe:
        """Whether TensorRT-RTX is installed; it is not imported."""
        return probe_package(_MODULE, ("tensorrt-rtx", "tensorrt-rtx-cu13"), self.extra)

    def check(self, target: Target) -> None:
        """Refuse a target that does not name its GPUs, or with options that cannot be used.

        Raises:
            ConfigError: As `compile`.
        """
        _compute_capabilities(target)
        BuildOptions.read(target.options, str(target.file))

    def compile(self, model: Path, target: Target, out: Path) -> Artifact:
        """Build `model.engine`, and write `model.engine.json`, which tells where it comes from.

        Equal inputs give equal bytes with one version of TensorRT-RTX, but for a model that takes
        any batch: there version 1.7 numbers the names in the engine differently in each build.

        Args:
            model: The ONNX file, float or in Q/DQ form.
            target: What to compile for; `options.compute_capabilities` names its GPUs, and
                `gnet_opt.backends._build_options` has the other options.
            out: An existing folder.

        Raises:
            ConfigError: The target does not name its GPUs, or an option cannot be used.
            MissingDependencyError: TensorRT-RTX is not installed.
            BackendError: TensorRT-RTX refused the model, or crashed.
        """
        require(_MODULE, self.extra, f"compile {model.name}")
        compute_capabilities = _compute_capabilities(target)
        options = BuildOptions.read(target.options, str(target.file))
        try:
            model_sha256 = sha256_file(model)
        except OSError as error:
            raise BackendError(f"{model} cannot be read ({error}). Export it again.") from error
        artifact = self.artifact(out)
        with tempfile.TemporaryDirectory(dir=out, prefix=".tensorrt-rtx-") as folder:
            engine = Path(folder) / _ENGINE
            version = build_apart(
                _LIBRARY, model, engine, options, compute_capabilities=compute_capabilities
            )
            EngineRecord(
                backend=self.name,
                version=version,
                compute_capabilities=compute_capabilities,
                model_sha256=model_sha256,
                engine_sha256=sha256_file(engine),
            ).write(record_of(engine))
            for _, path in artifact.files:
                (Path(folder) / path.name).replace(path)
        return artifact

    def open(
        self, artifact: Artifact, *, threads: int | None = None
    ) -> AbstractContextManager[Runner]:
        """Load an engine on the first GPU.

        Raises:
            MissingDependencyError: TensorRT-RTX or cuda-bindings is not installed.
            BackendError: A file is missing, damaged or stale, there is no GPU, or TensorRT-RTX
                refused the engine.
        """
        require(_MODULE, self.extra, f"run {artifact.path.name}")
        return open_engine(artifact.path, _LIBRARY)

    def is_native(self, artifact: Artifact) -> bool:
        """Whether this machine has a GPU that the engine was built for.

        Without TensorRT-RTX it has not: nothing runs an engine there.
        """
        if not self.probe().available:
            return False
        try:
            gpu = require_gpu(f"{artifact.path} was not run", "")
            record = EngineRecord.read(record_of(artifact.path))
        except BackendError:
            return False
        return gpu.compute_capability in record.compute_capabilities

    def profile(
        self,
        artifact: Artifact,
        batch: FloatArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """Refuse, and say what tells the time of each layer.

        Raises:
            BackendError: Always.
        """
        raise BackendError(
            f"{artifact.path}: this version of gnet-opt does not time the layers of an engine. "
            "On a machine with the GPU the tool tensorrt_rtx of NVIDIA's SDK does, with "
            f"--loadEngine={artifact.path.name}: {_BENCHMARKING}"
        )

    def artifact(self, folder: Path) -> Artifact:
        """The engine in `folder`."""
        path = folder / _ENGINE
        files = (("tensorrt-rtx-engine", path), ("engine-record", record_of(path)))
        return Artifact(backend=self.name, path=path, files=files)


def _compute_capabilities(target: Target) -> tuple[str, ...]:
    """The GPUs that a target names.

    Raises:
        ConfigError: It names none, or not in NVIDIA's form, such as `8.6`.
    """
    given = target.options.get("compute_capabilities")
    names = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not names or not all(isinstance(n, str) and re.fullmatch(r"\d+\.\d", n) for n in names):
        raise ConfigError(
            f"{target.file}: options.compute_capabilities is {given!r}; it must be a list of "
            'those of the GPUs, such as ["8.6", "8.9"].'
        )
    if len(set(names)) != len(names):
        raise ConfigError(f"{target.file}: options.compute_capabilities names one twice.")
    return names
