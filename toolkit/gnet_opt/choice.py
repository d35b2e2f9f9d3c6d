"""What ships: candidates are made, scored by the gate, timed, and one of them is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnet_opt import backends
from gnet_opt.bench.latency import LatencyReport
from gnet_opt.candidates import Candidate, Context, Maker
from gnet_opt.decision import decide, refusal, tied
from gnet_opt.errors import BackendError, ModelError
from gnet_opt.mixed import find_mixed
from gnet_opt.quantizer import Quantizer
from gnet_opt.runtime import Backend
from gnet_opt.scoring import FLOAT, Scorer
from gnet_opt.search import MOST_JUDGES
from gnet_opt.target import Scheme

Accuracies = dict[str, Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What ships, or would if the gate let it.

    Attributes:
        candidate: The candidate.
        accuracy: Its accuracy, as it stands in a manifest; None where it was not measured.
        latency: The same of its latency beside the float model.
        decision: Why this one, for the manifest; None where the user named the precision.
        rejected: Why the gate refused it, empty where it passed.
        notes: What was decided on the way, in plain sentences.
    """

    candidate: Candidate
    accuracy: Mapping[str, Any] | None
    latency: Mapping[str, Any] | None
    decision: Mapping[str, Any] | None = None
    rejected: str = ""
    notes: tuple[str, ...] = ()


