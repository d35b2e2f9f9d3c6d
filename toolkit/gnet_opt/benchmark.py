"""Measuring finished bundles: `gnet-opt bench`."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from gnet_opt import __version__, backends, target
from gnet_opt.bench import layers, report, results_file, session
from gnet_opt.bench import sweep as sweeping
from gnet_opt.bench.host import HostState, why_unstable
from gnet_opt.bench.process import Subject
from gnet_opt.bench.results import Environment, Measured, Results, SubjectResult
from gnet_opt.bench.scenarios import MULTI_STREAM, OFFLINE, QUERY
from gnet_opt.bench.session import Entry, Plan
from gnet_opt.bundle import Bundle
from gnet_opt.errors import (
    BackendError,
    ConfigError,
    IntegrityError,
    MissingDependencyError,
    require,
)
from gnet_opt.files import dump_json, publish, sha256_file, staging_directory, write_text
from gnet_opt.golden import Golden
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.operations import backend_of, is_native, pending
from gnet_opt.preprocess import PixelArray
from gnet_opt.printable import shown
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, Backend
from gnet_opt.versions import tools

TUNED = "tuned"
"""Key of a manifest for the best settings that a sweep found."""

_REPORT = "report.html"
_RESOLVE = "gnet_opt.backends:get"
_PICTURES = 8
"""Picture files that go from end to end in a round, where a set has as many."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A bundle with one backend that is to run it.

    Attributes:
        bundle: The bundle.
        backend: The backend.
        artifact: What it runs.
        folder: Where the artifact's files are.
        name: What it is called, unique in the run.
    """

    bundle: Bundle
    backend: Backend
    artifact: Artifact
    folder: Path
    name: str

    @property
    def own(self) -> bool:
        """Whether the backend is the bundle's own, and the files are its own, too."""
        return self.folder == self.bundle.root


def bench(
    folders: Sequence[Path],
    plan: Plan,
    *,
    backend_names: Sequence[str] = (),
    images: Path | None = None,
    sweep: bool = False,
    progress: Progress = silent,
) -> Results:
    """Measure bundles side by side, each with each backend in processes of its own.

    Args:
        folders: The bundles.
        plan: How to measure.
        backend_names: Who is to run them, each bundle's own backend where empty. Another one than
            its own gets the portable model, compiled for this machine into a folder that goes.
        images: Picture files to go from end to end; the golden pictures as JPEG by default.
        sweep: Whether to try threads, streams and batches as well.
        progress: Shows how far it is.

    Raises:
        ConfigError: There is no such backend, or the constraint cannot be had on this machine.
        IntegrityError: A bundle is damaged.
        MissingDependencyError: A runtime is not installed.
        CalibrationError: The pictures cannot be read.
        BackendError: A model cannot be run here, or its engine is still to be built.
    """
    plan.constraint.check()
    if plan.threads is None and plan.constraint.cpus is not None:
        plan = replace(plan, threads=len(plan.constraint.cpus))
    with tempfile.TemporaryDirectory(prefix="gnet-opt-bench-") as scratch:
        candidates = _candidates(folders, backend_names, Path(scratch), progress)
        found = [
            _entry(candidate, images, Path(scratch) / f"pictures-{index}")
            for index, candidate in enumerate(candidates)
        ]
        entries = [entry for entry, _ in found]
        start = HostState.read()
        measured = session.measure(entries, plan, progress)
        end = HostState.read()
        profiles = [
            _profile(candidate, entry, plan)
            for candidate, entry in zip(
                candidates, progress(entries, "Timing layers", len(entries)), strict=True
            )
        ]
        subjects = [
            SubjectResult(
                identity=_identity(candidate, plan),
                measured=figures,
                notes=tuple(filter(None, [*of_set, *_notes(candidate, entry, plan), note])),
                profile=profile,
                sweep=sweeping.sweep(entry, plan, progress) if sweep else None,
            )
            for candidate, (entry, of_set), figures, (profile, note) in zip(
                candidates, found, measured, profiles, strict=True
            )
        ]
    return Results(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
        settings=plan.settings(),
        environment=Environment(
            machine=this_machine().to_dict(),
            tools=tools(),
            affinity=_affinity(plan),
            constraint=plan.constraint or None,
            start=start,
            end=end,
            unstable=tuple(_unstable(candidates, measured, start, end)),
        ),
        subjects=tuple(subjects),
    )


