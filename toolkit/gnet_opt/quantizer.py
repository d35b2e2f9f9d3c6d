"""All that the INT8 candidates of one build have in common: statistics, method and repair.

What it chooses is chosen on calibration images that are held back, as `gnet_opt.search` says;
`facts` and `notes` say what and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gnet_opt.images import ImageSet, with_labels_of
from gnet_opt.machine import this_machine
from gnet_opt.planning import Plan
from gnet_opt.preprocess import FloatArray
from gnet_opt.progress import Progress, silent
from gnet_opt.quantization import LEAST_IMAGES, METHODS, Recipe, Statistics, quantize
from gnet_opt.quantization.cache import calibrate_cached
from gnet_opt.search import MOST_JUDGES, Judge, Verdict, best_method, split
from gnet_opt.sensitivity import LayerCost, measure
from gnet_opt.target import Scheme

_WORTH_DB = 0.5
"""Least gain in SQNR for which a graph without outlier channels takes the place of the graph."""


class Quantizer:
    """Writes INT8 files of one float graph.

    Attributes:
        facts: What was found, for the manifest: `method`, and `equalize` where there were
            outlier channels.
        held: Calibration images that are held back to choose by; labelled where their labels can
            be the model's, empty where there are too few.
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
        images = with_labels_of(job.calibration, job.model.classes)
        own, known = images.classes, tuple(job.model.labels)
        if own and known and own != known:  # nobody said that their order is the same
            images = replace(images, labels=None)
        fit, held = split(images)
        if len(fit) < LEAST_IMAGES.get(job.options.method, 1):  # the method needs them all
            fit, held = images, held.take([])
        self._fit, self.held = fit, held
        self._fitted: Statistics | None = None
        if job.options.method == "auto":
            # One pass over the images is enough for both.
            self._fitted = self._calibrate(model, self._fit)
            self._statistics = self._fitted.merged(self._calibrate(model, self.held))
        else:
            self.recipe = replace(self.recipe, method=job.options.method)
            self._statistics = self._calibrate(model, job.calibration)
        self._repair()
        if job.options.method == "auto":
            self._choose_method()

    @property
    def fitted(self) -> Statistics:
        """What was seen without the images held back; the first use may calibrate."""
        if self._fitted is None:
            self._fitted = self._calibrate(self._source, self._fit)
        return self._fitted

    def write(
        self,
        out: Path,
        scheme: Scheme,
        keep_float: frozenset[str] = frozenset(),
        *,
        to_score: bool = False,
    ) -> dict[str, Any]:
        """Write an INT8 file.

        Args:
            out: The file.
            scheme: The integer form.
            keep_float: Layers that stay in float.
            to_score: Whether it is to be scored on the images held back, so that its ranges are
                fitted to the others.

        Returns:
            The facts of `gnet_opt.quantization.quantize` and those of this object.
        """
        recipe = replace(self.recipe, keep_float=keep_float)
        statistics = self.fitted if to_score else self._statistics
        return {**quantize(self._source, out, statistics, scheme, recipe), **self.facts}

    @cached_property
    def costs(self) -> list[LayerCost]:
        """What each layer costs on the images held back; measured once."""
        return measure(
            self._source,
            self.fitted,
            self._job.target.scheme,
            self._load(self.held.spread(MOST_JUDGES)),
            recipe=self.recipe,
            jobs=self._job.options.threads or this_machine().cores,
            progress=self._progress,
        )

    @cached_property
    def _judge(self) -> Judge:
        """On the images held back."""
        pictures = self._load(self.held.spread(MOST_JUDGES))
        return Judge(self._float, pictures, self._job.options.threads)

    def _judged(self, model: Path, statistics: Statistics, recipe: Recipe) -> Verdict:
        tried = self._scratch / "tried.onnx"
        quantize(model, tried, statistics, self._job.target.scheme, recipe)
        return self._judge(tried)

    def _choose_method(self) -> None:
        judge = self._judge
        verdicts = {
            method: self._judged(self._source, self.fitted, replace(self.recipe, method=method))
            for method in self._progress(METHODS, "Choosing the method")
        }
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

        equalized = self._scratch / "equalized.onnx"
        if equalize(self._float, equalized, self._statistics) is None:
            return
        if not len(self.held):
            self.notes.append(
                "Some channels are out of line with those they share a scale with. Scaling them is "
                f"left out: {len(self._fit)} calibration images are too few to hold some back and "
                "see whether it helps."
            )
            return
        found = equalize(self._float, equalized, self.fitted)
        if found is None:  # one image alone is out of line
            return
        before = self._judged(self._float, self.fitted, self.recipe).to_dict()["sqnr_db"]
        fitted = self._calibrate(equalized, self._fit)
        after = self._judged(equalized, fitted, self.recipe).to_dict()["sqnr_db"]
        better = before is not None and (after is None or after >= before + _WORTH_DB)
        if better:
            self._source, self._fitted = equalized, fitted
            self._statistics = self._calibrate(equalized, self._job.calibration)
        self.facts["equalize"] = {
            **found,
            "images": self._judge.images,
            "sqnr_db_after": after,
            "sqnr_db_before": before,
            "used": better,
        }
        if better and before is not None and after is not None:
            self.notes.append(
                f"{found['channels']} channels of {len(found['layers'])} layers were out of line "
                "with those they share a scale with, by a factor of up to "
                f"{found['largest_factor']:.0f}. They were scaled without changing the logits: "
                f"INT8 goes from {before:.1f} to {after:.1f} dB on {self._judge.images} "
                "calibration images that were held back."
            )

    def _calibrate(self, model: Path, images: ImageSet) -> Statistics:
        """What a graph's tensors hold on some of the calibration images."""
        options = self._job.options
        return calibrate_cached(
            model,
            self._job.model.preprocess,
            images,
            method=options.method,
            cache=options.cache,
            threads=options.threads,
            progress=self._progress,
            tell=self._tell,
        )

    def _load(self, images: ImageSet) -> list[FloatArray]:
        return [self._job.model.preprocess.load(path) for path in images.files]
