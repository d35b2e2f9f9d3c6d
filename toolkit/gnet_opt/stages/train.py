"""Train a GoogLeNet on a labelled image set and leave weights with a model card.

The recipe `paper` follows C. Szegedy et al., "Going Deeper with Convolutions", 2014,
arXiv:1409.4842, section 6, as far as it is published; `modern` is what became usual since.
Everything is seeded by epoch, so that a training that was interrupted between two epochs and
resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import CalibrationError, ConfigError, ModelError
from gnet_opt.files import atomic_path, sha256_file, write_text
from gnet_opt.images import ImageSet, check_disjoint
from gnet_opt.preprocess import INCEPTION, Preprocess
from gnet_opt.progress import Progress, silent
from gnet_opt.stages.training.loop import Epoch, Training, measure
from gnet_opt.stages.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "weights.safetensors"
LABELS = "labels.txt"
CARD = "card.toml"
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training left behind.

    Attributes:
        card: The model card.
        weights: The float16 weights, auxiliary heads included.
        epochs: What each epoch measured.
        top1: Of the stored float16 weights, computed in float32, on the validation set; or None.
        validation_images: How many images `top1` was measured on.
        seconds: Duration of the training, in this and in resumed runs.
    """

    card: Path
    weights: Path
    epochs: tuple[Epoch, ...]
    top1: float | None
    validation_images: int
    seconds: float


def train(
    images: ImageSet,
    out: Path,
    recipe: Recipe,
    *,
    validation: ImageSet | None = None,
    preprocess: Preprocess = INCEPTION,
    init: nn.Module | None = None,
    resume: bool = False,
    name: str | None = None,
    license: str = "",
    source: str = "",
    progress: Progress = silent,
    log: Callable[[str], None] = lambda message: None,
) -> TrainResult:
    """Train torchvision's GoogLeNet, auxiliary heads and batch norm included.

    Args:
        images: Labelled pictures to learn from.
        out: Folder for `weights.safetensors`, `card.toml`, `labels.txt` and, while it runs,
            `checkpoint.pt`.
        recipe: How to train.
        validation: Labelled pictures to measure on; none of them may be in `images`.
        preprocess: What pictures go through when the model is used; training takes its
            normalisation, and its crop size where the recipe has none.
        init: A torchvision GoogLeNet to start from; its classifiers are left out where their
            number of classes differs.
        resume: Go on from `out/checkpoint.pt` where there is one.
        name: The model's name in the card; `out`'s name where not given.
        license: Licence of the weights, for the card.
        source: Where the images came from, for the card.
        progress: Told of each batch.
        log: Told one sentence after each epoch.

    Raises:
        CalibrationError: The sets have no labels, fewer than two classes, a class without a
            picture, a picture that cannot be read, or a picture in common.
        ConfigError: The checkpoint belongs to another training, or is in the way, or the
            preprocess does not give three channels.
        ModelError: The loss is not a number any more, the checkpoint is broken, or `init` is no
            torchvision GoogLeNet.
    """
    import torch

    classes = _check_sets(images, validation)
    if preprocess.planes != 3:
        raise ConfigError(
            f"preprocess.channels is {preprocess.channels}, but what is trained is torchvision's "
            "GoogLeNet, which takes three channels. Use rgb or bgr."
        )
    for pictures in (images, *filter(None, (validation,))):
        for note in pictures.remarks(classes):
            log(note)
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise ConfigError(
            f"{checkpoint} is left from a training that did not end. Resume that training, or "
            "remove the file to start anew."
        )
    out.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    # fork_rng: a library must not leave another random state behind than it found.
    with torch.random.fork_rng(devices=[]):
        try:
            if recipe.threads is not None:
                torch.set_num_threads(recipe.threads)
            state = Training(images, recipe, preprocess, len(classes), init, progress)
            if checkpoint.exists():
                state.restore(checkpoint)
                log(f"Resumed after epoch {len(state.epochs)} of {recipe.epochs}.")
            for number in range(len(state.epochs), recipe.epochs):
                epoch = state.run(number, validation)
                with atomic_path(checkpoint) as temporary:
                    state.save(temporary)
                log(_sentence(epoch, recipe.epochs))
            state.settle()
            result = _finish(
                state, out, classes, validation, name=name or out.name, license=license,
                source=source,
            )  # fmt: skip
        finally:
            torch.set_num_threads(before)
    checkpoint.unlink(missing_ok=True)
    return result


