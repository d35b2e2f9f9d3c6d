"""Candidates of a build: one precision on one backend each, written and compiled."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gnet_opt import backends
from gnet_opt.bundle import MODEL
from gnet_opt.decision import Figures
from gnet_opt.planning import Plan
from gnet_opt.preprocess import PixelArray
from gnet_opt.progress import Progress
from gnet_opt.quantizer import Quantizer
from gnet_opt.runtime import Artifact, Backend, Deferred
from gnet_opt.target import Scheme


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the steps of one build share.

    Attributes:
        job: The plan.
        scratch: A folder for files on the way, in the bundle's own folder.
        examples: Calibration images on which stages prove their claims, uint8 of shape
            (N, crop, crop, planes).
        golden: The golden inputs, of the same form.
        progress: Shows how far a step is.
        seconds: How long each step took so far, by name.
    """

    job: Plan
    scratch: Path
    examples: PixelArray
    golden: PixelArray
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def float_model(self) -> Path:
        """The float ONNX file, which `gnet_opt.stages.prepare` writes."""
        return self.scratch / "float.onnx"

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of the block to a step's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[step] = self.seconds.get(step, 0.0) + taken


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One precision on one backend, written and compiled in a folder of its own.

    Attributes:
        precision: `int8`, `mixed`, `fp16` or `fp32`.
        backend: Who runs it.
        scheme: The integer form, None without one.
        folder: Where its files are; it becomes the bundle if this one ships.
        plain: The model with the float input that its network has: `model` itself, or what it was
            made of where it takes pixels. Both give the same logits.
        compiled: What the backend made of `model`.
        facts: What was proved on the way, for the manifest.
        float_layers: Layers that were kept in float, for `mixed`.
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
        """Unique in a build."""
        return f"{self.precision} on {self.backend.name}"

    @property
    def model(self) -> Path:
        """The portable model."""
        return self.folder / MODEL

    def figures(self, accuracy: Mapping[str, Any] | None) -> Figures:
        """What is told of it beside its rivals.

        Args:
            accuracy: What was measured, as it stands in a manifest, or None.
        """
        return Figures(
            name=self.name,
            precision=self.precision,
            backend=self.backend.name,
            accuracy=accuracy,
            float_layers=tuple(sorted(self.float_layers)),
            macs_int8_share=self.facts.get("quantize", {}).get("macs_int8_share", 0.0),
        )


class Maker:
    """Writes and compiles candidates of one build.

    Attributes:
        backend: The target's own.
    """

    def __init__(self, context: Context, quantizer: Quantizer | None) -> None:
        """Keep what all of them are made of.

        Args:
            context: Of the build; its float model is written.
            quantizer: Of that float model, None where nothing is to be in INT8.
        """
        self._context = context
        self._quantizer = quantizer
        self.backend = backends.get(context.job.target.backend)
        self._number = itertools.count(1)

    def make(
        self,
        precision: str,
        backend: Backend,
        scheme: Scheme | None = None,
        keep_float: frozenset[str] = frozenset(),
        *,
        to_score: bool = False,
    ) -> Candidate:
        """Write and compile one precision.

        Args:
            precision: `int8`, `mixed`, `fp16` or `fp32`.
            backend: Who runs it.
            scheme: The integer form, for `int8` and `mixed`.
            keep_float: Layers that stay in float, for `mixed`.
            to_score: See `Quantizer.write`.

        Raises:
            BackendError: The compiler failed.
            ModelError: The result misses a post-condition.
        """
        context = self._context
        # With the rights that the user's umask gives: it becomes the bundle's folder.
        folder = context.scratch / f"{precision}-{backend.name}-{next(self._number)}"
        folder.mkdir()
        pixels = context.job.options.input == "uint8"
        plain = context.scratch / f"{folder.name}.onnx" if pixels else folder / MODEL
        facts: dict[str, Any] = {}
        if scheme is not None:
            assert self._quantizer is not None
            with context.timed("quantize"):
                facts = self._quantizer.write(plain, scheme, keep_float, to_score=to_score)
        elif precision == "fp16":
            from gnet_opt.quantization.half import write_half

            with context.timed("half"):
                facts = write_half(context.float_model, plain)
        else:
            shutil.copyfile(context.float_model, plain)
        if pixels:
            facts = {**facts, "input": self._take_pixels(plain, folder / MODEL)}
        with context.timed("compile"):
            compiled = backend.compile(folder / MODEL, context.job.target, folder)
        return Candidate(
            precision=precision,
            backend=backend,
            scheme=scheme,
            folder=folder,
            plain=plain,
            compiled=compiled,
            facts=facts,
            float_layers=keep_float,
        )

    def is_float(self, candidate: Candidate) -> bool:
        """Whether a candidate is what the others are measured beside, and not measured twice."""
        return candidate.precision == "fp32" and candidate.backend.name == self.backend.name

    @cached_property
    def float_artifact(self) -> Artifact | Deferred:
        """The float model compiled by the target's own backend."""
        folder = self._context.scratch / "float"
        folder.mkdir()
        return self.backend.compile(self.float_beside, self._context.job.target, folder)

    @cached_property
    def float_beside(self) -> Path:
        """The float model with the input that the shipped one has, so that both get the same."""
        context = self._context
        if context.job.options.input == "float32":
            return context.float_model
        model = context.scratch / "float-pixels.onnx"
        self._take_pixels(context.float_model, model)
        return model

    def _take_pixels(self, plain: Path, out: Path) -> dict[str, Any]:
        from gnet_opt.stages.pixels import take_pixels

        context = self._context
        with context.timed("input"):
            return take_pixels(plain, out, context.job.model.preprocess, context.examples)
