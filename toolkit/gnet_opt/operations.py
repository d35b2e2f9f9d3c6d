"""What is done with a model or a finished bundle: export, verify, inspect, finish."""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gnet_opt import backends
from gnet_opt.backends._tensorrt8 import FILE as MODEL_FOR_8
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bench import layers
from gnet_opt.bundle import MANIFEST, Bundle
from gnet_opt.drawn import drawn_examples, drawn_input
from gnet_opt.errors import BackendError, ConfigError, IntegrityError, ModelError, require
from gnet_opt.files import is_file
from gnet_opt.golden import Golden
from gnet_opt.machine import this_machine
from gnet_opt.model import Model
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, Backend, DeviceCompiler, OwnMachines, Runner
from gnet_opt.stages import prepare
from gnet_opt.target import Match

_BUILD_MODULES = (
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "torch",
    "torchvision",
)


def verify(bundle: Bundle, *, threads: int | None = None) -> dict[str, Any]:
    """Prove that a bundle is whole and computes here what it computed when it was made.

    Hashes of all files, the preprocess on the golden picture, and the golden outputs: by this
    machine's runtime, or by reference semantics where the engine is still to be built.

    Returns:
        What was checked, with the measured SQNR in dB.

    Raises:
        BackendError: The model cannot be run here; the message says what was checked before.
        IntegrityError: A file was changed, or an output is not as it must be.
        MissingDependencyError: The runtime is not installed.
    """
    files = bundle.check()
    samples = Golden.read(bundle.path("golden"))
    samples.check_preprocess(bundle.preprocess)
    tolerance = float(bundle.manifest["golden"]["tolerance"]["sqnr_db"])
    inputs = bundle.preprocess.tensor(samples.pixels)
    name, runtime = open_bundle(bundle, threads=threads)
    reference = name == "reference"
    foreign = not reference and not is_native(bundle)
    try:
        with runtime as runner:
            measured = samples.replay(runner, inputs, tolerance, name)
    except BackendError as error:
        raise BackendError(
            f"{error} What could be checked is right: {files} files have their SHA-256, and "
            "pictures are read and resized as at calibration."
        ) from error
    return {
        "backend": name,
        "deferred": bundle.deferred if reference else None,
        "files": files,
        "foreign": foreign,
        "golden_images": len(inputs),
        "sqnr_db": measured,
        "tolerance_db": tolerance,
    }


def open_bundle(
    bundle: Bundle, *, threads: int | None = None, reference: bool = False
) -> tuple[str, AbstractContextManager[Runner]]:
    """Open a bundle's model on this machine.

    Returns:
        The name of what runs it, and the runner's context manager. It is the bundle's own backend,
        or `reference` on request and where the engine is still to be built (`pending`).
    """
    if reference or pending(bundle):
        return "reference", open_reference(bundle.model, threads)
    backend = backend_of(bundle)
    return backend.name, backend.open(backend.artifact(bundle.root), threads=threads)


def pending(bundle: Bundle) -> str:
    """Why a bundle does not run here as its target runs it: what the device has still to build.

    Returns:
        A sentence, or nothing where the bundle came complete, or where a device has built what was
        deferred. Whether that fits this machine is told when it is opened.
    """
    if not bundle.deferred:
        return ""
    if not is_file(bundle.root / str(bundle.deferred["expected"])):
        return "The engine is not built yet."
    if all(is_file(path) for _, path in backend_of(bundle).artifact(bundle.root).files):
        return ""
    return (
        "The engine here has no record of where it comes from, because its script or trtexec built "
        "it; `gnet-opt compile` builds it again with one."
    )


def is_native(bundle: Bundle) -> bool:
    """Whether this machine is the bundle's target, so that its kernels give the target's figures.

    An engine that was built on the device is native where it opens at all. Where the target does
    not describe its machines, the backend may know them.

    Raises:
        IntegrityError: The manifest's description of the target is damaged.
    """
    if bundle.deferred:
        return not pending(bundle)
    table = bundle.manifest["target"].get("match")
    if table is None:
        if bundle.manifest["target"]["backend"] not in backends.names():
            return False
        backend = backend_of(bundle)
        return isinstance(backend, OwnMachines) and backend.is_native(backend.artifact(bundle.root))
    try:
        return Match(**table)(this_machine())
    except TypeError as error:
        raise IntegrityError(f"{bundle.root}: target.match is damaged ({error}).") from error


