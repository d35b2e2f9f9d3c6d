"""TensorRT: an engine belongs to one GPU and one version, so the device builds it."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gnet_opt.backends._boundary import probe_package, translated
from gnet_opt.backends._build_options import BuildOptions
from gnet_opt.backends._engine import EngineRecord, Library, open_engine, record_of
from gnet_opt.backends._engine_build import build_apart
from gnet_opt.backends._gpu import Gpu, require_gpu
from gnet_opt.backends._half import is_half
from gnet_opt.backends._tensorrt8 import FILE as MODEL_FOR_8
from gnet_opt.backends._tensorrt8 import OLDEST_WITH_INT8_WEIGHTS, for_tensorrt8, reads_opset_17
from gnet_opt.backends._trtexec import (
    ENGINE,
    MODEL,
    TIMINGS,
    VERSION,
    Input,
    build_command,
    build_script,
    deferred_command,
    tensorrt_version,
)
from gnet_opt.errors import (
    BackendError,
    ConfigError,
    IntegrityError,
    MissingDependencyError,
    require,
)
from gnet_opt.files import atomic_path, is_file, sha256_file, write_text
from gnet_opt.preflight import no_room
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, Deferred, Finished, FloatArray, Probe, Profile, Runner
from gnet_opt.target import Target

_SCRIPT = "build_engine.sh"
_PRECISIONS = ("INT8", "FP16")
"""The types that TensorRT 8 is allowed to choose beside float32, as its flags are called."""

_LIBRARY = Library(
    module="tensorrt",
    title="TensorRT",
    again="build it again with `gnet-opt compile`",
)


class TensorRtBackend:
    """Defers the build to the device, finishes it there, and runs what was built.

    The portable model needs no lowering from TensorRT 10 on, LRN included; for what TensorRT 8
    needs see `gnet_opt.backends._tensorrt8`. TensorRT has a float32 layer for LRN (an odd window up
    to 15, up to 9 on a DLA), which divides alpha by the window's size as ONNX does, and its parser
    makes one of every LRN node:
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

    def check(self, target: Target) -> None:
        """Refuse a target whose options do not make a command.

        Raises:
            ConfigError: As `compile`.
        """
        build_command(target, quantized=False)

    def compile(self, model: Path, target: Target, out: Path) -> Deferred:
        """Write `build_engine.sh` into `out` and tell what it runs.

        For TensorRT 8 `out` also gets the model in the form that it reads.

        Args:
            model: The ONNX file; it must be (or become) `out/model.onnx`.
            target: What to compile for; `options.tensorrt` is the device's TensorRT version, and
                `gnet_opt.backends._build_options` has the other options.
            out: An existing folder.

        Raises:
            ConfigError: The target does not say its TensorRT version, not a known one, or an option
                cannot be used.
            BackendError: The model cannot be read, or cannot be put into the form of TensorRT 8.
            MissingDependencyError: onnx-ir is needed and not installed.
        """
        version = tensorrt_version(target.options, str(target.file))
        options = BuildOptions.read(target.options, str(target.file))
        quantized, half = _is_quantized(model), is_half(model)
        free = _free_input(model)
        files: list[tuple[str, Path]] = []
        built_from, name = model, MODEL
        if version < OLDEST_WITH_INT8_WEIGHTS and (quantized or not reads_opset_17(version)):
            built_from, name = out / MODEL_FOR_8, MODEL_FOR_8
            content = for_tensorrt8(model, version)
            with atomic_path(built_from) as temporary:
                temporary.write_bytes(content)
            files.append(("tensorrt8-onnx", built_from))
        allowed = zip(_PRECISIONS, (quantized, half), strict=True)
        command = build_command(target, quantized=quantized, half=half, name=name, free=free)
        script = out / _SCRIPT
        text = build_script(
            target, built_from, quantized=quantized, half=half, name=name, free=free
        )
        write_text(script, text)
        script.chmod(script.stat().st_mode | 0o111)
        files.append(("script", script))
        return Deferred(
            backend=self.name,
            reason=(
                "A TensorRT engine fits one GPU and one TensorRT version, "
                f"so it is built on the device ({target.name})."
            ),
            command=command,
            expected=ENGINE,
            files=tuple(files),
            options={
                **options.to_dict(),
                "input": free and free.to_dict(),
                "model": name,
                "precisions": [precision for precision, used in allowed if used],
                "tensorrt": str(target.options["tensorrt"]),
            },
        )

    def command(self, folder: Path, options: Mapping[str, Any]) -> str:
        """The call of trtexec that does the same as `finish`, in the bundle's folder.

        Raises:
            IntegrityError: The options are damaged.
        """
        if not {"input", "tensorrt"} <= set(options):  # of an older version of gnet-opt
            return ""
        model, _, precisions = _asked_for(folder, options)
        try:
            quantized, half = (precision in precisions for precision in _PRECISIONS)
            where = f"{folder}: deferred"
            return deferred_command(options, where, quantized=quantized, half=half, name=model.name)
        except ConfigError as error:
            raise IntegrityError(f"{error} Build the bundle again.") from error

    def finish(
        self,
        folder: Path,
        options: Mapping[str, Any],
        *,
        force: bool = False,
        progress: Progress = silent,
    ) -> Finished:
        """Build the engine of a bundle for the GPU and the TensorRT of this machine.

        An engine that fits is left alone. One that build_engine.sh or trtexec made has no record of
        where it comes from, so it is built again, with the timings that they kept.

        Args:
            folder: The bundle.
            options: What `compile` deferred.
            force: Whether an engine that fits is built again, too.
            progress: Shows the phases of the build.

        Raises:
            BackendError: There is no GPU, a Jetson is not ready, or TensorRT refused the model.
            IntegrityError: The options are damaged.
            MissingDependencyError: TensorRT's Python package is not installed.
        """
        engine = folder / ENGINE
        gpu = require_gpu(
            f"{engine} was not built",
            f"Run `gnet-opt compile` on the device, or ./{_SCRIPT} in the bundle there.",
        )
        if not self.probe().available:
            raise MissingDependencyError(
                f"TensorRT's Python package is needed to build {engine} here, and it is not "
                "installed. On a Jetson JetPack has it (sudo apt install python3-libnvinfer; a "
                "virtual environment sees it with --system-site-packages), elsewhere: "
                f'pip install "gnet-opt[{self.extra}]". Or build without it: run ./{_SCRIPT} in '
                "the bundle."
            )
        version = str(_LIBRARY.load(f"Loading TensorRT to build {engine}").__version__)
        why = self._outdated(engine, version, gpu)
        if not why and not force:
            return Finished(built=False, engine=engine, reason="it fits this machine")
        if blockers := no_room(folder):
            raise BackendError(f"{engine} was not built. {' '.join(blockers)}")
        model, how, precisions = _asked_for(folder, options)
        _check_form(folder, options, version)
        # Before the build: should the model be replaced meanwhile, the engine counts as stale.
        model_sha256 = sha256_file(model)
        with _scratch(folder, engine) as scratch:
            made = scratch / ENGINE
            built_by = build_apart(
                _LIBRARY,
                model,
                made,
                how,
                precisions=precisions,
                timings=folder / TIMINGS,
                progress=progress,
            )
            EngineRecord(
                backend=self.name,
                version=built_by,
                compute_capabilities=(gpu.compute_capability,),
                model_sha256=model_sha256,
                engine_sha256=sha256_file(made),
                model=model.name,
                gpu=gpu.name,
                cuda=gpu.cuda,
                version_compatible=how.version_compatible,
                hardware_compatibility=how.hardware_compatibility,
            ).write(record_of(made))
            # Whatever ends this in between leaves a record that does not fit, which is seen.
            for path in sorted(scratch.iterdir()):
                path.replace(folder / path.name)
        return Finished(
            built=True,
            engine=engine,
            reason=why or "--force asks for it",
            version=built_by,
            device=str(gpu),
        )

    def open(
        self, artifact: Artifact, *, threads: int | None = None
    ) -> AbstractContextManager[Runner]:
        """Load an engine that `finish` built, on the first GPU.

        Raises:
            MissingDependencyError: TensorRT or cuda-bindings is not installed.
            BackendError: A file is missing, damaged or stale, there is no GPU, or TensorRT refused
                the engine.
        """
        require("tensorrt", self.extra, f"run {artifact.path.name}")
        return open_engine(artifact.path, _LIBRARY)

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
            f"{artifact.path}: this version of gnet-opt does not time the layers of an engine. On "
            "the device trtexec does, in the bundle's folder: trtexec "
            f"--loadEngine={engine} --dumpProfile --separateProfileRun."
        )

    def artifact(self, folder: Path) -> Artifact:
        """The engine in `folder`, once the device has built it, and its record."""
        path = folder / ENGINE
        files = (("tensorrt-engine", path), ("engine-record", record_of(path)))
        return Artifact(backend=self.name, path=path, files=files)

    def _outdated(self, engine: Path, version: str, gpu: Gpu) -> str:
        """Why an engine has to be built; empty where it fits this machine."""
        record = record_of(engine)
        if not is_file(engine):
            return "it was not built yet"
        if not is_file(record):
            return f"the one that was there has no record, as {_SCRIPT} and trtexec leave it"
        try:
            return EngineRecord.read(record).problem(engine, _LIBRARY, version, gpu)
        except BackendError:
            return f"the record of the one that was there, {record.name}, cannot be read"


