"""Our quantization beside its peers, from one float file: accuracy, latency, seconds and memory.

ONNX Runtime's `quantize_static` (defaults, and a short list of better recipes), NNCF (defaults, and
with accuracy control), NVIDIA ModelOpt and `gnet-opt quantize` get the same float ONNX file and the
same calibration pictures. What each makes is scored on other pictures: by reference semantics, by
OpenVINO, by OpenVINO limited to AVX2 (which has no VNNI) and by ONNX Runtime. All are timed in
interleaved rounds of several sittings, each with new processes. A second run, with 200 pictures,
measures time and memory alone.

Two networks: the 2014 original where GNET_OPT_DATA has it (every fifth picture in name order to
calibrate, the other 400 to evaluate), and the embedded demo model with its own image sets.

Every step runs in a process of its own. What is finished is kept in the work folder and not done
again while what it was made of stays the same.

    pip install -e '.[build,openvino,peers]'
    python -m venv build/modelopt && build/modelopt/bin/pip install 'nvidia-modelopt[onnx]'
    python benchmarks/quantizers.py --modelopt build/modelopt/bin/python
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gnet_opt
import peers
import steps
from gnet_opt import target
from gnet_opt.bench import accuracy
from gnet_opt.files import dump_json, sha256_file, write_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.versions import tools
from processes import once, watch
from steps import DATA, NETWORKS, Network

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNTIMES = ("reference", "openvino", "openvino-avx2", "onnxruntime")
MODELOPT = "nvidia-modelopt"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to INT8.

    Attributes:
        name: In the result file and on the command line.
        label: In the tables.
        recipe: The function of `peers`, empty for the float model and for ours.
        target: The target of `gnet-opt quantize`, empty for peers.
        usual: Whether it starts from a plain `torch.onnx.export` instead of our float file.
        cost: Whether it takes part in the run with 200 pictures.
    """

    name: str
    label: str
    recipe: str = ""
    target: str = ""
    usual: bool = False
    cost: bool = False

    @property
    def needs(self) -> str:
        """The package without which the peer cannot run; empty for ours and for float."""
        packages = {"modelopt": MODELOPT, "nncf": "nncf", "onnxruntime": "onnxruntime"}
        return packages[self.recipe.partition("_")[0]] if self.recipe else ""

    @property
    def described(self) -> str:
        """How it is asked, in words."""
        if self.target:
            return f"gnet-opt quantize --target {self.target} --no-cache"
        return (peers.RECIPES[self.recipe].__doc__ or "").strip() if self.recipe else ""


def _peer(
    name: str, label: str, recipe: str, *, usual: bool = False, cost: bool = False
) -> Variant:
    return Variant(name=name, label=label, recipe=recipe, usual=usual, cost=cost)


VARIANTS = (
    Variant(name="float", label="float32"),
    _peer("ort-usual", "ONNX Runtime, defaults, plain export", "onnxruntime_default", usual=True),
    _peer("ort-default", "ONNX Runtime, defaults", "onnxruntime_default", cost=True),
    _peer("ort-minmax", "ONNX Runtime, min-max", "onnxruntime_minmax", cost=True),
    _peer("ort-minmax-7bit", "ONNX Runtime, min-max, 7-bit", "onnxruntime_minmax_7"),
    _peer("ort-percentile", "ONNX Runtime, percentile", "onnxruntime_percentile", cost=True),
    _peer("ort-percentile-7bit", "ONNX Runtime, percentile, 7-bit", "onnxruntime_percentile_7"),
    _peer("ort-entropy", "ONNX Runtime, entropy", "onnxruntime_entropy", cost=True),
    _peer("nncf-default", "NNCF, defaults", "nncf_default", cost=True),
    _peer("nncf-accuracy-control", "NNCF, accuracy control", "nncf_accuracy_control"),
    _peer("modelopt-entropy", "ModelOpt, entropy", "modelopt_entropy", cost=True),
    _peer("modelopt-max", "ModelOpt, max", "modelopt_max", cost=True),
    Variant(name="ours-cpu", label="gnet-opt, cpu", target="cpu", cost=True),
    Variant(name="ours-x86-avx2", label="gnet-opt, x86-avx2", target="x86-avx2"),
    Variant(name="ours-jetson", label="gnet-opt, jetson", target="jetson"),
)


