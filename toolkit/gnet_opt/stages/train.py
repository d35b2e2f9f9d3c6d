"""Train a GoogLeNet on a labelled image set and leave weights with a model card.

The recipe `paper` follows C. Szegedy et al., "Going Deeper with Convolutions", 2014,
arXiv:1409.4842, section 6, as far as it is published; `modern` is what became usual since.
Everything is seeded by epoch, so that a training that was interrupted between two epochs and
resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from gnet_opt.errors import CalibrationError, ConfigError, ModelError
from gnet_opt.files import atomic_path, sha256_file, write_text
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import INCEPTION, PixelArray, Preprocess
from gnet_opt.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

WEIGHTS = "weights.safetensors"
LABELS = "labels.txt"
CARD = "card.toml"
CHECKPOINT = "checkpoint.pt"

_CACHE_BYTES = 6 << 30
_SETTLE_BATCHES = 64
_PHOTOMETRIC_CHANNELS = np.array([0.299, 0.587, 0.114], np.float32)
# Standard deviations and axes of RGB values over ImageNet (Krizhevsky et al. 2012, section 4.1,
# numbers as in the public reimplementations), on the 0..1 scale.
_LIGHTING_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045], np.float32)
_LIGHTING_AXES = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ],
    np.float32,
)
_HEADS = ("fc.", "aux1.fc2.", "aux2.fc2.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        name: `paper` or `modern`, or a name of the user's own.
        optimizer: `sgd` (with momentum) or `adamw`.
        schedule: `steps`, 4 % down every 8 epochs, or `cosine` down to zero.
        epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate: At the start, or after the warm-up where there is one.
        warmup_epochs: Epochs, also a fraction, in which the learning rate rises from zero.
        momentum: Of SGD.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: Of matrices and filters only, never of biases and batch norm.
        auxiliary_weight: Weight of each auxiliary classifier's loss.
        dropout: Share dropped before the main classifier.
        auxiliary_dropout: Share dropped before each auxiliary classifier.
        label_smoothing: Probability spread over all classes.
        averaging: Decay a step of the running average that becomes the final model.
        min_crop: Least area of a random crop as a share of the picture.
        photometric: Strength of brightness, contrast and saturation changes, 0 for none.
        size: Side of the crops in pixels; None for the side that `Preprocess` crops to.
        early_epochs: Epochs at the start on crops of `early_size`, which cost less.
        early_size: Side of these crops in pixels.
        seed: Of initial weights, order, augmentation and dropout.
        precision: `bf16` computes in bfloat16 where PyTorch's autocast thinks it safe; weights
            and optimizer are float32 either way.
        threads: CPU threads, or None for PyTorch's choice.
    """

    name: str
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["steps", "cosine"] = "steps"
    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 0.01
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    auxiliary_weight: float = 0.3
    dropout: float = 0.4
    auxiliary_dropout: float = 0.7
    label_smoothing: float = 0.0
    averaging: float = 0.999
    min_crop: float = 0.08
    photometric: float = 0.4
    size: int | None = None
    early_epochs: int = 0
    early_size: int = 128
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "fp32"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("steps", "cosine")),
            ("precision", ("bf16", "fp32")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"recipe.{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(allowed)}."
                )
        for name in ("epochs", "batch_size", "early_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"recipe.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("dropout", "auxiliary_dropout", "label_smoothing", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"recipe.{name} is {getattr(self, name)}; it must be at least 0 and below 1."
                )
        if not 0 < self.min_crop <= 1:
            raise ConfigError(f"recipe.min_crop is {self.min_crop}; it must be in (0, 1].")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"recipe.learning_rate is {self.learning_rate}; it must be positive.")

    @classmethod
    def paper(cls, **changes: Any) -> Recipe:
        """The recipe of Szegedy et al. 2014 (arXiv:1409.4842, section 6).

        From the paper: SGD with momentum 0.9, the learning rate 4 % down every 8 epochs, both
        auxiliary losses weighted 0.3, 40 % and 70 % dropout (section 5), Polyak averaging for
        the final model, crops of 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, and
        the photometric distortions of A. Howard, "Some Improvements on Deep Convolutional Neural
        Network Based Image Classification", 2013, arXiv:1312.5402. The paper leaves out learning
        rate and weight decay; ours are those of the published Caffe replication
        (BVLC `models/bvlc_googlenet/quick_solver.prototxt`). The averaging is exponential.

        Args:
            **changes: Other values for attributes.
        """
        return dataclasses.replace(cls(name="paper"), **changes)

    @classmethod
    def modern(cls, **changes: Any) -> Recipe:
        """Nesterov SGD, warm-up and cosine, label smoothing, averaging.

        After T. He et al., "Bag of Tricks for Image Classification with Convolutional Neural
        Networks", 2019, arXiv:1812.01187, sections 3.1 and 5. The auxiliary classifiers keep
        their 0.3.

        Args:
            **changes: Other values for attributes.
        """
        recipe = cls(
            name="modern",
            schedule="cosine",
            learning_rate=0.05,
            warmup_epochs=1.0,
            nesterov=True,
            weight_decay=5e-5,
            dropout=0.2,
            label_smoothing=0.1,
            min_crop=0.25,
        )
        return dataclasses.replace(recipe, **changes)

    def rate(self, epoch: float) -> float:
        """The learning rate at a point of the training, in epochs from its start."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * max(epoch / self.warmup_epochs, 1e-3)
        if self.schedule == "steps":
            return self.learning_rate * 0.96 ** (int(epoch) // 8)
        share = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


RECIPES: Mapping[str, Callable[..., Recipe]] = {"paper": Recipe.paper, "modern": Recipe.modern}
"""The named recipes; each takes changes of single attributes."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch measured.

    Attributes:
        number: From 1.
        loss: Mean training loss, auxiliary losses included.
        accuracy: Top-1 on the augmented training images, 0..1.
        images_per_second: Training speed.
        validation: Top-1 of the averaged weights on the validation set, 0..1, or None.
    """

    number: int
    loss: float
    accuracy: float
    images_per_second: float
    validation: float | None


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
        ConfigError: The checkpoint belongs to another training, or is in the way.
        ModelError: The loss is not a number any more, the checkpoint is broken, or `init` is no
            torchvision GoogLeNet.
    """
    import torch

    classes = _check_sets(images, validation)
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
            state = _Training(images, recipe, preprocess, len(classes), init, progress)
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