def write(results: Results, out: Path) -> None:
    """Write a folder with `results.json`, `results.csv` and `report.html`, or nothing of it."""
    document = results.to_dict()
    with staging_directory(out) as staging:
        write_text(staging / "results.json", dump_json(document))
        write_text(staging / "results.csv", results.to_csv())
        write_text(staging / _REPORT, report.render([document]))
        publish(staging, out)


def report_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The report of a document that another machine sent, by the name of its file.

    Raises:
        IntegrityError: It is no document of `gnet-opt bench`.
    """
    try:
        results_file.check(document, "results.json")
    except ConfigError as error:
        raise IntegrityError(
            f"What came home is no result of this version of `gnet-opt bench`: {error}"
        ) from error
    return {_REPORT: report.render([document])}


def note_best(folder: Path, subject: SubjectResult) -> None:
    """Write the best settings of a sweep into the bundle's manifest.

    Raises:
        ConfigError: There was no sweep.
        IntegrityError: The bundle is damaged.
    """
    if subject.sweep is None:
        raise ConfigError(f"{subject.name} was not swept. Pass --sweep, too.")
    bundle = Bundle.open(folder)
    best = {
        **subject.sweep["best"],
        "backend": subject.identity["backend"],
        "machine": this_machine().to_dict(),
    }
    bundle.noted({TUNED: best})


def _candidates(
    folders: Sequence[Path], backend_names: Sequence[str], scratch: Path, progress: Progress
) -> list[_Candidate]:
    """Every bundle with every backend, compiled where it has to be."""
    chosen = [backends.get(name) for name in dict.fromkeys(backend_names)]
    if any(backend.name == "reference" for backend in chosen):
        raise ConfigError(
            "Reference semantics compute everything in float by itself, which no device does, so "
            "their time says nothing. Measure the backend onnxruntime instead."
        )
    found = []
    for number, folder in enumerate(progress(folders, "Checking", len(folders))):
        bundle = Bundle.open(folder)
        bundle.check()
        own = backend_of(bundle)
        for backend in chosen or [own]:
            where = bundle.root
            if backend.name == own.name:
                artifact = _own_artifact(bundle, own)
            else:
                where = scratch / f"{number}-{backend.name}"
                where.mkdir()
                artifact = _compiled(bundle, backend, where)
            model, precision = bundle.manifest["model"]["name"], bundle.manifest["precision"]
            found.append(
                _Candidate(
                    bundle=bundle,
                    backend=backend,
                    artifact=artifact,
                    folder=where,
                    name=shown(f"{model}-{precision} {backend.name}"),
                )
            )
    return _with_different_names(found)


def _own_artifact(bundle: Bundle, backend: Backend) -> Artifact:
    """What a bundle's own backend runs, which on a device may have been built there."""
    if waiting := pending(bundle):
        raise BackendError(
            f"{bundle.root}: {waiting} So there is nothing to time. Run "
            f"`gnet-opt compile {bundle.root}` on the device, or measure the portable model on "
            "this machine with --backend onnxruntime."
        )
    return backend.artifact(bundle.root)


def _compiled(bundle: Bundle, backend: Backend, out: Path) -> Artifact:
    """A bundle's portable model in the form of another backend, compiled for this machine."""
    compiled = backend.compile(bundle.model, target.detect(), out)
    if not isinstance(compiled, Artifact):
        raise BackendError(
            f"{bundle.root} cannot be measured with {backend.name} here: {compiled.reason} "
            "Choose another --backend."
        )
    return compiled


def _with_different_names(candidates: list[_Candidate]) -> list[_Candidate]:
    """Names that are alike get the target, the folder or a number, whatever tells them apart."""
    details = (
        [f"({shown(one.bundle.manifest['target']['name'])})" for one in candidates],
        [f"in {shown(one.bundle.root.name)}" for one in candidates],
        [f"#{number}" for number in range(1, len(candidates) + 1)],
    )
    names = [one.name for one in candidates]
    for texts in details:
        found: dict[str, set[str]] = {}
        for name, text in zip(names, texts, strict=True):
            found.setdefault(name, set()).add(text)
        names = [
            f"{name} {text}" if len(found[name]) > 1 else name
            for name, text in zip(names, texts, strict=True)
        ]
    return [replace(one, name=name) for one, name in zip(candidates, names, strict=True)]


