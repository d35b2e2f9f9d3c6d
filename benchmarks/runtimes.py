"""The same network in every runtime of its kind: time, memory, size, and agreement with float.

Eager PyTorch, `torch.compile`, ONNX Runtime, OpenVINO, ncnn, MNN, LiteRT and ExecuTorch, each in
float and in INT8 by its own documented quantizer, beside `gnet-opt quantize`, in one run. All start
from the same checkpoint, calibrate on the same pictures and are scored on others that none of them
saw.

Every runtime has a process of its own and, where it needs one, an environment of its own
(`environments.py` makes them; nothing is installed here). They take turns in rounds, with one
thread and with two, and ratios to our INT8 are taken within rounds. What cannot be installed,
converted or run has a row that says why. Where Linux allows it, no peer has a network.

    pip install -e '.[build,openvino]'
    python benchmarks/environments.py
    python benchmarks/runtimes.py
    python benchmarks/tables.py

What is finished is kept in the work folder and not done again while what it was made of stays the
same; times are always measured anew.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import contenders
import converters
import environments
import peers
import runners
import steps
from contenders import Contender
from environments import Environment
from gnet_opt import target
from gnet_opt.bench import accuracy
from gnet_opt.bench.latency import Latency
from gnet_opt.bench.process import Subject
from gnet_opt.bench.session import Plan
from gnet_opt.errors import GnetOptError
from gnet_opt.files import dump_json, sha256_file, write_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import Artifact, FloatArray
from gnet_opt.versions import tools
from processes import once, watch, without_network
from quantizers import chosen, toolkit_digest
from steps import NETWORKS, Network

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS, MEMORY = 900.0, 16e9
"""What making a model may take, memory in bytes, and how long one answer of a process may:
`torch.compile` compiles in its first run."""

_HERE = "gnet_opt.backends:get"
_OUR_COMMAND = "gnet-opt quantize --target cpu --no-cache"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One runtime with one precision.

    Attributes:
        name: In the result file and on the command line.
        label: In the tables.
        precision: `float32` or `int8`.
        runner: A backend of gnet-opt, or a name that `runners.get` knows.
        recipe: Of `converters`, empty for ours.
        environment: Of `environments`, empty for the one that runs this program.
        files: What the runtime loads, the file that it opens first; empty for ours.
    """

    name: str
    label: str
    precision: str
    runner: str
    recipe: str = ""
    environment: str = ""
    files: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether gnet-opt made it."""
        return not self.recipe

    @property
    def described(self) -> str:
        """How it was made, in words."""
        if self.ours:
            return _OUR_COMMAND if self.precision == "int8" else "gnet-opt export"
        return (converters.RECIPES[self.recipe].__doc__ or "").strip()


def _ours(runner: str, label: str) -> tuple[Variant, Variant]:
    float_, int8 = (
        Variant(
            name=f"ours-{runner}-{precision}",
            label=f"gnet-opt, {label}",
            precision=precision,
            runner=runner,
        )
        for precision in ("float32", "int8")
    )
    return float_, int8


def _peer(
    name: str, label: str, quantizer: str, files: tuple[str, ...], environment: str = ""
) -> tuple[Variant, Variant]:
    """A runtime in float, and in what its quantizer makes."""
    float_, int8 = (
        Variant(
            name=f"{name}-{precision}",
            label=label if precision == "float32" else f"{label}, {quantizer}",
            precision=precision,
            runner=name,
            recipe=f"{name}_{short}",
            environment=environment,
            files=files,
        )
        for precision, short in (("float32", "float"), ("int8", "int8"))
    )
    return float_, int8


VARIANTS = (
    *_ours("openvino", "OpenVINO"),
    *_ours("onnxruntime", "ONNX Runtime"),
    Variant(
        name="torch-eager-float32",
        label="PyTorch, eager",
        precision="float32",
        runner="torch-eager",
        recipe="torch_module",
        environment="torch",
        files=("module.pt",),
    ),
    Variant(
        name="torch-compile-float32",
        label="torch.compile",
        precision="float32",
        runner="torch-compile",
        recipe="torch_module",
        environment="torch",
        files=("module.pt",),
    ),
    Variant(
        name="torch-compile-int8",
        label="torch.compile, PT2E",
        precision="int8",
        runner="torch-int8",
        recipe="torch_int8",
        environment="torch",
        files=("module.pt2",),
    ),
    *_peer("onnxruntime", "ONNX Runtime", "quantize_static", ("model.onnx",)),
    *_peer("openvino", "OpenVINO", "NNCF", ("model.xml", "model.bin"), "openvino"),
    *_peer("ncnn", "ncnn", "ncnn2int8", ("model.param", "model.bin"), "ncnn"),
    *_peer("mnn", "MNN", "mnnquant", ("model.mnn",), "mnn"),
    *_peer("litert", "LiteRT", "AI Edge Quantizer", ("model.tflite",), "litert"),
    *_peer("executorch", "ExecuTorch (XNNPACK)", "PT2E", ("model.pte",), "executorch"),
)


class Run:
    """One run of the program: its options, its environments and its work folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._work: Path = options.work.resolve()
        self._tools = tools()
        self._toolkit = toolkit_digest()
        self._variants = [v for v in VARIANTS if not options.only or v.name in options.only]
        self._environments = {
            name: Environment.open(options.environments.resolve(), name)
            for name in environments.REQUIREMENTS
        }
        self._versions = {
            name: _versions(environment)
            for name, environment in self._environments.items()
            if not environment.problem
        }

    def measure(self) -> dict[str, Any]:
        """Do everything, and give what the result file holds."""
        load_before = os.getloadavg()[0]
        networks = {}
        for name in self._options.networks:
            if name == "bvlc" and not (steps.DATA / "bvlc_googlenet.toml").is_file():
                print(f"{steps.DATA} has no bvlc_googlenet.toml: the 2014 original is left out.")
                continue
            networks[name] = self._network(Network.open(name, self._options.at_most))
        if toolkit_digest() != self._toolkit:
            raise SystemExit(
                "The package was changed while it was measured, so these results are of no one "
                "version. Run it again; what is still valid is kept."
            )
        return {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "environments": {
                name: {
                    "problem": environment.problem,
                    "requirements": list(environment.requirements),
                    "versions": self._versions.get(name, {}),
                }
                for name, environment in self._environments.items()
            },
            "load": {"before": load_before, "after": os.getloadavg()[0]},
            "machine": this_machine().to_dict(),
            "network_cut_off": bool(without_network()),
            "networks": networks,
            "schema": "gnet-opt/runtimes/1",
            "toolkit_sha256": self._toolkit,
            "tools": self._tools,
        }

    def _network(self, network: Network) -> dict[str, Any]:
        folder = self._work / network.name
        self._prepare(network, folder)
        if any(variant.ours and variant.precision == "int8" for variant in self._variants):
            self._quantize(network, folder)
        rows = {v.name: self._made(network, v, folder) for v in self._variants}
        ready = [v for v in self._variants if rows[v.name]["status"] == "done"]
        reference = self._reference(network, folder)
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        for variant in ready:
            rows[variant.name] |= self._score(network, variant, folder, reference)
        ready = [v for v in ready if rows[v.name]["status"] == "done"]
        return {
            "calibration": _described(network.calibration),
            "evaluation": _described(network.evaluation),
            "model": network.card.name,
            "ours": self._baseline(),
            "rounds": self._options.rounds,
            "sittings": self._options.sittings,
            "threads": {
                str(threads): self._times(ready, folder, threads, logs)
                for threads in self._options.threads
            },
            "variants": list(rows.values()),
        }

    def _baseline(self) -> str:
        """Our INT8 on the backend that this machine's target ships it with."""
        return f"ours-{target.detect().backend}-int8"

    def _prepare(self, network: Network, folder: Path) -> None:
        """What every peer starts from, and the pictures to score on."""
        folder.mkdir(parents=True, exist_ok=True)
        assert network.card.weights is not None  # both cards have them
        key = {
            "calibration": network.calibration.digest,
            "card": [sha256_file(network.card.path), sha256_file(network.card.weights)],
            "evaluation": network.evaluation.digest,
            "program": [sha256_file(Path(file)) for file in (__file__, steps.__file__)],
            "toolkit": self._toolkit,
            "tools": self._tools,
        }
        _, kept = once(
            folder / "prepared.json",
            key,
            lambda: self._own_step(network.name, folder / "prepare.log"),
            force=self._options.force,
        )
        print(f"{network.name}: exports and inputs {'kept' if kept else 'made'}", flush=True)

    def _own_step(self, name: str, log: Path) -> dict[str, Any]:
        """Prepare in a process of its own; its failure ends the program."""
        command: list[str | Path] = [sys.executable, __file__, "--work", self._work]
        command += ["--prepare", name]
        if self._options.at_most is not None:
            command += ["--at-most", str(self._options.at_most)]
        ended = watch(command, log, timeout=SECONDS, memory=MEMORY)
        if problem := ended.problem(log):
            raise SystemExit(f"Preparing {name} {problem}\nAll that it said is in {log}.")
        return {"seconds": ended.seconds}

    def _quantize(self, network: Network, folder: Path) -> None:
        """Our bundle for this machine; its failure ends the program."""
        out, inputs = folder / "ours-cpu", folder / "inputs"
        key = {
            "calibration": network.calibration.digest,
            "card": sha256_file(network.card.path),
            "toolkit": self._toolkit,
            "tools": self._tools,
        }

        def make() -> dict[str, Any]:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            log = out / "quantize.log"
            command: list[str | Path] = [
                Path(sys.executable).with_name("gnet-opt"),
                *("quantize", network.card.path, "--target", "cpu"),
                *("--calibration", inputs / "pictures"),
                *("--samples", str(len(network.calibration))),
                *("--no-cache", "--output", out / "bundle", "--json", "--force"),
            ]
            ended = watch(command, log, timeout=SECONDS, memory=MEMORY)
            if problem := ended.problem(log):
                raise SystemExit(f"gnet-opt quantize {problem}\nAll that it said is in {log}.")
            shutil.copyfile(out / "bundle" / "model.onnx", out / "model.onnx")
            printed = json.loads(log.with_suffix(".out").read_text(encoding="utf-8"))
            stages = ("calibrate", "quantize")
            return {"seconds": sum(printed["seconds"][stage] for stage in stages)}

        once(out / "quantize.json", key, make, force=self._options.force)

    def _made(self, network: Network, variant: Variant, folder: Path) -> dict[str, Any]:
        """Make a variant's model, now or earlier; why not where that was impossible."""
        row: dict[str, Any] = {
            "label": variant.label,
            "name": variant.name,
            "ours": variant.ours,
            "precision": variant.precision,
            "recipe": variant.described,
            "status": "done",
        }
        if not variant.ours:
            row |= self._converted(network, variant, folder)
        if row["status"] == "done":
            row["bytes"] = sum(path.stat().st_size for _, path in _artifact(variant, folder).files)
        size = f"{row['bytes'] / 1e6:.1f} MB" if "bytes" in row else row["reason"]
        print(f"{network.name}, {variant.name}: {row['status']}, {size}", flush=True)
        return row

    def _converted(self, network: Network, variant: Variant, folder: Path) -> dict[str, Any]:
        if problem := self._missing(variant):
            return {"reason": problem, "status": "not run"}
        out = folder / variant.name
        key = {
            "calibration": network.calibration.digest,
            "ncnn_tools": str(self._options.ncnn_tools),
            "program": _digests(converters, peers),
            "recipe": variant.recipe,
            "source": [sha256_file(folder / name) for name in ("module.pt", "usual/model.onnx")],
            "versions": [self._versions.get(variant.environment), self._tools],
        }

        def make() -> dict[str, Any]:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            log = out / "convert.log"
            command: list[str | Path] = [*without_network(), self._python(variant)]
            command += [converters.__file__, variant.recipe, folder, out]
            extra = {"PYTHONPATH": str(ROOT / "toolkit")}
            if self._options.ncnn_tools:
                extra["NCNN_TOOLS"] = str(self._options.ncnn_tools.resolve())
            ended = watch(command, log, environment=extra, timeout=SECONDS, memory=MEMORY)
            value: dict[str, Any] = {"made_peak_rss_bytes": ended.peak_rss_bytes}
            if problem := ended.problem(log):
                return {**value, "reason": problem, "status": "failed"}
            if missing := [name for name in variant.files if not (out / name).is_file()]:
                reason = f"it left no {', '.join(missing)}; {log.relative_to(self._work)} says more"
                return {**value, "reason": reason, "status": "failed"}
            step = json.loads((out / "step.json").read_text(encoding="utf-8"))
            return {**value, "made_seconds": step["seconds"], "status": "done"}

        value, _ = once(out / "convert.json", key, make, force=self._options.force)
        return value

    def _missing(self, variant: Variant) -> str:
        """What a peer lacks here, empty where it can be tried."""
        if variant.environment and (p := self._environments[variant.environment].problem):
            return p
        if variant.recipe == "ncnn_int8" and not self._options.ncnn_tools:
            return (
                "its package carries no ncnn2table and ncnn2int8: build them from ncnn's source "
                "and name their folder with --ncnn-tools"
            )
        return ""

    def _python(self, variant: Variant) -> Path:
        if not variant.environment:
            return Path(sys.executable)
        return self._environments[variant.environment].python

    def _contender(self, variant: Variant, folder: Path, threads: int) -> Contender:
        resolve = "runners:get" if variant.runner in runners.names() else _HERE
        subject = Subject(name=variant.name, artifact=_artifact(variant, folder), resolve=resolve)
        cache = folder / "inductor" / f"{variant.name}-{threads}"
        return Contender(
            subject=subject,
            python=self._python(variant),
            environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        )

    def _reference(self, network: Network, folder: Path) -> FloatArray:
        """Logits of the float file by reference semantics."""
        model, out = folder / "float" / "model.onnx", folder / "float" / "logits.npy"
        artifact = Artifact(backend="reference", path=model, files=(("onnx", model),))
        contender = Contender(
            subject=Subject(name="float", artifact=artifact, resolve=_HERE),
            python=Path(sys.executable),
            environment={},
        )
        key = {"evaluation": network.evaluation.digest, "model": sha256_file(model)}
        self._logits(contender, key, out)
        result: FloatArray = np.load(out)
        return result

    def _logits(self, contender: Contender, key: Mapping[str, Any], out: Path) -> None:
        """Run the evaluation pictures, now or earlier.

        Raises:
            GnetOptError: It cannot be loaded or run.
        """
        pictures = out.parents[1] / "evaluation.npy"
        whole = {
            **key,
            "program": _digests(contenders, runners),
            "toolkit": self._toolkit,
            "tools": self._tools,
        }

        def make() -> dict[str, Any]:
            log, threads = out.with_suffix(".log"), max(self._options.threads)
            contenders.logits(contender, pictures, out, threads, log, SECONDS)
            return {}

        once(out.with_suffix(".json"), whole, make, force=self._options.force)

    def _score(
        self, network: Network, variant: Variant, folder: Path, reference: FloatArray
    ) -> dict[str, Any]:
        """Accuracy and agreement with float by the runtime's own kernels."""
        contender = self._contender(variant, folder, max(self._options.threads))
        out = folder / variant.name / "logits.npy"
        out.parent.mkdir(exist_ok=True)
        files = [sha256_file(path) for _, path in contender.subject.artifact.files]
        key = {
            "evaluation": network.evaluation.digest,
            "model": files,
            "versions": self._versions.get(variant.environment),
        }
        try:
            self._logits(contender, key, out)
            labels = network.evaluation.labels
            compared = accuracy.compare(reference, np.load(out), labels, semantics="native")
        except GnetOptError as error:
            print(f"{network.name}, {variant.name}: failed, {error}", flush=True)
            return {"reason": str(error), "status": "failed"}
        found = compared.to_dict()
        top1, sqnr = found["quantized"]["top1"], found["sqnr_db"]
        print(
            f"{network.name}, {variant.name}: top-1 {top1:.2f} %, agreement "
            f"{found['agreement']:.1f} %, SQNR {'-' if sqnr is None else f'{sqnr:.1f}'} dB",
            flush=True,
        )
        interval = accuracy.wilson(top1, len(network.evaluation))
        return {"accuracy": {**found, "ci95": list(interval)}}

    def _times(
        self, variants: Sequence[Variant], folder: Path, threads: int, logs: Path
    ) -> dict[str, Any]:
        """All variants side by side with so many threads."""
        # The first start compiles, as on a new device; later ones find what it left.
        shutil.rmtree(folder / "inductor", ignore_errors=True)
        plan = Plan(
            rounds=self._options.sittings,
            turns=self._options.rounds,
            seconds=0.3,
            warm_up=1.0,
            threads=threads,
            timeout=SECONDS,
        )
        done, failed = contenders.measure(
            [self._contender(variant, folder, threads) for variant in variants],
            folder / "picture.npy",
            plan,
            logs,
        )
        results = compared(done, self._baseline())
        for name, row in results.items():
            print(
                f"{folder.name}, {threads} threads, {name}: p50 {row['p50_ms']:.2f} ms, n "
                f"{row['n']}, spread {100 * row['spread']:.0f} %",
                flush=True,
            )
        for name, reason in failed.items():
            print(f"{folder.name}, {threads} threads, {name}: failed, {reason}", flush=True)
        return {"failed": failed, "results": results}