def measure(
    module: nn.Module,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    precision: Literal["bf16", "fp32"] = "fp32",
    batch_size: int = 32,
    progress: Progress = silent,
) -> float:
    """Top-1 of a network in eval mode on a labelled set, 0..1."""
    import torch

    labels = images.labels
    if labels is None:
        raise CalibrationError(f"The image set {images.name} has no labels to measure accuracy on.")
    right = 0
    starts = range(0, len(images), batch_size)
    with torch.inference_mode(), _autocast(precision):
        for start in progress(starts, "measuring", len(starts)):
            files = images.files[start : start + batch_size]
            batch = np.stack([preprocess.load(path) for path in files])
            scores = module(torch.from_numpy(batch).to(memory_format=torch.channels_last))
            guesses = scores.argmax(1).tolist()
            right += sum(map(int.__eq__, guesses, labels[start : start + batch_size]))
    return right / len(images)


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
        raise CalibrationError(
            f"The image set {images.name} has no picture of class {missing[0]} "
            f"({classes[missing[0]]}); {len(missing)} of {count} classes are empty. Add pictures, "
            "or take the class out."
        )
    if validation is not None:
        validation.check_labels(count)
        known = set(images.hashes)
        for path, digest in zip(validation.files, validation.hashes, strict=True):
            if digest in known:
                raise CalibrationError(
                    f"{path} of the validation set is a training picture too, so that accuracy "
                    "on it would be too good. Pass sets without common pictures."
                )
    return classes


def _sentence(epoch: Epoch, epochs: int) -> str:
    text = (
        f"Epoch {epoch.number} of {epochs}: loss {epoch.loss:.3f}, training top-1 "
        f"{100 * epoch.accuracy:.1f} %, {epoch.images_per_second:.0f} images/s"
    )
    if epoch.validation is not None:
        text += f", validation top-1 {100 * epoch.validation:.1f} %"
    return text + "."


# --- Pictures -----------------------------------------------------------------------------------


