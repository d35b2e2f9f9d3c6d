"""The main job, from a loaded model to a bundle: every step in its order, once.

prepare -> calibrate -> candidates -> score -> time -> decide -> write. Steps know nothing of each
other; what one gives the next is passed here. Nothing is printed: the caller gets a `Result`, and
`notes` for what was assumed or left out.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import golden
from gnet_opt.bench import binary
from gnet_opt.bundle import MODEL, Bundle, file_kinds
from gnet_opt.candidates import Candidate, Context, Maker
from gnet_opt.choice import Choice, Chosen
from gnet_opt.errors import BackendError, GateFailedError, IntegrityError
from gnet_opt.files import publish, sha256_file, staging_directory
from gnet_opt.planning import Plan
from gnet_opt.preprocess import FloatArray
from gnet_opt.progress import Progress, silent
from gnet_opt.quantizer import Quantizer
from gnet_opt.runtime import Artifact, Deferred
from gnet_opt.scoring import Scorer
from gnet_opt.stages import prepare
from gnet_opt.versions import tools

_EXAMPLES = 4
"""Images on which the stages before quantization prove their claims."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished build.

    Attributes:
        bundle: The bundle; where the gate failed, the rejected one.
        sizes: Bytes by name: `float` and `quantized` portable models, `compiled` files.
        seconds: How long each stage took, by name.
        notes: What was decided while building, in plain sentences; `Plan.notes` has the rest.
        rejected: Why the gate refused it, empty when it passed.
    """

    bundle: Bundle
    sizes: Mapping[str, int]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    rejected: str = ""

    def raise_if_rejected(self) -> None:
        """Turn a failed gate into an error.

        Raises:
            GateFailedError: The gate refused the bundle.
        """
        if self.rejected:
            raise GateFailedError(self.rejected)


def build(job: Plan, progress: Progress = silent) -> Result:
    """Do the whole work of a plan; the bundle appears when it is complete, or not at all.

    A bundle that fails the gate is kept beside as `NAME.rejected`, and `Result.rejected` says why.

    Raises:
        GnetOptError: A step failed; nothing is left behind.
    """
    told: list[str] = []  # what is true of this run alone: not for the manifest
    with staging_directory(job.output) as scratch:
        context = _context(job, scratch, progress)
        facts = _prepare(context)
        quantizer = _calibrate(context, told.append)
        maker = Maker(context, quantizer)
        scorer = Scorer(context, maker)
        choice = Choice(context, quantizer, maker, scorer)
        precision = job.options.precision
        chosen = choice.fastest() if precision == "auto" else choice.as_asked(precision)
        notes = [*_outputs(context), *scorer.chance_notes(), *chosen.notes]
        if chosen.candidate.scheme is not None and quantizer is not None:
            notes += quantizer.notes
        if isinstance(chosen.candidate.compiled, Artifact):
            notes += chosen.candidate.compiled.notes
        facts["golden"] = _golden(context, chosen.candidate, scorer)
        manifest = {
            **_manifest(job, chosen, quantizer, scorer.threshold),
            "decision": chosen.decision,
            "facts": {**facts, **chosen.candidate.facts},
            "notes": [*job.notes, *notes],
        }
        output, rejected = _destination(job, chosen)
        _write(chosen.candidate, manifest, output)
        return Result(
            bundle=Bundle.open(output),
            sizes=_sizes(output, chosen.candidate, context.float_model),
            seconds=context.seconds,
            notes=(*notes, *told),
            rejected=rejected,
        )


def _context(job: Plan, scratch: Path, progress: Progress) -> Context:
    preprocess, seed = job.model.preprocess, job.options.seed
    examples = job.calibration.varied(golden.COUNT, seed)
    return Context(
        job=job,
        scratch=scratch,
        examples=np.stack([preprocess.load_pixels(path) for path in examples.files]),
        golden=job.golden.pixels(preprocess, seed),
        progress=progress,
    )


def _prepare(context: Context) -> dict[str, Any]:
    """Strip, fold and export; what each of them proved."""
    job = context.job
    with context.timed("prepare"):
        return prepare(
            job.model,
            job.model.preprocess.normalize(context.examples[:_EXAMPLES]),
            context.float_model,
            batch=job.options.batch,
            progress=context.progress,
        )


def _outputs(context: Context) -> list[str]:
    """What is to be known of the outputs before accuracy is read."""
    job = context.job
    names = job.model.labels or (job.evaluation.classes if job.evaluation else ())
    note = binary.note(context.float_model, job.model.classes, names)
    return [note] if note else []


def _calibrate(context: Context, tell: Callable[[str], None]) -> Quantizer | None:
    """What INT8 is made of; None where no candidate is to be in INT8."""
    job = context.job
    asked = job.options.precision
    if "int8" not in (job.target.precisions if asked == "auto" else [asked]):
        return None
    with context.timed("calibrate"):
        return Quantizer(job, context.float_model, context.scratch, context.progress, tell)


def _golden(context: Context, candidate: Candidate, scorer: Scorer) -> dict[str, Any]:
    """Write the golden samples, and hold this machine's runtime to them where it counts."""
    with context.timed("golden"):
        outputs = scorer.judge.run(candidate.plain)
        return {
            "images": len(outputs),
            "runtime_sqnr_db": _replay(context, candidate, outputs),
            "sqnr_db": scorer.judge.verdict(outputs).to_dict()["sqnr_db"],
        }


