from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import nn

import networks
from gnet_opt.errors import ModelError
from gnet_opt.files import sha256_file
from gnet_opt.model import Model
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages import prepare
from gnet_opt.stages.export import trace, write
from gnet_opt.stages.fold import fold
from gnet_opt.stages.load import from_module

SMALL = Preprocess(resize=64, crop=64)


def as_model(module: nn.Module) -> Model:
    return from_module(networks.make_lively(module), preprocess=SMALL)


def export(module: nn.Module, out: Path, batch: Any = 1) -> tuple[onnx.ModelProto, dict[str, Any]]:
    facts = prepare(as_model(module), networks.pictures(2), out, batch=batch)
    return onnx.load(out), facts["export"]


def operators(proto: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in proto.graph.node)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": images})[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    return path, export(networks.small_net(), path)[1]


def test_the_file_is_plain_and_valid(small: tuple[Path, dict[str, Any]]) -> None:
    path, facts = small
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert operators(proto) == {
        "Conv": 7,
        "Relu": 7,
        "MaxPool": 2,
        "LRN": 1,
        "Concat": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    assert [(i.domain, i.version) for i in proto.opset_import] == [("", 17)]
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    assert not proto.functions
    assert list(path.parent.iterdir()) == [path]
    assert facts["bytes"] == path.stat().st_size
    assert facts["sha256"] == sha256_file(path)
    assert facts["operators"] == dict(operators(proto))
    assert facts["inputs"] == {"input": [1, 3, 64, 64]}
    assert facts["outputs"] == {"logits": [1, 5]}
    json.dumps(facts, allow_nan=False)


def test_every_value_has_a_shape_and_every_weight_a_use(small: tuple[Path, Any]) -> None:
    graph = onnx.load(small[0]).graph
    weights = {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in node.input}
    assert weights == read - {name for node in graph.node for name in node.output} - {"input"}
    described = {value.name: value for value in [*graph.value_info, *graph.output]}
    for node in graph.node:
        for name in node.output:
            dimensions = described[name].type.tensor_type.shape.dim
            assert all(dimension.dim_value > 0 for dimension in dimensions), name
    assert not weights & set(described)


def test_names_come_from_the_network(small: tuple[Path, Any]) -> None:
    graph = onnx.load(small[0]).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert names[:4] == ["stem.conv", "stem.conv.relu", "maxpool_1", "lrn_1"]
    assert names[-1] == "fc"
    assert [tensor.name for tensor in graph.initializer][:2] == [
        "stem.conv.weight",
        "stem.conv.bias",
    ]


def test_nothing_in_the_file_tells_of_the_machine(small: tuple[Path, Any]) -> None:
    proto = onnx.load(small[0])
    content = small[0].read_bytes()
    for trace_of in (b"site-packages", b"/home", b".py", b"stack_trace", b"namespace"):
        assert trace_of not in content
    assert not proto.metadata_props
    assert not proto.graph.metadata_props
    for node in proto.graph.node:
        assert not node.metadata_props
        assert not node.doc_string
    assert (proto.producer_name, proto.producer_version) == ("gnet-opt", "")


def test_parity_is_recorded(small: tuple[Path, dict[str, Any]]) -> None:
    path, facts = small
    images = networks.pictures(2)
    with torch.no_grad():
        expected = networks.small_net()(torch.from_numpy(images)).numpy()
    actual = np.concatenate([run(path, image[None]) for image in images])
    assert facts["images"] == 2
    assert facts["max_abs_difference"] == pytest.approx(np.abs(actual - expected).max(), abs=1e-5)
    assert facts["max_abs_difference"] <= facts["tolerance"] * facts["logits_range"]


def test_two_runs_write_the_same_bytes(small: tuple[Path, Any], tmp_path: Path) -> None:
    # In another process, with other hash seeds, from another folder.
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import networks\n"
        "from pathlib import Path\n"
        "from gnet_opt.preprocess import Preprocess\n"
        "from gnet_opt.stages import prepare\n"
        "from gnet_opt.stages.load import from_module\n"
        "model = from_module(networks.small_net(), preprocess=Preprocess(resize=64, crop=64))\n"
        "prepare(model, networks.pictures(2), Path('again.onnx'))\n"
    )
    tests = Path(networks.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(tests)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "again.onnx").read_bytes() == small[0].read_bytes()
    # And the exporter's chatter is nobody's business.
    assert (result.stdout, result.stderr) == ("", "")