class _Pictures:
    """The training pictures, decoded once and kept in memory as far as they fit."""

    def __init__(self, files: tuple[Path, ...], preprocess: Preprocess, progress: Progress) -> None:
        self._files = files
        self._preprocess = preprocess
        self._kept: dict[int, PixelArray] = {}
        room = _CACHE_BYTES
        # Reading all of them now finds a bad picture before hours of training, not after.
        for index, _ in enumerate(progress(files, "reading pictures", len(files))):
            pixels = self._decode(index)
            room -= pixels.nbytes
            if room >= 0:
                self._kept[index] = pixels

    def __getitem__(self, index: int) -> PixelArray:
        kept = self._kept.get(index)
        return self._decode(index) if kept is None else kept

    def _decode(self, index: int) -> PixelArray:
        path = self._files[index]
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CalibrationError(
                f"{path} cannot be read as a picture ({error}). Remove or replace the file."
            ) from error
        shrink = self._preprocess.resize / min(picture.size)
        if shrink < 1:
            width, height = picture.size
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(picture)


def crop_box(
    rng: np.random.Generator, width: int, height: int, min_area: float
) -> tuple[float, float, float, float]:
    """A random crop: even in area, log-even in aspect ratio from 3/4 to 4/3.

    Args:
        rng: Random numbers.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        min_area: Least area as a share of the picture's.

    Returns:
        Left, top, right and bottom in pixels, inside the picture.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = float(min(width, height))
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def color_change(
    rng: np.random.Generator, strength: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Random brightness, contrast, saturation and light color as one affine map of RGB.

    Howard 2013 (arXiv:1312.5402) applies the first three in random order and adds the lighting
    noise of Krizhevsky et al. 2012. Contrast turns about mid-grey here, not about the picture's
    mean, so that the whole is one matrix.

    Returns:
        `matrix` of shape (3, 3) and `offset` of shape (3,): the pixels x on the 0..255 scale
        become `x @ matrix + offset`.
    """
    matrix = np.eye(3, dtype=np.float32)
    offset = np.zeros(3, np.float32)
    if strength == 0:
        return matrix, offset
    for kind in rng.permutation(3):
        factor = np.float32(rng.uniform(1 - strength, 1 + strength))
        if kind == 0:
            matrix, offset = matrix * factor, offset * factor
        elif kind == 1:
            matrix, offset = matrix * factor, offset * factor + 127.5 * (1 - factor)
        else:
            grey = np.tile(_PHOTOMETRIC_CHANNELS[:, None], (1, 3))
            mix = np.eye(3, dtype=np.float32) * factor + grey * (1 - factor)
            matrix, offset = matrix @ mix, offset @ mix
    lighting = _LIGHTING_AXES @ (rng.normal(0, 0.1, 3).astype(np.float32) * _LIGHTING_DEVIATIONS)
    return matrix.astype(np.float32), (offset + 255 * lighting).astype(np.float32)