def compared(timed: Mapping[str, Latency], baseline: str) -> dict[str, dict[str, Any]]:
    """Every result with its time as a multiple of the baseline's, where that was measured."""
    base = timed.get(baseline)
    found = {}
    for name, result in timed.items():
        row = contenders.row(result)
        if base is not None:
            row["times_ours"] = contenders.ratios(result.rounds_ms, base.rounds_ms)
        found[name] = row
    return found


def prepare(network: Network, folder: Path) -> None:
    """Write what every peer starts from (see `converters.py`), and the pictures to score on."""
    import torch
    from PIL import Image

    from gnet_opt.stages.load import load

    steps.prepare(network, folder)
    model = load(network.card.path)
    torch.save(model.module, folder / "module.pt")
    settings = model.preprocess
    wanted = {"channels": settings.channels, "mean": settings.mean, "std": settings.std}
    write_text(folder / "preprocess.json", dump_json(wanted))
    shutil.rmtree(folder / "crops", ignore_errors=True)
    (folder / "crops").mkdir()
    for path in sorted((folder / "inputs").glob("*.npy")):
        crop = Image.fromarray(pixels(np.load(path)[0], settings))
        crop.save(folder / "crops" / f"{path.stem}.png")
    pictures = np.stack([settings.load(path) for path in network.evaluation.files])
    np.save(folder / "evaluation.npy", pictures)
    np.save(folder / "picture.npy", pictures[:1])


