"""The steps of `quantizers.py` that have a process of their own: prepare, score and time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends, paths, target
from gnet_opt.bench import accuracy, latency
from gnet_opt.bench.process import Subject
from gnet_opt.bench.session import Plan
from gnet_opt.cards import ModelCard
from gnet_opt.files import atomic_path
from gnet_opt.images import ImageSet, check_disjoint
from gnet_opt.runtime import Artifact

DATA = Path(os.environ.get("GNET_OPT_DATA", Path(__file__).parents[2] / "shared" / "data"))
NETWORKS = ("bvlc", "demo")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network with its pictures.

    Attributes:
        name: `bvlc` or `demo`.
        card: The model card.
        calibration: What every quantizer calibrates on.
        evaluation: What every result is scored on; no quantizer sees it.
        more: 200 pictures for the second run, of time and memory; None for no such run.
    """

    name: str
    card: ModelCard
    calibration: ImageSet
    evaluation: ImageSet
    more: ImageSet | None

    @classmethod
    def open(cls, name: str, at_most: int | None = None) -> Network:
        """Read the image sets; `at_most` thins each of them out, to try the program."""
        more = None
        if name == "demo":
            card = ModelCard.open(paths.demo_card())
            calibration = ImageSet.open(paths.demo_calibration(), classes=card.labels)
            evaluation = ImageSet.open(paths.demo_evaluation(), classes=card.labels)
        else:
            card = ModelCard.open(DATA / "bvlc_googlenet.toml")
            images = ImageSet.open(DATA / "imagenet-sample", classes=card.labels)
            order = sorted(range(len(images)), key=lambda i: images.files[i].name)
            calibration = images.take(order[::5])
            evaluation = images.take([i for rank, i in enumerate(order) if rank % 5])
            more = images.take([i for rank, i in enumerate(order) if rank % 5 in (0, 2)])
        check_disjoint(calibration, evaluation)
        return cls(
            name=name,
            card=card,
            calibration=thinned(calibration, at_most),
            evaluation=thinned(evaluation, at_most),
            more=more and thinned(more, at_most),
        )


def thinned(images: ImageSet, at_most: int | None) -> ImageSet:
    """At most so many pictures of a set, evenly spread over it."""
    if at_most is None or len(images) <= at_most:
        return images
    return images.take([i * len(images) // at_most for i in range(at_most)])


def prepare(network: Network, folder: Path) -> dict[str, Any]:
    """Write both float files, and the calibration pictures as the quantizers read them.

    `float/model.onnx` is what `gnet-opt export` writes, `usual/model.onnx` a plain
    `torch.onnx.export`; `inputs` and `more` hold preprocessed pictures (see `peers.py`) and a
    folder `pictures` with links to the same files for `gnet-opt quantize`.
    """
    import torch

    from gnet_opt import operations
    from gnet_opt.stages.load import load

    model = load(network.card.path)
    for name, images in (("inputs", network.calibration), ("more", network.more)):
        shutil.rmtree(folder / name, ignore_errors=True)
        if images is None:
            continue
        (folder / name / "pictures").mkdir(parents=True)
        for index, path in enumerate(images.files):
            (folder / name / "pictures" / f"{index:04}{path.suffix}").symlink_to(path.resolve())
            np.save(folder / name / f"{index:04}.npy", model.preprocess.load(path)[None])
        labels = json.dumps(images.labels)
        (folder / name / "labels.json").write_text(labels, encoding="utf-8")
    # A load of its own: what export does to a module is no part of the plain one.
    operations.export(load(network.card.path), folder / "float" / "model.onnx")
    example = torch.from_numpy(np.load(folder / "inputs" / "0000.npy"))
    with atomic_path(folder / "usual" / "model.onnx") as temporary:
        torch.onnx.export(
            model.module,
            (example,),
            temporary,
            dynamo=True,
            external_data=False,
            input_names=["input"],
            verbose=False,
        )
    return {"images": len(network.calibration)}


def score(network: Network, out: Path, runtime: str) -> dict[str, Any]:
    """Run the evaluation pictures through one result, and count its integer convolutions.

    The logits go to `logits-RUNTIME.npy` in `out`.
    """
    opened = artifact(out, runtime)
    assert network.card.preprocess is not None  # both cards have one
    with backends.get(opened.backend).open(opened) as runner:
        logits = accuracy.collect({out.name: runner}, network.evaluation, network.card.preprocess)[
            out.name
        ]
    with atomic_path(out / f"logits-{runtime}.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, logits)
    count = {
        "onnxruntime": _onnxruntime_convolutions,
        "openvino": _openvino_convolutions,
        "reference": _file_convolutions,
    }[opened.backend]
    return {"int8_convolutions": count(opened.path), "images": len(logits)}


def time_all(
    folder: Path, names: Sequence[str], threads: int, sittings: int, rounds: int
) -> dict[str, Any]:
    """Time every result by OpenVINO and, where it is an ONNX file, by ONNX Runtime."""
    subjects = [
        Subject(
            name=f"{name} by {runtime}",
            artifact=artifact(folder / name, runtime),
            resolve="gnet_opt.backends:get",
        )
        for runtime in ("openvino", "onnxruntime")
        for name in names
        if runtime == "openvino" or (folder / name / "model.onnx").is_file()
    ]
    report = latency.measure(
        subjects,
        np.load(folder / "inputs" / "0000.npy"),
        Plan(
            rounds=sittings,
            turns=rounds,
            seconds=0.3,
            count=10,
            warm_up=1.0,
            threads=threads,
            control=False,
        ),
    )
    return {**report.to_dict(), "sittings": sittings}


def artifact(out: Path, runtime: str) -> Artifact:
    """What a runtime opens.

    OpenVINO needs an IR, which is made of the ONNX file where there is none. ONNX Runtime gets a
    peer's file as it is, and from us what our backend makes of ours (it lowers LRN), float too.
    """
    portable = out / "model.onnx"
    backend = backends.get(runtime.removesuffix("-avx2"))
    if backend.name == "openvino" and not portable.is_file():
        return backend.artifact(out)
    ours = out.name == "float" or out.name.startswith("ours-")
    if backend.name == "reference" or (backend.name == "onnxruntime" and not ours):
        return Artifact(backend=backend.name, path=portable, files=(("onnx", portable),))
    folder = out / runtime
    folder.mkdir(exist_ok=True)
    compiled = backend.compile(portable, target.detect(), folder)
    assert isinstance(compiled, Artifact)  # both compile where they are
    return compiled


def convolutions(path: Path) -> int:
    """The number of convolutions of an ONNX file."""
    return len(_convolutions(path))


def _file_convolutions(path: Path) -> int:
    """Convolutions between Q/DQ pairs in the file itself."""
    return sum(row["precision"] == "int8" for row in _convolutions(path))


def _convolutions(path: Path) -> list[dict[str, Any]]:
    from gnet_opt.quantization.describe import describe

    return [row for row in describe(path)["layers"] if row["operator"] == "Conv"]


def _openvino_convolutions(path: Path) -> int:
    """Convolutions of OpenVINO's execution graph that compute in integers."""
    from gnet_opt.telemetry import import_openvino

    core = import_openvino().Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return sum(
        fact["layerType"].astype(str) == "Convolution"
        and fact["runtimePrecision"].astype(str) in ("i8", "u8")
        for fact in facts
    )


def _onnxruntime_convolutions(path: Path) -> int:
    """Convolutions of ONNX Runtime's optimized graph that compute in integers: QLinearConv."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return sum(node.op_type == "QLinearConv" for node in graph.node)
