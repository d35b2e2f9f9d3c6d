"""Accuracy of a quantized model beside its float model, on the same pictures."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gnet_opt.bench.binary import LOGIT, as_classes
from gnet_opt.bench.process import Subject, WorkerProcess, started
from gnet_opt.errors import BackendError, CalibrationError
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import Preprocess
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import FloatArray, InputArray, Runner

# Runners take turns by this many pictures: enough that the thread pool of one has come to rest
# before the next one starts, few enough to keep (10 MB at 224 x 224).
_CHUNK = 16

_Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a model is right.

    Attributes:
        top1: Percent of pictures whose label has the greatest logit, or where there is one logit
            for two classes, is on the label's side of the threshold.
        top5: Percent whose label is among the five greatest, None with fewer than five classes.
    """

    top1: float
    top5: float | None

    def to_dict(self) -> dict[str, Any]:
        """The score as it stands in a manifest."""
        return {"top1": self.top1, "top5": self.top5}


@dataclass(frozen=True, kw_only=True)
class Drop:
    """What quantization costs.

    Attributes:
        value: Float top-1 minus quantized top-1, in percentage points; negative is a gain.
        ci95: The 95 % interval of `value`, in percentage points.
    """

    value: float
    ci95: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The drop as it stands in a manifest."""
        return {"ci95": list(self.ci95), "value": self.value}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A quantized model beside its float model on the same pictures.

    Attributes:
        images: The number of pictures.
        semantics: `native`, the host's own kernels, or `reference`, Q and DQ as float arithmetic.
        float_score: The float model's score, None without labels.
        quantized_score: The quantized model's score, None without labels.
        drop: What quantization costs, None without labels.
        agreement: Percent of pictures on which both have the same top-1.
        sqnr_db: Signal to quantization noise ratio of the logits, see `sqnr_db`.
    """

    images: int
    semantics: Literal["native", "reference"]
    float_score: Score | None
    quantized_score: Score | None
    drop: Drop | None
    agreement: float
    sqnr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """`accuracy` as it stands in a manifest."""
        return {
            "agreement": self.agreement,
            "drop": self.drop and self.drop.to_dict(),
            "float": self.float_score and self.float_score.to_dict(),
            "images": self.images,
            "quantized": self.quantized_score and self.quantized_score.to_dict(),
            "semantics": self.semantics,
            "sqnr_db": self.sqnr_db,
        }


def collect(
    runners: Mapping[str, Runner],
    images: ImageSet,
    preprocess: Preprocess,
    progress: Progress = silent,
) -> dict[str, FloatArray]:
    """Run every model on every picture, reading each picture once.

    Memory does not depend on the number of pictures but for the logits.

    Args:
        runners: Open models by name; each is run with one picture at a time.
        images: The pictures.
        preprocess: How a picture becomes the input.
        progress: Shows how far it is.

    Returns:
        Logits by name: float32 of shape (len(images), classes), in the order of `images`.

    Raises:
        CalibrationError: The set is empty, or a picture cannot be read.
        BackendError: A model failed, or gave something that is not finite logits.
    """
    if not len(images):
        raise CalibrationError(f"The image set {images.name} is empty. Pass a set with pictures.")
    rows: dict[str, list[FloatArray]] = {name: [] for name in runners}
    files = iter(progress(images.files, "Evaluating", len(images)))
    while paths := list(islice(files, _CHUNK)):
        inputs = [preprocess.load(path)[None] for path in paths]
        for name, runner in runners.items():
            for path, batch in zip(paths, inputs, strict=True):
                logits = runner.run(batch)
                if logits.ndim != 2 or len(logits) != 1:
                    raise BackendError(
                        f"The {name} model gives an output of shape {logits.shape}; logits have "
                        "the shape (1, classes). Export it with `gnet-opt export`."
                    )
                _check_finite(logits, f"The {name} model", f" on {path}")
                rows[name].append(logits)
    return {name: np.concatenate(logits) for name, logits in rows.items()}


