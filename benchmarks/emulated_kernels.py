"""The integer kernels of CPUs that this machine is not: do they compute what the bundle says?

A bundle for a foreign CPU is judged on reference semantics. Here its real kernels run: those of
ONNX Runtime on emulated Arm cores, those of OpenVINO and ONNX Runtime for AVX2 without VNNI. Each
runs the bundle as a device does, and its logits are compared with reference semantics, with the
float model and with the labels. It also counts how many convolutions really became integer ones
(for Arm with the other integer form, s8 symmetric, beside it), asks one convolution whether
eight-bit products overflow, and runs `gnet-opt verify` there.

Emulation says nothing about time, so no time is recorded.

Two networks: the embedded demo model, and the 2014 original with its real weights where
GNET_OPT_DATA has them (every fifth picture in name order to calibrate, others to evaluate).

    python benchmarks/emulated_kernels.py arm64 raspberry-pi-5
    python benchmarks/emulated_kernels.py x86-avx2 --images 400

What is needed is fetched into build/emulated and used again; a run that was interrupted goes on
where it was. Exit code: 0; 1 where something is worse than it must be; 77 where this machine cannot
do it, with the reason.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import foreign_cpus
import gnet_opt
from emulated_processes import FailedError, check_python, chunks, run_chunks, run_python
from foreign_cpus import Cpu, UnavailableError
from gnet_opt import backends
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bench import accuracy
from gnet_opt.bundle import MANIFEST, Bundle
from gnet_opt.files import atomic_path, dump_json, sha256_file, sha256_text, write_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.runtime import FloatArray, run_all
from gnet_opt.target import Target, find
from gnet_opt.versions import tools
from saturation_probe import make_probe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
DATA = Path(os.environ.get("GNET_OPT_DATA", ROOT.parent / "shared" / "data"))
RUNNER = Path(__file__).with_name("emulated_run.py")

LEAST_SQNR_DB = 30.0
"""Correct integer kernels round in other places than reference semantics and come to 34 dB and
more; saturating ones to 14 and less."""

SKIPPED = 77
"""The exit code by which a test says that it could not run (Automake's)."""

CROSS_CHECK = 2
"""Pictures that an emulated Haswell repeats: it takes a minute for one."""

S8 = "s8-symmetric"
"""Suffix of a target whose integer form is replaced, to compare how much of it is fused."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Whose kernels run a target's bundle.

    Attributes:
        cpu: The name of a CPU of `foreign_cpus`.
        backend: The backend; another one than the bundle's own takes the portable model.
    """

    cpu: str
    backend: str


PLAN: Mapping[str, tuple[Kernels, ...]] = {
    # The A53 has no dot product instructions, so ONNX Runtime has other kernels for it.
    "arm64": (
        Kernels(cpu="cortex-a76", backend="onnxruntime"),
        Kernels(cpu="cortex-a53", backend="onnxruntime"),
    ),
    "raspberry-pi-5": (Kernels(cpu="cortex-a76", backend="onnxruntime"),),
    "x86-avx2": (
        Kernels(cpu="avx2", backend="openvino"),
        Kernels(cpu="avx2", backend="onnxruntime"),
    ),
}
"""What is run, by target."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bundle with what it is compared with.

    Attributes:
        folder: `bundle`, `float.onnx` and `pictures.json` are in it.
        facts: The sets of pictures and the labels of those to evaluate on.
        images: The number of pictures to evaluate on.
    """

    folder: Path
    facts: Mapping[str, Any]
    images: int

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return Bundle.open(self.folder / "bundle")

    @property
    def key(self) -> str:
        """A hash of what its logits depend on; its manifest has the time of day, too."""
        manifest = self.bundle.manifest
        parts = [manifest["artifacts"], manifest["preprocess"], manifest["target"]["name"]]
        return sha256_text(dump_json([*parts, self.facts["digest"]]))[:16]


def image_sets(network: str, labels: Sequence[str]) -> tuple[ImageSet, ImageSet]:
    """The pictures to calibrate on and to evaluate on."""
    from gnet_opt import paths

    if network == "demo":
        return (
            ImageSet.open(paths.demo_calibration(), classes=labels),
            ImageSet.open(paths.demo_evaluation(), classes=labels),
        )
    images = ImageSet.open(DATA / "imagenet-sample")
    order = sorted(range(len(images)), key=lambda i: images.files[i].name)
    evaluation = images.take([i for rank, i in enumerate(order) if rank % 5])
    return images.take(order[::5]), evaluation


def target_of(name: str) -> Target:
    """A shipped target, or for NAME.s8-symmetric the same with that integer form."""
    base, _, form = name.partition(".")
    target = find(base)
    if form != S8:
        return target
    scheme = dataclasses.replace(target.scheme, activations="s8", symmetric=True, weight_bits=8)
    return dataclasses.replace(target, name=name, scheme=scheme)


def build(network: str, target_name: str, count: int, output: Path) -> None:
    """Fill the folder of a `Built`, unless it is there; called in a process of its own."""
    from gnet_opt import operations, pipeline, planning
    from gnet_opt.stages.load import load

    def make(staging: Path) -> Mapping[str, Any]:
        model = load(None if network == "demo" else DATA / "bvlc_googlenet.toml")
        calibration, evaluation = image_sets(network, model.labels)
        chosen = evaluation.sample(count, seed=0)
        job = planning.plan(
            model,
            target_of(target_name),
            staging / "bundle",
            calibration=calibration,
            evaluation=chosen,
            # Accuracy is recorded here, not judged: with few pictures the gate is a matter of luck.
            options=planning.Options(max_drop=100.0),
        )
        pipeline.build(job)
        operations.export(model, staging / "float.onnx")
        files = [str(path.resolve()) for path in chosen.files]
        write_text(staging / "pictures.json", dump_json(files))
        return {
            "calibration": {"images": len(job.calibration), "set": calibration.name},
            "digest": chosen.digest,
            "labels": list(chosen.labels or ()),
            "set": chosen.name,
        }

    recipe = {"count": count, "network": network, "sources": sources(), "target": target_name}
    foreign_cpus.part(output, recipe, make)


def built(network: str, target_name: str, count: int, folder: Path) -> Built:
    """Build a bundle in a process of its own, which gives its memory back."""
    made = folder / f"{network}-{target_name}"
    command = [sys.executable, __file__, "--build", network, target_name, str(made)]
    with subprocess.Popen([*command, "--images", str(count)]) as process:
        try:
            code = process.wait()
        except BaseException:
            # Not killed, so that it takes its unfinished folder with it.
            process.terminate()
            raise
    if code:
        raise FailedError(f"The build of {network} for {target_name} failed; its reason is above.")
    return Built(folder=made, facts=foreign_cpus.contents(made), images=count)


def sources() -> str:
    """One hash of what a bundle depends on beside the data: code, target files, versions."""
    package = Path(gnet_opt.__file__).parent
    files = sorted(p for p in package.rglob("*") if p.suffix in (".py", ".toml"))
    hashes = [f"{p.relative_to(package)} {sha256_file(p)}" for p in files]
    return sha256_text("\n".join([*hashes, dump_json(tools())]))


def open_cpu(name: str, folder: Path) -> Cpu:
    """Make a CPU ready.

    Raises:
        UnavailableError: This machine cannot.
    """
    if name in foreign_cpus.ARM_CORES:
        return foreign_cpus.arm(folder, name)
    return {"avx2": foreign_cpus.without_vnni, "haswell": foreign_cpus.haswell}[name](folder)


def state_of(cpu: Cpu, backend: str, made: Built, folder: Path) -> Path:
    """Where what ran of a bundle on a CPU is kept; another one when anything of it changes."""
    parts = [cpu.facts, sha256_file(RUNNER), tools()]
    return folder / "runs" / made.key / f"{cpu.name}-{backend}-{sha256_text(dump_json(parts))[:16]}"


def logits_of(
    cpu: Cpu, backend: str, made: Built, folder: Path, *, count: int, jobs: int, label: str
) -> FloatArray:
    """Run a bundle on a CPU, as far as it is not done yet.

    Returns:
        float32 of shape (count, classes), for the first `count` pictures.
    """
    state = state_of(cpu, backend, made, folder)
    files = {piece: state / f"{piece[0]:04}-{piece[1]:04}.npy" for piece in chunks(count)}
    start = [str(RUNNER), "logits", str(made.folder / "bundle"), backend]
    pictures = str(made.folder / "pictures.json")
    command = {p: [*start, pictures, str(p[0]), str(p[1]), str(files[p])] for p in files}
    return run_chunks(cpu, command, files, jobs=jobs, label=label)


def reference_of(model: Path, made: Built, folder: Path) -> FloatArray:
    """Logits by reference semantics on this machine, kept beside the others."""
    file = folder / "runs" / made.key / f"{model.stem}-{sha256_file(model)[:16]}.npy"
    if not file.is_file():
        preprocess = made.bundle.preprocess
        pictures = json.loads((made.folder / "pictures.json").read_text(encoding="utf-8"))
        with open_reference(model) as runner:
            values = run_all(runner, (preprocess.load(Path(path)) for path in pictures))
        with atomic_path(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, values)
    loaded: FloatArray = np.load(file)
    return loaded


def executed(cpu: Cpu, backend: str, made: Built, folder: Path) -> list[tuple[str, str]]:
    """What the runtime executes of a bundle's model on a CPU.

    Returns:
        Pairs of operator and kernel; ONNX Runtime does not name its kernels.
    """
    state = state_of(cpu, backend, made, folder)
    out = state / ("graph.onnx" if backend == "onnxruntime" else "graph.json")
    if not out.is_file():
        command = [str(RUNNER), "graph", str(made.folder / "bundle"), backend, str(out)]
        check_python(cpu, command, out.with_suffix(".log"))
    if backend == "onnxruntime":
        import onnx

        return [(node.op_type, "") for node in onnx.load(out).graph.node]
    return [(layer, kernel) for layer, kernel in json.loads(out.read_text(encoding="utf-8"))]


def count_convolutions(nodes: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """How many convolutions compute in integers and how many in float.

    Args:
        nodes: From `executed`.

    Returns:
        `integer`, `float`, and the number of nodes by what was `executed`.
    """
    counts = collections.Counter(nodes)
    integer = real = 0
    for (operator, kernel), count in counts.items():
        if operator in ("QLinearConv", "ConvInteger") or (
            operator == "Convolution" and kernel.lower().endswith(("_i8", "_u8"))
        ):
            integer += count
        elif "Conv" in operator and operator != "Convert":
            real += count
    left_out = ("Const", "Input", "Output")
    return {
        "executed": {
            " ".join(filter(None, node)): n
            for node, n in sorted(counts.items())
            if node[0] not in left_out
        },
        "float": real,
        "integer": integer,
    }


def verify(cpu: Cpu, bundle: Path, log: Path) -> dict[str, Any]:
    """Run `gnet-opt verify` on a CPU.

    Returns:
        Its exit code, and its result or what it said last instead.
    """
    command = ["-c", "from gnet_opt.cli import main; main()", "verify", str(bundle), "--json"]
    code, said = run_python(cpu, command, log)
    if code:
        return {"exit_code": code, "said": "".join(said.strip().splitlines()[-1:])}
    result = json.loads(said[said.index("{") :])
    return {"exit_code": code, "result": {k: v for k, v in result.items() if k != "bundle"}}


def probe(cpu: Cpu, backend: str, folder: Path) -> dict[str, Any]:
    """Ask one convolution whether eight-bit products overflow in a runtime's kernels.

    Returns:
        `outputs`, the percentage of `wrong` ones, and on Arm which dot product instructions ran.
    """
    made = make_probe(folder / "probe.onnx")
    # The target matters to no CPU backend; compiled here, as bundles are.
    backends.get(backend).compile(made.model, find("arm64"), folder)
    inputs, out = folder / "input.npy", folder / "output.npy"
    np.save(inputs, made.inputs)
    out.unlink(missing_ok=True)
    command = [str(RUNNER), "probe", str(folder), backend, str(inputs), str(out)]
    trace = folder / "instructions.log"
    emulates_arm = cpu.name in foreign_cpus.ARM_CORES
    runner = foreign_cpus.traced(cpu, trace) if emulates_arm else cpu
    check_python(runner, command, out.with_suffix(".log"))
    wrong = np.load(out) != made.expected
    told: dict[str, Any] = {
        "outputs": int(wrong.size),
        "wrong_percent": 100 * float(wrong.mean()),
    }
    if emulates_arm:
        with trace.open(encoding="ascii", errors="replace") as lines:
            told["dot_product_instructions"] = foreign_cpus.count_dot_products(lines)
        trace.unlink()
    return told


def measure(
    network: str, target_name: str, options: argparse.Namespace, count: int
) -> list[dict[str, Any]]:
    """Build one bundle and run it on every CPU of its target's plan.

    Returns:
        One row a CPU and backend.
    """
    folder: Path = options.folder
    # A CPU that cannot be had is told before the work begins.
    cpus = {kernels.cpu: open_cpu(kernels.cpu, folder) for kernels in PLAN[target_name]}
    made = built(network, target_name, count, folder)
    bundle, labels = made.bundle, made.facts["labels"]
    before = reference_of(made.folder / "float.onnx", made, folder)
    reference = reference_of(bundle.model, made, folder)
    rows = []
    for kernels in PLAN[target_name]:
        cpu, backend = cpus[kernels.cpu], kernels.backend
        label = f"{target_name}, {network}, {backend} on {cpu.name}"
        logits = logits_of(cpu, backend, made, folder, count=count, jobs=options.jobs, label=label)
        row = {
            "against_reference": compared(reference, logits),
            "backend": backend,
            "bundle": {
                "manifest_sha256": sha256_file(bundle.root / MANIFEST),
                "model_sha256": sha256_file(bundle.model),
                "scheme": bundle.manifest["scheme"],
            },
            "calibration": made.facts["calibration"],
            "convolutions": count_convolutions(executed(cpu, backend, made, folder)),
            "cpu": {"name": cpu.name, **cpu.facts},
            "evaluation": {
                "digest": made.facts["digest"],
                "images": count,
                "set": made.facts["set"],
            },
            "kernels": scored(before, logits, labels, "native"),
            "model": bundle.manifest["model"],
            "network": network,
            "probe": probe(cpu, backend, folder / f"probe-{cpu.name}-{backend}"),
            "reference": scored(before, reference, labels, "reference"),
        }
        if backend == bundle.manifest["target"]["backend"]:
            log = state_of(cpu, backend, made, folder) / "verify.log"
            row["verify"] = verify(cpu, bundle.root, log)
        rows.append(row)
        print(f"{label}: {summary(row)}", flush=True)
    return rows


def other_form(network: str, target_name: str, folder: Path) -> dict[str, Any]:
    """How much of the s8 symmetric form the same runtime fuses on the same CPU.

    It is not run on pictures: an emulated float convolution takes too long.
    """
    kernels = PLAN[target_name][0]
    cpu = open_cpu(kernels.cpu, folder)
    made = built(network, f"{target_name}.{S8}", CROSS_CHECK, folder)
    bundle = made.bundle
    return {
        "backend": kernels.backend,
        "convolutions": count_convolutions(executed(cpu, kernels.backend, made, folder)),
        "cpu": cpu.name,
        "model_sha256": sha256_file(bundle.model),
        "network": network,
        "scheme": bundle.manifest["scheme"],
    }


def cross_check(network: str, target_name: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """Repeat a few pictures on an emulated Haswell, where no instruction is real.

    Returns:
        One row a backend: whether its logits are those of the CPU that hides instructions.
    """
    made = built(network, target_name, count, folder)
    hidden, emulated = foreign_cpus.without_vnni(folder), foreign_cpus.haswell(folder)
    rows = []
    for kernels in PLAN[target_name]:
        here, there = (
            logits_of(
                cpu,
                kernels.backend,
                made,
                folder,
                count=min(count, CROSS_CHECK),
                jobs=1,
                label=f"{target_name}, {network}, {kernels.backend} on {cpu.name}, cross-check",
            )
            for cpu in (hidden, emulated)
        )
        rows.append(
            {
                "backend": kernels.backend,
                "cpu": {"name": emulated.name, **emulated.facts},
                "identical": bool((here == there).all()),
                "images": len(here),
                "network": network,
                "sqnr_db": accuracy.sqnr_db(here, there),
            }
        )
    return rows


def compared(reference: FloatArray, logits: FloatArray) -> dict[str, Any]:
    """Agreement of top-1 in percent, and SQNR in dB (None where the logits are identical)."""
    same = reference.argmax(1) == logits.argmax(1)
    return {
        "agreement": 100 * int(same.sum()) / len(same),
        "identical": bool((reference == logits).all()),
        "sqnr_db": accuracy.sqnr_db(reference, logits),
    }


def scored(
    before: FloatArray,
    logits: FloatArray,
    labels: Sequence[int],
    semantics: Literal["native", "reference"],
) -> dict[str, Any]:
    """Accuracy beside the float model, with 95 % intervals."""
    result = accuracy.compare(before, logits, labels, semantics=semantics)
    intervals = {
        name: list(accuracy.wilson(score.top1, result.images))
        for name, score in (("float", result.float_score), ("quantized", result.quantized_score))
        if score is not None
    }
    return {**result.to_dict(), "top1_ci95": intervals}


def faults(result: Mapping[str, Any]) -> list[str]:
    """What is worse than it must be in a result, as sentences."""
    found = []
    for row in result["runs"]:
        where = f"{result['target']}, {row['network']}, {row['backend']} on {row['cpu']['name']}"
        against = row["against_reference"]
        sqnr = against["sqnr_db"]
        if not against["identical"] and (sqnr is None or sqnr < LEAST_SQNR_DB):
            ratio = "no signal" if sqnr is None else f"{sqnr:.1f} dB"
            least = f"at least {LEAST_SQNR_DB:g} dB are required"
            found.append(f"{where}: {ratio} against reference semantics; {least}.")
        checked = row.get("verify", {"exit_code": 0})
        if checked["exit_code"]:
            said = f"exit code {checked['exit_code']} ({checked['said']})"
            found.append(f"{where}: `gnet-opt verify` ended with {said}.")
    for row in result.get("cross_check", ()):
        if not row["identical"]:
            where = f"{result['target']}, {row['network']}, {row['backend']}"
            found.append(f"{where}: an emulated Haswell gives other logits.")
    return found


def summary(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    against, convolutions = row["against_reference"], row["convolutions"]
    sqnr = "identical" if against["identical"] else f"{against['sqnr_db']:.1f} dB"
    top1 = {name: row[name]["quantized"]["top1"] for name in ("kernels", "reference")}
    return (
        f"{sqnr} and {against['agreement']:.1f} % agreement with reference semantics; top-1 "
        f"{top1['kernels']:.1f} % (reference {top1['reference']:.1f} %, float "
        f"{row['kernels']['float']['top1']:.1f} %, n = {row['evaluation']['images']}); "
        f"{convolutions['integer']} of {convolutions['integer'] + convolutions['float']} "
        f"convolutions in integers; {row['probe']['wrong_percent']:.0f} % of the probe wrong"
    )


def record(
    target_name: str, networks: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Measure one target and write its result file.

    Returns:
        The result.
    """
    result: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "least_sqnr_db": LEAST_SQNR_DB,
        "machine": this_machine().to_dict(),
        "runs": [],
        "schema": "gnet-opt/emulated-kernels/1",
        "target": target_name,
        "tools": tools(),
    }
    for network in networks:
        count = min(options.images, len(image_sets(network, ())[1]))
        result["runs"] += measure(network, target_name, options, count)
        if target_name == "arm64":
            form = other_form(network, target_name, options.folder)
            result.setdefault("other_form", []).append(form)
        if target_name == "x86-avx2":
            rows = cross_check(network, target_name, count, options.folder)
            result.setdefault("cross_check", []).extend(rows)
    path = options.output / f"emulated-{target_name}.json"
    write_text(path, dump_json(result))
    print(path)
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", default=["arm64", "raspberry-pi-5"], metavar="TARGET")
    parser.add_argument("--images", type=int, default=100, help="pictures a network")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "emulated")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if set(options.targets) - set(PLAN) or options.images < 1 or options.jobs < 1:
        parser.error(f"the targets are {', '.join(PLAN)}; --images and --jobs are at least 1")
    options.folder = options.folder.absolute()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line names."""
    options = parse(arguments)
    if options.build:
        network, target_name, out = options.build
        build(network, target_name, options.images, Path(out))
        return 0
    networks = ["demo"]
    if (DATA / "bvlc_googlenet.toml").is_file():
        networks.append("bvlc")
    else:
        print(f"{DATA} has no bvlc_googlenet.toml: the 2014 original is left out.")
    found: list[str] = []
    try:
        for target_name in options.targets:
            found += faults(record(target_name, networks, options))
    except UnavailableError as error:
        print(f"SKIPPED: {error}.", file=sys.stderr)
        return SKIPPED
    except FailedError as error:
        found.append(str(error))
    for fault in found:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    # So that the emulated processes end, too, when a service manager stops this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(128 + signal.SIGINT)
