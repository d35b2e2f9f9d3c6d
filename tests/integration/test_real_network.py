"""A really trained network on real pictures: INT8 keeps its accuracy on every kind of target."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import shared_data
from gnet_opt import pipeline, planning, target
from gnet_opt.images import ImageSet
from gnet_opt.stages.load import load


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "jetson"])
def test_bvlc_keeps_its_accuracy(name: str, tmp_path: Path) -> None:
    data = shared_data()
    images = ImageSet.open(data / "imagenet-sample")
    order = sorted(range(len(images)), key=lambda i: images.files[i].name)
    job = planning.plan(
        load(data / "bvlc_googlenet.toml"),
        target.find(name),
        tmp_path / "bundle",
        calibration=images.take(order[::5]),
        evaluation=images.take([i for rank, i in enumerate(order) if rank % 5]),
    )
    result = pipeline.build(job)
    manifest = result.bundle.manifest
    accuracy = manifest["accuracy"]
    assert accuracy["images"] == 400
    assert accuracy["semantics"] == ("native" if name == "cpu" else "reference")
    assert accuracy["float"]["top1"] == pytest.approx(74.75, abs=0.5)
    assert accuracy["drop"]["value"] <= 1.0
    assert accuracy["agreement"] >= 96.0
    assert accuracy["sqnr_db"] >= 25.0
    assert not result.rejected
    assert manifest["facts"]["quantize"]["conv"] == 57
    assert manifest["facts"]["quantize"]["macs_int8_share"] == 1.0
    assert manifest["facts"]["export"]["operators"]["LRN"] == 2
