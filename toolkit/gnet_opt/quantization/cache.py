"""Calibration statistics kept between runs, so that the same pictures are not run twice.

A key names everything that decides the statistics: the float graph with its weights, the
preprocess, every picture in its order, what computed them (versions and the CPU's instruction set,
on which last bits depend), and whether they hold histograms. With histograms they serve every
method, without them minmax alone; a run with another scheme or precision finds them as well.

A file is the SHA-256 of the rest and then NumPy's .npz, so that a damaged one is noticed before
anything reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gnet_opt.files import atomic_path, dump_json, sha256_file, sha256_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.preprocess import Preprocess
from gnet_opt.progress import Progress, silent
from gnet_opt.quantization import calibrate, needs_histograms
from gnet_opt.quantization.statistics import BINS, Histogram, Statistics
from gnet_opt.versions import tools

_FORMAT = 2
"""Part of the key; raised when the file, or the statistics of equal pictures, become others."""

_MOST_FILES = 64
"""Files that are kept, newest first: at most 20 MB in all for GoogLeNet."""

_VECTORS = ("highs", "lows", "sums")
"""The attributes of `Statistics` that hold one vector a tensor."""

_DIGEST_SIZE = hashlib.sha256().digest_size


@dataclass(frozen=True, kw_only=True)
class CalibrationCache:
    """A folder of statistics.

    Attributes:
        folder: Where the files are; it is made when the first one is written.
    """

    folder: Path

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.statistics"

    def load(self, key: str) -> Statistics | None:
        """The statistics of a key; None where there are none, or their file is damaged."""
        path = self.path(key)
        try:
            content = path.read_bytes()
            digest, packed = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
            if hashlib.sha256(packed).digest() != digest:
                return None
            with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
                statistics = _unpack(arrays)
        except (OSError, ValueError, KeyError):  # ValueError: NumPy refuses pickled objects
            return None
        with contextlib.suppress(OSError):  # it may be another user's
            path.touch()  # used files are kept longest
        return statistics

    def store(self, key: str, statistics: Statistics) -> bool:
        """Keep statistics; False where the folder cannot be written, which costs time alone."""
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **_pack(statistics))
        content = packed.getvalue()
        try:
            with atomic_path(self.path(key)) as temporary:
                temporary.write_bytes(hashlib.sha256(content).digest() + content)
            self._prune()
        except OSError:
            return False
        return True

    def _prune(self) -> None:
        ages = []
        for path in self.folder.glob("[!.]*.statistics"):  # not what another run is writing
            with contextlib.suppress(FileNotFoundError):  # another run has removed it
                ages.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(ages)[:-_MOST_FILES]:
            path.unlink(missing_ok=True)


def calibrate_cached(
    model: Path,
    preprocess: Preprocess,
    images: ImageSet,
    *,
    method: str,
    cache: Path | None = None,
    threads: int | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Statistics:
    """Calibrate a float ONNX file on pictures, or take the statistics from the cache.

    Args:
        model: The float ONNX file.
        preprocess: How a picture becomes its input.
        images: The calibration pictures.
        method: What the ranges will be chosen by: one of `METHODS`, or `auto`.
        cache: Folder of statistics from earlier runs, or None to neither read nor write any.
        threads: CPU threads, or None for one a core.
        progress: Shows the pictures.
        tell: Called with a sentence when the cache was used, or could not be written.

    Raises:
        CalibrationError: The pictures cannot be used; see `gnet_opt.quantization.calibrate`.
    """
    histograms = needs_histograms(method)
    kept = None if cache is None else CalibrationCache(folder=cache)
    if kept is not None:
        # Statistics with histograms hold all that those without them do.
        for held in dict.fromkeys((histograms, True)):
            name = key(model, preprocess, images, histograms=held)
            if (known := kept.load(name)) is not None:
                tell(
                    f"{len(images)} pictures were calibrated on in an earlier run: "
                    f"{kept.path(name)}"
                )
                return known
    files = progress(images.files, "Calibrating", len(images))
    inputs = (preprocess.load(path) for path in files)
    seen = calibrate(model, inputs, histograms=histograms, threads=threads)
    if kept is not None:
        name = key(model, preprocess, images, histograms=histograms)
        if not kept.store(name, seen):
            tell(
                f"{kept.folder} cannot be written, so the next run calibrates again "
                "(see --no-cache)."
            )
    return seen


def key(model: Path, preprocess: Preprocess, images: ImageSet, *, histograms: bool) -> str:
    """The key of what calibration with these pictures will see.

    Args:
        model: The float ONNX file that is run.
        preprocess: How a picture becomes its input.
        images: The calibration pictures.
        histograms: Whether the statistics hold histograms.
    """
    versions = tools()
    parts = {
        "format": _FORMAT,
        "histograms": histograms,
        "images": list(images.hashes),
        "machine": this_machine().to_dict()["instructions"],
        "model": sha256_file(model),
        "preprocess": preprocess.to_dict(),
        "versions": {n: versions.get(n) for n in ("gnet-opt", "numpy", "onnxruntime", "pillow")},
    }
    return sha256_text(dump_json(parts))


def _pack(statistics: Statistics) -> dict[str, npt.NDArray[Any]]:
    arrays = {"images": np.array(statistics.images)}
    for kind in _VECTORS:
        arrays |= _pack_vectors(kind, getattr(statistics, kind))
    if statistics.histograms:
        arrays |= _pack_histograms(statistics.histograms)
    return arrays


def _unpack(arrays: Mapping[str, npt.NDArray[Any]]) -> Statistics:
    return Statistics(
        images=int(arrays["images"]),
        **{kind: dict(_unpack_vectors(kind, arrays)) for kind in _VECTORS},
        histograms=_unpack_histograms(arrays) if "counts" in arrays else {},
    )


def _pack_histograms(histograms: Mapping[str, Histogram]) -> dict[str, npt.NDArray[Any]]:
    return {
        "bounds": np.array([[h.minimum, h.maximum, h.width] for h in histograms.values()]),
        "counts": np.stack([[h.positive, h.negative] for h in histograms.values()]),
        "names": np.array(list(histograms)),
        "zeros": np.array([h.zeros for h in histograms.values()], np.int64),
    }


def _unpack_histograms(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Histogram]:
    histograms = {}
    rows = zip(arrays["names"], arrays["bounds"], arrays["counts"], arrays["zeros"], strict=True)
    for name, (minimum, maximum, width), (positive, negative), zeros in rows:
        if positive.shape != (BINS,):
            raise ValueError("another number of bins")
        histogram = Histogram()
        histogram.minimum, histogram.maximum = float(minimum), float(maximum)
        histogram.width, histogram.zeros = float(width), int(zeros)
        histogram.positive, histogram.negative = positive, negative
        histograms[str(name)] = histogram
    return histograms


def _pack_vectors(
    kind: str, vectors: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    return {
        f"{kind}_names": np.array(list(vectors)),
        f"{kind}_sizes": np.array([vector.size for vector in vectors.values()]),
        f"{kind}_values": np.concatenate(list(vectors.values())),
    }


def _unpack_vectors(
    kind: str, arrays: Mapping[str, npt.NDArray[Any]]
) -> Iterable[tuple[str, npt.NDArray[Any]]]:
    ends = np.cumsum(arrays[f"{kind}_sizes"])
    pieces = np.split(arrays[f"{kind}_values"], ends[:-1])
    names = [str(name) for name in arrays[f"{kind}_names"]]
    return zip(names, pieces, strict=True)
