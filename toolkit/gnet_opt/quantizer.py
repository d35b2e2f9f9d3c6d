"""All that the INT8 candidates of one build have in common: statistics, method and repair.

What it finds is measured on calibration pictures alone; `facts` and `notes` say what and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.planning import Plan
from gnet_opt.preprocess import FloatArray
from gnet_opt.progress import Progress, silent
from gnet_opt.quantization import METHODS, Recipe, Statistics, quantize
from gnet_opt.quantization.cache import calibrate_cached
from gnet_opt.search import MOST_JUDGES, Judge, best_method, split
from gnet_opt.sensitivity import LayerCost, measure
from gnet_opt.target import Scheme

_WORTH_DB = 0.5
"""Least gain in SQNR for which a graph without outlier channels takes the place of the graph."""


class Quantizer:
    """Writes INT8 files of one float graph.

    Attributes:
        facts: What was found, for the manifest: `method`, and `equalize` where there were
            outlier channels.
        notes: The same in plain sentences, where a user should know.
        recipe: What the target leaves open, as it was chosen.
    """

    def __init__(
        self,
        job: Plan,
        model: Path,
        scratch: Path,
        progress: Progress = silent,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Calibrate, repair outlier channels and choose the method.

        Args:
            job: The plan.
            model: The float ONNX file.
            scratch: A folder for files on the way.
            progress: Shows how far it is.
            tell: Called with sentences about this run alone, which no manifest should have.

        Raises:
            CalibrationError: The pictures cannot be used.
        """
        self._job = job
        self._float = self._source = model
        self._scratch = scratch
        self._progress = progress
        self._tell = tell
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.recipe = Recipe(
            bias_correction=job.options.bias_correction, weight_search=job.options.weight_search
        )
        self._parts: tuple[ImageSet, ...] = (job.calibration,)
        if job.options.method == "auto":
            self._parts = split(job.calibration)
        else:
            self.recipe = replace(self.recipe, method=job.options.method)
        self._seen = self._calibrate(model)
        self._repair()
        if job.options.method == "auto":
            self._choose_method()

    @property
    def _statistics(self) -> Statistics:
        """What was seen on all calibration pictures."""
        first, *others = self._seen
        for other in others:
            first = first.merged(other)
        return first

    def write(
        self, out: Path, scheme: Scheme, keep_float: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Write an INT8 file.

        Args:
            out: The file.
            scheme: The integer form.
            keep_float: Layers that stay in float.

        Returns:
            The facts of `gnet_opt.quantization.quantize` and those of this object.
        """
        recipe = replace(self.recipe, keep_float=keep_float)
        return {**quantize(self._source, out, self._statistics, scheme, recipe), **self.facts}

    @cached_property
    def costs(self) -> list[LayerCost]:
        """What each layer costs, on at most 64 calibration pictures; measured once."""
        return measure(
            self._source,
            self._statistics,
            self._job.target.scheme,
            self._load(self._job.calibration.spread(MOST_JUDGES)),
            recipe=self.recipe,
            jobs=self._job.options.threads or this_machine().cores,
            progress=self._progress,
        )

    def _judged(self, judge: Judge, scheme: Scheme, recipe: Recipe) -> float | None:
        tried = self._scratch / "tried.onnx"
        quantize(self._source, tried, self._statistics, scheme, recipe)
        sqnr: float | None = judge(tried).to_dict()["sqnr_db"]
        return sqnr

    def _choose_method(self) -> None:
        seen, held = self._seen[0], self._parts[1]
        judge = Judge(self._float, self._load(held.spread(MOST_JUDGES)), self._job.options.threads)
        tried = self._scratch / "tried.onnx"
        verdicts = {}
        for method in self._progress(METHODS, "Choosing the method"):
            recipe = replace(self.recipe, method=method)
            quantize(self._source, tried, seen, self._job.target.scheme, recipe)
            verdicts[method] = judge(tried)
        method = best_method(verdicts, judge.images)
        self.recipe = replace(self.recipe, method=method)
        self.facts["method"] = {
            "chosen": method,
            "images": judge.images,
            "verdicts": {name: verdict.to_dict() for name, verdict in verdicts.items()},
        }
        self.notes.append(
            f"Ranges are chosen by {method}: {verdicts[method].sqnr_db:.1f} dB on "
            f"{judge.images} calibration pictures that were held back."
        )

    def _repair(self) -> None:
        """Use the graph without outlier channels, where there are some and it measures better."""
        from gnet_opt.quantization.equalize import equalize

        job = self._job
        equalized = self._scratch / "equalized.onnx"
        found = equalize(self._float, equalized, self._statistics)
        if found is None:
            return
        pictures = self._load(job.calibration.spread(MOST_JUDGES // 2))
        judge = Judge(self._float, pictures, job.options.threads)
        before = self._judged(judge, job.target.scheme, self.recipe)
        original = self._seen
        self._source, self._seen = equalized, self._calibrate(equalized)
        after = self._judged(judge, job.target.scheme, self.recipe)
        better = before is not None and (after is None or after >= before + _WORTH_DB)
        if not better:
            self._source, self._seen = self._float, original
        self.facts["equalize"] = {
            **found,
            "images": judge.images,
            "sqnr_db_after": after,
            "sqnr_db_before": before,
            "used": better,
        }
        if better and before is not None and after is not None:
            self.notes.append(
                f"{found['channels']} channels of {len(found['layers'])} layers were out of line "
                "with those they share a scale with, by a factor of up to "
                f"{found['largest_factor']:.0f}. They were scaled without changing the logits: "
                f"INT8 goes from {before:.1f} to {after:.1f} dB."
            )

    def _calibrate(self, model: Path) -> list[Statistics]:
        """What a graph's tensors hold on each part of the calibration pictures."""
        options = self._job.options
        return [
            calibrate_cached(
                model,
                self._job.model.preprocess,
                part,
                method=options.method,
                cache=options.cache,
                threads=options.threads,
                progress=self._progress,
                tell=self._tell,
            )
            for part in self._parts
        ]

    def _load(self, images: ImageSet) -> list[FloatArray]:
        return [self._job.model.preprocess.load(path) for path in images.files]
