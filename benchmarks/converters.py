"""How each peer's model is made: one function a recipe, run in a process of its own.

`runtimes.py` starts it with the Python of the peer's own environment (`environments.py`), in which
only what the recipe imports has to be there.

    python benchmarks/converters.py versions PACKAGE ...
    python benchmarks/converters.py RECIPE SOURCE OUT

SOURCE is what `runtimes.py` prepared of one network:

    module.pt           the untouched `torch.nn.Module`, pickled
    usual/model.onnx    a plain `torch.onnx.export` of it
    inputs/0000.npy     calibration pictures, float32 of shape (1, 3, height, width)
    crops/0000.png      the same before normalisation, for tools that read pictures
    preprocess.json     their normalisation

OUT gets the files that the runtime loads, and `step.json` with the seconds that it took, imports
left out. Recipes follow what each project documents for post-training quantization, with its
defaults; `quantize_static` and NNCF are asked by `peers.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import peers
from peers import Clock


def torch_module(source: Path, out: Path, clock: Clock) -> None:
    """The module as it is, pickled whole."""
    # A hard link: 28 MB that need not be there twice.
    os.link(source / "module.pt", out / "module.pt")


def torch_int8(source: Path, out: Path, clock: Clock) -> None:
    """PT2E of torchao, X86InductorQuantizer with its default configuration."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
    example = (next(_inputs(source)),)
    with clock.running(), torch.no_grad():
        exported = torch.export.export(_module(source), example).module()
        prepared = prepare_pt2e(exported, quantizer)
        for picture in _inputs(source):
            prepared(picture)
        converted = convert_pt2e(prepared)
        torch.export.save(torch.export.export(converted, example), out / "module.pt2")


def executorch_float(source: Path, out: Path, clock: Clock) -> None:
    """`to_edge_transform_and_lower` with the XNNPACK partitioner."""
    import torch

    example = (next(_inputs(source)),)
    with clock.running(), torch.no_grad():
        _lower(torch.export.export(_module(source), example), out)


def executorch_int8(source: Path, out: Path, clock: Clock) -> None:
    """PT2E of torchao, XNNPACKQuantizer, symmetric, per channel; then the XNNPACK partitioner."""
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = xnnpack_quantizer.XNNPACKQuantizer()
    quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    example = (next(_inputs(source)),)
    with clock.running(), torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(_module(source), example).module(), quantizer)
        for picture in _inputs(source):
            prepared(picture)
        converted = convert_pt2e(prepared)
        _lower(torch.export.export(converted, example), out)


def litert_float(source: Path, out: Path, clock: Clock) -> None:
    """`litert_torch.convert`."""
    import litert_torch

    with clock.running():
        model = litert_torch.convert(_module(source), (next(_inputs(source)),))
        model.export(str(out / "model.tflite"))


def litert_int8(source: Path, out: Path, clock: Clock) -> None:
    """`litert_torch.convert`, then AI Edge Quantizer with its recipe `static_wi8_ai8`."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    litert_float(source, out, clock)
    model = out / "model.tflite"
    runner = Interpreter(str(model)).get_signature_runner()
    (name,) = runner.get_input_details()
    (signature,) = Interpreter(str(model)).get_signature_list()
    with clock.running():
        quantizing = quantizer.Quantizer(str(model), recipe.static_wi8_ai8())
        samples = [{name: picture.numpy()} for picture in _inputs(source)]
        seen = quantizing.calibrate({signature: samples})
        quantizing.quantize(seen).export_model(str(model), overwrite=True)


def ncnn_float(source: Path, out: Path, clock: Clock) -> None:
    """`torch.jit.trace` and pnnx, weights in float32."""
    import pnnx
    import torch

    module, example = _module(source), next(_inputs(source))
    shape = ",".join(map(str, example.shape))
    with clock.running(), torch.no_grad():
        traced = out / "traced.pt"
        trace: Any = torch.jit.trace
        trace(module, example).save(str(traced))
        # By default it keeps the weights in 16 bits: that would be another comparison.
        command = [pnnx.EXEC_PATH, str(traced), f"inputshape=[{shape}]", "fp16=0"]
        command += [f"ncnnparam={out / 'model.param'}", f"ncnnbin={out / 'model.bin'}"]
        subprocess.run(command, check=True, cwd=out, stdout=sys.stderr)
    for path in out.iterdir():
        if path.name not in ("model.param", "model.bin"):
            path.unlink()


def ncnn_int8(source: Path, out: Path, clock: Clock) -> None:
    """pnnx, then ncnn's own `ncnn2table` (kl) and `ncnn2int8`."""
    tools = Path(os.environ["NCNN_TOOLS"])
    ncnn_float(source, out, clock)
    settings = _preprocess(source)
    lines = "\n".join(str(path) for path in sorted((source / "crops").iterdir()))
    (out / "pictures.txt").write_text(lines + "\n", encoding="utf-8")
    shape = next(_inputs(source)).shape
    options = {
        "mean": _listed(settings["mean"]),
        "norm": _listed(1 / value for value in settings["std"]),
        "shape": _listed((shape[3], shape[2], 3)),
        "pixel": settings["channels"].upper(),
        "thread": "2",
        "method": "kl",
    }
    with clock.running():
        command = [str(tools / "ncnn2table"), "model.param", "model.bin", "pictures.txt"]
        command += ["model.table", *(f"{key}={value}" for key, value in options.items())]
        subprocess.run(command, check=True, cwd=out, stdout=sys.stderr)
        command = [str(tools / "ncnn2int8"), "model.param", "model.bin"]
        command += ["int8.param", "int8.bin", "model.table"]
        subprocess.run(command, check=True, cwd=out, stdout=sys.stderr)
    for name in ("param", "bin"):
        (out / f"int8.{name}").replace(out / f"model.{name}")
    for name in ("pictures.txt", "model.table"):
        (out / name).unlink()


