"""Training learns, resumes exactly, and says what is wrong with its input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gnet_opt.cards import ModelCard
from gnet_opt.errors import CalibrationError, ConfigError, ModelError
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages.train import train
from gnet_opt.stages.training.pictures import color_change, crop_box
from gnet_opt.stages.training.recipe import RECIPES, Recipe

SMALL = Preprocess(resize=40, crop=32, mean=(127.5,) * 3, std=(127.5,) * 3)
COLORS = {"blue": (30, 40, 200), "green": (20, 180, 40), "red": (210, 30, 30)}


def tiny(**changes: Any) -> Recipe:
    return Recipe.paper(
        **{"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "threads": 1, **changes}
    )


def paint(folder: Path, each: int, seed: int) -> ImageSet:
    """One folder a color, pictures of that color with noise, one of them not square."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            shape = (48, 40, 3) if number == 0 else (40, 40, 3)
            pixels = np.clip(np.array(color) + rng.normal(0, 25, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return ImageSet.open(folder)


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return paint(tmp_path_factory.mktemp("colors"), 8, seed=1)


@pytest.fixture(scope="module")
def other_colors(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return paint(tmp_path_factory.mktemp("other"), 3, seed=2)


def interrupt_after(epoch: int) -> Callable[[str], None]:
    def log(text: str) -> None:
        if text.startswith(f"Epoch {epoch} "):
            raise KeyboardInterrupt

    return log


def test_training_leaves_weights_labels_and_a_card(
    colors: ImageSet, other_colors: ImageSet, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from torchvision.models import GoogLeNet

    said: list[str] = []
    result = train(
        colors, tmp_path / "model", tiny(), validation=other_colors, preprocess=SMALL,
        name='the "colors"', license="CC0-1.0", log=said.append,
    )  # fmt: skip

    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "card.toml",
        "labels.txt",
        "weights.safetensors",
    ]
    card = ModelCard.open(result.card)
    assert (card.name, card.classes, card.labels) == ('the "colors"', 3, ("blue", "green", "red"))
    assert card.preprocess == SMALL
    training = card.extra["training"]
    assert training["images"] == 24
    assert training["images_digest"] == colors.digest
    assert training["validation_top1"] == round(result.top1 or 0, 4)
    assert (training["recipe"], training["epochs"], training["seed"]) == ("paper", 2, 0)
    stored = load_file(result.weights)
    assert str(stored["fc.weight"].dtype) == "torch.float16"
    assert str(stored["conv1.bn.running_var"].dtype) == "torch.float32"
    model = GoogLeNet(num_classes=3, aux_logits=True, init_weights=False)
    model.load_state_dict(stored, strict=True)
    assert [epoch.number for epoch in result.epochs] == [1, 2]
    assert said[0].startswith("Epoch 1 of 2: loss ") and "validation top-1" in said[0]


def test_training_needs_three_planes(colors: ImageSet, tmp_path: Path) -> None:
    gray = Preprocess(resize=40, crop=32, channels="gray")
    with pytest.raises(ConfigError, match=r"preprocess\.channels is gray, but what is trained is"):
        train(colors, tmp_path / "out", tiny(), preprocess=gray)
    assert not (tmp_path / "out").exists()


def test_training_learns(colors: ImageSet, other_colors: ImageSet, tmp_path: Path) -> None:
    recipe = tiny(epochs=5, averaging=0.5, dropout=0.0, auxiliary_dropout=0.0, photometric=0.1)

    result = train(colors, tmp_path, recipe, validation=other_colors, preprocess=SMALL)

    assert result.epochs[-1].loss < result.epochs[0].loss * 0.8
    assert result.validation_images == 9
    assert result.top1 is not None and result.top1 > 0.6


def test_interrupted_training_resumes_to_the_same_weights(colors: ImageSet, tmp_path: Path) -> None:
    whole = train(colors, tmp_path / "whole", tiny(), preprocess=SMALL)
    with pytest.raises(KeyboardInterrupt):
        train(colors, tmp_path / "cut", tiny(), preprocess=SMALL, log=interrupt_after(1))
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoint.pt"]

    said: list[str] = []
    resumed = train(
        colors, tmp_path / "cut", tiny(), preprocess=SMALL, resume=True, log=said.append
    )

    assert said[0] == "Resumed after epoch 1 of 2."
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_checkpoint_in_the_way_or_of_another_training(colors: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(colors, tmp_path, tiny(), preprocess=SMALL, log=interrupt_after(1))

    with pytest.raises(ConfigError, match="left from a training that did not end"):
        train(colors, tmp_path, tiny(), preprocess=SMALL)
    with pytest.raises(ConfigError, match=r"recipe\.seed was 0 and is now 5"):
        train(colors, tmp_path, tiny(seed=5), preprocess=SMALL, resume=True)
    longer = train(colors, tmp_path, tiny(epochs=3), preprocess=SMALL, resume=True)
    assert [epoch.number for epoch in longer.epochs] == [1, 2, 3]
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="cannot be read as a checkpoint"):
        train(colors, tmp_path, tiny(), preprocess=SMALL, resume=True)


def test_other_recipe_other_seed_other_weights(colors: ImageSet, tmp_path: Path) -> None:
    import torch

    state = torch.random.get_rng_state()
    recipe = Recipe.modern(epochs=1, batch_size=12, threads=1, early_epochs=1, early_size=36)
    first = train(colors, tmp_path / "a", recipe, preprocess=SMALL)
    second = train(
        colors, tmp_path / "b", Recipe.modern(epochs=1, batch_size=12, threads=1, seed=1,
                                              optimizer="adamw", precision="bf16"),
        preprocess=SMALL,
    )  # fmt: skip

    assert first.top1 is None
    assert first.weights.read_bytes() != second.weights.read_bytes()
    assert torch.equal(state, torch.random.get_rng_state())


def test_starts_from_a_model_with_other_classes(colors: ImageSet, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from torch import nn
    from torchvision.models import GoogLeNet

    start = GoogLeNet(num_classes=7, aux_logits=True, init_weights=False)
    recipe = tiny(epochs=1, learning_rate=1e-9)
    result = train(colors, tmp_path / "a", recipe, preprocess=SMALL, init=start)

    stored = load_file(result.weights)
    assert stored["fc.weight"].shape == (3, 1024)
    kept = start.state_dict()["conv2.conv.weight"].half()
    assert float((stored["conv2.conv.weight"] - kept).abs().max()) < 1e-4
    without_heads = GoogLeNet(num_classes=3, aux_logits=False, init_weights=False)
    train(colors, tmp_path / "b", recipe, preprocess=SMALL, init=without_heads)
    with pytest.raises(ModelError, match=r"conv1\.conv\.weight is missing"):
        train(colors, tmp_path / "c", recipe, preprocess=SMALL, init=nn.Linear(2, 2))


def test_diverging_training_stops(colors: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"diverged\. Use a smaller learning rate than 1e\+30"):
        train(colors, tmp_path, tiny(learning_rate=1e30), preprocess=SMALL)


def test_unfit_sets_are_named(colors: ImageSet, tmp_path: Path) -> None:
    files, labels = colors.files, colors.labels

    def run(images: ImageSet, validation: ImageSet | None = None) -> None:
        train(images, tmp_path / "out", tiny(), validation=validation, preprocess=SMALL)

    with pytest.raises(CalibrationError, match="s has no labels, and training needs them"):
        run(ImageSet(name="s", files=files))
    with pytest.raises(CalibrationError, match="s has 1 class, and training needs at least 2"):
        run(ImageSet(name="s", files=files[:2], labels=(0, 0)))
    with pytest.raises(CalibrationError, match=r"no picture of class 1 \(b\); 1 of 3 classes"):
        run(ImageSet(name="s", files=files[:2], labels=(0, 2), classes=("a", "b", "c")))
    with pytest.raises(CalibrationError, match=r"of class 0 .* count from 1, subtract 1 from each"):
        run(ImageSet(name="s", files=files[:2], labels=(1, 2)))
    with pytest.raises(CalibrationError, match="validation pictures are training pictures too"):
        run(colors, colors.take([3]))
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:60])
    with pytest.raises(CalibrationError, match=r"broken\.png cannot be read as a picture"):
        run(ImageSet(name="s", files=(broken, files[-1]), labels=(0, 1)))
    assert labels is not None and not (tmp_path / "out" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"recipe\.epochs is 0; it must be at least 1"),
        ({"min_crop": 0.0}, r"recipe\.min_crop is 0\.0; it must be in \(0, 1\]"),
        ({"learning_rate": float("nan")}, r"recipe\.learning_rate is nan; it must be positive"),
        ({"precision": "fp8"}, r"recipe\.precision is 'fp8'; it must be one of bf16, fp32"),
        ({"dropout": 1.0}, r"recipe\.dropout is 1\.0; it must be at least 0 and below 1"),
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.paper(**changes)


def test_learning_rates() -> None:
    paper = RECIPES["paper"](learning_rate=1.0)
    assert [round(paper.rate(epoch), 6) for epoch in (0, 7.99, 8, 16.5)] == [1, 1, 0.96, 0.9216]
    modern = RECIPES["modern"](learning_rate=1.0, epochs=11)
    assert modern.rate(0) == pytest.approx(0.001)
    assert [modern.rate(e) for e in (0.5, 1, 6, 11)] == pytest.approx([0.5, 1, 0.5, 0])


@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    least=st.floats(0.01, 1),
)
def test_crops_stay_inside(seed: int, width: int, height: int, least: float) -> None:
    left, top, right, bottom = crop_box(np.random.default_rng(seed), width, height, least)

    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
    assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6


@given(seed=st.integers(0, 2**32))
def test_color_changes_keep_grey_near_grey(seed: int) -> None:
    rng = np.random.default_rng(seed)
    identity, zero = color_change(rng, 0.0)
    assert np.array_equal(identity, np.eye(3)) and not zero.any()

    matrix, offset = color_change(rng, 0.4)
    assert np.isfinite(matrix).all() and np.isfinite(offset).all()
    # Saturation, brightness and contrast leave grey grey; only the lamp's color may tint it.
    grey = np.full(3, 128, np.float32) @ matrix
    assert np.ptp(grey) < 0.01
