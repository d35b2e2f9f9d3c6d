"""Candidates of a build on images and on the clock, beside the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gnet_opt.bench import accuracy, binary, latency
from gnet_opt.bench.process import Subject
from gnet_opt.bench.session import Plan
from gnet_opt.candidates import Candidate, Context, Maker
from gnet_opt.decision import undecided
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.preprocess import FloatArray
from gnet_opt.runtime import Artifact, Deferred
from gnet_opt.search import Judge

FLOAT = "float"
"""The float model on the target's own backend, beside which everything is measured."""

TIMING = Plan(rounds=3, seconds=0.3, warm_up=1.0, control=False)
"""How candidates are timed: each with a new process in each round, without the control load."""

MOST_ROUNDS = 9
"""Rounds at most, while it is not clear which candidates are equally fast."""

_RESOLVE = "gnet_opt.backends:get"


class Scorer:
    """Measures candidates of one build."""

    def __init__(self, context: Context, maker: Maker) -> None:
        self._context = context
        self._maker = maker
        self._float_logits: dict[str, FloatArray] = {}

    @cached_property
    def judge(self) -> Judge:
        """On the golden inputs, by reference semantics."""
        context = self._context
        inputs = context.job.model.preprocess.normalize(context.golden)
        return Judge(context.float_model, list(inputs), context.job.options.threads)

    @cached_property
    def threshold(self) -> float:
        """What decides where there is one logit for two classes, see `gnet_opt.bench.binary`."""
        context = self._context
        return binary.threshold(context.float_model, context.job.model.classes)

    def score(
        self, candidates: Sequence[Candidate], images: ImageSet | None
    ) -> dict[str, Mapping[str, Any] | None]:
        """The accuracy of each, beside the float model; each model in a process of its own.

        Args:
            candidates: What to score.
            images: What on; labels are used where they are there.

        Returns:
            By name, as it stands in a manifest; None where there are no images.

        Raises:
            BackendError: A model failed.
        """
        job = self._context.job
        if images is None:
            return {candidate.name: None for candidate in candidates}
        with self._context.timed("accuracy"):
            subjects = [
                self._subject(candidate.name, candidate.model, candidate.compiled)
                for candidate in candidates
                if not self._maker.is_float(candidate)
            ]
            beside = self._float_logits.get(images.digest)
            if beside is None:
                made = self._maker.float_artifact
                subjects.insert(0, self._subject(FLOAT, self._maker.float_beside, made))
            logits: dict[str, FloatArray] = {}
            if subjects:
                logits = accuracy.collect_apart(
                    subjects,
                    images,
                    job.preprocess,
                    threads=job.options.threads,
                    progress=self._context.progress,
                )
            if beside is None:
                beside = self._float_logits[images.digest] = logits[FLOAT]
            logits[FLOAT] = beside
            return {
                candidate.name: {
                    **accuracy.compare(
                        beside,
                        logits[FLOAT if self._maker.is_float(candidate) else candidate.name],
                        images.labels,
                        semantics=job.semantics,
                        threshold=self.threshold,
                    ).to_dict(),
                    "digest": images.digest,
                    "set": images.name,
                }
                for candidate in candidates
            }

    def chance_notes(self) -> list[str]:
        """Where the network is no better than guessing on the evaluation images, that it is so."""
        images = self._context.job.evaluation
        logits = None if images is None else self._float_logits.get(images.digest)
        if images is None or images.labels is None or logits is None:
            return []
        scored = accuracy.score(logits, images.labels, threshold=self.threshold)
        note = accuracy.chance_note(scored, images.labels)
        return [note] if note else []

    def time(self, candidates: Sequence[Candidate]) -> latency.LatencyReport | None:
        """The latency of each beside the target's own float, or None where it is not to be had."""
        job = self._context.job
        if job.semantics != "native":
            return None
        is_float = self._maker.is_float
        compiled = {FLOAT: self._maker.float_artifact}
        compiled |= {c.name: c.compiled for c in candidates if not is_float(c)}
        artifacts = {n: made for n, made in compiled.items() if isinstance(made, Artifact)}
        if len(artifacts) < len(compiled):  # some are finished on the device
            return None
        shown = {FLOAT: FLOAT, **{c.name: FLOAT if is_float(c) else c.name for c in candidates}}
        names = [candidate.name for candidate in candidates]
        with self._context.timed("latency"):
            report = latency.measure(
                [
                    Subject(name=name, artifact=artifact, resolve=_RESOLVE)
                    for name, artifact in artifacts.items()
                ],
                job.preprocess.tensor(self._context.examples[:1]),
                replace(TIMING, threads=job.options.threads or this_machine().cores),
                more=lambda found: undecided(names, found.renamed(shown)),
                most_rounds=MOST_ROUNDS,
                progress=self._context.progress,
            )
            return report.renamed(shown)

    def _subject(self, name: str, model: Path, compiled: Artifact | Deferred) -> Subject:
        """What is run for accuracy: this machine's kernels where they are the target's."""
        artifact = Artifact(backend="reference", path=model, files=(("onnx", model),))
        if self._context.job.semantics == "native" and isinstance(compiled, Artifact):
            artifact = compiled
        return Subject(name=name, artifact=artifact, resolve=_RESOLVE)