@contextlib.contextmanager
def _scratch(folder: Path, engine: Path) -> Iterator[Path]:
    """A folder in the bundle to build in, so that what is ready is moved into its place at once.

    By its name, what a killed build leaves behind is a by-product of the engine.

    Raises:
        BackendError: The bundle cannot be written into.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{engine.name}.") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise BackendError(
            f"{engine} was not built: {error}. Make room there and allow writing, or copy the "
            "bundle to a disk that has room and may be written."
        ) from error


def _asked_for(
    folder: Path, options: Mapping[str, Any]
) -> tuple[Path, BuildOptions, tuple[str, ...]]:
    """What `compile` deferred: the file to build from, how to build, and TensorRT 8's flags.

    Raises:
        IntegrityError: The manifest that they stand in is damaged.
    """
    name, precisions = options.get("model", MODEL), options.get("precisions", [])
    where = f"{folder}: deferred.options"
    if name not in (MODEL, MODEL_FOR_8) or not is_file(folder / name):
        raise IntegrityError(
            f"{where}.model is {name!r}, which is no model. Build the bundle again."
        )
    if not isinstance(precisions, list) or any(p not in _PRECISIONS for p in precisions):
        raise IntegrityError(
            f"{where}.precisions is {precisions!r}; known are {', '.join(_PRECISIONS)}. Build the "
            "bundle again."
        )
    made_for = options.get("tensorrt", "")
    if made_for and not (isinstance(made_for, str) and VERSION.fullmatch(made_for)):
        raise IntegrityError(
            f"{where}.tensorrt is {str(made_for)[:40]!r}, which is no version. Build the bundle "
            "again."
        )
    try:
        return folder / name, BuildOptions.read(options, f"{folder}: deferred"), tuple(precisions)
    except ConfigError as error:
        raise IntegrityError(f"{error} Build the bundle again.") from error


def _check_form(folder: Path, options: Mapping[str, Any], version: str) -> None:
    """Refuse a TensorRT 8 that does not read the form of the model that the bundle has.

    The other way round it fits: what is read by an older version is read by later ones.

    Raises:
        BackendError: The version here is too old.
    """
    made_for = str(options.get("tensorrt", ""))
    wanted, here = (
        tuple(int(number) for number in re.findall(r"\d+", text)[:2])
        for text in (made_for, version)
    )
    if here < min(wanted, OLDEST_WITH_INT8_WEIGHTS):
        raise BackendError(
            f"{folder} was made for TensorRT {made_for}, and the TensorRT {version} that is here "
            "does not read the model's form. Update it, or build the bundle again for a target "
            "file whose options.tensorrt is the version here."
        )


def _is_quantized(model: Path) -> bool:
    """Whether an ONNX file has QuantizeLinear nodes.

    An operator's name stands in the file as plain text, so a device needs no ONNX package to see.
    """
    try:
        return b"QuantizeLinear" in model.read_bytes()
    except OSError as error:
        raise BackendError(f"{model} cannot be read ({error}). Build the bundle again.") from error


def _free_input(model: Path) -> Input | None:
    """The input of a model that takes any batch, or None where its batch is fixed."""
    require("onnx_ir", "build", f"compile {model.name}")
    import onnx_ir as ir

    with translated(f"Reading {model}", "Export the model again with `gnet-opt export`."):
        value = ir.load(model, format="protobuf").graph.inputs[0]
        assert value.shape is not None and value.name is not None
        batch, *picture = value.shape
        if isinstance(batch, int):
            return None
        return Input(name=value.name, picture=tuple(int(str(size)) for size in picture))