def pixels(picture: FloatArray, settings: Preprocess) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A preprocessed picture before its normalisation.

    Args:
        picture: float32 of shape (3, height, width), in the network's order of channels.
        settings: How it was normalised.

    Returns:
        RGB, uint8 of shape (height, width, 3).
    """
    shape = (3, 1, 1)
    values = picture * np.reshape(settings.std, shape) + np.reshape(settings.mean, shape)
    found = np.rint(values).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(found if settings.channels == "rgb" else found[..., ::-1])


@functools.cache
def _artifact(variant: Variant, folder: Path) -> Artifact:
    """What the variant's runtime opens. Ours is compiled for it at the first call."""
    if variant.ours:
        out = folder / ("ours-cpu" if variant.precision == "int8" else "float")
        return steps.artifact(out, variant.runner)
    paths = [folder / variant.name / name for name in variant.files]
    files = tuple((path.suffix.lstrip("."), path) for path in paths)
    return Artifact(backend=variant.runner, path=paths[0], files=files)


def _versions(environment: Environment) -> dict[str, str]:
    """The pinned packages of an environment, and the torch that it sees."""
    names = [requirement.partition("==")[0] for requirement in environment.requirements]
    command = [str(environment.python), converters.__file__, "versions", *names, "torch"]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{environment.python} cannot be used: {error}. "
            f"python benchmarks/environments.py {environment.name} makes its environment anew."
        ) from None
    return dict(json.loads(done.stdout))


