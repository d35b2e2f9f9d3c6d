"""The main job, from a loaded model to a bundle: every stage in its order, once.

Stages know nothing of each other; what one gives the next is passed here. Nothing is printed:
the caller gets a `Result`, and `notes` for what was assumed or left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends, golden
from gnet_opt.bench import accuracy, binary, latency
from gnet_opt.bench.process import Subject
from gnet_opt.bundle import MODEL, Bundle, file_kinds
from gnet_opt.decision import Figures, decide, refusal
from gnet_opt.errors import BackendError, GateFailedError, IntegrityError, ModelError
from gnet_opt.files import publish, sha256_file, staging_directory
from gnet_opt.machine import this_machine
from gnet_opt.planning import Plan
from gnet_opt.preprocess import FloatArray, PixelArray
from gnet_opt.progress import Progress, silent
from gnet_opt.quantizer import Quantizer
from gnet_opt.runtime import Artifact, Backend, Deferred
from gnet_opt.search import Judge, fewest_float_layers
from gnet_opt.stages import prepare
from gnet_opt.target import Scheme
from gnet_opt.versions import tools

_EXAMPLES = 4
"""Pictures on which the stages before quantization prove their claims."""

_FLOAT = "float"
"""The float model on the target's own backend, beside which everything is measured."""