def mnn_float(source: Path, out: Path, clock: Clock) -> None:
    """MNN's converter from the plain ONNX export, shapes fixed."""
    # `MNN.tools` would install a package and report home when imported; the same converter lies
    # in a module beside it.
    import _tools

    words = ["mnnconvert", "-f", "ONNX", "--modelFile", source / "usual" / "model.onnx"]
    # Without fixed shapes its quantizer ends in a segmentation fault (3.6.1, KL).
    words += ["--MNNModel", out / "model.mnn", "--bizCode", "benchmark", "--saveStaticModel"]
    with clock.running():
        _tools.mnnconvert([str(word) for word in words])


def mnn_int8(source: Path, out: Path, clock: Clock) -> None:
    """MNN's converter, then its offline quantizer: KL for activations, MAX_ABS for weights."""
    import _tools

    mnn_float(source, out, clock)
    settings = _preprocess(source)
    height, width = next(_inputs(source)).shape[2:]
    asked = {
        "format": settings["channels"].upper(),
        "mean": settings["mean"],
        "normal": [1 / value for value in settings["std"]],
        "width": width,
        "height": height,
        "path": f"{source / 'crops'}/",
        "feature_quantize_method": "KL",
        "weight_quantize_method": "MAX_ABS",
    }
    (out / "model.mnn").rename(out / "float.mnn")
    (out / "quant.json").write_text(json.dumps(asked), encoding="utf-8")
    with clock.running():
        files = (out / "float.mnn", out / "model.mnn", out / "quant.json")
        # A list, as the converter takes it: its own command passes three words, and crashes.
        _tools.mnnquant(["mnnquant", *map(str, files)])
    for name in ("float.mnn", "model.mnn.json", "quant.json"):
        (out / name).unlink()


def openvino_float(source: Path, out: Path, clock: Clock) -> None:
    """`openvino.convert_model` of the plain ONNX export, weights in float32."""
    import openvino

    with clock.running():
        model = openvino.convert_model(source / "usual" / "model.onnx")
        openvino.save_model(model, out / "model.xml", compress_to_fp16=False)


def onnxruntime_float(source: Path, out: Path, clock: Clock) -> None:
    """The plain ONNX export."""
    os.link(source / "usual" / "model.onnx", out / "model.onnx")


def _quantized(recipe: Callable[[peers.Task, Clock], None]) -> Callable[[Path, Path, Clock], None]:
    """A recipe of `peers.py`, from the plain ONNX export."""

    def convert(source: Path, out: Path, clock: Clock) -> None:
        task = peers.Task.open(source / "usual" / "model.onnx", source / "inputs", out)
        recipe(task, clock)

    convert.__doc__ = recipe.__doc__
    return convert


RECIPES: dict[str, Callable[[Path, Path, Clock], None]] = {
    "executorch_float": executorch_float,
    "executorch_int8": executorch_int8,
    "litert_float": litert_float,
    "litert_int8": litert_int8,
    "mnn_float": mnn_float,
    "mnn_int8": mnn_int8,
    "ncnn_float": ncnn_float,
    "ncnn_int8": ncnn_int8,
    "onnxruntime_float": onnxruntime_float,
    "onnxruntime_int8": _quantized(peers.onnxruntime_minmax),
    "openvino_float": openvino_float,
    "openvino_int8": _quantized(peers.nncf_default),
    "torch_int8": torch_int8,
    "torch_module": torch_module,
}


def versions(names: list[str]) -> dict[str, str]:
    """Versions of packages in this environment; those that it lacks are left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _module(source: Path) -> Any:
    """The network, in eval mode."""
    import torch

    # Made by `runtimes.py` itself; a whole module cannot be read otherwise.
    return torch.load(source / "module.pt", weights_only=False).eval()


def _inputs(source: Path) -> Iterator[Any]:
    """The calibration pictures as tensors, one at a time."""
    import torch

    for path in sorted((source / "inputs").glob("*.npy")):
        yield torch.from_numpy(np.load(path))


def _preprocess(source: Path) -> dict[str, Any]:
    return dict(json.loads((source / "preprocess.json").read_text(encoding="utf-8")))


def _listed(values: Any) -> str:
    return f"[{','.join(f'{value:.9g}' for value in values)}]"


def _lower(exported: Any, out: Path) -> None:
    """Write a program for ExecuTorch with all that XNNPACK takes delegated to it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    (out / "model.pte").write_bytes(lowered.to_executorch().buffer)


def main() -> None:
    """Command line, for `runtimes.py`."""
    if sys.argv[1] == "versions":
        print(json.dumps(versions(sys.argv[2:])))
        return
    recipe, source, out = sys.argv[1:]
    clock = Clock()
    RECIPES[recipe](Path(source), Path(out), clock)
    step = {"seconds": clock.seconds}
    (Path(out) / "step.json").write_text(json.dumps(step), encoding="utf-8")


if __name__ == "__main__":
    main()