def _batch(
    pictures: _Pictures,
    indices: npt.NDArray[np.int64],
    rng: np.random.Generator,
    recipe: Recipe,
    preprocess: Preprocess,
    size: int,
) -> Tensor:
    """Augmented and normalised pictures of shape (N, 3, size, size), channels last in memory."""
    import torch

    pixels = np.empty((len(indices), size, size, 3), np.uint8)
    matrices = np.empty((len(indices), 3, 3), np.float32)
    offsets = np.empty((len(indices), 1, 3), np.float32)
    for row, index in enumerate(indices):
        source = pictures[int(index)]
        box = crop_box(rng, source.shape[1], source.shape[0], recipe.min_crop)
        image = Image.fromarray(source).resize((size, size), Image.Resampling.BILINEAR, box=box)
        cropped = np.asarray(image)
        pixels[row] = cropped[:, ::-1] if rng.random() < 0.5 else cropped
        matrices[row], offsets[row, 0] = color_change(rng, recipe.photometric)
    x = torch.from_numpy(pixels).view(len(indices), size * size, 3).float()
    x = torch.baddbmm(torch.from_numpy(offsets), x, torch.from_numpy(matrices)).clamp_(0, 255)
    if preprocess.channels == "bgr":
        x = x.flip(-1)
    x = (x - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    return x.view(len(indices), size, size, 3).permute(0, 3, 1, 2)


# --- The training itself ------------------------------------------------------------------------


class _Training:
    """Network, averaged network and optimizer, and how they go through an epoch."""

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        preprocess: Preprocess,
        classes: int,
        init: nn.Module | None,
        progress: Progress,
    ) -> None:
        import torch

        self.images = images
        self.recipe = recipe
        self.preprocess = preprocess
        self.progress = progress
        self.epochs: list[Epoch] = []
        self.seconds = 0.0
        self.steps = 0
        self.labels = torch.tensor(images.labels)
        self.pictures = _Pictures(images.files, preprocess, progress)
        torch.manual_seed(recipe.seed)
        self.module = _googlenet(classes, recipe)
        if init is not None:
            _start_from(self.module, init)
        self.average = _googlenet(classes, recipe)
        self.average.load_state_dict(self.module.state_dict())
        self.average.eval()
        self.optimizer = _optimizer(self.module, recipe)

    def run(self, number: int, validation: ImageSet | None) -> Epoch:
        """Train for one epoch and measure the averaged network."""
        import torch

        recipe = self.recipe
        started = time.monotonic()
        # Streams of their own for each epoch: nothing random needs to be kept in a checkpoint.
        rng = np.random.default_rng([recipe.seed, number])
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, number]).generate_state(1)[0]))
        size = recipe.early_size if number < recipe.early_epochs else self._size()
        order = rng.permutation(len(self.images))
        # A short last batch would make batch norm noisy; its pictures have their turn elsewhere.
        batches = max(1, len(order) // recipe.batch_size)
        self.module.train()
        losses, right, seen = 0.0, 0, 0
        label = f"epoch {number + 1} of {recipe.epochs}"
        for step in self.progress(range(batches), label, batches):
            indices = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = _batch(self.pictures, indices, rng, recipe, self.preprocess, size)
            y = self.labels[torch.from_numpy(indices)]
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.rate(number + step / batches)
            loss, scores = self._step(x, y)
            if not math.isfinite(loss):
                raise ModelError(
                    f"The loss is {loss} in epoch {number + 1}, step {step + 1}: the training has "
                    f"diverged. Use a smaller learning rate than {recipe.learning_rate:g}; the "
                    "last good epoch is in the checkpoint."
                )
            losses += loss
            right += int((scores.argmax(1) == y).sum())
            seen += len(indices)
        duration = time.monotonic() - started
        accuracy = None
        if validation is not None:
            accuracy = measure(
                self.average, validation, self.preprocess,
                precision=recipe.precision, progress=self.progress,
            )  # fmt: skip
        self.seconds += time.monotonic() - started
        epoch = Epoch(
            number=number + 1,
            loss=losses / batches,
            accuracy=right / seen,
            images_per_second=seen / duration,
            validation=accuracy,
        )
        self.epochs.append(epoch)
        return epoch

    def _size(self) -> int:
        return self.recipe.size or self.preprocess.crop

    def _step(self, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        from torch.nn.functional import cross_entropy

        recipe = self.recipe
        with _autocast(recipe.precision):
            main, *auxiliary = self.module(x)
        smoothing = recipe.label_smoothing
        loss = cross_entropy(main.float(), y, label_smoothing=smoothing)
        for scores in auxiliary:
            extra = cross_entropy(scores.float(), y, label_smoothing=smoothing)
            loss = loss + recipe.auxiliary_weight * extra
        value = float(loss.detach())
        if math.isfinite(value):
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self._follow()
        return value, main.detach()

    def _follow(self) -> None:
        """Move the averaged weights and batch-norm statistics towards the current ones."""
        import torch

        self.steps += 1
        # Early weights are poor, so the average is short at first and lengthens.
        decay = min(self.recipe.averaging, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            means, values = [], []
            ours, theirs = self.average.state_dict(), self.module.state_dict()
            for key, mean in ours.items():
                if mean.is_floating_point():
                    means.append(mean)
                    values.append(theirs[key])
                else:
                    mean.copy_(theirs[key])
            torch._foreach_lerp_(means, values, 1 - decay)

    def settle(self) -> None:
        """Measure batch norm's statistics anew with the averaged weights.

        The statistics collected on the way belong to other weights, and after a short training
        still hold their initial values. After P. Izmailov et al., "Averaging Weights Leads to
        Wider Optima and Better Generalization", 2018, arXiv:1803.05407, section 3.2.
        """
        import torch

        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, recipe.epochs, _SETTLE_BATCHES])
        order = rng.permutation(len(self.images))
        batches = min(_SETTLE_BATCHES, max(1, len(order) // recipe.batch_size))
        norms = [m for m in self.average.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            # None: a plain mean over all batches, not an exponential one.
            norm.momentum = None
        self.average.train()
        with torch.no_grad():
            for step in self.progress(range(batches), "settling batch norm", batches):
                indices = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
                x = _batch(self.pictures, indices, rng, recipe, self.preprocess, self._size())
                self.average(x)
        self.average.eval()

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        import torch

        torch.save(
            {
                "identity": self._identity(),
                "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
                "seconds": self.seconds,
                "steps": self.steps,
                "module": self.module.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            path,
        )

    def restore(self, path: Path) -> None:
        """Read the checkpoint of the same training."""
        import torch

        try:
            saved = torch.load(path, weights_only=True)
            identity = saved["identity"]
        except (OSError, RuntimeError, KeyError, TypeError, EOFError,
                pickle.UnpicklingError) as error:  # fmt: skip
            raise ModelError(
                f"{path} cannot be read as a checkpoint ({error}). Remove it to start anew."
            ) from error
        for key, value in self._identity().items():
            if identity.get(key) != value:
                raise ConfigError(
                    f"{path} belongs to another training: {key} was {identity.get(key)!r} and is "
                    f"now {value!r}. Use the same images and recipe, or remove the file."
                )
        if len(saved["epochs"]) > self.recipe.epochs:
            raise ConfigError(
                f"{path} is {len(saved['epochs'])} epochs old, and recipe.epochs is "
                f"{self.recipe.epochs}. Ask for at least as many, or remove the file."
            )
        self.module.load_state_dict(saved["module"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epochs = [Epoch(**epoch) for epoch in saved["epochs"]]
        self.seconds = saved["seconds"]
        self.steps = saved["steps"]

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit.

        The number of threads may change, and the number of epochs where the learning rate does
        not depend on it, so that a training can be made longer.
        """
        values = dataclasses.asdict(self.recipe)
        del values["threads"]
        if self.recipe.schedule == "steps":
            del values["epochs"]
        return {
            **{f"recipe.{key}": value for key, value in values.items()},
            "preprocess": json.dumps(self.preprocess.to_dict()),
            "images": self.images.digest,
        }


def _googlenet(classes: int, recipe: Recipe) -> nn.Module:
    import torch
    from torchvision.models import GoogLeNet

    # init_weights=False: PyTorch's own initialisation does as well under batch norm, and the
    # truncated normal distribution takes long.
    module: nn.Module = GoogLeNet(
        num_classes=classes,
        aux_logits=True,
        init_weights=False,
        dropout=recipe.dropout,
        dropout_aux=recipe.auxiliary_dropout,
    )
    return module.to(memory_format=torch.channels_last)


def _start_from(module: nn.Module, init: nn.Module) -> None:
    """Copy the weights of `init`, but for classifiers with another number of classes."""
    weights = dict(init.state_dict())
    own = module.state_dict()
    for key, value in own.items():
        fits = key in weights and weights[key].shape == value.shape
        if fits:
            continue
        if key.startswith(_HEADS) or (key.startswith(("aux1.", "aux2.")) and key not in weights):
            weights[key] = value
            continue
        raise ModelError(
            f"The initial weights are not those of torchvision's GoogLeNet: {key} "
            f"{'has another shape' if key in weights else 'is missing'}. Start from such a "
            "model, or from scratch."
        )
    surplus = sorted(set(weights) - set(own))
    if surplus:
        raise ModelError(
            f"The initial weights are not those of torchvision's GoogLeNet: {surplus[0]} is "
            "surplus. Start from such a model, or from scratch."
        )
    module.load_state_dict(weights)


def _optimizer(module: nn.Module, recipe: Recipe) -> Optimizer:
    import torch

    decayed = [p for p in module.parameters() if p.ndim > 1]
    free = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov
    )


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        yield


# --- What stays ---------------------------------------------------------------------------------


def _finish(
    state: _Training,
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
