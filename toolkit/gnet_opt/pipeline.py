"""The main job, from a loaded model to a bundle: every stage in its order, once.

Stages know nothing of each other; what one gives the next is passed here. Nothing is printed:
the caller gets a `Result`, and `notes` for what was assumed or left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends, golden
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bench import accuracy, latency
from gnet_opt.bundle import MODEL, Bundle, file_kinds
from gnet_opt.errors import BackendError, GateFailedError, IntegrityError
from gnet_opt.files import publish, sha256_file, staging_directory
from gnet_opt.machine import this_machine
from gnet_opt.planning import Plan
from gnet_opt.preprocess import FloatArray, PixelArray
from gnet_opt.progress import Progress, silent
from gnet_opt.quantization import quantize
from gnet_opt.runtime import Artifact, Deferred, run_all
from gnet_opt.stages import prepare
from gnet_opt.versions import tools

_EXAMPLES = 4
"""Pictures on which the stages before quantization prove their claims."""


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
        GnetOptError: A stage failed; nothing is left behind.
    """
    with staging_directory(job.output) as scratch:
        return _Build(job, scratch, progress).run()


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """One precision, written, compiled and measured in a folder of its own."""

    precision: str
    folder: Path
    compiled: Artifact | Deferred
    facts: Mapping[str, Any]
    accuracy: Mapping[str, Any] | None
    latency: Mapping[str, Any] | None


