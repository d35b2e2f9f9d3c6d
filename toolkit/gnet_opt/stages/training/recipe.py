"""How to train: every setting in one value, and two named sets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gnet_opt.errors import ConfigError


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