class Choice:
    """Makes candidates and chooses among them."""

    def __init__(
        self, context: Context, quantizer: Quantizer | None, maker: Maker, scorer: Scorer
    ) -> None:
        self._context = context
        self._quantizer = quantizer
        self._maker = maker
        self._scorer = scorer
        self._held_back: Accuracies = {}
        self._notes: list[str] = []

    def as_asked(self, precision: str) -> Chosen:
        """The one precision that the user named."""
        job = self._context.job
        scheme = job.target.scheme if precision == "int8" else None
        candidate = self._maker.make(precision, self._maker.backend, scheme)
        measured = self._gate(candidate)
        rejected = refusal(candidate.figures(measured), job.options.max_drop)
        report = self._scorer.time([candidate])
        if report is not None and scheme is not None:
            ratio = report.speedup(candidate.name).median
            if ratio <= 1.0 and not rejected:
                self._notes.append(
                    f"INT8 is not faster than float here ({ratio:.2f} times as fast). "
                    "--precision auto would ship float."
                )
        return Chosen(
            candidate=candidate,
            accuracy=measured,
            latency=_beside_float(candidate, report),
            rejected=rejected,
            notes=tuple(self._notes),
        )

    def fastest(self) -> Chosen:
        """The fastest candidate within the budget."""
        job = self._context.job
        candidates, measured = self._candidates()
        figures = [c.figures(measured[name]) for name, c in candidates.items()]
        refusals = {f.name: refusal(f, job.options.max_drop) for f in figures}
        within = [name for name, refused in refusals.items() if not refused]
        if not within:
            # A target without float, which alone is always within the budget.
            first = figures[0].name
            return Chosen(
                candidate=candidates[first],
                accuracy=measured[first],
                latency=None,
                rejected=refusals[first],
                notes=tuple(self._notes),
            )
        report = self._scorer.time([candidates[name] for name in within])
        equals = tied(within, report) if report else []
        held_back = self._on_held_back([candidates[name] for name in equals])
        name, decision = decide(figures, job.options.max_drop, report, held_back)
        chosen = candidates[name]
        if chosen.precision != "int8" and "int8" in job.target.precisions:
            self._notes.append(str(decision["reason"]))
        return Chosen(
            candidate=chosen,
            accuracy=measured[name],
            latency=_beside_float(chosen, report),
            decision=decision,
            notes=tuple(self._notes),
        )

    def _candidates(self) -> tuple[dict[str, Candidate], Accuracies]:
        """All candidates in the order of preference, and the gate's figures of each."""
        job, make = self._context.job, self._maker.make
        precisions = job.target.precisions
        rivals = [(self._maker.backend, job.target.scheme), *self._alternatives()]
        integer = [make("int8", *rival) for rival in rivals if "int8" in precisions]
        whole = [make("fp32", backend) for backend, _ in rivals if "fp32" in precisions]
        measured = self._scorer.score([*integer, *whole], job.evaluation)
        half = []
        for backend, _ in rivals if "fp16" in precisions else []:
            try:
                candidate = make("fp16", backend)
                measured[candidate.name] = self._gate(candidate)
            except (BackendError, ModelError) as error:
                if not (integer or whole):
                    raise
                self._notes.append(f"FP16 on {backend.name} was left out: {error}")
            else:
                half.append(candidate)
        mixed = [
            found
            for candidate in integer
            if refusal(candidate.figures(measured[candidate.name]), job.options.max_drop)
            and (found := self._mixed(candidate, measured))
        ]
        return {c.name: c for c in (*integer, *mixed, *half, *whole)}, measured

    def _mixed(self, refused: Candidate, measured: Accuracies) -> Candidate | None:
        """The choice of layers in float, as the images held back make it, before the gate."""
        assert self._quantizer is not None
        found = find_mixed(refused, self._context, self._quantizer, self._maker, self._scorer)
        candidate = found.candidate
        if candidate is None:
            self._notes.append(found.note)
            return None
        self._held_back[candidate.name] = found.held_back
        measured[candidate.name] = self._gate(candidate)
        if refused_again := refusal(
            candidate.figures(measured[candidate.name]), self._context.job.options.max_drop
        ):
            self._notes.append(
                f"Mixed precision on {candidate.backend.name} does not ship, though its choice of "
                "layers is within the budget on the calibration images that were held back: "
                f"{refused_again} No other choice is tried: evaluation images do not choose."
            )
        return candidate

    def _alternatives(self) -> list[tuple[Backend, Scheme]]:
        """The target's other backends that can be measured here."""
        if self._context.job.semantics != "native":
            return []
        found = []
        for name, scheme in self._context.job.target.alternatives.items():
            backend = backends.get(name)
            probe = backend.probe()
            if probe.available:
                found.append((backend, scheme))
            else:
                self._notes.append(f"{name} was not measured as a candidate: {probe.detail}.")
        return found

    def _gate(self, candidate: Candidate) -> Mapping[str, Any] | None:
        """The accuracy of one candidate on the evaluation images."""
        images = self._context.job.evaluation
        if candidate.precision != "fp16":
            return self._scorer.score([candidate], images)[candidate.name]
        try:
            # The golden images, too, must stay within its range.
            self._scorer.judge(candidate.plain)
            return self._scorer.score([candidate], images)[candidate.name]
        except BackendError as error:
            raise BackendError(
                f"{error} FP16 ends at 65504; --precision fp32 has room for larger values."
            ) from error

    def _on_held_back(self, equals: Sequence[Candidate]) -> dict[str, Mapping[str, Any]]:
        """The accuracy of equally fast candidates on the images held back, where there are some."""
        if len(equals) < 2 or self._quantizer is None or not len(self._quantizer.held):
            return {}
        held = self._quantizer.held.spread(MOST_JUDGES)
        for candidate in equals:
            if candidate.name not in self._held_back:
                scored, scheme = candidate, candidate.scheme
                if scheme is not None:
                    make = self._maker.make
                    scored = make(candidate.precision, candidate.backend, scheme, to_score=True)
                self._held_back |= self._scorer.score([scored], held)
        found = {candidate.name: self._held_back[candidate.name] for candidate in equals}
        return {name: measured for name, measured in found.items() if measured is not None}


def _beside_float(candidate: Candidate, report: LatencyReport | None) -> dict[str, Any] | None:
    """`latency` of the manifest: float and what ships, side by side."""
    if report is None:
        return None
    return report.renamed({"float": FLOAT, "quantized": candidate.name}).to_dict()