def test_a_dynamic_batch_takes_any_batch(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    proto, facts = export(networks.small_net(), path, batch="dynamic")
    assert facts["batch"] == "dynamic"
    assert facts["inputs"] == {"input": ["batch", 3, 64, 64]}
    assert facts["outputs"] == {"logits": ["batch", 5]}
    assert operators(proto)["Flatten"] == 1
    assert operators(proto)["Reshape"] == 0
    images = networks.pictures(5, seed=3)
    with torch.no_grad():
        expected = networks.small_net()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(path, images), expected, rtol=0, atol=1e-4)


# --- one operator at a time -------------------------------------------------------------------


class Classifier(nn.Module):
    """Some operation on the map, some reduction of it, and some linear layer."""

    def __init__(self, middle: Any = None, reduce: Any = None, fc: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 7, stride=8, padding=3)
        self.middle = middle or nn.Identity()
        self.reduce = reduce or (lambda x: x.mean((2, 3)))
        self.fc = fc or nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.reduce(self.middle(self.conv(x))))


class Functional(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.LocalResponseNorm(5, alpha=0.5, beta=0.5, k=2.0), (5, 0.5, 0.5, 2.0)),
        (nn.LocalResponseNorm(3), (3, 1e-4, 0.75, 1.0)),
        (Functional(lambda x: F.local_response_norm(x, 3, k=2)), (3, 1e-4, 0.75, 2.0)),
        (Functional(lambda x: F.local_response_norm(x, size=5, alpha=1)), (5, 1.0, 0.75, 1.0)),
    ],
)
def test_local_response_norm_is_one_node(norm: nn.Module, expected: Any, tmp_path: Path) -> None:
    proto, _ = export(Classifier(norm), tmp_path / "a.onnx")
    assert operators(proto)["LRN"] == 1
    assert set(operators(proto)) == {"Conv", "LRN", "GlobalAveragePool", "Flatten", "Gemm"}
    found = attributes(next(node for node in proto.graph.node if node.op_type == "LRN"))
    values = (found["size"], found["alpha"], found["beta"], found["bias"])
    assert values == pytest.approx(expected)


def test_an_even_window_means_something_else_in_onnx(tmp_path: Path) -> None:
    norm = nn.LocalResponseNorm(4, alpha=0.5)
    proto, facts = export(Classifier(norm), tmp_path / "a.onnx")
    assert operators(proto)["LRN"] == 0
    assert facts["max_abs_difference"] <= 1e-4 * facts["logits_range"]


@pytest.mark.parametrize(
    "reduce",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), Functional(lambda x: x.view(x.size(0), -1))),
        nn.Sequential(nn.AvgPool2d(8, stride=1), Functional(lambda x: x.reshape(-1, 6))),
        Functional(lambda x: x.mean((2, 3))),
        Functional(lambda x: x.mean((-1, -2), keepdim=True).squeeze(3).squeeze(2)),
        Functional(lambda x: F.avg_pool2d(x, x.size(2)).flatten(1)),
    ],
)
@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_a_mean_over_the_map_is_a_global_pool(reduce: Any, batch: Any, tmp_path: Path) -> None:
    proto, _ = export(Classifier(reduce=reduce), tmp_path / "a.onnx", batch)
    found = operators(proto)
    assert found["GlobalAveragePool"] == 1
    assert found["ReduceMean"] == found["AveragePool"] == 0


def test_a_smaller_average_pool_stays(tmp_path: Path) -> None:
    reduce = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    proto, _ = export(Classifier(reduce=reduce, fc=nn.Linear(24, 3)), tmp_path / "a.onnx")
    assert operators(proto)["AveragePool"] == 1
    assert operators(proto)["GlobalAveragePool"] == 0