def _digests(*modules: ModuleType) -> list[str]:
    """SHA-256 of the files of modules."""
    return [sha256_file(Path(str(module.__file__))) for module in modules]


def _described(images: ImageSet) -> dict[str, Any]:
    return {"digest": images.digest, "images": len(images), "set": images.name}


def main() -> None:
    """Command line."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--environments", type=Path, default=environments.FOLDER, metavar="DIR")
    add("--ncnn-tools", type=Path, metavar="DIR", help="folder of ncnn2table and ncnn2int8")
    add("--networks", type=lambda t: chosen(t, NETWORKS), default=("demo",), metavar="A,B")
    add(
        "--only",
        type=lambda text: chosen(text, names),
        default=(),
        metavar="A,B",
        help=f"these variants, of {', '.join(names)}",
    )
    add("--at-most", type=int, metavar="N", help="pictures a set, to try the program")
    add("--threads", type=lambda t: tuple(map(int, t.split(","))), default=(1, 2), metavar="A,B")
    add("--sittings", type=int, default=3, help="with new processes each")
    add("--rounds", type=int, default=3, help="in a sitting")
    add("--force", action="store_true", help="do again what is finished")
    add("--work", type=Path, default=ROOT / "build" / "runtimes")
    add("-o", "--output", type=Path)
    add("--prepare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(Network.open(options.prepare, options.at_most), options.work / options.prepare)
        return
    result = Run(options).measure()
    path = options.output
    if path is None and (options.only or options.at_most or "demo" not in options.networks):
        # What was only tried does not replace a published result.
        path = options.work / "tried.json"
    path = path or RESULTS / f"runtimes-{target.detect().name}.json"
    write_text(path, dump_json(result))
    print(path)


if __name__ == "__main__":
    main()