class Run:
    """One run of the program: its options, its environments and its work folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._work: Path = options.work.resolve()
        self._tools = tools()
        self._toolkit = toolkit_digest()
        self._program = "".join(
            sha256_file(Path(module)) for module in (__file__, steps.__file__, peers.__file__)
        )
        self._here = _versions(Path(sys.executable))
        self._modelopt = _versions(options.modelopt) if options.modelopt else {}
        self._variants = [v for v in VARIANTS if not options.only or v.name in options.only]

    def measure(self) -> dict[str, Any]:
        """Do everything, and give what the result file holds."""
        networks = {}
        for name in self._options.networks:
            if name == "bvlc" and not (DATA / "bvlc_googlenet.toml").is_file():
                print(f"{DATA} has no bvlc_googlenet.toml: the 2014 original is left out.")
                continue
            networks[name] = self._network(Network.open(name, self._options.at_most))
        if toolkit_digest() != self._toolkit:
            raise SystemExit(
                "The package was changed while it was measured, so these results are of no one "
                "version. Run it again; what is still valid is kept."
            )
        return {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": this_machine().to_dict(),
            "networks": networks,
            "schema": "gnet-opt/quantizers/1",
            "toolkit_sha256": self._toolkit,
            "tools": self._tools | self._here,
            "tools_of_modelopt": self._modelopt,
        }

    def _network(self, network: Network) -> dict[str, Any]:
        folder = self._work / network.name
        self._prepare(network, folder)
        rows = [self._quantize(network, variant, folder) for variant in self._variants]
        done = [row for row in rows if row["status"] == "done"]
        for row in done:
            row |= self._scores(network, row["name"], folder)
        return {
            "calibration": _described(network.calibration),
            "cost": self._cost(network, folder),
            "evaluation": _described(network.evaluation),
            "convolutions": steps.convolutions(folder / "float" / "model.onnx"),
            "float_sha256": sha256_file(folder / "float" / "model.onnx"),
            "latency": self._latency(network, folder, [row["name"] for row in done]),
            "model": network.card.name,
            "variants": rows,
        }

    def _prepare(self, network: Network, folder: Path) -> None:
        """Both float files, and the calibration pictures as the quantizers read them."""
        folder.mkdir(parents=True, exist_ok=True)
        assert network.card.weights is not None  # both cards have them
        key = {
            "calibration": network.calibration.digest,
            "card": [sha256_file(network.card.path), sha256_file(network.card.weights)],
            "more": network.more and network.more.digest,
            "program": self._program,
            "toolkit": self._toolkit,
            "tools": self._tools,
        }
        _, kept = once(
            folder / "prepared.json",
            key,
            lambda: self._own_step("prepare", network.name, folder / "prepare.log"),
            force=False,
        )
        print(f"{network.name}: float files and inputs {'kept' if kept else 'made'}", flush=True)

    def _own_step(self, step: str, argument: str, log: Path, **environment: str) -> dict[str, Any]:
        """Run a step of this program in a process of its own; its failure ends the program."""
        command: list[str | Path] = [sys.executable, __file__, "--work", self._work]
        command += ["--step", step, argument]
        if self._options.at_most is not None:
            command += ["--at-most", str(self._options.at_most)]
        command += ["--threads", str(self._options.threads)]
        command += ["--sittings", str(self._options.sittings)]
        command += ["--rounds", str(self._options.rounds)]
        ended = watch(command, log, timeout=3600, memory=float("inf"), environment=environment)
        if problem := ended.problem(log):
            raise SystemExit(f"{step} {argument} {problem}\nAll that it said is in {log}.")
        printed = log.with_suffix(".out").read_text(encoding="utf-8").splitlines()
        return dict(json.loads(printed[-1]))

    def _quantize(self, network: Network, variant: Variant, folder: Path) -> dict[str, Any]:
        """Make INT8 with the calibration pictures."""
        if variant.name == "float":
            size = (folder / "float" / "model.onnx").stat().st_size
            return {
                "bytes": size,
                "label": variant.label,
                "name": variant.name,
                "recipe": "gnet-opt export",
                "status": "done",
            }
        out, inputs = folder / variant.name, folder / "inputs"
        return self._quantizer(network, variant, network.calibration, inputs, out)

    def _start(self, network: Network, variant: Variant) -> Path:
        return self._work / network.name / ("usual" if variant.usual else "float") / "model.onnx"

    def _versions(self, variant: Variant) -> dict[str, str]:
        return self._modelopt if variant.needs == MODELOPT else self._here

    def _key(self, network: Network, variant: Variant, images: ImageSet) -> dict[str, Any]:
        """Everything that the result of one quantizer depends on."""
        return {
            "calibration": images.digest,
            "float": sha256_file(self._start(network, variant)),
            "limits": [self._options.timeout, self._options.memory],
            "program": self._toolkit if variant.target else sha256_file(Path(peers.__file__)),
            "recipe": variant.described,
            "versions": self._tools if variant.target else self._versions(variant),
        }

    def _quantizer(
        self,
        network: Network,
        variant: Variant,
        images: ImageSet,
        inputs: Path,
        out: Path,
        beside: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """One quantizer with one set of pictures: done now, or kept.

        Args:
            network: The network.
            variant: The quantizer.
            images: The pictures.
            inputs: Where they lie preprocessed.
            out: The folder for the result.
            beside: The keys of those whose time is compared with it. Seconds of another day are
                not to be compared, so a change of one of them makes this one run again.
        """
        row: dict[str, Any] = {
            "images": len(images),
            "label": variant.label,
            "name": variant.name,
            "recipe": variant.described,
        }
        if variant.needs and variant.needs not in self._versions(variant):
            row |= {"reason": f"{variant.needs} is not installed", "status": "not run"}
            kept = False
        else:
            key = self._key(network, variant, images)
            if beside:
                key["beside"] = list(beside)
            value, kept = once(
                out / "quantize.json",
                key,
                lambda: self._run_quantizer(network, variant, images, inputs, out),
                force=self._options.force,
            )
            row |= value
        if row["status"] == "done":
            memory = row["peak_rss_bytes"]
            text = f"{row['seconds']:.1f} s (the whole process {row['process_seconds']:.1f}), "
            text += "memory not known" if memory is None else f"{memory / 1e9:.2f} GB"
        else:
            text = f"{row['status']}: {row['reason']}"
        print(
            f"{network.name}, {variant.name}, {len(images)} pictures: {text}"
            f"{' (kept)' if kept else ''}",
            flush=True,
        )
        return row

    def _run_quantizer(
        self,
        network: Network,
        variant: Variant,
        images: ImageSet,
        inputs: Path,
        out: Path,
    ) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        log = out / "quantize.log"
        if variant.target:
            # No evaluation pictures: as with the peers, what is made depends on none of them. No
            # cache: statistics from an earlier run would be time that is not measured.
            command: list[str | Path] = [
                Path(sys.executable).with_name("gnet-opt"),
                *("quantize", network.card.path, "--target", variant.target),
                *("--calibration", inputs / "pictures", "--samples", str(len(images))),
                *("--no-cache", "--output", out / "bundle", "--json", "--force"),
            ]
        else:
            python = self._options.modelopt if variant.needs == MODELOPT else sys.executable
            start = self._start(network, variant)
            command = [python, peers.__file__, variant.recipe, start, inputs, out]
        limits = {"memory": self._options.memory * 1e9, "timeout": self._options.timeout}
        ended = watch(command, log, **limits)
        value: dict[str, Any] = {
            "peak_rss_bytes": ended.peak_rss_bytes,
            "process_seconds": ended.seconds,
        }
        if problem := ended.problem(log):
            return {**value, "reason": problem, "status": "failed"}
        if variant.target:
            printed = json.loads(log.with_suffix(".out").read_text(encoding="utf-8"))
            shutil.copyfile(out / "bundle" / "model.onnx", out / "model.onnx")
            value["seconds"] = sum(printed["seconds"][stage] for stage in ("calibrate", "quantize"))
            value["stages"] = printed["seconds"]
            value["target"] = printed["manifest"]["target"]["name"]
        else:
            value |= json.loads((out / "step.json").read_text(encoding="utf-8"))
        value["bytes"] = sum(file.stat().st_size for file in _model_files(out))
        return {**value, "status": "done"}

    def _scores(self, network: Network, name: str, folder: Path) -> dict[str, Any]:
        """Accuracy and integer convolutions by every runtime that can run the result."""
        out = folder / name
        measured: dict[str, Any] = {}
        convolutions: dict[str, Any] = {}
        for runtime in runtimes(out, this_machine().architecture):
            convolutions[runtime] = self._score(network, out, runtime)["int8_convolutions"]
            # One float model for all: reference semantics of the float file.
            compared = accuracy.compare(
                np.load(folder / "float" / "logits-reference.npy"),
                np.load(out / f"logits-{runtime}.npy"),
                network.evaluation.labels,
                semantics="reference" if runtime == "reference" else "native",
            ).to_dict()
            top1, sqnr = compared["quantized"]["top1"], compared["sqnr_db"]
            interval = accuracy.wilson(top1, len(network.evaluation))
            measured[runtime] = {**compared, "ci95": list(interval)}
            print(
                f"{network.name}, {name} by {runtime}: top-1 {top1:.2f} %, agreement "
                f"{compared['agreement']:.1f} %, SQNR {'-' if sqnr is None else f'{sqnr:.1f}'} dB",
                flush=True,
            )
        return {"accuracy": measured, "int8_convolutions": convolutions}

    def _score(self, network: Network, out: Path, runtime: str) -> dict[str, Any]:
        key = {
            "evaluation": network.evaluation.digest,
            "model": [sha256_file(file) for file in _model_files(out)],
            "program": sha256_file(Path(steps.__file__)),
            "toolkit": self._toolkit,
            "tools": self._tools,
        }
        limit = {"ONEDNN_MAX_CPU_ISA": "AVX2"} if runtime == "openvino-avx2" else {}
        argument = f"{network.name},{out.name},{runtime}"
        value, _ = once(
            out / f"score-{runtime}.json",
            key,
            lambda: self._own_step("score", argument, out / f"score-{runtime}.log", **limit),
            force=self._options.force,
        )
        return value

    def _latency(self, network: Network, folder: Path, names: list[str]) -> dict[str, Any] | None:
        """All results of one network in interleaved rounds."""
        if not self._options.rounds:
            return None
        key = {
            "models": {n: [sha256_file(f) for f in _model_files(folder / n)] for n in names},
            "program": sha256_file(Path(steps.__file__)),
            "rounds": self._options.rounds,
            "sittings": self._options.sittings,
            "threads": self._options.threads,
            "toolkit": self._toolkit,
            "tools": self._tools,
        }
        argument = ",".join([network.name, *names])
        value, kept = once(
            folder / "latency.json",
            key,
            lambda: self._own_step("latency", argument, folder / "latency.log"),
            force=self._options.force,
        )
        for subject, row in value["results"].items():
            print(
                f"{network.name}, {subject}: p50 {row['p50_ms']:.2f} ms, n {row['n']}, spread "
                f"{100 * row['spread']:.0f} %{' (kept)' if kept else ''}",
                flush=True,
            )
        return value

    def _cost(self, network: Network, folder: Path) -> dict[str, Any] | None:
        """Time and memory alone, with more pictures, several times in turns."""
        if network.more is None or not self._options.repeats:
            return None
        variants = [variant for variant in self._variants if variant.cost]
        beside = [self._key(network, variant, network.more) for variant in variants]
        runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
        for repeat in range(self._options.repeats):
            # Who went first goes last, so that a drift favours nobody.
            for variant in variants[:: 1 if repeat % 2 == 0 else -1]:
                out, inputs = folder / "cost" / f"{variant.name}-{repeat}", folder / "more"
                runs[variant.name].append(
                    self._quantizer(network, variant, network.more, inputs, out, beside)
                )
        return {**_described(network.more), "variants": [summary(rows) for rows in runs.values()]}


def runtimes(out: Path, architecture: str) -> list[str]:
    """What can run a result: an OpenVINO IR is run by OpenVINO alone.

    Args:
        out: The folder of the result.
        architecture: This machine's; only x86-64 has instruction sets to leave out.
    """
    portable = (out / "model.onnx").is_file()
    return [
        runtime
        for runtime in RUNTIMES
        if (portable or runtime.startswith("openvino"))
        and (runtime != "openvino-avx2" or architecture == "x86_64")
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs of one quantizer: medians with the least and the greatest.

    A run that failed or was stopped decides: then there are no seconds of the step, but the reason,
    and the memory that was reached.
    """
    first = next((row for row in rows if row["status"] != "done"), rows[0])
    texts = ("images", "label", "name", "reason", "recipe", "status", "target")
    found: dict[str, Any] = {key: first[key] for key in texts if key in first}
    numbers = ["peak_rss_bytes", "process_seconds"]
    if first["status"] == "done":
        numbers.append("seconds")
    for key in numbers:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found[key] = {
                "high": max(values),
                "low": min(values),
                "median": statistics.median(values),
                "n": len(values),
            }
    return found


