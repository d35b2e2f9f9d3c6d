"""What the INT8 candidates of a build share: method, repair and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import networks
from gnet_opt import quantizer
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bench.accuracy import sqnr_db
from gnet_opt.golden import Source
from gnet_opt.images import ImageSet
from gnet_opt.model import Model
from gnet_opt.planning import Options, Plan
from gnet_opt.preprocess import Preprocess
from gnet_opt.progress import silent
from gnet_opt.quantization import METHODS, Recipe, cache, calibrate, equalize, quantize
from gnet_opt.quantizer import Quantizer
from gnet_opt.runtime import run_all
from gnet_opt.search import Verdict, best_method
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module
from gnet_opt.target import Scheme, find

PREPROCESS = Preprocess(resize=72, crop=64)
JETSON = find("jetson")
COUNT = 20


def hostile() -> networks.SmallNet:
    """A network with two channels that are far larger than their neighbours."""
    module = networks.small_net()
    for branch, channel in ((module.inception.branch2, 1), (module.inception.branch3, 0)):
        networks.scale_channels(branch[0], [(branch[1].conv, 0)], [channel], 300.0)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(3)
    for index in range(COUNT):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02}.png")
    return ImageSet.open(folder)


Make = Callable[..., Quantizer]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Model, Path]]:
    folder = tmp_path_factory.mktemp("exported")
    made = {}
    for name, module in (("small", networks.small_net()), ("hostile", hostile())):
        model = from_module(module, preprocess=PREPROCESS)
        prepare(model, networks.pictures(1), folder / f"{name}.onnx")
        made[name] = (model, folder / f"{name}.onnx")
    return made


@pytest.fixture
def make(exported: dict[str, tuple[Model, Path]], images: ImageSet, tmp_path: Path) -> Make:
    def made(name: str = "small", *, images: ImageSet = images, **options: Any) -> Quantizer:
        model, path = exported[name]
        plan = Plan(
            model=model,
            target=JETSON,
            options=Options(threads=1, **options),
            calibration=images,
            evaluation=None,
            golden=Source(kind="drawn", images=None),
            semantics="reference",
            output=tmp_path / "b",
            notes=(),
        )
        return Quantizer(plan, path, tmp_path, silent)

    return made


def loaded(images: ImageSet) -> list[np.ndarray]:
    return [PREPROCESS.load(path) for path in images.files]


def logits(model: Path, images: ImageSet) -> np.ndarray:
    with open_reference(model, 1) as runner:
        return run_all(runner, loaded(images))


def test_a_method_that_the_user_names(
    make: Make, exported: dict[str, tuple[Model, Path]], images: ImageSet, tmp_path: Path
) -> None:
    made = make(method="minmax", weight_search=True, bias_correction=False)
    recipe = Recipe(method="minmax", weight_search=True, bias_correction=False)
    assert made.recipe == recipe
    assert (made.facts, made.notes) == ({}, [])
    facts = made.write(tmp_path / "a.onnx", JETSON.scheme)
    assert facts["calibrate"]["images"] == COUNT
    assert facts["calibrate"]["method"] == "minmax"
    path = exported["small"][1]
    seen = calibrate(path, loaded(images), threads=1)
    quantize(path, tmp_path / "b.onnx", seen, JETSON.scheme, recipe)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_auto_takes_the_method_that_measures_best_on_pictures_held_back(
    make: Make, exported: dict[str, tuple[Model, Path]], images: ImageSet, tmp_path: Path
) -> None:
    made = make(method="auto")
    path = exported["small"][1]
    held = images.take(range(4, COUNT, 5))
    seen = calibrate(path, loaded(images.take([i for i in range(COUNT) if i % 5 != 4])), threads=1)
    before = logits(path, held)
    expected = {}
    for method in METHODS:
        quantize(path, tmp_path / "x.onnx", seen, JETSON.scheme, Recipe(method=method))
        after = logits(tmp_path / "x.onnx", held)
        expected[method] = {
            "agreement": 100.0 * float((before.argmax(1) == after.argmax(1)).mean()),
            "sqnr_db": sqnr_db(before, after),
        }
    found = made.facts["method"]
    assert found["images"] == len(held) == 4
    assert sorted(found["verdicts"]) == sorted(METHODS)
    for method, verdict in expected.items():
        assert found["verdicts"][method] == pytest.approx(verdict)
    assert len({verdict["sqnr_db"] for verdict in expected.values()}) > 1
    chosen = best_method({m: Verdict(**values) for m, values in expected.items()}, 4)
    assert made.recipe.method == found["chosen"] == chosen
    # The final ranges are from all pictures, those that were held back too.
    facts = made.write(tmp_path / "a.onnx", JETSON.scheme)
    assert facts["calibrate"] | {"largest_range_reduction": 0} == {
        "images": COUNT,
        "largest_range_reduction": 0,
        "method": chosen,
        "ranges": facts["calibrate"]["ranges"],
    }
    assert facts["method"] == found
    (note,) = made.notes
    assert note == (
        f"Ranges are chosen by {chosen}: {expected[chosen]['sqnr_db']:.1f} dB on 4 calibration "
        "pictures that were held back."
    )


def test_channels_out_of_line_are_repaired(
    make: Make, exported: dict[str, tuple[Model, Path]], images: ImageSet, tmp_path: Path
) -> None:
    path = exported["hostile"][1]
    made = make("hostile")
    found = made.facts["equalize"]
    assert found["used"]
    assert found["layers"] == ["inception.branch2.0.conv", "inception.branch3.0.conv"]
    assert found["channels"] >= 2
    held = images.take(range(4, COUNT, 5))
    assert found["images"] == len(held) == 4
    assert found["sqnr_db_after"] > found["sqnr_db_before"] + 10
    # Both were fitted without the images that they are scored on, ...
    fit = images.take([i for i in range(COUNT) if i % 5 != 4])
    equalized = tmp_path / "equalized.onnx"
    equalize.equalize(path, equalized, calibrate(path, loaded(fit), threads=1))
    before = logits(path, held)
    for graph, key in ((path, "sqnr_db_before"), (equalized, "sqnr_db_after")):
        seen = calibrate(graph, loaded(fit), threads=1)
        quantize(graph, tmp_path / "scored.onnx", seen, JETSON.scheme)
        measured = sqnr_db(before, logits(tmp_path / "scored.onnx", held))
        assert found[key] == pytest.approx(measured)
    # ... and what ships to all of them.
    made.write(tmp_path / "repaired.onnx", JETSON.scheme)
    seen = calibrate(equalized, loaded(images), threads=1)
    quantize(equalized, tmp_path / "expected.onnx", seen, JETSON.scheme)
    repaired = (tmp_path / "repaired.onnx").read_bytes()
    assert repaired == (tmp_path / "expected.onnx").read_bytes()
    (note,) = made.notes
    assert note.startswith(f"{found['channels']} channels of 2 layers were out of line ")
    assert note.endswith(
        f"INT8 goes from {found['sqnr_db_before']:.1f} to {found['sqnr_db_after']:.1f} dB "
        "on 4 calibration images that were held back."
    )


def test_nothing_is_chosen_where_no_image_can_be_held_back(
    exported: dict[str, tuple[Model, Path]], images: ImageSet, make: Make, tmp_path: Path
) -> None:
    made = make("hostile", images=images.take(range(4)))
    assert len(made.held) == 0
    assert "equalize" not in made.facts
    (note,) = made.notes
    assert "4 calibration images are too few to hold some back" in note
    # A method that needs all images leaves none to hold back, and still works.
    made = make("hostile", images=images.take(range(17)), method="entropy")
    assert len(made.held) == 0
    made.write(tmp_path / "a.onnx", JETSON.scheme)


def test_labels_of_another_model_are_not_used(
    make: Make,
    exported: dict[str, tuple[Model, Path]],
    images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for label, kept in ((4, True), (5, False)):
        made = make(images=replace(images, labels=(0,) * (COUNT - 1) + (label,)))
        assert (made.held.labels is not None) == kept
        assert made.held.files == images.files[4::5]
    model = replace(exported["small"][0], labels=tuple("abcde"))
    monkeypatch.setitem(exported, "small", (model, exported["small"][1]))
    for classes, kept in (((), True), (tuple("abcde"), True), (tuple("bacde"), False)):
        labelled = replace(images, labels=(0,) * COUNT, classes=classes)
        assert (make(images=labelled).held.labels is not None) == kept


def test_a_network_in_line_is_left_alone(make: Make) -> None:
    assert "equalize" not in make().facts


def test_a_repair_that_does_not_help_is_not_used(
    make: Make,
    exported: dict[str, tuple[Model, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = make()
    plain.write(tmp_path / "plain.onnx", JETSON.scheme)
    found = {"channels": 1, "largest_factor": 9.0, "layers": ["stem.conv"]}

    def useless(model: Path, out: Path, statistics: Any) -> dict[str, Any]:
        # Another file with the same function, but a worse one: one channel is made larger.
        module = networks.small_net()
        parts = module.inception
        networks.scale_channels(parts.branch2[0], [(parts.branch2[1].conv, 0)], [1], 300.0)
        prepare(from_module(module, preprocess=PREPROCESS), networks.pictures(1), out)
        return found

    monkeypatch.setattr(equalize, "equalize", useless)
    made = make()
    facts = made.facts["equalize"]
    assert facts.items() >= {**found, "used": False}.items()
    assert facts["sqnr_db_after"] < facts["sqnr_db_before"]
    assert made.notes == []
    made.write(tmp_path / "made.onnx", JETSON.scheme)
    assert (tmp_path / "made.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_one_graph_serves_every_scheme_and_choice_of_float_layers(
    make: Make, tmp_path: Path
) -> None:
    made = make()
    u8 = Scheme(activations="u8", symmetric=False, weight_bits=8)
    kept = frozenset({"fc", "stem.conv"})
    facts = made.write(tmp_path / "mixed.onnx", u8, kept)
    assert facts["quantize"]["float_layers"] == 2
    assert facts["quantize"]["conv"] == 6
    types = {
        tuple(v.dims): v.data_type
        for v in onnx.load(tmp_path / "mixed.onnx").graph.initializer
        if v.name.endswith("zero_point") and not v.dims
    }
    assert types == {(): onnx.TensorProto.UINT8}


def test_costs_are_measured_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    real = quantizer.measure

    def spy(model: Path, statistics: Any, scheme: Scheme, pictures: Any, **more: Any) -> Any:
        counts = {"fitted": statistics.images, "pictures": len(pictures)}
        calls.append({"model": model, "scheme": scheme, **counts, **more})
        return real(model, statistics, scheme, pictures, **more)

    monkeypatch.setattr(quantizer, "measure", spy)
    monkeypatch.setattr(quantizer, "MOST_JUDGES", 3)
    made = make("hostile", method="mse")
    assert calls == []
    costs = made.costs
    assert made.costs is costs
    (call,) = calls
    assert call["model"].name == "equalized.onnx"
    assert call["scheme"] == JETSON.scheme
    assert call["pictures"] == 3
    assert call["fitted"] == COUNT - 4  # to the images that are not held back
    assert call["recipe"] == Recipe(method="mse")
    assert call["jobs"] == 1
    assert {cost.name for cost in costs} >= {"fc", "stem.conv"}


@pytest.mark.parametrize("method", ["lp", "auto"])
@pytest.mark.parametrize("name", ["small", "hostile"])
def test_kept_statistics_give_the_same_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, name: str
) -> None:
    make(name, method=method).write(tmp_path / "plain.onnx", JETSON.scheme)
    folder = tmp_path / "cache"
    make(name, method=method, cache=folder).write(tmp_path / "first.onnx", JETSON.scheme)
    kept = sorted(folder.iterdir())
    # Images to fit with and images held back are kept apart, where something is chosen.
    seen = 2 if method == "auto" or name == "hostile" else 1
    assert len(kept) == seen + (2 if name == "hostile" else 0)  # the repaired graph, too

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pictures were run again")

    monkeypatch.setattr(cache, "calibrate", fail)
    make(name, method=method, cache=folder).write(tmp_path / "second.onnx", JETSON.scheme)
    assert sorted(folder.iterdir()) == kept
    plain = (tmp_path / "plain.onnx").read_bytes()
    assert plain == (tmp_path / "first.onnx").read_bytes()
    assert plain == (tmp_path / "second.onnx").read_bytes()


def test_the_method_is_chosen_on_the_repaired_graph(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, str]] = []
    real = quantizer.quantize

    def spy(model: Path, out: Path, statistics: Any, scheme: Scheme, recipe: Recipe) -> Any:
        tried.append((model.name, recipe.method))
        return real(model, out, statistics, scheme, recipe)

    monkeypatch.setattr(quantizer, "quantize", spy)
    made = make("hostile", method="auto")
    assert made.facts["equalize"]["used"]
    assert tried[-len(METHODS) :] == [("equalized.onnx", method) for method in METHODS]
    verdicts = made.facts["method"]["verdicts"].values()
    assert min(verdict["sqnr_db"] for verdict in verdicts) > 15.0
    facts = made.write(tmp_path / "a.onnx", JETSON.scheme)
    assert facts["calibrate"]["images"] == COUNT
