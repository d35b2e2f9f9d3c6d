"""What is promised of the OpenVINO backend beyond the conformance suite."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import onnx
import pytest

from conformance import models
from gnet_opt.backends import openvino as openvino_backend
from gnet_opt.backends.openvino import OpenVinoBackend
from gnet_opt.runtime import INTEGERS, Artifact
from gnet_opt.target import find
from gnet_opt.telemetry import import_openvino

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)
openvino = import_openvino()


def executed(path: Path) -> Counter[tuple[str, str]]:
    """How many layers of each kind run in which precision on this machine."""
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", config)
    found: Counter[tuple[str, str]] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        found[kind, precision] += 1
    return found


@pytest.mark.parametrize("form", ["u8", "s8"])
def test_convolutions_pools_and_concats_run_as_integers(
    form: Literal["u8", "s8"], tmp_path: Path
) -> None:
    net = models.quantize(models.float_net(lrn=False), models.pictures(8), form, weight_bits=7)
    model = models.save(net, tmp_path / "in.onnx")
    OpenVinoBackend().compile(model, find("openvino-cpu"), tmp_path)
    found = executed(tmp_path / "model.xml")
    count = Counter(node.op_type for node in net.graph.node)

    def integer(kind: str) -> int:
        # Behind a ReLU, OpenVINO turns i8 into u8 where the CPU prefers that (AVX2).
        return found[kind, "u8"] + found[kind, "i8"]

    assert integer("Convolution") == count["Conv"] == 14
    assert integer("Pooling") == count["MaxPool"] == 4
    assert integer("Concatenation") == count["Concat"] == 2
    # Requantization happens in front of the first convolution and of the classifier only: the
    # pairs around MaxPool and Concat cost nothing. (With s8 on AVX2 a step joins i8 and u8.)
    steps = ("FakeQuantize", "Subgraph", "Eltwise")
    if form == "u8":
        assert sum(n for (kind, _), n in found.items() if kind in steps) <= 2


def test_float_is_float32_where_the_cpu_has_bfloat16(tmp_path: Path) -> None:
    model = models.save(models.float_net(), tmp_path / "in.onnx")
    backend = OpenVinoBackend()
    artifact = backend.compile(model, find("openvino-cpu"), tmp_path)
    with backend.open(artifact) as runner:
        compiled = runner._request.get_compiled_model()  # type: ignore[attr-defined]
        precisions = {
            node.get_rt_info()["runtimePrecision"].astype(str)
            for node in compiled.get_runtime_model().get_ops()
        }
    assert "f32" in precisions
    assert not precisions & {"bf16", "f16"}


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_honoured(threads: int, tmp_path: Path) -> None:
    model = models.save(models.float_net(), tmp_path / "in.onnx")
    backend = OpenVinoBackend()
    artifact = backend.compile(model, find("openvino-cpu"), tmp_path)
    with backend.open(artifact, threads=threads) as runner:
        compiled = runner._request.get_compiled_model()  # type: ignore[attr-defined]
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert compiled.get_property("NUM_STREAMS") == 1


def test_weights_keep_their_type(tmp_path: Path) -> None:
    net = models.float_net()
    sizes = {}
    for name, proto in {"float": net, "u8": models.quantize(net, models.pictures(4))}.items():
        out = tmp_path / name
        out.mkdir()
        model = models.save(proto, tmp_path / f"{name}.onnx")
        OpenVinoBackend().compile(model, find("openvino-cpu"), out)
        sizes[name] = (out / "model.bin").stat().st_size
    weights = sum(len(t.raw_data) for t in net.graph.initializer)
    assert sizes["float"] >= weights
    assert sizes["u8"] < weights / 2


def test_the_same_network_without_the_undocumented_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = models.quantize(models.float_net(lrn=False), models.pictures(4), weight_bits=7)
    model = models.save(net, tmp_path / "in.onnx")
    backend = OpenVinoBackend()
    results = []
    for blocked in (False, True):
        if blocked:
            monkeypatch.setitem(
                __import__("sys").modules, "openvino._offline_transformations", None
            )
        artifact = backend.compile(model, find("openvino-cpu"), tmp_path)
        assert ["model.xml is larger than usual" in note for note in artifact.notes] == (
            [True] if blocked else []
        )
        with backend.open(artifact, threads=1) as runner:
            results.append(runner.run(models.pictures(1)))
    assert abs(results[0] - results[1]).max() <= 1e-5 * abs(results[0]).max()


def test_nothing_is_reported_home() -> None:
    program = (
        "import sys\n"
        "from gnet_opt.telemetry import import_openvino\n"
        "assert import_openvino().Core().available_devices\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
        "import openvino.tools.ovc as ovc\n"
        "print(type(ovc.telemetry).__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "openvino.tools.ovc.telemetry_stub\n", done.stderr


def quantized(folder: Path, form: Literal["u8", "s8"] = "u8", *, lrn: bool = True) -> Artifact:
    net = models.quantize(models.float_net(lrn=lrn), models.pictures(4), form, weight_bits=7)
    backend = OpenVinoBackend()
    artifact = backend.compile(models.save(net, folder / "in.onnx"), find("openvino-cpu"), folder)
    assert isinstance(artifact, Artifact)
    return artifact


def test_the_profile_is_the_runtime_model(tmp_path: Path) -> None:
    artifact = quantized(tmp_path)
    profile = OpenVinoBackend().profile(artifact, models.pictures(1), threads=1, runs=30)
    said = executed(artifact.path)
    layers = [node for node in profile.nodes if node.kind == "layer"]
    assert len(layers) == 15
    assert Counter((node.operator, node.precision.replace("s8", "i8")) for node in layers) == {
        key: count for key, count in said.items() if key[0] in ("Convolution", "FullyConnected")
    }
    (lrn,) = [node for node in profile.nodes if node.kind == "lrn"]
    assert (lrn.precision, lrn.covers) == ("f32", ("lrn",))
    for node in layers:
        assert node.precision in INTEGERS
        assert node.kernel.lower().endswith("i8")
    # Nothing that does no work, and nothing twice.
    operators = {node.operator for node in profile.nodes}
    assert not operators & {"Const", "Input", "Output"}
    assert len({node.name for node in profile.nodes}) == len(profile.nodes)
    assert (profile.backend, profile.threads, profile.runs) == ("openvino", 1, 30)
    assert profile.version == OpenVinoBackend().probe().version
    assert len(profile.rounds) == 3


class EveryNodeTakesTwo(dict[str, float]):
    """Counters for nodes of any name: those of a small net take less than a microsecond."""

    def get(self, name: str, default: float = 0.0) -> float:  # type: ignore[override]
        return 2.0


def test_what_quantizes_is_told_from_other_elementwise_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = quantized(tmp_path)
    monkeypatch.setattr(openvino_backend, "_counted_round", lambda *_: EveryNodeTakesTwo())
    profile = OpenVinoBackend().profile(artifact, models.pictures(1), threads=1, runs=1)
    quantizers = [node for node in profile.nodes if node.kind == "quantize"]
    # The input, what the LRN gives, and the average that the classifier takes.
    assert {cover for node in quantizers for cover in node.covers} >= {"input_dq", "lrn_dq"}
    assert {node.precision for node in quantizers} == {"f32"}
    assert {node.microseconds for node in profile.nodes} == {2.0}


def test_elementwise_work_in_float_is_no_quantization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = models.float_net()
    net.graph.node[-1].output[0] = "scores"
    for operator, source, result in (("Softmax", "scores", "p"), ("Exp", "p", "logits")):
        net.graph.node.append(onnx.helper.make_node(operator, [source], [result], name=operator))
    backend = OpenVinoBackend()
    target = find("openvino-cpu")
    artifact = backend.compile(models.save(net, tmp_path / "x.onnx"), target, tmp_path)
    monkeypatch.setattr(openvino_backend, "_counted_round", lambda *_: EveryNodeTakesTwo())
    profile = backend.profile(artifact, models.pictures(1), threads=1, runs=1)
    kinds = {node.kind for node in profile.nodes}
    assert {"concat", "elementwise", "layer", "lrn", "pool", "softmax"} <= kinds
    assert "quantize" not in kinds
    assert {node.precision for node in profile.nodes} == {"f32"}


def test_counters_are_means_and_rounds_undo_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up that is slow does not count, though the counters never forget it."""
    durations = {"conv": [900, 30, 20, *[100] * 5, *[120] * 5]}

    class Counting:
        ran = 0

        def __init__(self, compiled: object, path: Path) -> None:
            pass

        def run(self, batch: object) -> None:
            self.ran += 1

        def counters(self) -> dict[str, float]:
            return {name: sum(all_[: self.ran]) / self.ran for name, all_ in durations.items()}

        def close(self) -> None:
            pass

    monkeypatch.setattr(openvino_backend, "_Runner", Counting)
    counted = openvino_backend._counted_round(None, Path("x"), models.pictures(1))
    assert counted == {"conv": pytest.approx(110.0)}


def test_a_profile_keeps_the_layers_that_take_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = quantized(tmp_path)
    monkeypatch.setattr(openvino_backend, "_counted_round", lambda *_: {})
    profile = OpenVinoBackend().profile(artifact, models.pictures(1), threads=1)
    assert {node.kind for node in profile.nodes} == {"layer"}
    assert len(profile.nodes) == 15
    assert profile.rounds == (0,) * 10
