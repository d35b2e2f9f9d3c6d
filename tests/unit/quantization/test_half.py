from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Graph, googlenet_like, pictures
from onnx import TensorProto, numpy_helper

from conformance import models
from gnet_opt import paths
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bench.accuracy import sqnr_db
from gnet_opt.errors import ModelError
from gnet_opt.images import ImageSet
from gnet_opt.quantization.describe import describe
from gnet_opt.quantization.half import write_half
from gnet_opt.runtime import run_all


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("half") / "float.onnx")


def run(path: Path, images: list[np.ndarray]) -> np.ndarray:
    with open_reference(path, 1) as runner:
        return run_all(runner, images)


def types(path: Path) -> dict[str, int]:
    """The type of every tensor of a file, constants too."""
    loaded = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    graph = loaded.graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    found |= {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_layers_are_half_and_the_outside_is_not(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    facts = write_half(model, out)
    # Around the input, the LRN node and the logits.
    assert facts == {"half": {"casts": 4, "float32": {"LRN": 1}, "layers": 15}}
    before, after = onnx.load(model).graph, onnx.load(out).graph
    assert [v.name for v in (*after.input, *after.output)] == ["input", before.output[0].name]
    assert (after.input[0].type, after.output[0].type) == (
        before.input[0].type,
        before.output[0].type,
    )
    found = types(out)
    for node in after.node:
        kinds = {found[name] for name in (*node.input, *node.output)}
        if node.op_type == "Cast":
            assert kinds == {TensorProto.FLOAT, TensorProto.FLOAT16}
        else:
            wanted = TensorProto.FLOAT if node.op_type == "LRN" else TensorProto.FLOAT16
            assert kinds == {wanted}, node.name
    assert {tensor.data_type for tensor in after.initializer} == {TensorProto.FLOAT16}
    names = {node.name for node in before.node}
    assert {node.name for node in after.node if node.op_type != "Cast"} == names
    assert out.stat().st_size < 0.7 * model.stat().st_size


def test_logits_stay_close(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    write_half(model, out)
    unseen = pictures(8, seed=1)
    found = sqnr_db(run(model, unseen), run(out, unseen))
    assert found is not None
    assert 55.0 < found < 80.0  # rounded somewhere, and nowhere badly


def test_weights_are_those_of_the_file_to_the_nearest(model: Path, tmp_path: Path) -> None:
    write_half(model, tmp_path / "half.onnx")
    graphs = [onnx.load(path).graph for path in (model, tmp_path / "half.onnx")]
    (before, after) = (
        {t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in graphs
    )
    assert {name.removesuffix("/float16") for name in after} == set(before)
    for name, values in before.items():
        np.testing.assert_array_equal(after[f"{name}/float16"], values.astype(np.float16))


def test_squares_beyond_the_range_of_half_do_no_harm(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.lrn(graph.block("input", 8, "conv"), "norm")
    path = graph.save(tmp_path / "float.onnx", graph.conv(data, 8, "next"))
    images = [4000 * image for image in pictures(4, 16)]
    first = Graph(size=16)
    peak = run(first.save(tmp_path / "first.onnx", first.block("input", 8, "conv")), images).max()
    assert 255.0 < peak < 65504.0
    write_half(path, tmp_path / "half.onnx")
    found = sqnr_db(run(path, images), run(tmp_path / "half.onnx", images))
    assert found is not None
    assert found > 50.0


def test_a_tensor_that_is_read_in_both_types_is_cast_once(tmp_path: Path) -> None:
    graph = Graph(channels=4, size=16)
    data = graph.block("input", 4, "conv")
    norms = [graph.lrn(data, "one"), graph.lrn(data, "two")]
    path = graph.save(tmp_path / "float.onnx", graph.concat([data, *norms], "concat"))
    facts = write_half(path, tmp_path / "half.onnx")
    # Input, the common input of the two LRN nodes, their results, and the output.
    assert facts["half"]["casts"] == 5
    images = [image[:1].repeat(4, 0) for image in pictures(2, 16)]
    found = sqnr_db(run(path, images), run(tmp_path / "half.onnx", images))
    assert found is not None
    assert found > 55.0


def test_a_result_that_stays_float_needs_no_cast(tmp_path: Path) -> None:
    graph = Graph(size=16)
    path = graph.save(tmp_path / "float.onnx", graph.lrn(graph.conv("input", 4, "a"), "norm"))
    assert write_half(path, tmp_path / "half.onnx")["half"]["casts"] == 2
    assert onnx.load(tmp_path / "half.onnx").graph.output[0].name == "norm_out"


def test_a_file_without_the_types_of_its_tensors(model: Path, tmp_path: Path) -> None:
    bare = onnx.load(model)
    del bare.graph.value_info[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    assert write_half(tmp_path / "bare.onnx", tmp_path / "half.onnx")["half"]["casts"] == 4


def test_a_dynamic_batch(tmp_path: Path) -> None:
    path = models.save(models.float_net(batch="batch"), tmp_path / "float.onnx")
    write_half(path, tmp_path / "half.onnx")
    batch = models.pictures(3)
    logits = []
    for file in (path, tmp_path / "half.onnx"):
        with open_reference(file, 1) as runner:
            logits.append(runner.run(batch))
    assert logits[1].shape == (3, models.CLASSES)
    found = sqnr_db(*logits)
    assert found is not None
    assert found > 55.0


def test_equal_files_give_equal_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        write_half(model, tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_a_weight_beyond_the_range(tmp_path: Path) -> None:
    graph = Graph(size=16)
    path = graph.save(tmp_path / "float.onnx", graph.conv("input", 4, "a"))
    loaded = onnx.load(path)
    values = numpy_helper.to_array(loaded.graph.initializer[0]).copy()
    values[0, 0, 0, 0] = -70000.0
    loaded.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "a.weight"))
    onnx.save(loaded, path)
    with pytest.raises(ModelError) as caught:
        write_half(path, tmp_path / "half.onnx")
    assert str(caught.value) == (
        "a.weight has values of up to 70000, and FP16 ends at 65504. Use --precision fp32."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["float.onnx"]


def test_inspect_tells_it(model: Path, tmp_path: Path) -> None:
    write_half(model, tmp_path / "half.onnx")
    layers = describe(tmp_path / "half.onnx")["layers"]
    assert [layer["precision"] for layer in layers] == ["fp16"] * 15


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gnet_opt.stages import prepare
    from gnet_opt.stages.load import load

    loaded = load(None)
    files = ImageSet.open(paths.demo_calibration()).files[:2]
    out = tmp_path_factory.mktemp("demo") / "float.onnx"
    prepare(loaded, np.stack([loaded.preprocess.load(path) for path in files]), out)
    return out


@pytest.mark.slow
def test_the_demo_model(demo: Path, tmp_path: Path) -> None:
    from gnet_opt.stages.load import load

    half = tmp_path / "half.onnx"
    facts = write_half(demo, half)
    assert facts["half"]["layers"] == 58
    preprocess = load(None).preprocess
    images = [
        preprocess.load(path) for path in ImageSet.open(paths.demo_evaluation()).spread(16).files
    ]
    logits = []
    for path in (demo, half):
        with open_reference(path, 1) as runner:
            logits.append(run_all(runner, images))
    found = sqnr_db(*logits)
    assert found is not None
    assert found >= 60.0
