"""The training itself: epochs, averaged weights, checkpoints, and the measuring between."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gnet_opt.errors import CalibrationError, ConfigError, ModelError
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import Preprocess
from gnet_opt.progress import Progress, silent
from gnet_opt.stages.training.pictures import Pictures, make_batch
from gnet_opt.stages.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_SETTLE_BATCHES = 64
_HEADS = ("fc.", "aux1.fc2.", "aux2.fc2.")


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


class Training:
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
        self.pictures = Pictures(images.files, preprocess, progress)
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
            x = make_batch(self.pictures, indices, rng, recipe, self.preprocess, size)
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
                x = make_batch(self.pictures, indices, rng, recipe, self.preprocess, self._size())
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