class _Build:
    """One build: what its steps share."""

    def __init__(self, job: Plan, scratch: Path, progress: Progress) -> None:
        self._job = job
        self._scratch = scratch
        self._progress = progress
        self._backend = backends.get(job.target.backend)
        self._float = scratch / "float.onnx"
        self._seconds: dict[str, float] = {}
        examples = job.calibration.take(range(min(golden.COUNT, len(job.calibration))))
        self._pixels: PixelArray = np.stack(
            [job.model.preprocess.load_pixels(path) for path in examples.files]
        )

    def run(self) -> Result:
        job = self._job
        with self._timed("prepare"):
            examples = job.model.preprocess.normalize(self._pixels[:_EXAMPLES])
            batch = job.options.batch
            facts = prepare(job.model, examples, self._float, batch=batch, progress=self._progress)
        wanted = job.options.precision
        if wanted == "auto":
            wanted = "int8" if "int8" in job.target.precisions else job.target.precisions[0]
        chosen = self._candidate(wanted)
        notes: list[str] = []
        decision, rejected = None, ""
        reason = self._refusal(chosen) if chosen.precision == "int8" else ""
        if reason and job.options.precision == "auto" and "fp32" in job.target.precisions:
            notes.append(f"INT8 does not ship: {reason} The bundle is float.")
            decision = {
                "reason": reason,
                "refused": {"accuracy": chosen.accuracy, "latency": chosen.latency},
            }
            chosen = self._candidate("fp32")
        elif chosen.precision == "int8":
            rejected = self._gate(chosen)
            if reason and not rejected:
                notes.append(f"{reason} --precision auto would ship float.")
        output = job.output
        if rejected:
            output = output.with_name(f"{output.name}.rejected")
            rejected += (
                f" The bundle is kept as {output}. Raise --max-drop to accept it, or try another "
                "--method or more calibration pictures."
            )
        manifest = {
            **self._manifest(chosen, [*job.notes, *notes]),
            "decision": decision,
            "facts": {**facts, **chosen.facts},
        }
        kinds = file_kinds(chosen.folder, chosen.compiled)
        kinds |= {MODEL: "onnx", golden.FILE: "golden"}
        Bundle.write(chosen.folder, manifest, kinds).check()
        publish(chosen.folder, output)
        return Result(
            bundle=Bundle.open(output),
            sizes=self._sizes(output, chosen),
            seconds=self._seconds,
            notes=tuple(notes),
            rejected=rejected,
        )

    def _candidate(self, precision: str) -> _Candidate:
        """Write, compile and measure one precision."""
        folder = self._scratch / precision
        folder.mkdir()
        portable = folder / MODEL
        facts: dict[str, Any] = {}
        if precision == "int8":
            with self._timed("quantize"):
                facts |= self._quantize(portable)
        else:
            shutil.copyfile(self._float, portable)
        with self._timed("compile"):
            compiled = self._backend.compile(portable, self._job.target, folder)
        artifact = compiled if isinstance(compiled, Artifact) else None
        with self._timed("golden"):
            facts["golden"] = self._golden(precision, portable, artifact)
        with self._timed("accuracy"):
            measured = self._accuracy(portable, artifact)
        with self._timed("latency"):
            latency_ = self._latency(artifact)
        return _Candidate(
            precision=precision,
            folder=folder,
            compiled=compiled,
            facts=facts,
            accuracy=measured,
            latency=latency_,
        )

    def _quantize(self, out: Path) -> dict[str, Any]:
        job = self._job
        files = self._progress(job.calibration.files, "Calibrating", len(job.calibration))
        inputs: Iterator[FloatArray] = (job.model.preprocess.load(path) for path in files)
        return quantize(
            self._float,
            out,
            inputs,
            job.target.scheme,
            method=job.options.method,
            threads=job.options.threads,
        )

    def _golden(self, precision: str, portable: Path, artifact: Artifact | None) -> dict[str, Any]:
        """Write the golden samples, and hold this machine's runtime to them where it counts."""
        job = self._job
        inputs = job.model.preprocess.normalize(self._pixels)
        with open_reference(portable, job.options.threads) as runner:
            outputs = run_all(runner, inputs)
        with open_reference(self._float, job.options.threads) as runner:
            float_outputs = run_all(runner, inputs)
        samples = golden.Golden.make(self._pixels, outputs, job.model.preprocess)
        samples.write(portable.with_name(golden.FILE))
        facts = {
            "images": len(inputs),
            "runtime_sqnr_db": None,
            "sqnr_db": accuracy.sqnr_db(float_outputs, outputs),
        }
        if artifact is not None and job.semantics == "native":
            with self._backend.open(artifact, threads=job.options.threads) as runner:
                try:
                    facts["runtime_sqnr_db"] = samples.replay(
                        runner, inputs, golden.TOLERANCE_DB[precision], artifact.backend
                    )
                except IntegrityError as error:
                    raise BackendError(
                        f"{job.target.backend} does not compute on this machine what the INT8 "
                        f"model means, though it is {job.target.name}: {error} Please report it."
                    ) from error
        return facts

    def _accuracy(self, portable: Path, artifact: Artifact | None) -> dict[str, Any] | None:
        job = self._job
        if job.evaluation is None:
            return None
        threads = job.options.threads
        if artifact is not None and job.semantics == "native":
            before = self._backend.open(self._float_artifact(), threads=threads)
            after = self._backend.open(artifact, threads=threads)
        else:
            before, after = open_reference(self._float, threads), open_reference(portable, threads)
        with before as float_runner, after as quantized_runner:
            runners = {"float": float_runner, "quantized": quantized_runner}
            logits = accuracy.collect(runners, job.evaluation, job.model.preprocess, self._progress)
        compared = accuracy.compare(
            logits["float"],
            logits["quantized"],
            job.evaluation.labels,
            semantics=job.semantics,
        )
        return {
            **compared.to_dict(),
            "digest": job.evaluation.digest,
            "set": job.evaluation.name,
        }

    def _latency(self, artifact: Artifact | None) -> dict[str, Any] | None:
        job = self._job
        if artifact is None or job.semantics != "native":
            return None
        resolve = "gnet_opt.backends:get"
        report = latency.measure(
            [
                latency.Subject(name="float", artifact=self._float_artifact(), resolve=resolve),
                latency.Subject(name="quantized", artifact=artifact, resolve=resolve),
            ],
            job.model.preprocess.normalize(self._pixels[:1]),
            threads=job.options.threads or this_machine().cores,
            progress=self._progress,
        )
        return report.to_dict()

    def _float_artifact(self) -> Artifact:
        """The float model compiled by the same backend, made once."""
        folder = self._scratch / "float"
        if folder.is_dir():
            return self._backend.artifact(folder)
        folder.mkdir()
        compiled = self._backend.compile(self._float, self._job.target, folder)
        assert isinstance(compiled, Artifact)  # only a target that compiles here comes this far
        return compiled

    def _sizes(self, root: Path, chosen: _Candidate) -> dict[str, int]:
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
            "float": self._float.stat().st_size,
            "quantized": (root / MODEL).stat().st_size,
        }

    def _gate(self, candidate: _Candidate) -> str:
        """Why the accuracy gate refuses, or nothing."""
        drop = candidate.accuracy and candidate.accuracy["drop"]
        if not candidate.accuracy or not drop or drop["value"] <= self._job.options.max_drop:
            return ""
        low, high = drop["ci95"]
        return (
            f"INT8 loses {drop['value']:.2f} points of top-1 (95 % interval {low:.2f} to "
            f"{high:.2f}, {candidate.accuracy['images']} pictures); --max-drop allows "
            f"{self._job.options.max_drop:g}."
        )

    def _refusal(self, candidate: _Candidate) -> str:
        """Why INT8 is not worth shipping, or nothing."""
        if reason := self._gate(candidate):
            return reason
        if candidate.latency:
            speedup = candidate.latency["speedup"]["quantized"]["median"]
            if speedup <= 1.0:
                return f"INT8 is not faster than float here ({speedup:.2f} times as fast)."
        return ""

    def _manifest(self, chosen: _Candidate, notes: list[str]) -> dict[str, Any]:
        job = self._job
        compiled = chosen.compiled
        return {
            "accuracy": chosen.accuracy,
            "calibration": {
                "digest": job.calibration.digest,
                "images": len(job.calibration),
                "method": job.options.method if chosen.precision == "int8" else None,
                "seed": job.options.seed,
                "set": job.calibration.name,
            },
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "deferred": {
                "command": compiled.command,
                "expected": compiled.expected,
                "reason": compiled.reason,
            }
            if isinstance(compiled, Deferred)
            else None,
            "golden": {
                "inputs": f"{golden.FILE}:pixels",
                "outputs": f"{golden.FILE}:outputs",
                "semantics": "reference",
                "tolerance": {"sqnr_db": golden.TOLERANCE_DB[chosen.precision]},
            },
            "labels": list(job.model.labels),
            "latency": chosen.latency,
            "model": {
                "architecture": job.model.architecture,
                "classes": job.model.classes,
                "name": job.model.name,
                "sha256": job.model.sha256,
                "source": job.model.source,
            },
            "notes": notes,
            "precision": chosen.precision,
            "preprocess": job.model.preprocess.to_dict(),
            "scheme": job.target.scheme.to_dict() if chosen.precision == "int8" else None,
            "target": {
                "backend": job.target.backend,
                "match": job.target.match and dataclasses.asdict(job.target.match),
                "name": job.target.name,
                "sha256": sha256_file(job.target.file),
            },
            "tools": tools(),
        }

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start