# --- Checks -------------------------------------------------------------------------------------


def _check_sets(images: ImageSet, validation: ImageSet | None) -> tuple[str, ...]:
    """Require sets that can be learned from and give the class names."""
    if images.labels is None:
        raise CalibrationError(
            f"The image set {images.name} has no labels, and training needs them. Use one folder "
            "a class, or a labels.csv with the columns file,label."
        )
    count = len(images.classes) or max(images.labels) + 1
    if count < 2:
        raise CalibrationError(
            f"The image set {images.name} has {count} class, and training needs at least 2. Add "
            "pictures of another class."
        )
    images.check_labels(count)
    classes = images.classes or tuple(f"class {index}" for index in range(count))
    missing = sorted(set(range(count)) - set(images.labels))
    if missing:
        counted = ""
        if missing == [0] and not images.classes:
            counted = " If the labels count from 1, subtract 1 from each."
        raise CalibrationError(
            f"The image set {images.name} has no picture of class {missing[0]} "
            f"({classes[missing[0]]}); {len(missing)} of {count} classes are empty. Add pictures, "
            f"or take the class out.{counted}"
        )
    if validation is not None:
        validation.check_labels(count)
        check_disjoint(images, validation, roles=("training", "validation"))
    return classes


def _sentence(epoch: Epoch, epochs: int) -> str:
    text = (
        f"Epoch {epoch.number} of {epochs}: loss {epoch.loss:.3f}, training top-1 "
        f"{100 * epoch.accuracy:.1f} %, {epoch.images_per_second:.0f} images/s"
    )
    if epoch.validation is not None:
        text += f", validation top-1 {100 * epoch.validation:.1f} %"
    return text + "."


# --- What stays ---------------------------------------------------------------------------------


def _finish(
    state: Training,
    out: Path,
    classes: tuple[str, ...],
    validation: ImageSet | None,
    *,
    name: str,
    license: str,
    source: str,
) -> TrainResult:
    """Store the averaged weights, measure what was stored, and write the card last."""
    from safetensors.torch import load_file, save_file

    stored = {key: _store(key, value) for key, value in state.average.state_dict().items()}
    weights = out / WEIGHTS
    with atomic_path(weights) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    top1 = None
    if validation is not None:
        state.average.load_state_dict(load_file(weights))
        top1 = measure(state.average, validation, state.preprocess, progress=state.progress)
    write_text(out / LABELS, "\n".join(classes) + "\n")
    card: dict[str, Any] = {
        "name": name,
        "architecture": "googlenet",
        "weights": WEIGHTS,
        "classes": len(classes),
        "labels": LABELS,
    }
    card |= {key: text for key, text in (("license", license), ("source", source)) if text}
    recipe = {k: v for k, v in dataclasses.asdict(state.recipe).items() if v is not None}
    training: dict[str, Any] = {
        "recipe": recipe.pop("name"),
        "images": len(state.images),
        "images_digest": state.images.digest,
        "weights_sha256": sha256_file(weights),
        "seconds": round(state.seconds),
        **recipe,
    }
    if validation is not None and top1 is not None:
        training |= {
            "validation_images": len(validation),
            "validation_digest": validation.digest,
            "validation_top1": round(top1, 4),
        }
    preprocess = state.preprocess.to_dict()
    tables = {"": card, "preprocess": preprocess, "training": training}
    write_text(out / CARD, "\n".join(_table(key, table) for key, table in tables.items()))
    return TrainResult(
        card=out / CARD,
        weights=weights,
        epochs=tuple(state.epochs),
        top1=top1,
        validation_images=0 if validation is None else len(validation),
        seconds=state.seconds,
    )


def _store(key: str, value: Tensor) -> Tensor:
    """Filters and matrices as float16; what has one dimension as it is.

    Batch norm's variances span more than float16 holds, and all vectors together are 1 % of the
    file.

    Raises:
        ModelError: A value does not fit.
    """
    import torch

    stored = value.detach().to(memory_format=torch.contiguous_format).clone()
    if value.ndim > 1:
        stored = stored.half()
    if not bool(torch.isfinite(stored).all()):
        raise ModelError(
            f"{key} holds values that are not finite in float16, so the training has diverged. "
            "Use a smaller learning rate."
        )
    return stored


def _table(title: str, values: Mapping[str, Any]) -> str:
    """One table of TOML. JSON's strings, numbers, booleans and lists are valid TOML."""
    lines = [f"[{title}]"] if title else []
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"
