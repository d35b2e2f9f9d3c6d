from __future__ import annotations

import re
from pathlib import Path

import pytest

from data import shared_data
from gnet_opt.cards import ModelCard
from gnet_opt.errors import ConfigError

CARD = """
name = "parts"
architecture = "googlenet"
weights = "parts.safetensors"
classes = 2
labels = "labels.txt"
license = "MIT"
source = "trained here"

[preprocess]
resize = 256
mean = [127.5, 127.5, 127.5]

[training]
epochs = 30
"""


def open_card(folder: Path, text: str) -> ModelCard:
    path = folder / "card.toml"
    path.write_text(text, encoding="utf-8")
    return ModelCard.open(path)


def test_a_card_is_read_with_its_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("nut\nbolt\n\n", encoding="utf-8")
    card = open_card(tmp_path, CARD)
    assert card.name == "parts"
    assert card.architecture == "googlenet"
    assert card.weights == tmp_path / "parts.safetensors"
    assert card.labels == ("nut", "bolt")
    assert card.preprocess is not None
    assert card.preprocess.mean == (127.5, 127.5, 127.5)
    assert card.preprocess.crop == 224
    assert card.transform_input is None
    assert card.extra == {"training": {"epochs": 30}}


def test_labels_can_stand_in_the_card(tmp_path: Path) -> None:
    card = open_card(tmp_path, 'name = "a"\narchitecture = "googlenet"\nlabels = ["nut", "bolt"]\n')
    assert card.labels == ("nut", "bolt")
    assert card.weights is None
    assert card.classes is None


def test_the_shared_card_is_read() -> None:
    card = ModelCard.open(shared_data() / "bvlc_googlenet.toml")
    assert card.architecture == "googlenet-caffe"
    assert card.classes == len(card.labels) == 1000
    assert card.preprocess is not None
    assert card.preprocess.channels == "bgr"


BASE = 'name = "a"\narchitecture = "googlenet"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML: "),
        ('architecture = "googlenet"', 'name is missing. Add a line name = "...".'),
        ('name = "a"', 'architecture is missing. Add a line architecture = "...".'),
        (
            'name = "a"\narchitecture = "resnet"',
            "architecture is 'resnet'; it must be one of googlenet, googlenet-caffe, inception-v3, "
            "bn-inception, module.",
        ),
        (BASE + "lables = []", "lables is not known. Did you mean labels?"),
        (BASE + "zzz = 1", "zzz is not known. The keys are name, architecture, weights,"),
        (BASE + 'classes = "ten"', "classes is 'ten'; it must be an integer."),
        (BASE + "classes = true", "classes is True; it must be an integer."),
        (BASE + "classes = 0", "classes is 0; it must be at least 1."),
        (BASE + "labels = 3", "labels is 3; it must be a string or a list."),
        (BASE + "labels = ['a', 2]", "labels[1] is 2; it must be a string."),
        (BASE + "labels = 'gone.txt'", "gone.txt, which cannot be read"),
        (BASE + "transform_input = 1", "transform_input is 1; it must be a boolean."),
        (BASE + "[preprocess]\nsize = 3", "preprocess.size is not known;"),
        (
            BASE + "[preprocess]\nmean = 'a'",
            "preprocess.mean is 'a'; it must be a list of",
        ),
        (
            BASE + "factory = 'a:b'\nweights = 'a.pth'",
            "weights and factory both say where the weights of 'googlenet' come from.",
        ),
        ('name = "a"\narchitecture = "module"', "architecture 'module' needs a factory, which"),
        (
            'name = "a"\narchitecture = "module"\nfactory = "a:b"\nhead = ["linear"]',
            "head is for networks built here; the factory builds its own.",
        ),
        (BASE + "head = 'linear'", "head is 'linear'; it must be a list."),
        (BASE + "head = ['relu']", "head is ['relu']; it lists the classifier's layers in their"),
        (BASE + "head = ['linear', 3]", "out of linear, batchnorm, relu, leaky_relu, gelu,"),
        (BASE + "output = 1", "output is 1; it must be a string."),
        (
            'name = "a"\narchitecture = "googlenet-caffe"\ntransform_input = true',
            "transform_input belongs to architecture 'googlenet' or 'inception-v3'. Remove it,",
        ),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    pattern = re.escape(str(tmp_path / "card.toml")) + ".*" + re.escape(message)
    with pytest.raises(ConfigError, match=pattern):
        open_card(tmp_path, text)


def test_a_missing_card_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml does not exist\. Pass the path"):
        ModelCard.open(tmp_path / "gone.toml")
