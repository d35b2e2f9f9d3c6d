"""OpenVINO on this machine: our float and INT8 beside what people would otherwise type.

The usual path is `torch.onnx.export`, OpenVINO's converter and `nncf.quantize` with its defaults.
Two networks: torchvision's architecture with seeded random weights (time does not depend on them),
and the 2014 original with its real weights where GNET_OPT_DATA has them.

Every variant is timed alone in a process of its own, in interleaved rounds of several sittings,
each with new processes; ratios are medians over rounds. Run it in an environment with the extra
`peers`:

    pip install -e '.[build,openvino,peers]'
    python benchmarks/openvino_paths.py --threads 1
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/openvino_paths.py --target x86-avx2
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends, paths, target
from gnet_opt.bench import latency
from gnet_opt.bench.process import Subject
from gnet_opt.bench.session import Plan
from gnet_opt.files import dump_json, write_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.model import Model
from gnet_opt.quantization import calibrate, quantize
from gnet_opt.runtime import Artifact
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module, load
from gnet_opt.target import Target
from gnet_opt.telemetry import import_openvino
from gnet_opt.versions import tools

RESULTS = Path(__file__).with_name("results")
DATA = Path(os.environ.get("GNET_OPT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def torchvision_model() -> Model:
    """torchvision's architecture with 1000 classes and seeded random weights."""
    import torch
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
    return from_module(module.eval(), name="torchvision-architecture")


def usual_path(
    model: Model, inputs: list[np.ndarray[Any, Any]], folder: Path
) -> dict[str, Artifact]:
    """`torch.onnx.export`, OpenVINO and `nncf.quantize`, each with its defaults."""
    openvino = import_openvino()
    # NNCF reports home through the same package, and does without it.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf
    import torch

    onnx_file = folder / "usual.onnx"
    example = torch.from_numpy(inputs[0][None])
    torch.onnx.export(model.module, (example,), onnx_file, dynamo=True, verbose=False)
    converted = openvino.convert_model(onnx_file)
    dataset = nncf.Dataset([image[None] for image in inputs])
    quantized = nncf.quantize(converted, dataset, subset_size=len(inputs))
    made = {}
    for name, result in (("usual float", converted), ("usual INT8 (NNCF)", quantized)):
        where = folder / name.replace(" ", "-")
        where.mkdir()
        openvino.save_model(result, where / "model.xml", compress_to_fp16=False)
        made[name] = backends.get("openvino").artifact(where)
    return made


def our_path(
    model: Model, inputs: list[np.ndarray[Any, Any]], folder: Path, device: Target
) -> dict[str, Artifact]:
    """Float and INT8 as `gnet-opt quantize` makes them."""
    float_file, int8_file = folder / "float.onnx", folder / "int8.onnx"
    prepare(model, np.stack(inputs[:4]), float_file)
    seen = calibrate(float_file, inputs, histograms=False)
    quantize(float_file, int8_file, seen, device.scheme)
    made = {}
    for name, file in (("our float", float_file), ("our INT8", int8_file)):
        where = folder / name.replace(" ", "-")
        where.mkdir()
        compiled = backends.get("openvino").compile(file, device, where)
        assert isinstance(compiled, Artifact)
        made[name] = compiled
    return made


def measure(
    model: Model,
    images: ImageSet,
    device: Target,
    count: int,
    threads: int,
    sittings: int,
    rounds: int,
) -> dict[str, Any]:
    """Build every variant of one network and time them side by side."""
    inputs = [model.preprocess.load(path) for path in images.files[:count]]
    with tempfile.TemporaryDirectory() as scratch:
        (ours := Path(scratch) / "ours").mkdir()
        (usual := Path(scratch) / "usual").mkdir()
        variants = {**our_path(model, inputs, ours, device), **usual_path(model, inputs, usual)}
        report = latency.measure(
            [
                Subject(name=name, artifact=artifact, resolve="gnet_opt.backends:get")
                for name, artifact in variants.items()
            ],
            inputs[0][None],
            Plan(
                rounds=sittings,
                turns=rounds,
                seconds=0.4,
                count=10,
                warm_up=1.0,
                threads=threads,
                control=False,
            ),
        )
    medians = {result.name: result.rounds_ms for result in report.results}

    def ratio(slow: str, fast: str) -> dict[str, float]:
        rounds_ = [a / b for a, b in zip(medians[slow], medians[fast], strict=True)]
        return {"high": max(rounds_), "low": min(rounds_), "median": float(np.median(rounds_))}

    return {
        "calibration": {"images": len(inputs), "set": images.name},
        "latency": report.to_dict(),
        "our INT8 against": {
            name: ratio(name, "our INT8") for name in medians if name != "our INT8"
        },
    }


def main() -> None:
    """Measure, write the result file and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sittings", type=int, default=8, help="with new processes each")
    parser.add_argument("--rounds", type=int, default=3, help="in a sitting")
    parser.add_argument("--calibration", type=int, default=100, help="pictures")
    parser.add_argument("--target", default="cpu", help="whose integer form to use")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    networks = {"torchvision architecture": (torchvision_model(), paths.demo_calibration())}
    card = DATA / "bvlc_googlenet.toml"
    if card.is_file():
        networks["LRN original (2014)"] = (load(card), DATA / "imagenet-sample")
    else:
        print(f"{card} is absent: the LRN original is left out.")
    # oneDNN's own variable shows what the same code does on a CPU with fewer instructions.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    device = target.find(options.target)
    result: dict[str, Any] = {
        "kernels": f"limited to {limit}" if limit else device.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "networks": {},
        "machine": this_machine().to_dict(),
        "schema": "gnet-opt/openvino-paths/1",
        "target": device.name,
        "tools": tools() | _nncf(),
    }
    for name, (model, folder) in networks.items():
        images = ImageSet.open(folder)
        measured = measure(
            model,
            images,
            device,
            options.calibration,
            options.threads,
            options.sittings,
            options.rounds,
        )
        result["networks"][name] = measured
        rounds = measured["latency"]["rounds"]
        print(f"{name}, {options.threads} thread(s), n of rounds {rounds}")
        for variant, row in measured["latency"]["results"].items():
            print(f"  {variant:<20} p50 {row['p50_ms']:7.2f} ms  n {row['n']}")
        for variant, row in measured["our INT8 against"].items():
            print(
                f"  our INT8 is {row['median']:.2f} times as fast as {variant} "
                f"[{row['low']:.2f}, {row['high']:.2f}]"
            )
    out = options.output or RESULTS / f"openvino_paths-{result['target']}-{options.threads}t.json"
    write_text(out, dump_json(result))
    print(out)


def _nncf() -> dict[str, str]:
    from importlib.metadata import version

    return {"nncf": version("nncf")}


if __name__ == "__main__":
    main()