def export(
    model: Model,
    out: Path,
    *,
    batch: Literal[1, "dynamic"] = 1,
    input: Literal["float32", "uint8"] = "float32",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the stripped and folded float graph; the claims are proved on drawn pictures.

    Args:
        model: The loaded model.
        out: The file to write.
        batch: 1, or `dynamic` for a symbolic batch dimension.
        input: What the file takes: `float32`, normalised values, or `uint8`, pixels that its own
            first nodes normalise.
        progress: Shows the steps.

    Returns:
        The facts of each stage.

    Raises:
        ModelError: A stage failed, or changed the logits by more than it may.
    """
    pixels = drawn_examples(model.preprocess)
    examples = model.preprocess.normalize(pixels)
    if input == "float32":
        return prepare(model, examples, out, batch=batch, progress=progress)
    from gnet_opt.stages.pixels import take_pixels

    with tempfile.TemporaryDirectory(prefix="gnet-opt-") as scratch:
        plain = Path(scratch) / "float.onnx"
        facts = prepare(model, examples, plain, batch=batch, progress=progress)
        return {**facts, "input": take_pixels(plain, out, model.preprocess, pixels)}


def inspect(path: Path) -> dict[str, Any]:
    """Describe a bundle or an ONNX file.

    Returns:
        `model`, what `gnet_opt.quantization.describe` found, and for a bundle `bundle` (its
        manifest without long lists) and `artifacts`; None for a file.

    Raises:
        IntegrityError: The bundle is damaged.
        ModelError: The file is no ONNX file.
    """
    model = _portable_model(path)
    from gnet_opt.quantization.describe import describe

    if not path.is_dir():
        return {"artifacts": None, "bundle": None, "model": describe(model)}
    bundle = Bundle.open(path)
    long = ("artifacts", "facts", "labels", "notes")
    summary = {key: value for key, value in bundle.manifest.items() if key not in long}
    artifacts = bundle.manifest["artifacts"]
    return {"artifacts": artifacts, "bundle": summary, "model": describe(model)}


def lint(path: Path, rules: str) -> dict[str, Any]:
    """Name every form in a bundle's model or an ONNX file that a runtime does not like.

    Args:
        path: A bundle, or an ONNX file of any tool. Of a bundle it is the portable model, or with
            the rules of TensorRT 8 the one in its form, where the bundle has it.
        rules: Whose rules, as `gnet_opt.quantization.lint` knows them.

    Returns:
        `findings` (`gnet_opt.quantization.lint.Finding.to_dict`), how many `errors` and `slow`
        forms are among them, the `file`, whether it is `quantized` at all, and the `rules`.

    Raises:
        ConfigError: There are no such rules.
        IntegrityError: The bundle is damaged.
        MissingDependencyError: What reads an ONNX file is not installed.
        ModelError: The file is no ONNX file.
    """
    model = _portable_model(path)
    from gnet_opt.quantization import lint as linter

    if rules == "tensorrt8" and path.is_dir() and is_file(path / MODEL_FOR_8):
        model = path / MODEL_FOR_8
    found = linter.lint(model, rules)
    findings = found or []
    return {
        "errors": sum(finding.severity == "error" for finding in findings),
        "file": str(model),
        "findings": [finding.to_dict() for finding in findings],
        "quantized": found is not None,
        "rules": rules,
        "slow": sum(finding.severity == "slow" for finding in findings),
    }


def dla(path: Path) -> dict[str, Any]:
    """Tell what a DLA would take of a bundle's portable model or an ONNX file; nothing is built.

    Returns:
        What `gnet_opt.quantization.dla.Report.to_dict` gives.

    Raises:
        IntegrityError: The bundle is damaged.
        MissingDependencyError: What reads an ONNX file is not installed.
        ModelError: The file is no ONNX file.
    """
    model = _portable_model(path)
    from gnet_opt.quantization.dla import report

    return report(model).to_dict()


def inspect_layers(
    path: Path, *, threads: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Describe a bundle or an ONNX file, and tell what the runtime executes of it on this machine.

    A bundle is run by its own backend on its first golden picture, an ONNX file by ONNX Runtime on
    a drawn one.

    Returns:
        What `inspect` gives, with `executed` (`gnet_opt.bench.layers.Report.to_dict`) and `notes`.

    Raises:
        BackendError: The bundle's runtime cannot tell; the message says what can.
        IntegrityError: The bundle is damaged.
        MissingDependencyError: The runtime, or what reads an ONNX file, is not installed.
        ModelError: The file is no ONNX file, or does not take a picture.
    """
    described = inspect(path)
    from gnet_opt.quantization.surroundings import surroundings

    notes = []
    with tempfile.TemporaryDirectory(prefix="gnet-opt-") as scratch:
        if described["bundle"]:
            bundle = Bundle.open(path)
            model, target = bundle.model, bundle.manifest["target"]["name"]
            backend = backend_of(bundle)
            artifact = backend.artifact(bundle.root)
            batch = bundle.preprocess.tensor(Golden.read(bundle.path("golden")).pixels[:1])
            if not pending(bundle) and not is_native(bundle):
                notes.append(f"This machine is not {target}: these are its own kernels.")
        else:
            model = _with_names(path, Path(scratch))
            backend = backends.get("onnxruntime")
            artifact = Artifact(backend=backend.name, path=model, files=(("onnx", model),))
            batch = drawn_input(path)
            if model != path:
                described = {**described, "model": inspect(model)["model"]}
        profile = backend.profile(artifact, batch, threads=threads, progress=progress)
        found = layers.explain(
            described["model"]["layers"], surroundings(model), profile, this_machine()
        )
    return {**described, "executed": found.to_dict(), "notes": notes}


def finish(bundle: Bundle, *, force: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Finish a deferred build on the device itself.

    Args:
        bundle: The bundle.
        force: Whether to build again what fits this machine.
        progress: Shows the build.

    Returns:
        Whether something was `built`, with the `reason`, and a `message` for people.

    Raises:
        BackendError: This machine cannot build it; the message says what to run where.
        IntegrityError: The bundle is damaged.
        MissingDependencyError: The compiler is not installed.
    """
    bundle.check()
    told: dict[str, Any] = {"built": False, "bundle": str(bundle.root)}
    if not bundle.deferred:
        reason = "nothing was left to the device"
        return {**told, "message": f"{bundle.root} is complete already.", "reason": reason}
    backend = backend_of(bundle)
    name = backend.name
    if not isinstance(backend, DeviceCompiler):
        raise BackendError(
            f"{bundle.root} is finished on the device without gnet-opt ({name} has no "
            f"`finish`). Its own words for it are in {MANIFEST}, under deferred.command: run them "
            "only where you trust who made the bundle."
        )
    made = backend.artifact(bundle.root).path.name
    if made != bundle.deferred["expected"]:
        raise IntegrityError(
            f"{bundle.root / MANIFEST}: deferred.expected is {bundle.deferred['expected']!r}, but "
            f"{name} builds {made}. Build the bundle again."
        )
    done = backend.finish(bundle.root, _deferred_options(bundle), force=force, progress=progress)
    message = (
        f"Built {done.engine} with {name} {done.version} for {done.device}, because "
        f"{done.reason}. `gnet-opt verify` proves what it computes."
        if done.built
        else f"{bundle.root} is complete already: {done.engine.name} fits this machine."
    )
    return {**told, "built": done.built, "message": message, "reason": done.reason}


def next_step(bundle: Bundle) -> str:
    """What finishes a deferred build on the device, in words of this program alone.

    Raises:
        IntegrityError: The bundle is damaged.
    """
    backend = backend_of(bundle)
    if not isinstance(backend, DeviceCompiler):
        return f"How {backend.name} finishes it on the device stands in its documentation."
    first = "Run `gnet-opt compile` on the bundle there."
    command = backend.command(bundle.root, _deferred_options(bundle))
    if not command:
        return first
    return f"{first} Where the compiler has no Python package, run this in it:\n  {command}"


def _deferred_options(bundle: Bundle) -> dict[str, Any]:
    options = (bundle.deferred or {}).get("options", {})
    if not isinstance(options, dict):
        raise IntegrityError(
            f"{bundle.root / MANIFEST}: deferred.options is of the wrong type. Build the bundle "
            "again."
        )
    return options


def build_probe() -> dict[str, Any]:
    """Which packages of the extra `build` are missing, without importing any."""
    missing = [name for name in _BUILD_MODULES if find_spec(name) is None]
    return {"install": 'pip install "gnet-opt[build]"' if missing else "", "missing": missing}


def _portable_model(path: Path) -> Path:
    """The ONNX file of a bundle, all of whose files are checked, or the file that `path` is."""
    require("onnx_ir", "build", "look into an ONNX file")
    if path.is_dir():
        bundle = Bundle.open(path)
        bundle.check()
        return bundle.model
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Pass an ONNX file or a bundle.")
    return path


def backend_of(bundle: Bundle) -> Backend:
    """The backend that a bundle was made for.

    Raises:
        IntegrityError: There is no such backend here.
    """
    try:
        return backends.get(bundle.manifest["target"]["backend"])
    except ConfigError as error:
        raise IntegrityError(f"{bundle.root}: {error}") from error


def _with_names(path: Path, scratch: Path) -> Path:
    """An ONNX file whose nodes have a name each: itself, or a copy in `scratch`."""
    import onnx_ir as ir

    from gnet_opt.quantization.regions import load_graph

    model = load_graph(path)
    used = Counter(node.name for node in model.graph)
    if max(used.values()) == 1 and not used[None] and not used[""]:
        return path
    for index, node in enumerate(model.graph):
        if not node.name or used[node.name] > 1:
            node.name = f"{node.name or node.op_type}#{index}"
    ir.external_data.load_to_model(model)
    copy = scratch / "named.onnx"
    ir.save(model, copy)
    return copy
