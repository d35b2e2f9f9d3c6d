from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import networks
from gnet_opt.errors import ModelError
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages.export import trace
from gnet_opt.stages.fold import fold
from gnet_opt.stages.graph import run_graph
from gnet_opt.stages.load import from_module

SMALL = Preprocess(resize=64, crop=64)


class Head(nn.Module):
    """Whatever stands before, as a classifier."""

    def __init__(self, body: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.body(x), 2).mean(2))


def traced(module: nn.Module) -> ir.Model:
    module = networks.make_lively(module)
    return trace(from_module(module, preprocess=SMALL), networks.pictures(1))[0]


def operators(graph: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in graph.graph)


def check(module: nn.Module, folded: int, rewritten: int = 0) -> ir.Model:
    """Fold, and hold the graph against torch in float64."""
    graph = traced(module)
    images = networks.pictures(2)
    facts = fold(graph, images)
    assert facts["batch_norms"] == folded + rewritten
    assert (facts["folded"], facts["rewritten"]) == (folded, rewritten)
    assert facts["images"] == 2
    assert 0 <= facts["max_abs_difference"] <= 1e-4 * facts["logits_range"]
    assert operators(graph)["BatchNormalization"] == 0
    with torch.no_grad():
        expected = module.eval().double()(torch.from_numpy(images).double()).numpy()
    spread = float(expected.max() - expected.min())
    np.testing.assert_allclose(run_graph(graph, images), expected, rtol=0, atol=1e-5 * spread)
    return graph


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_after_a_convolution_is_folded(bias: bool, affine: bool) -> None:
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU()
    )
    check(Head(body), folded=1)


def test_a_grouped_convolution_is_folded() -> None:
    body = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU())
    check(Head(body, 6), folded=1)


def test_two_batch_norms_in_a_row_are_folded() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    check(Head(body), folded=2)


def test_a_dropout_between_is_no_hindrance() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(4))
    check(Head(body), folded=1)


def test_a_batch_norm_after_a_linear_layer_is_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 8)
            self.norm = nn.BatchNorm1d(8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.norm(self.fc(x.amax((2, 3))))))

    check(Net(), folded=1)


def test_a_shared_convolution_is_folded_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.first = nn.BatchNorm2d(4)
            self.second = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((self.first(self.conv(x)), self.second(self.conv(x + 1))), 1)

    check(Head(Net(), 8), folded=2)


def test_a_convolution_that_others_read_keeps_its_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return torch.relu(self.norm(x)) + x

    graph = check(Head(Net()), folded=0, rewritten=1)
    assert operators(graph)["Mul"] == 1


def test_a_batch_norm_without_a_convolution_is_rewritten() -> None:
    body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4))
    check(Head(body), folded=0, rewritten=2)


def test_a_batch_norm_at_the_very_end_keeps_the_output() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.amax((2, 3)))

    graph = check(Net(), folded=0, rewritten=1)
    assert [value.name for value in graph.graph.outputs] == ["logits"]


@pytest.mark.parametrize(
    ("module", "count"),
    [(networks.small_net(), 7), (networks.small_reimplemented_googlenet(), 57)],
    ids=["small", "reimplemented"],
)
def test_networks_of_the_family_are_folded(module: nn.Module, count: int) -> None:
    check(module, folded=count)


def test_nothing_to_fold_is_said() -> None:
    graph = traced(Head(nn.Conv2d(3, 4, 3)))
    assert fold(graph, networks.pictures(1)) == {
        "batch_norms": 0,
        "folded": 0,
        "rewritten": 0,
        "images": 0,
        "max_abs_difference": 0.0,
        "logits_range": None,
    }


def test_batch_statistics_are_refused() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    module = Head(body)
    graph, _ = trace(from_module(module, preprocess=SMALL), networks.pictures(1))
    if "BatchNormalization" not in operators(graph):
        pytest.skip("this torch writes batch statistics as other operators")
    with pytest.raises(ModelError, match="computes its statistics from the batch"):
        fold(graph, networks.pictures(1))


def test_overflow_is_refused() -> None:
    graph = traced(Head(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    initializers = graph.graph.initializers
    for end, number in (("body.1.weight", 3e38), ("body.1.running_var", 1e-12)):
        value = next(value for name, value in initializers.items() if name.endswith(end))
        value.const_value = ir.tensor(np.full(4, number, np.float32), name=value.name)
    with pytest.raises(ModelError, match=r"body\.0\.weight would have values that are not finite"):
        fold(graph, networks.pictures(1))
