from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import S8, SCHEMES, U8, U8_7, Graph, googlenet_like, pictures, run, to_int8
from onnx import numpy_helper

from gnet_opt.errors import CalibrationError, ConfigError
from gnet_opt.quantization import METHODS, Recipe, calibrate, check_enough, quantize, ranges
from gnet_opt.quantization.describe import describe
from gnet_opt.target import Scheme


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("quantize") / "float.onnx")


def sqnr(model: Path, quantized: Path) -> float:
    unseen = pictures(8, seed=1)
    signal = run(model, unseen).astype(np.float64)
    noise = signal - run(quantized, unseen)
    return float(10 * np.log10((signal**2).sum() / (noise**2).sum()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_logits_stay_close(tmp_path: Path, model: Path, scheme: Scheme, method: str) -> None:
    out = tmp_path / "int8.onnx"
    facts = to_int8(model, out, pictures(16), scheme, method=method, threads=1)
    assert sqnr(model, out) > 20.0
    assert facts["calibrate"]["images"] == 16
    assert facts["calibrate"]["method"] == method
    assert facts["quantize"]["conv"] == 14
    assert facts["quantize"]["gemm"] == 1
    assert facts["quantize"]["macs_int8_share"] == 1.0
    assert facts["quantize"]["shared_scales"] == 5  # two Concats, pool3 and the pools of modules


def test_eight_bits_are_closer_than_seven(tmp_path: Path, model: Path) -> None:
    close = {}
    for name, scheme in {"8": U8, "7": U8_7}.items():
        to_int8(model, tmp_path / name, pictures(16), scheme, method="minmax", threads=1)
        close[name] = sqnr(model, tmp_path / name)
    assert close["8"] > close["7"] + 1.0


def test_bias_correction_brings_the_mean_nearer(tmp_path: Path) -> None:
    graph = Graph(seed=3, size=16)
    data = graph.block("input", 32, "a")
    graph.conv(data, 16, "b")
    path = graph.save(tmp_path / "float.onnx", "b_out")
    images = pictures(16, 16)
    expected = run(path, images).mean((0, 2, 3))
    error = {}
    for correct in (True, False):
        out = tmp_path / f"{correct}.onnx"
        to_int8(path, out, images, U8_7, bias_correction=correct, method="minmax", threads=1)
        error[correct] = np.abs(run(out, images).mean((0, 2, 3)) - expected).mean()
    assert error[True] < 0.5 * error[False]


def test_layers_without_a_bias_get_none(tmp_path: Path) -> None:
    graph = Graph(size=16)
    graph.conv(graph.relu(graph.conv("input", 8, "a", bias=False)), 8, "b")
    path = graph.save(tmp_path / "float.onnx", "b_out")
    to_int8(path, tmp_path / "int8.onnx", pictures(2, 16), U8, threads=1)
    inputs = {n.name: len(n.input) for n in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert (inputs["a"], inputs["b"]) == (2, 3)


def test_a_weight_of_two_layers_is_stored_once(tmp_path: Path) -> None:
    graph = Graph(channels=4, size=16)
    graph.conv(graph.relu(graph.conv("input", 4, "a")), 4, "b")
    graph.nodes[-1].input[1] = "a.weight"
    graph.initializers = [value for value in graph.initializers if value.name != "b.weight"]
    path = graph.save(tmp_path / "float.onnx", "b_out")
    images = [image[:1].repeat(4, 0) for image in pictures(4, 16)]
    to_int8(path, tmp_path / "int8.onnx", images, U8, threads=1)
    stored = [
        v.name for v in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(v.dims) == 4
    ]
    assert stored == ["a.weight/quantized"]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_two_runs_give_equal_bytes(tmp_path: Path, model: Path, scheme: Scheme) -> None:
    hashes = set()
    facts = []
    for name in ("a.onnx", "b.onnx"):
        facts.append(to_int8(model, tmp_path / name, pictures(4), scheme, threads=1))
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert facts[0] == facts[1]


def test_weights_are_stored_as_int8(tmp_path: Path, model: Path) -> None:
    to_int8(model, tmp_path / "int8.onnx", pictures(2), U8, threads=1)
    before = {v.name: numpy_helper.to_array(v) for v in onnx.load(model).graph.initializer}
    after = {
        v.name: numpy_helper.to_array(v)
        for v in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    weights = [name for name, values in before.items() if values.ndim > 1]
    assert not set(weights) & set(after)
    for name in weights:
        stored = after[f"{name}/quantized"]
        assert stored.dtype == np.int8
        assert stored.shape == before[name].shape
    floats = sum(values.nbytes for values in after.values() if values.dtype == np.float32)
    assert floats < 0.2 * sum(values.nbytes for values in before.values())


def test_the_float_file_is_not_touched(tmp_path: Path, model: Path) -> None:
    before = model.read_bytes()
    to_int8(model, tmp_path / "int8.onnx", pictures(2), S8, threads=1)
    assert model.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_input_and_output_keep_their_names_and_shapes(tmp_path: Path, model: Path) -> None:
    to_int8(model, tmp_path / "int8.onnx", pictures(2), U8, threads=1)
    one, other = describe(model), describe(tmp_path / "int8.onnx")
    assert one["input"] == other["input"] == "input: FLOAT[1, 3, 32, 32]"
    assert one["output"] == other["output"] == "fc_out: FLOAT[1, 7]"
    assert one["opset"] == other["opset"]
    assert one["macs"] == other["macs"]
    assert one["parameters"] == other["parameters"]
    assert [layer["precision"] for layer in one["layers"]] == ["float"] * 15
    assert [layer["precision"] for layer in other["layers"]] == ["int8"] * 15
    assert [layer["name"] for layer in one["layers"]] == [n["name"] for n in other["layers"]]
    first = one["layers"][0]
    assert (first["macs"], first["weight"]) == (16 * 16 * 16 * 3 * 49, [16, 3, 7, 7])
    floats = {"Relu", "LRN", "MaxPool", "Concat", "GlobalAveragePool", "Flatten", "Conv", "Gemm"}
    kept = {name: count for name, count in other["operators"].items() if name in floats}
    assert kept == one["operators"]


def test_an_unknown_method(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        to_int8(model, tmp_path / "int8.onnx", pictures(1), U8, method="max")
    assert str(caught.value) == (
        "There is no method 'max'; use one of entropy, lp, minmax, mse, percentile."
    )
    assert tuple(sorted([*ranges.BY_HISTOGRAM, "minmax"])) == METHODS


@pytest.mark.parametrize(("method", "least"), [("entropy", 16), ("percentile", 8)])
def test_too_few_pictures_for_a_method(
    tmp_path: Path, model: Path, method: str, least: int
) -> None:
    out = tmp_path / "int8.onnx"
    with pytest.raises(CalibrationError) as caught:
        to_int8(model, out, pictures(least - 1), U8, method=method, threads=1)
    assert str(caught.value) == (
        f"The method {method} needs at least {least} calibration pictures to tell rare values "
        f"from usual ones, and there are {least - 1}. Add pictures, or use --method minmax."
    )
    assert not out.exists()
    to_int8(model, out, pictures(least), U8, method=method, threads=1)
    check_enough(method, least)


@pytest.mark.parametrize("method", ["lp", "minmax", "mse"])
def test_one_picture_is_enough_for_the_other_methods(
    tmp_path: Path, model: Path, method: str
) -> None:
    check_enough(method, 1)
    facts = to_int8(model, tmp_path / "int8.onnx", pictures(1), U8, method=method, threads=1)
    assert facts["calibrate"]["images"] == 1


def test_methods_share_one_calibration(tmp_path: Path, model: Path) -> None:
    seen = calibrate(model, pictures(16), threads=1)
    for method in METHODS:
        alone, shared = tmp_path / f"{method}.onnx", tmp_path / f"{method}-shared.onnx"
        to_int8(model, alone, pictures(16), U8, method=method, threads=1)
        quantize(model, shared, seen, U8, Recipe(method=method))
        assert alone.read_bytes() == shared.read_bytes()


def test_a_recipe_in_a_manifest() -> None:
    assert Recipe(method="mse", keep_float=frozenset({"b", "a"})).to_dict() == {
        "bias_correction": True,
        "keep_float": ["a", "b"],
        "method": "mse",
        "weight_search": False,
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CalibrationError("corrupt")])
def test_an_interruption_leaves_the_old_file(
    tmp_path: Path, model: Path, error: BaseException
) -> None:
    def stream() -> Iterator[np.ndarray]:
        yield pictures(1)[0]
        raise error

    out = tmp_path / "int8.onnx"
    out.write_text("old")
    with pytest.raises(type(error)):
        to_int8(model, out, stream(), U8, threads=1)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_a_result_that_misses_a_condition_is_not_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gnet_opt.errors import ModelError

    monkeypatch.setattr(
        ranges, "affine", lambda *a: ranges.Affine(scale=np.float32(1), zero_point=1, dtype="int8")
    )
    with pytest.raises(ModelError, match="a zero point other than 0"):
        to_int8(model, tmp_path / "int8.onnx", pictures(1), S8, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_tensor_is_quantized_all_the_same(tmp_path: Path) -> None:
    graph = Graph(size=16)
    graph.constant("low", np.float32(-1e9))
    graph.conv("input", 4, "a")
    graph.add("Add", ["a_out", "low"], "dead")
    graph.conv(graph.relu("dead_out"), 4, "b")
    path = graph.save(tmp_path / "float.onnx", "b_out")
    images = pictures(2, 16)
    to_int8(path, tmp_path / "int8.onnx", images, S8, threads=1)
    assert np.allclose(run(tmp_path / "int8.onnx", images), run(path, images), atol=1e-5)


def test_a_concat_with_a_constant_ends_the_sharing(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    extra = graph.constant("extra", np.ones((1, 2, 16, 16), np.float32))
    graph.add("Concat", [data, extra], "cat", axis=1)
    graph.channels["cat_out"] = 6
    graph.conv("cat_out", 4, "after")
    path = graph.save(tmp_path / "f.onnx", "after_out")
    images = [np.random.default_rng(i).normal(size=(3, 16, 16)).astype(np.float32) for i in (0, 1)]
    facts = to_int8(path, tmp_path / "q.onnx", images, U8)
    assert facts["quantize"]["conv"] == 2
    assert facts["quantize"]["macs_int8_share"] == 1.0
    assert facts["quantize"]["shared_scales"] == 0


def test_a_weight_that_is_computed_stays_float_and_counts_as_float(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    first = describe(graph.save(tmp_path / "one.onnx", data))["macs"]
    graph.channels["raw"] = 4
    weight = graph.add("Relu", [graph.constant("raw", np.ones((4, 4, 1, 1), np.float32))], "made")
    graph.add("Conv", [data, weight], "dynamic")
    path = graph.save(tmp_path / "f.onnx", "dynamic_out")
    images = [np.random.default_rng(i).normal(size=(3, 16, 16)).astype(np.float32) for i in (0, 1)]
    facts = to_int8(path, tmp_path / "q.onnx", images, U8)["quantize"]
    assert facts["conv"] == 1
    assert facts["macs"] == first + 4 * 4 * 16 * 16
    assert facts["macs_int8_share"] == pytest.approx(first / facts["macs"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "minmax"])
def test_a_method_without_the_histograms_it_goes_by(
    model: Path, tmp_path: Path, method: str
) -> None:
    seen = calibrate(model, pictures(16), histograms=False)
    quantize(model, tmp_path / "minmax.onnx", seen, U8)
    with pytest.raises(CalibrationError) as caught:
        quantize(model, tmp_path / "other.onnx", seen, U8, Recipe(method=method))
    assert str(caught.value) == (
        f"The method {method} goes by how often values occur, which was not counted. Calibrate "
        "with histograms=True, or use the method minmax."
    )
    assert not (tmp_path / "other.onnx").exists()