def _entry(
    candidate: _Candidate, images: Path | None, folder: Path
) -> tuple[Entry, tuple[str, ...]]:
    """A candidate with its golden pictures and picture files to go from end to end, and notes."""
    bundle = candidate.bundle
    notes: tuple[str, ...] = ()
    golden = Golden.read(bundle.path("golden"))
    if images is None:
        files, form = _as_files(golden.pixels, folder)
        size = " x ".join(str(side) for side in golden.pixels.shape[1:3])
        source = f"golden pictures of {size} pixels as {form}"
    else:
        chosen = ImageSet.open(images, classes=bundle.manifest["labels"]).spread(_PICTURES)
        chosen.check_readable()
        files, source, notes = chosen.files, f"pictures of {shown(chosen.name)}", chosen.notes
    export = bundle.manifest["facts"].get("export")
    dynamic = isinstance(export, dict) and export.get("batch") == "dynamic"
    entry = Entry(
        subject=Subject(name=candidate.name, artifact=candidate.artifact, resolve=_RESOLVE),
        pictures=bundle.preprocess.tensor(golden.pixels),
        preprocess=bundle.preprocess,
        files=files,
        source=source,
        batch=QUERY if dynamic else 1,
    )
    return entry, notes


def _as_files(pictures: PixelArray, folder: Path) -> tuple[tuple[Path, ...], str]:
    """Write pictures into a new folder: as JPEG, which has no fourth band, or as PNG."""
    folder.mkdir()
    form = "PNG" if pictures.shape[-1] == 4 else "JPEG"
    files = tuple(folder / f"{index}.{form.lower()}" for index in range(len(pictures)))
    for path, pixels in zip(files, pictures, strict=True):
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
            path, form, quality=90
        )
    return files, form


def _identity(candidate: _Candidate, plan: Plan) -> dict[str, Any]:
    """What a subject is, with the hashes of what it ran."""
    bundle, backend = candidate.bundle, candidate.backend
    manifest = bundle.manifest
    files = [path for _, path in candidate.artifact.files]
    return {
        # It was measured with the bundle's own backend, whose integer kernels are others.
        "accuracy": manifest["accuracy"] if candidate.own else None,
        "artifact_sha256": {
            path.relative_to(candidate.folder).as_posix(): sha256_file(path) for path in files
        },
        "backend": backend.name,
        "backend_version": backend.probe().version,
        "file_bytes": sum(path.stat().st_size for path in files),
        "model": shown(manifest["model"]["name"]),
        "model_sha256": sha256_file(bundle.model),
        "name": candidate.name,
        "native": candidate.own and is_native(bundle),
        "precision": manifest["precision"],
        "target": shown(manifest["target"]["name"]),
        "threads": plan.threads,
    }


def _notes(candidate: _Candidate, entry: Entry, plan: Plan) -> list[str]:
    """What is to be read beside the figures of one subject."""
    manifest = candidate.bundle.manifest
    notes = []
    if not candidate.own:
        notes.append(
            f"{candidate.backend.name} ran the portable model, compiled for this run; its accuracy "
            "was not measured."
        )
    elif not is_native(candidate.bundle):
        target_name = shown(manifest["target"]["name"])
        notes.append(f"This machine is not {target_name}: these are its own times.")
    if entry.batch == 1 and {MULTI_STREAM, OFFLINE} & set(plan.scenarios):
        notes.append("The model takes one picture at a time: eight are eight runs.")
    if plan.constraint:
        notes.append("This is a constrained host, not a device with as much.")
    return notes


def _profile(
    candidate: _Candidate, entry: Entry, plan: Plan
) -> tuple[dict[str, Any] | None, str | None]:
    """Where the time goes by layer, or why that cannot be told here."""
    try:
        require("onnx_ir", "build", "tell the time of each layer")
        from gnet_opt.quantization.describe import describe
        from gnet_opt.quantization.surroundings import surroundings

        profile = session.profile(entry, plan)
    except (BackendError, MissingDependencyError) as error:
        return None, f"The time of each layer is left out: {error}"
    model = candidate.bundle.model
    described = describe(model)["layers"]
    return layers.explain(described, surroundings(model), profile, this_machine()).to_dict(), None


def _affinity(plan: Plan) -> tuple[int, ...]:
    """The CPUs that measured processes could run on."""
    if plan.constraint.cpus is not None:
        return plan.constraint.cpus
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _unstable(
    candidates: Sequence[_Candidate],
    measured: Sequence[Measured],
    start: HostState,
    end: HostState,
) -> list[str]:
    """Why the run's figures are to be doubted."""
    named = [(one.name, found) for one, found in zip(candidates, measured, strict=True)]
    return why_unstable(
        start,
        end,
        this_machine().cores,
        {
            f"{name}, {scenario}": spread
            for name, found in named
            for scenario, spread in found.spreads().items()
        },
        tuple(name for name, found in named if not found.warm_up["steady"]),
    )