_RESOLVE = "gnet_opt.backends:get"


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
    """One precision on one backend, written and compiled in a folder of its own.

    `plain` is the model with the float input that its network has: `model` itself, or what it was
    made of where it takes pixels. Both give the same logits, so that whatever is judged is `plain`.
    """

    precision: str
    backend: Backend
    scheme: Scheme | None
    folder: Path
    plain: Path
    compiled: Artifact | Deferred
    facts: Mapping[str, Any]
    float_layers: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.precision} on {self.backend.name}"

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    def figures(self, measured: Mapping[str, Any] | None) -> Figures:
        return Figures(
            name=self.name,
            precision=self.precision,
            backend=self.backend.name,
            accuracy=measured,
            float_layers=tuple(sorted(self.float_layers)),
            macs_int8_share=self.facts.get("quantize", {}).get("macs_int8_share", 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What ships, or would if the gate let it."""

    candidate: _Candidate
    accuracy: Mapping[str, Any] | None
    latency: Mapping[str, Any] | None
    decision: Mapping[str, Any] | None = None
    rejected: str = ""


class _Build:
    """One build: what its steps share."""

    def __init__(self, job: Plan, scratch: Path, progress: Progress) -> None:
        self._job = job
        self._scratch = scratch
        self._progress = progress
        self._backend = backends.get(job.target.backend)
        self._float = scratch / "float.onnx"
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []
        self._told: list[str] = []  # what is true of this run alone: not for the manifest
        self._float_logits: FloatArray | None = None
        self._threshold = binary.LOGIT
        preprocess, seed = job.model.preprocess, job.options.seed
        examples = job.calibration.varied(golden.COUNT, seed)
        self._examples: PixelArray = np.stack([preprocess.load_pixels(p) for p in examples.files])
        self._golden_pixels = job.golden.pixels(preprocess, seed)

    def run(self) -> Result:
        job = self._job
        with self._timed("prepare"):
            examples = job.model.preprocess.normalize(self._examples[:_EXAMPLES])
            batch = job.options.batch
            facts = prepare(job.model, examples, self._float, batch=batch, progress=self._progress)
        names = job.model.labels or (job.evaluation.classes if job.evaluation else ())
        self._threshold = binary.threshold(self._float, job.model.classes)
        if note := binary.note(self._float, job.model.classes, names):
            self._notes.append(note)
        automatic = job.options.precision == "auto"
        chosen = self._decide() if automatic else self._as_asked(job.options.precision)
        candidate = chosen.candidate
        with self._timed("golden"):
            judge = self._judge
            outputs = judge.run(candidate.plain)
            shipped = judge.verdict(outputs)
            facts["golden"] = self._golden(candidate, outputs)
            facts["golden"]["sqnr_db"] = shipped.to_dict()["sqnr_db"]
        if candidate.scheme is not None:
            self._notes += self._quantizer.notes
        output = job.output
        rejected = chosen.rejected
        if rejected:
            output = output.with_name(f"{output.name}.rejected")
            rejected += (
                f" The bundle is kept as {output}. Let --precision auto keep some layers in float, "
                "raise --max-drop to accept it, or try more calibration pictures."
            )
        manifest = {
            **self._manifest(chosen, [*job.notes, *self._notes]),
            "decision": chosen.decision,
            "facts": {**facts, **candidate.facts},
        }
        kinds = file_kinds(candidate.folder, candidate.compiled)
        kinds |= {MODEL: "onnx", golden.FILE: "golden"}
        Bundle.write(candidate.folder, manifest, kinds).check()
        publish(candidate.folder, output)
        return Result(
            bundle=Bundle.open(output),
            sizes=self._sizes(output, candidate),
            seconds=self._seconds,
            notes=(*self._notes, *self._told),
            rejected=rejected,
        )

    # --- what ships -----------------------------------------------------------------------------

    def _as_asked(self, precision: str) -> _Chosen:
        """The one precision that the user named."""
        scheme = self._job.target.scheme if precision == "int8" else None
        candidate = self._candidate(precision, self._backend, scheme)
        measured = self._measured(candidate)
        rejected = refusal(candidate.figures(measured), self._job.options.max_drop)
        latency_ = self._time([candidate])
        if latency_ is not None and scheme is not None:
            ratio = latency_.speedup(candidate.name).median
            if ratio <= 1.0 and not rejected:
                self._notes.append(
                    f"INT8 is not faster than float here ({ratio:.2f} times as fast). "
                    "--precision auto would ship float."
                )
        return _Chosen(
            candidate=candidate,
            accuracy=measured,
            latency=self._latency_of(candidate, latency_),
            rejected=rejected,
        )

    def _decide(self) -> _Chosen:
        """The fastest candidate within the budget."""
        job, target = self._job, self._job.target
        rivals = [(self._backend, target.scheme), *self._alternatives()]
        integer = (
            [self._candidate("int8", backend, scheme) for backend, scheme in rivals]
            if "int8" in target.precisions
            else []
        )
        whole = (
            [self._candidate("fp32", backend, None) for backend, _ in rivals]
            if "fp32" in target.precisions
            else []
        )
        measured = self._score([*integer, *whole])
        half = []
        for backend, _ in rivals if "fp16" in target.precisions else []:
            try:
                candidate = self._candidate("fp16", backend, None)
                measured[candidate.name] = self._measured(candidate)
            except (BackendError, ModelError) as error:
                if not (integer or whole):
                    raise
                self._notes.append(f"FP16 on {backend.name} was left out: {error}")
            else:
                half.append(candidate)
        mixed = []
        for candidate in integer:
            if refusal(candidate.figures(measured[candidate.name]), job.options.max_drop):
                made = self._mixed(candidate)
                if made is None:
                    self._notes.append(
                        f"Mixed precision on {candidate.backend.name} was tried: no choice of "
                        "layers in float but all of them is within the budget."
                    )
                    continue
                mixed.append(made[0])
                measured[made[0].name] = made[1]
        candidates = {c.name: c for c in (*integer, *mixed, *half, *whole)}
        figures = [c.figures(measured[name]) for name, c in candidates.items()]
        refusals = {f.name: refusal(f, job.options.max_drop) for f in figures}
        within = [name for name, refused in refusals.items() if not refused]
        if not within:
            # A target without float, which alone is always within the budget.
            first = figures[0].name
            return _Chosen(
                candidate=candidates[first],
                accuracy=measured[first],
                latency=None,
                rejected=refusals[first],
            )
        report = self._time([candidates[name] for name in within])
        name, decision = decide(figures, job.options.max_drop, report)
        if candidates[name].precision != "int8" and integer:
            self._notes.append(str(decision["reason"]))
        return _Chosen(
            candidate=candidates[name],
            accuracy=measured[name],
            latency=self._latency_of(candidates[name], report),
            decision=decision,
        )

    def _alternatives(self) -> list[tuple[Backend, Scheme]]:
        """The target's other backends that can be measured here."""
        if self._job.semantics != "native":
            return []
        found = []
        for name, scheme in self._job.target.alternatives.items():
            backend = backends.get(name)
            probe = backend.probe()
            if probe.available:
                found.append((backend, scheme))
            else:
                self._notes.append(f"{name} was not measured as a candidate: {probe.detail}.")
        return found

    def _mixed(self, refused: _Candidate) -> tuple[_Candidate, Mapping[str, Any] | None] | None:
        """The candidate with the fewest multiply-accumulates in float that is within the budget.

        None where that is all of them, which is the float candidate.
        """
        assert refused.scheme is not None
        with self._timed("sensitivity"):
            costs = self._quantizer.costs
        tried: dict[frozenset[str], tuple[_Candidate, Mapping[str, Any] | None]] = {}

        def passes(kept: frozenset[str]) -> bool:
            candidate = self._candidate("mixed", refused.backend, refused.scheme, kept)
            measured = self._score([candidate])[candidate.name]
            tried[kept] = candidate, measured
            return not refusal(candidate.figures(measured), self._job.options.max_drop)

        kept = fewest_float_layers(costs, passes)
        if len(kept) == len(costs):
            return None
        candidate, measured = tried[kept]
        noise = {cost.name: cost for cost in costs}
        reasons = {
            name: {
                "agreement": noise[name].agreement,
                "macs": noise[name].macs,
                "sqnr_db": noise[name].sqnr_db,
            }
            for name in sorted(kept)
        }
        return replace(candidate, facts={**candidate.facts, "kept_in_float": reasons}), measured

    # --- one candidate --------------------------------------------------------------------------

    @cached_property
    def _judge(self) -> Judge:
        """On the pictures that become golden samples."""
        inputs = self._job.model.preprocess.normalize(self._golden_pixels)
        return Judge(self._float, list(inputs), self._job.options.threads)

    @cached_property
    def _quantizer(self) -> Quantizer:
        scratch, tell = self._scratch, self._told.append
        with self._timed("calibrate"):
            return Quantizer(self._job, self._float, scratch, self._progress, tell)

    def _candidate(
        self,
        precision: str,
        backend: Backend,
        scheme: Scheme | None,
        keep_float: frozenset[str] = frozenset(),
    ) -> _Candidate:
        """Write and compile one precision."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch, prefix=f"{precision}-{backend.name}-"))
        pixels = self._job.options.input == "uint8"
        plain = self._scratch / f"{folder.name}.onnx" if pixels else folder / MODEL
        facts: dict[str, Any] = {}
        if scheme is not None:
            quantizer = self._quantizer  # the first use calibrates
            with self._timed("quantize"):
                facts = quantizer.write(plain, scheme, keep_float)
        elif precision == "fp16":
            from gnet_opt.quantization.half import write_half

            with self._timed("half"):
                facts = write_half(self._float, plain)
        else:
            shutil.copyfile(self._float, plain)
        if pixels:
            facts = {**facts, "input": self._take_pixels(plain, folder / MODEL)}
        with self._timed("compile"):
            compiled = backend.compile(folder / MODEL, self._job.target, folder)
        return _Candidate(
            precision=precision,
            backend=backend,
            scheme=scheme,
            folder=folder,
            plain=plain,
            compiled=compiled,
            facts=facts,
            float_layers=keep_float,
        )

    def _measured(self, candidate: _Candidate) -> Mapping[str, Any] | None:
        """The accuracy of one candidate; see `_score`."""
        if candidate.precision != "fp16":
            return self._score([candidate])[candidate.name]
        try:
            # The golden pictures, too, must stay within its range.
            self._judge(candidate.plain)
            return self._score([candidate])[candidate.name]
        except BackendError as error:
            raise BackendError(
                f"{error} FP16 ends at 65504; --precision fp32 has room for larger values."
            ) from error

    def _score(self, candidates: Sequence[_Candidate]) -> dict[str, Mapping[str, Any] | None]:
        """The accuracy of each, beside the float model; each model in a process of its own."""
        job = self._job
        if job.evaluation is None:
            return {candidate.name: None for candidate in candidates}
        with self._timed("accuracy"):
            subjects = [
                self._subject(candidate.name, candidate.model, candidate.compiled)
                for candidate in candidates
                if not self._is_float(candidate)
            ]
            if self._float_logits is None:
                beside = self._subject(_FLOAT, self._float_beside, self._float_artifact)
                subjects.insert(0, beside)
            logits = accuracy.collect_apart(
                subjects,
                job.evaluation,
                job.preprocess,
                threads=job.options.threads,
                progress=self._progress,
            )
            if self._float_logits is None:
                self._float_logits = logits[_FLOAT]
                self._note_chance(job.evaluation.labels)
            logits[_FLOAT] = self._float_logits
            return {
                candidate.name: {
                    **accuracy.compare(
                        self._float_logits,
                        logits[_FLOAT if self._is_float(candidate) else candidate.name],
                        job.evaluation.labels,
                        semantics=job.semantics,
                        threshold=self._threshold,
                    ).to_dict(),
                    "digest": job.evaluation.digest,
                    "set": job.evaluation.name,
                }
                for candidate in candidates
            }

    def _note_chance(self, labels: Sequence[int] | None) -> None:
        """Say where the network is no better than guessing, whatever quantization does."""
        if labels is None or self._float_logits is None:
            return
        scored = accuracy.score(self._float_logits, labels, threshold=self._threshold)
        if note := accuracy.chance_note(scored, labels):
            self._notes.append(note)

    def _time(self, candidates: Sequence[_Candidate]) -> latency.LatencyReport | None:
        """The latency of each beside the target's own float, or None where it is not to be had."""
        job = self._job
        if job.semantics != "native":
            return None
        compiled = {_FLOAT: self._float_artifact}
        compiled |= {c.name: c.compiled for c in candidates if not self._is_float(c)}
        artifacts = {n: made for n, made in compiled.items() if isinstance(made, Artifact)}
        if len(artifacts) < len(compiled):  # some are finished on the device
            return None
        with self._timed("latency"):
            names = {c.name: _FLOAT if self._is_float(c) else c.name for c in candidates}
            report = latency.measure(
                [
                    Subject(name=name, artifact=artifact, resolve=_RESOLVE)
                    for name, artifact in artifacts.items()
                ],
                job.preprocess.tensor(self._examples[:1]),
                threads=job.options.threads or this_machine().cores,
                progress=self._progress,
            )
            return report.renamed({_FLOAT: _FLOAT, **names})

    def _is_float(self, candidate: _Candidate) -> bool:
        """Whether a candidate is what the others are measured beside, and not measured twice."""
        return candidate.precision == "fp32" and candidate.backend.name == self._backend.name

    def _latency_of(
        self, candidate: _Candidate, report: latency.LatencyReport | None
    ) -> dict[str, Any] | None:
        """`latency` of the manifest: float and what ships, side by side."""
        if report is None:
            return None
        return report.renamed({"float": _FLOAT, "quantized": candidate.name}).to_dict()

    def _subject(self, name: str, model: Path, compiled: Artifact | Deferred) -> Subject:
        """What is run for accuracy: this machine's kernels where they are the target's."""
        artifact = Artifact(backend="reference", path=model, files=(("onnx", model),))
        if self._job.semantics == "native" and isinstance(compiled, Artifact):
            artifact = compiled
        return Subject(name=name, artifact=artifact, resolve=_RESOLVE)

    @cached_property
    def _float_artifact(self) -> Artifact | Deferred:
        """The float model compiled by the target's own backend."""
        folder = self._scratch / "float"
        folder.mkdir()
        return self._backend.compile(self._float_beside, self._job.target, folder)

    @cached_property
    def _float_beside(self) -> Path:
        """The float model with the input that the shipped one has, so that both get the same."""
        if self._job.options.input == "float32":
            return self._float
        model = self._scratch / "float-pixels.onnx"
        self._take_pixels(self._float, model)
        return model

    def _take_pixels(self, plain: Path, out: Path) -> dict[str, Any]:
        from gnet_opt.stages.pixels import take_pixels

        with self._timed("input"):
            return take_pixels(plain, out, self._job.model.preprocess, self._examples)

    def _golden(self, chosen: _Candidate, outputs: FloatArray) -> dict[str, Any]:
        """Write the golden samples, and hold this machine's runtime to them where it counts."""
        job = self._job
        samples = golden.Golden.make(self._golden_pixels, outputs, job.model.preprocess)
        samples.write(chosen.folder / golden.FILE)
        facts: dict[str, Any] = {"images": len(outputs), "runtime_sqnr_db": None}
        if isinstance(chosen.compiled, Artifact) and job.semantics == "native":
            with chosen.backend.open(chosen.compiled, threads=job.options.threads) as runner:
                tolerance = golden.TOLERANCE_DB[chosen.precision]
                name = chosen.backend.name
                try:
                    inputs = job.preprocess.tensor(self._golden_pixels)
                    facts["runtime_sqnr_db"] = samples.replay(runner, inputs, tolerance, name)
                except IntegrityError as error:
                    raise BackendError(
                        f"{name} does not compute on this machine what the INT8 model means, "
                        f"though it is {job.target.name}: {error} Please report it."
                    ) from error
        return facts

    # --- the bundle -----------------------------------------------------------------------------

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

    def _manifest(self, chosen: _Chosen, notes: list[str]) -> dict[str, Any]:
        job, candidate = self._job, chosen.candidate
        compiled = candidate.compiled
        return {
            "accuracy": chosen.accuracy,
            "calibration": {
                "digest": job.calibration.digest,
                "images": len(job.calibration),
                "method": self._quantizer.recipe.method if candidate.scheme else None,
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
                **({"threshold": self._threshold} if job.model.classes == 1 else {}),
            },
            "notes": notes,
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

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start