class ByMatrix(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 3))
        self.shift = nn.Parameter(torch.randn(3)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.matmul(x, self.matrix)
        return x if self.shift is None else self.shift + x


@pytest.mark.parametrize(
    "fc", [nn.Linear(6, 3), nn.Linear(6, 3, bias=False), ByMatrix(True), ByMatrix(False)]
)
@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_a_linear_layer_is_a_gemm(fc: nn.Module, batch: Any, tmp_path: Path) -> None:
    model = as_model(Classifier(fc=fc))
    facts = prepare(model, networks.pictures(2), tmp_path / "a.onnx", batch=batch)
    assert facts["strip"]["parameters_unreached"] == 0
    proto = onnx.load(tmp_path / "a.onnx")
    assert set(operators(proto)) == {"Conv", "GlobalAveragePool", "Flatten", "Gemm"}
    gemm = proto.graph.node[-1]
    assert attributes(gemm)["transB"] == 1
    assert len(gemm.input) == 1 + len(list(fc.parameters()))
    weight = next(t for t in proto.graph.initializer if t.name == gemm.input[1])
    assert list(weight.dims) == [3, 6]


def test_a_shared_linear_layer_is_transposed_for_each_use(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 6))
            self.out = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(x @ self.matrix) @ self.matrix)

    proto, _ = export(Classifier(fc=Twice()), tmp_path / "a.onnx")
    assert operators(proto)["Gemm"] == 3
    assert operators(proto)["MatMul"] == 0


def test_dropout_and_dead_branches_leave_nothing(tmp_path: Path) -> None:
    model = as_model(networks.SmallNetWithAuxOutputs())
    facts = prepare(model, networks.pictures(1), tmp_path / "a.onnx")
    aux = sum(p.numel() for p in model.module.aux.parameters())
    assert facts["strip"]["parameters_removed"] == 0
    assert facts["strip"]["parameters_unreached"] == aux > 0
    names = [tensor.name for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer]
    assert not [name for name in names if name.startswith("aux")]


# --- what must fail ---------------------------------------------------------------------------


def test_control_flow_on_pixels_is_explained(tmp_path: Path) -> None:
    class Branches(networks.SmallNet):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ModelError) as caught:
        export(Branches(), tmp_path / "a.onnx")
    message = str(caught.value)
    assert message.startswith("torch.onnx.export cannot trace Branches: ")
    assert message.endswith("must not depend on pixel values or on the batch size.")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_from_torch_is_not_written(tmp_path: Path) -> None:
    model = as_model(networks.SmallNet())
    images = networks.pictures(1)
    graph, _ = trace(model, images)
    fold(graph, images)
    # Another network, because the graph shares its memory with the one that was traced.
    model = as_model(networks.SmallNet())
    with torch.no_grad():
        model.module.fc.bias[0] += 1
    with pytest.raises(ModelError) as caught:
        write(graph, model, images, tmp_path / "a.onnx")
    assert re.match(
        r"The ONNX file of SmallNet differs from torch by up to 1\S* on 1 pictures, more than "
        r"0\.0001 of the logits' range of \S+\. It was not written\.",
        str(caught.value),
    )
    assert not list(tmp_path.iterdir())


def test_a_batch_norm_that_was_not_folded_is_refused(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(6)
    model = as_model(Classifier(nn.Sequential(nn.ReLU(), norm)))
    images = networks.pictures(1)
    with pytest.raises(ModelError, match="still has BatchNormalization"):
        write(trace(model, images)[0], model, images, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("examples", "batch", "message"),
    [
        (np.zeros((0, 3, 64, 64), np.float32), 1, r"have the shape \(0, 3, 64, 64\), not \(N, 3,"),
        (np.zeros((3, 64, 64), np.float32), 1, r"have the shape \(3, 64, 64\), not \(N, 3, heig"),
        (np.full((1, 3, 64, 64), np.nan, np.float32), 1, "values that are not finite"),
        (np.zeros((1, 3, 64, 64), np.float32), 2, "The batch is 2; it must be 1 or 'dynamic'"),
    ],
)
def test_prepare_refuses_what_it_cannot_use(
    examples: np.ndarray, batch: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        prepare(as_model(networks.SmallNet()), examples, tmp_path / "a.onnx", batch=batch)
