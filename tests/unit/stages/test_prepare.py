from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import networks
from data import shared_data
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module, load

BODY = {"Conv": 57, "Relu": 57, "MaxPool": 13, "Concat": 9, "Gemm": 1}
END = {"GlobalAveragePool": 1, "Flatten": 1}


def test_torchvision_becomes_its_57_convolutions(tmp_path: Path) -> None:
    model = from_module(networks.torchvision_googlenet(10, transform_input=True))
    facts = prepare(model, networks.pictures(1, 224), tmp_path / "a.onnx")
    assert facts["strip"]["modules"] == ["aux1", "aux2"]
    assert facts["strip"]["parameters_unreached"] == 0
    assert facts["fold"]["folded"] == facts["fold"]["batch_norms"] == 57
    assert facts["fold"]["max_abs_difference"] > 0
    assert facts["export"]["operators"] == BODY | END
    names = [node.name for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert "inception3a.branch2.1.conv" in names
    json.dumps(facts, allow_nan=False)


def test_the_reimplementation_keeps_its_lrn_and_both_linear_layers(tmp_path: Path) -> None:
    small = Preprocess(resize=64, crop=64)
    model = from_module(networks.small_reimplemented_googlenet(), preprocess=small)
    facts = prepare(model, networks.pictures(1), tmp_path / "a.onnx")
    assert facts["fold"]["folded"] == 57
    assert facts["export"]["operators"] == BODY | END | {"LRN": 2, "Gemm": 2, "Relu": 58}


@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_the_original_on_real_pictures(tmp_path: Path, batch: Any) -> None:
    model = load(shared_data() / "bvlc_googlenet.toml")
    files = sorted((shared_data() / "imagenet-sample").glob("*.jpg"))[:4]
    images = np.stack([model.preprocess.load(path) for path in files])
    facts = prepare(model, images, tmp_path / "a.onnx", batch=batch)
    assert facts["load"]["name"] == "bvlc-googlenet"
    assert facts["load"]["assumptions"] == []
    assert facts["strip"]["parameters_removed"] == 0
    assert facts["fold"]["batch_norms"] == 0
    assert facts["export"]["operators"] == BODY | END | {"LRN": 2}
    assert facts["export"]["parameters"] == 6_998_552
    assert facts["export"]["images"] == 4
    assert facts["export"]["max_abs_difference"] <= 1e-5 * facts["export"]["logits_range"]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, Any]] = []

    def progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        for item in items:
            told.append((label, item))
            yield item

    small = Preprocess(resize=64, crop=64)
    model = from_module(networks.small_net(), preprocess=small)
    prepare(model, networks.pictures(1), tmp_path / "a.onnx", progress=progress)
    label = "Preparing the float graph"
    assert told == [(label, stage) for stage in ("strip", "trace", "fold", "export")]