def collect_apart(
    subjects: Sequence[Subject],
    images: ImageSet,
    preprocess: Preprocess,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, FloatArray]:
    """As `collect`, each model in a process of its own, so that one cannot disturb another.

    Args:
        subjects: Models with different names.
        images: The pictures.
        preprocess: How a picture becomes the input.
        threads: CPU threads of each, or None for the runtime's own choice.
        progress: Shows how far it is.

    Raises:
        CalibrationError: The set is empty, or a picture cannot be read.
        MissingDependencyError: A runtime is not installed.
        BackendError: A model failed, or gave something that is not finite logits.
    """
    with (
        tempfile.TemporaryDirectory(prefix="gnet-opt-accuracy-") as folder,
        contextlib.ExitStack() as stack,
    ):
        runners = {
            subject.name: stack.enter_context(
                _runner_apart(subject, Path(folder) / str(index), threads)
            )
            for index, subject in enumerate(subjects)
        }
        return collect(runners, images, preprocess, progress)


class _RunnerApart:
    """A worker process as a `Runner`; it is loaded with the first picture."""

    def __init__(
        self, worker: WorkerProcess, subject: Subject, folder: Path, threads: int | None
    ) -> None:
        self._worker = worker
        self._subject = subject
        self._folder = folder
        self._threads = threads
        self._loaded = False

    def run(self, batch: InputArray) -> FloatArray:
        pictures = self._folder / "input.npy"
        np.save(pictures, batch)
        if not self._loaded:
            self._worker.load(self._subject, pictures, self._threads)
            self._loaded = True
        return self._worker.run(pictures, self._folder / "logits.npy")


@contextlib.contextmanager
def _runner_apart(subject: Subject, folder: Path, threads: int | None) -> Iterator[Runner]:
    folder.mkdir()
    with started(subject.name, folder / "stderr") as worker:
        yield _RunnerApart(worker, subject, folder, threads)


def compare(
    float_logits: FloatArray,
    quantized_logits: FloatArray,
    labels: Sequence[int] | None,
    *,
    semantics: Literal["native", "reference"],
    threshold: float = LOGIT,
) -> Accuracy:
    """Compare two models' logits on the same pictures.

    Args:
        float_logits: The float model's, of shape (pictures, classes).
        quantized_logits: The quantized model's, of the same shape.
        labels: The class index of each picture, or None.
        semantics: What computed `quantized_logits`.
        threshold: What decides where there is one logit for two classes, see `binary`.

    Raises:
        BackendError: The shapes differ, or a logit is not finite.
        CalibrationError: There is no picture, or the labels do not fit the logits.
    """
    if float_logits.ndim != 2 or float_logits.shape != quantized_logits.shape:
        raise BackendError(
            f"The float model gives logits of shape {float_logits.shape} and the quantized model "
            f"of shape {quantized_logits.shape}. Build both from one checkpoint."
        )
    if not float_logits.size:
        raise CalibrationError("There is no picture to compare on. Pass a set with pictures.")
    _check_finite(float_logits, "The float model", "")
    _check_finite(quantized_logits, "The quantized model", "")
    float_columns = as_classes(float_logits, threshold)
    quantized_columns = as_classes(quantized_logits, threshold)
    same = float_columns.argmax(1) == quantized_columns.argmax(1)
    before = after = drop = None
    if labels is not None:
        truth = _check_labels(labels, float_columns)
        float_ranks, quantized_ranks = ranks(float_columns, truth), ranks(quantized_columns, truth)
        classes = float_columns.shape[1]
        before, after = _score(float_ranks, classes), _score(quantized_ranks, classes)
        drop = paired_drop(float_ranks == 0, quantized_ranks == 0)
    return Accuracy(
        images=len(float_logits),
        semantics=semantics,
        float_score=before,
        quantized_score=after,
        drop=drop,
        agreement=_percent(same),
        sqnr_db=sqnr_db(float_logits, quantized_logits),
    )


def score(logits: FloatArray, labels: Sequence[int], *, threshold: float = LOGIT) -> Score:
    """Score one model.

    Args:
        logits: Of shape (pictures, classes).
        labels: The class index of each picture.
        threshold: What decides where there is one logit for two classes, see `binary`.

    Raises:
        BackendError: A logit is not finite.
        CalibrationError: There is no picture, or the labels do not fit the logits.
    """
    _check_finite(logits, "The model", "")
    columns = as_classes(logits, threshold)
    return _score(ranks(columns, _check_labels(labels, columns)), columns.shape[1])