def _replay(context: Context, candidate: Candidate, outputs: FloatArray) -> float | None:
    job = context.job
    samples = golden.Golden.make(context.golden, outputs, job.model.preprocess)
    samples.write(candidate.folder / golden.FILE)
    if isinstance(candidate.compiled, Deferred) or job.semantics != "native":
        return None
    with candidate.backend.open(candidate.compiled, threads=job.options.threads) as runner:
        tolerance = golden.TOLERANCE_DB[candidate.precision]
        name = candidate.backend.name
        try:
            return samples.replay(runner, job.preprocess.tensor(context.golden), tolerance, name)
        except IntegrityError as error:
            raise BackendError(
                f"{name} does not compute on this machine what the INT8 model means, "
                f"though it is {job.target.name}: {error} Please report it."
            ) from error


def _destination(job: Plan, chosen: Chosen) -> tuple[Path, str]:
    """Where the bundle goes, and why it is not where the user wanted it."""
    if not chosen.rejected:
        return job.output, ""
    aside = job.output.with_name(f"{job.output.name}.rejected")
    return aside, (
        f"{chosen.rejected} The bundle is kept as {aside}. Let --precision auto keep some layers "
        "in float, raise --max-drop to accept it, or try more calibration pictures."
    )


def _write(candidate: Candidate, manifest: Mapping[str, Any], output: Path) -> None:
    """Complete the candidate's folder, check it, and put it where it belongs."""
    kinds = file_kinds(candidate.folder, candidate.compiled)
    kinds |= {MODEL: "onnx", golden.FILE: "golden"}
    Bundle.write(candidate.folder, manifest, kinds).check()
    publish(candidate.folder, output)


def _sizes(root: Path, chosen: Candidate, float_model: Path) -> dict[str, int]:
    """Bytes of the float and the shipped portable model, and of what was compiled from it."""
    engine = (
        0
        if isinstance(chosen.compiled, Deferred)
        else sum(
            (root / name).stat().st_size
            for name in file_kinds(chosen.folder, chosen.compiled)
            if name != MODEL
        )
    )
    return {
        "compiled": engine,
        "float": float_model.stat().st_size,
        "quantized": (root / MODEL).stat().st_size,
    }


def _manifest(
    job: Plan, chosen: Chosen, quantizer: Quantizer | None, threshold: float
) -> dict[str, Any]:
    """What is known of every bundle; facts, notes and the decision come beside it."""
    candidate = chosen.candidate
    compiled = candidate.compiled
    return {
        "accuracy": chosen.accuracy,
        "calibration": {
            "digest": job.calibration.digest,
            "images": len(job.calibration),
            "method": quantizer.recipe.method if quantizer and candidate.scheme else None,
            "seed": job.options.seed,
            "set": job.calibration.name,
        },
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "deferred": {
            "command": compiled.command,
            "expected": compiled.expected,
            "options": dict(compiled.options),
            "reason": compiled.reason,
        }
        if isinstance(compiled, Deferred)
        else None,
        "golden": {
            **job.golden.to_dict(),
            "inputs": f"{golden.FILE}:pixels",
            "outputs": f"{golden.FILE}:outputs",
            "semantics": "reference",
            "tolerance": {"sqnr_db": golden.TOLERANCE_DB[candidate.precision]},
        },
        "labels": list(job.model.labels),
        "latency": chosen.latency,
        "model": {
            "architecture": job.model.architecture,
            "classes": job.model.classes,
            "name": job.model.name,
            "sha256": job.model.sha256,
            "source": job.model.source,
            **({"threshold": threshold} if job.model.classes == 1 else {}),
        },
        "precision": candidate.precision,
        "preprocess": job.preprocess.to_dict(),
        "scheme": candidate.scheme.to_dict() if candidate.scheme else None,
        "target": {
            "backend": candidate.backend.name,
            "match": job.target.match and dataclasses.asdict(job.target.match),
            "name": job.target.name,
            "sha256": sha256_file(job.target.file),
        },
        "tools": tools(),
    }