def toolkit_digest() -> str:
    """One SHA-256 of all code and target files of the package."""
    root = Path(gnet_opt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.toml")]):
        digest.update(f"{path.relative_to(root)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def chosen(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Names of an option, separated by commas, each one of those known."""
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


def _versions(python: Path) -> dict[str, str]:
    """The peers' packages in an environment."""
    command = [str(python), peers.__file__, "versions"]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{python} cannot be used as the Python of a peer: {error}.") from None
    return dict(json.loads(done.stdout))


def _described(images: ImageSet) -> dict[str, Any]:
    return {"digest": images.digest, "images": len(images), "set": images.name}


def _model_files(out: Path) -> list[Path]:
    names = ("model.onnx", "model.xml", "model.bin")
    return [out / name for name in names if (out / name).is_file()]


def _own(options: argparse.Namespace) -> dict[str, Any]:
    """A step, in the process that was started for it."""
    step, argument = options.step
    name, *words = argument.split(",")
    network, folder = Network.open(name, options.at_most), options.work / name
    if step == "prepare":
        return steps.prepare(network, folder)
    if step == "score":
        return steps.score(network, folder / words[0], words[1])
    return steps.time_all(folder, words, options.threads, options.sittings, options.rounds)


def main() -> None:
    """Command line."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--modelopt", type=Path, help="Python of an environment with nvidia-modelopt[onnx]")
    add("--networks", type=lambda t: chosen(t, NETWORKS), default=NETWORKS, metavar="A,B")
    add(
        "--only",
        type=lambda text: ("float", *chosen(text, names)),
        default=(),
        metavar="A,B",
        help=f"these variants beside float, of {', '.join(names)}",
    )
    add("--at-most", type=int, metavar="N", help="pictures a set, to try the program")
    add("--threads", type=int, default=1, help="of the latency")
    add("--sittings", type=int, default=6, help="of the latency, with new processes each")
    add("--rounds", type=int, default=3, help="of a sitting; 0 leaves the latency out")
    add("--repeats", type=int, default=3, help="of the run with 200 pictures; 0 leaves it out")
    add("--timeout", type=float, default=900, help="seconds that a quantizer may take")
    add("--memory", type=float, default=16, help="GB in RAM that a quantizer may take")
    add("--force", action="store_true", help="do again what is finished")
    add("--work", type=Path, default=ROOT / "build" / "quantizers")
    add("-o", "--output", type=Path)
    add("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(_own(options)))
        return
    result = Run(options).measure()
    path = options.output
    if path is None and (options.only or options.at_most or options.networks != NETWORKS):
        # What was only tried does not replace a published result.
        path = options.work / "tried.json"
    path = path or RESULTS / f"quantizers-{target.detect().name}.json"
    write_text(path, dump_json(result))
    print(path)


if __name__ == "__main__":
    main()
