"""Accuracy of a bundle, an ONNX file or any other model on labelled pictures."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gnet_opt import backends
from gnet_opt.backends.onnxruntime import input_form
from gnet_opt.bench import accuracy, binary
from gnet_opt.bundle import MANIFEST, Bundle
from gnet_opt.cards import ModelCard
from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.images import ImageSet
from gnet_opt.operations import export, is_native, open_bundle, pending
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact

_SAY = "Pass --card with a model card to say it."
_ASSUMED = (
    "An ONNX file does not say how pictures become its input: ImageNet mean and standard deviation "
    f"are assumed. {_SAY}"
)
_ASSUMED_SIZE = (
    "An ONNX file does not say how pictures are resized: the shorter side to "
    f"{IMAGENET.resize} pixels and a crop of {IMAGENET.crop} are assumed. {_SAY}"
)


def evaluate(
    spec: str,
    folder: Path,
    *,
    card: Path | None = None,
    weights: str | None = None,
    reference: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure accuracy on labelled pictures.

    Args:
        spec: A bundle, an ONNX file, or anything that `gnet_opt.stages.load` takes.
        folder: The labelled pictures.
        card: A model card with preprocess and labels, for an ONNX file or a checkpoint.
        weights: Which weights to take of a checkpoint that has several, such as `ema`.
        reference: Reference semantics instead of this machine's kernels.
        threads: CPU threads, or None for the runtime's own choice.
        progress: Shows how far it is.

    Returns:
        `top1` and `top5` in percent, `ci95` of top-1 (Wilson score interval), and what ran.

    Raises:
        GnetOptError: The model or the pictures cannot be used.
    """
    notes: list[str] = []
    bundle: Bundle | None = None
    is_bundle = (Path(spec) / MANIFEST).is_file()
    if weights is not None and (is_bundle or spec.endswith(".onnx")):
        raise ConfigError(f"--weights chooses in a checkpoint, and {spec} is none. Leave it out.")
    with tempfile.TemporaryDirectory(prefix="gnet-opt-") as scratch:
        if is_bundle:
            bundle = Bundle.open(Path(spec))
            bundle.check()
            preprocess, labels = bundle.preprocess, tuple(bundle.manifest["labels"])
            if card is not None:
                raise ConfigError(f"{spec} is a bundle and has its preprocess: leave out --card.")
            if (waiting := pending(bundle)) and not reference:
                notes.append(f"{waiting} These are reference semantics.")
            elif not is_native(bundle) and not reference:
                name = bundle.manifest["target"]["name"]
                notes.append(f"This machine is not {name}: these are reference semantics.")
            reference = reference or not is_native(bundle)
            backend, opened = open_bundle(bundle, threads=threads, reference=reference)
        else:
            path, preprocess, labels, assumed = _onnx_of(
                spec, card, weights, Path(scratch), progress
            )
            notes.extend(assumed)
            backend = "reference" if reference else "onnxruntime"
            artifact = Artifact(backend=backend, path=path, files=(("onnx", path),))
            opened = backends.get(backend).open(artifact, threads=threads)
        images = ImageSet.open(folder, classes=labels)
        notes += images.remarks(labels)
        with opened as runner:
            logits = accuracy.collect({"model": runner}, images, preprocess, progress)["model"]
        classes = logits.shape[1]
        threshold = bundle.threshold if bundle else binary.threshold(path, classes)
    images.check_labels(classes)
    assert images.labels is not None  # check_labels requires them
    if classes == 1:
        notes.append(binary.sentence(threshold, labels or images.classes))
    scored = accuracy.score(logits, images.labels, threshold=threshold)
    if note := accuracy.chance_note(scored, images.labels):
        notes.append(note)
    return {
        "backend": backend,
        "ci95": list(accuracy.wilson(scored.top1, len(images))),
        "images": len(images),
        "model": spec,
        "notes": notes,
        "semantics": "reference" if backend == "reference" else "native",
        "set": images.name,
        "top1": scored.top1,
        "top5": scored.top5,
    }


def _onnx_of(
    spec: str, card: Path | None, weights: str | None, scratch: Path, progress: Progress
) -> tuple[Path, Preprocess, tuple[str, ...], tuple[str, ...]]:
    """An ONNX file for a model, with its preprocess, its labels and what was assumed."""
    if not spec.endswith(".onnx"):
        from gnet_opt.stages.load import load

        model = load(spec, card=card, weights=weights)
        path = scratch / "float.onnx"
        export(model, path, progress=progress)
        return path, model.preprocess, model.labels, model.assumptions
    path = Path(spec)
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Pass an ONNX file, a bundle or a model.")
    if find_spec("onnx_ir") is not None:  # else, as on a device, the runtime's own check is left
        from gnet_opt.quantization.regions import load_graph

        load_graph(path)
    kind, planes = input_form(path)
    preprocess = Preprocess(channels="gray") if planes == 1 else IMAGENET
    labels: tuple[str, ...] = ()
    assumed: tuple[str, ...] = (_ASSUMED,)
    if card is not None:
        described = ModelCard.open(card)
        if described.preprocess is None or described.transform_input:
            raise ConfigError(
                f"{card} does not say how pictures become the input of {path}. Give it a "
                "[preprocess] table with the mean and std of the ONNX file itself, without "
                "transform_input."
            )
        preprocess, labels, assumed = described.preprocess, described.labels, ()
    if planes not in (None, preprocess.planes):
        where = f"the [preprocess] of {card} has" if card else "ImageNet's pictures have"
        raise ConfigError(
            f"{path} takes pictures of {planes} planes, and {where} {preprocess.planes}. Pass "
            "--card with a model card whose preprocess.channels fits: rgb or bgr is 3 planes, gray "
            "1 and rgba 4."
        )
    if kind == "uint8":
        preprocess = replace(preprocess, input="uint8")
        assumed = (_ASSUMED_SIZE,) if card is None else ()
    return path, preprocess, labels, assumed