def ranks(logits: FloatArray, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many classes come before the label; 0 is top-1.

    Of equal logits the lower class index comes first, as with argmax, so ties count the same on
    every machine.

    Args:
        logits: Of shape (pictures, classes), finite.
        labels: int64 of shape (pictures,).

    Returns:
        int64 of shape (pictures,).
    """
    own = np.take_along_axis(logits, labels[:, None], 1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    before: npt.NDArray[np.int64] = ((logits > own) | ((logits == own) & earlier)).sum(1)
    return before


def paired_drop(float_right: npt.NDArray[np.bool_], quantized_right: npt.NDArray[np.bool_]) -> Drop:
    """The drop in top-1 and its 95 % interval, from outcomes paired by picture.

    The interval is the Wald interval for the difference of matched proportions after half an
    outcome is added to each of the four cells: A. Agresti and Y. Min, "Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24 (2005), 729-740. Only
    pictures on which the models differ widen it, so it is far narrower than two separate ones.

    Args:
        float_right: Whether the float model is right, of shape (pictures,), at least one.
        quantized_right: The same for the quantized model.
    """
    count = len(float_right)
    lost = int((float_right & ~quantized_right).sum())
    gained = int((~float_right & quantized_right).sum())
    n, b, c = count + 2, lost + 0.5, gained + 0.5
    centre = (b - c) / n
    half = _Z95 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    return Drop(
        value=100 * (lost - gained) / count,
        ci95=(100 * max(-1.0, centre - half), 100 * min(1.0, centre + half)),
    )


def wilson(percent: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a percentage.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22 (1927), 209-212.
    """
    p, z2 = percent / 100, _Z95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def below_chance(top1: float, classes: int) -> bool:
    """Whether a top-1 is at or below that of guessing among the classes that were asked for.

    Without an interval: a network that works is so far above it that noise does not matter, and
    one at it by chance deserves the same look.

    Args:
        top1: In percent.
        classes: How many different labels the images have; with one there is nothing to guess.
    """
    return classes > 1 and top1 <= 100 / classes


def chance_note(score: Score, labels: Sequence[int]) -> str:
    """A sentence for a network that is no better than guessing on these labels, or nothing."""
    classes = len(set(labels))
    if not below_chance(score.top1, classes):
        return ""
    return (
        f"Warning: the top-1 of {score.top1:.2f} % on {len(labels)} images of {classes} "
        f"classes is no better than guessing ({100 / classes:.2f} %). Check that the labels, the "
        "order of the classes, the preprocess and the weights belong together."
    )


def sqnr_db(float_logits: FloatArray, quantized_logits: FloatArray) -> float | None:
    """Signal to quantization noise ratio of all logits together, in decibels.

    10 log10(sum f^2 / sum (f - q)^2) over pictures and classes in float64, where f are the float
    model's logits and q the quantized model's.

    Returns:
        The ratio; None where it is not a finite number: there is no noise (the logits are
        identical) or no signal (all float logits are zero).
    """
    signal = float_logits.astype(np.float64)
    noise = signal - quantized_logits.astype(np.float64)
    power, error = float((signal**2).sum()), float((noise**2).sum())
    if power == 0 or error == 0:
        return None
    return 10 * (math.log10(power) - math.log10(error))


def _score(rank: npt.NDArray[np.int64], classes: int) -> Score:
    return Score(top1=_percent(rank == 0), top5=_percent(rank < 5) if classes >= 5 else None)


def _percent(hits: npt.NDArray[np.bool_]) -> float:
    return 100 * int(hits.sum()) / len(hits)


def _check_finite(logits: FloatArray, who: str, where: str) -> None:
    if not np.isfinite(logits).all():
        raise BackendError(
            f"{who} gives logits that are not finite (NaN or infinity){where}. "
            "Check its weights and its preprocess."
        )


def _check_labels(labels: Sequence[int], logits: FloatArray) -> npt.NDArray[np.int64]:
    truth = np.asarray(labels, np.int64)
    pictures, classes = logits.shape
    if truth.shape != (pictures,) or not pictures:
        raise CalibrationError(
            f"There are {truth.size} labels for {pictures} pictures. Pass one label a picture."
        )
    if truth.min() < 0 or truth.max() >= classes:
        raise CalibrationError(
            f"Labels go from {truth.min()} to {truth.max()}, but the model has {classes} classes "
            f"(0..{classes - 1}). Use labels of the model's own classes."
        )
    return truth
