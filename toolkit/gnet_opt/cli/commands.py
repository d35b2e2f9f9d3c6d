"""The commands and their options: what the user types becomes values, results become text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gnet_opt.cli import base
from gnet_opt.cli.base import gnet_opt
from gnet_opt.cli.console import Output

if TYPE_CHECKING:
    from gnet_opt.images import ImageSet
    from gnet_opt.model import Model

_DEFAULT_METHOD = "minmax"
_METHODS = ("auto", "entropy", "lp", "minmax", "mse", "percentile")
_DEMO = (
    "No model was given: this is the embedded demo model (machine parts, ten classes). "
    "Pass a checkpoint or a model card to use your own: gnet-opt {command} MODEL ..."
)


_target = click.option(
    "-t", "--target", "target_name", required=True, help="Device; see `gnet-opt targets`."
)
_samples = click.option(
    "--samples",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Calibration pictures.",
)
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Of their choice.")
_cache = click.option(
    "--cache/--no-cache",
    "keep",
    default=True,
    show_default=True,
    help="Use and keep calibration statistics of earlier runs.",
)
_card = click.option(
    "--card", type=base.FOLDER, help="Model card with the preprocess and labels of MODEL."
)
_weights = click.option(
    "--weights", metavar="NAME", help="Which weights of a checkpoint that has several, as `ema`."
)
_batch = click.option(
    "--batch", type=click.Choice(["1", "dynamic"]), default="1", show_default=True
)
_input = click.option(
    "--input",
    type=click.Choice(["float32", "uint8"]),
    default="float32",
    show_default=True,
    help="What the model takes; uint8: pixels, which it normalises itself.",
)


@gnet_opt.command()
@click.argument("model", required=False)
@_target
@click.option("--calibration", type=base.FOLDER, help="Folder of pictures to calibrate on.")
@click.option(
    "--eval", "evaluation", type=base.FOLDER, help="Folder of labelled pictures to score on."
)
@click.option(
    "--golden",
    metavar="FOLDER|drawn",
    help="Images that travel in the bundle; some of --calibration by default.",
)
@base.output_option(False, "Folder of the bundle; MODEL-TARGET by default.")
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp16", "fp32", "auto"]),
    default="int8",
    show_default=True,
    help="auto: the fastest within --max-drop of INT8, INT8 with layers in float, FP16 and float.",
)
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    default=_DEFAULT_METHOD,
    show_default=True,
    help="How ranges are chosen; auto measures all on calibration pictures held back.",
)
@click.option(
    "--bias-correction/--no-bias-correction",
    default=True,
    show_default=True,
    help="Undo the mean error of rounded weights in the biases.",
)
@click.option(
    "--weight-search/--no-weight-search",
    default=False,
    show_default=True,
    help="Let scales of weights clip where that is nearer.",
)
@click.option(
    "--max-drop",
    type=float,
    default=1.0,
    show_default=True,
    help="Top-1 that INT8 may lose, in percentage points.",
)
@_samples
@_seed
@_card
@_weights
@_batch
@_input
@base.threads
@_cache
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan.")
@base.force
@base.common
def quantize(
    model: str | None,
    target_name: str,
    calibration: Path | None,
    evaluation: Path | None,
    golden: str | None,
    out: Path | None,
    card: Path | None,
    weights: str | None,
    batch: str,
    keep: bool,
    dry_run: bool,
    output: Output,
    **choices: Any,
) -> None:
    """Quantize MODEL to INT8 for a device and write a verified bundle.

    MODEL is a checkpoint (.pth, .pt, .safetensors), a model card (.toml), `torchvision`, or
    `package.module:factory`. Without it the embedded demo model is used.
    """
    from gnet_opt import operations, paths, pipeline, planning, target
    from gnet_opt.cli import render

    device = target.find(target_name)
    if target_name == "cpu":
        output.note(f"This machine's CPU is the target {device.name} ({device.file}).")
    loaded = _load(model, card, weights, "quantize", output)
    job = planning.plan(
        loaded,
        device,
        out or Path(f"{_slug(loaded.name)}-{device.name}"),
        calibration=_calibration(model, calibration, loaded),
        evaluation=_evaluation(model, calibration, evaluation, loaded),
        golden_images=planning.golden_images(golden),
        options=planning.Options(
            batch=_batch_value(batch),
            cache=paths.calibration_cache() if keep else None,
            **choices,
        ),
    )
    for note in job.notes:
        output.note(note)
    if dry_run:
        plan = job.to_dict()
        output.result(
            plan,
            render.listing("plan", ("", ""), [(k, render.short(v)) for k, v in plan.items()]),
        )
        return
    result = pipeline.build(job, output.progress)
    manifest = result.bundle.manifest
    for note in result.notes:
        output.note(note)
    shown: list[Any] = [
        render.comparison(manifest, result.sizes),
        render.conditions(manifest),
        f"Bundle: {result.bundle.root}",
    ]
    if manifest["decision"]:
        shown[:0] = render.decision(manifest["decision"])
    if output.verbose:
        shown.insert(0, render.facts(manifest["facts"]))
        shown.append(render.durations(result.seconds))
    if manifest["deferred"]:
        shown.append(f"{manifest['deferred']['reason']} {operations.next_step(result.bundle)}")
        shown += [
            f"{entry['path']} runs it, after a look at the compiler's version and the model."
            for entry in manifest["artifacts"]
            if entry["kind"] == "script"
        ]
    value = {
        "bundle": str(result.bundle.root),
        "manifest": dict(manifest),
        "rejected": result.rejected or None,
        "seconds": dict(result.seconds),
        "sizes": dict(result.sizes),
    }
    output.result(value, *shown)
    result.raise_if_rejected()


@gnet_opt.command()
@click.argument("model", required=False)
@_target
@click.option("--calibration", type=base.FOLDER, help="Folder of pictures to calibrate on.")
@click.option(
    "--images", type=base.FOLDER, help="Folder to measure on; that of calibration by default."
)
@base.output_option(False, "Folder of the result; MODEL-TARGET-sensitivity by default.")
@click.option(
    "--method",
    type=click.Choice(_METHODS[1:]),
    default=_DEFAULT_METHOD,
    show_default=True,
    help="How ranges are chosen.",
)
@_samples
@_seed
@click.option(
    "--count", type=click.IntRange(1), default=64, show_default=True, help="Pictures to measure on."
)
@click.option("--jobs", type=click.IntRange(1), help="Layers at a time; one a core by default.")
@_card
@_weights
@_cache
@base.force
@base.common
def sensitivity(
    model: str | None,
    target_name: str,
    calibration: Path | None,
    images: Path | None,
    out: Path | None,
    method: str,
    samples: int,
    seed: int,
    count: int,
    jobs: int | None,
    card: Path | None,
    weights: str | None,
    keep: bool,
    force: bool,
    output: Output,
) -> None:
    """Rank the layers of MODEL by what quantizing each of them alone costs.

    Costs are written as they are found: an interrupted run goes on when it is started again.
    """
    from gnet_opt import paths, target
    from gnet_opt.cli import render
    from gnet_opt.images import ImageSet
    from gnet_opt.quantization import Recipe, check_enough
    from gnet_opt.sensitivity import rank

    device = target.find(target_name)
    loaded = _load(model, card, weights, "sensitivity", output)
    for note in loaded.assumptions:
        output.note(note)
    chosen = _calibration(model, calibration, loaded).sample(samples, seed)
    check_enough(method, len(chosen))
    ranking = rank(
        loaded,
        device,
        out or Path(f"{_slug(loaded.name)}-{device.name}-sensitivity"),
        calibration=chosen,
        images=None if images is None else ImageSet.open(images, classes=loaded.labels),
        count=count,
        recipe=Recipe(method=method),
        cache=paths.calibration_cache() if keep else None,
        jobs=jobs,
        force=force,
        progress=output.progress,
        tell=output.note,
    )
    if ranking.resumed:
        output.note(f"{ranking.resumed} layers were measured by an earlier run.")
    if ranking.plot is None:
        output.note('The plot was left out: pip install "gnet-opt[plot]"')
    files = [str(path) for path in (ranking.file, ranking.plot) if path is not None]
    output.result(
        ranking.to_dict(),
        render.costs(f"{loaded.name} for {device.name}", ranking.costs),
        f"{ranking.images} pictures of {ranking.set}, reference semantics, one layer in INT8 each.",
        f"Written: {', '.join(files)}",
    )


@gnet_opt.command()
@click.argument("model", required=False)
@base.output_option(True, "ONNX file to write.")
@_card
@_weights
@_batch
@_input
@base.force
@base.common
def export(
    model: str | None,
    out: Path,
    card: Path | None,
    weights: str | None,
    batch: str,
    input: Literal["float32", "uint8"],
    force: bool,
    output: Output,
) -> None:
    """Write the stripped and folded float graph of MODEL as ONNX."""
    from gnet_opt import operations
    from gnet_opt.cli import render
    from gnet_opt.files import check_writable

    check_writable(out, force=force)
    loaded = _load(model, card, weights, "export", output)
    for note in loaded.assumptions:
        output.note(note)
    facts = operations.export(
        loaded, out, batch=_batch_value(batch), input=input, progress=output.progress
    )
    output.result({"facts": facts, "file": str(out)}, render.facts(facts), f"ONNX: {out}")


@gnet_opt.command(name="compile")
@click.argument("bundle", type=base.FOLDER)
@click.option("--force", is_flag=True, help="Build again what fits this machine already.")
@base.common
def compile_(bundle: Path, force: bool, output: Output) -> None:
    """Finish the deferred build of BUNDLE on the device itself.

    What was built for another GPU, version or model is built again.
    """
    from gnet_opt import operations
    from gnet_opt.bundle import Bundle

    done = operations.finish(Bundle.open(bundle), force=force, progress=output.progress)
    output.result(done, done["message"])


@gnet_opt.command()
@click.argument("bundle", type=base.FOLDER)
@base.threads
@base.common
def verify(bundle: Path, threads: int | None, output: Output) -> None:
    """Prove that BUNDLE is whole and computes on this machine what it must."""
    from gnet_opt import operations
    from gnet_opt.bundle import Bundle

    opened = Bundle.open(bundle)
    checked = operations.verify(opened, threads=threads)
    sqnr = "identical" if checked["sqnr_db"] is None else f"{checked['sqnr_db']:.1f} dB"
    lines = [
        f"{checked['files']} files have their SHA-256.",
        "Pictures are read and resized as at calibration, to the last bit.",
        f"{checked['golden_images']} golden outputs by {checked['backend']}: {sqnr} "
        f"(at least {checked['tolerance_db']:.0f} dB).",
    ]
    if checked["foreign"]:
        target_name = opened.manifest["target"]["name"]
        lines.append(f"This machine is not {target_name}: these are its own kernels.")
    if checked["deferred"]:
        lines.append(
            f"{operations.pending(opened)} So the portable model was run by reference semantics. "
            f"{operations.next_step(opened)}"
        )
    output.result({"bundle": str(bundle), **checked}, "\n".join(lines), f"{bundle} is good.")


@gnet_opt.command()
@click.argument("model")
@click.option("--images", type=base.FOLDER, required=True, help="Folder of labelled pictures.")
@click.option("--reference", is_flag=True, help="Reference semantics instead of native kernels.")
@_card
@_weights
@base.threads
@base.common
def evaluate(
    model: str,
    images: Path,
    reference: bool,
    card: Path | None,
    weights: str | None,
    threads: int | None,
    output: Output,
) -> None:
    """Measure the accuracy of a bundle, a model or an ONNX file on labelled pictures."""
    from gnet_opt import evaluation
    from gnet_opt.cli import render

    scored = evaluation.evaluate(
        model,
        images,
        card=card,
        weights=weights,
        reference=reference,
        threads=threads,
        progress=output.progress,
    )
    for note in scored["notes"]:
        output.note(note)
    top5 = "" if scored["top5"] is None else f"{scored['top5']:.2f}"
    low, high = scored["ci95"]
    rows = [
        ("top-1, %", f"{scored['top1']:.2f}", f"[{low:.2f}, {high:.2f}]"),
        ("top-5, %", top5, ""),
    ]
    output.result(
        scored,
        render.table(model, ("", scored["semantics"], "95 % interval"), rows),
        f"{scored['images']} pictures of {scored['set']}, run by {scored['backend']}.",
    )


@gnet_opt.command()
@click.argument("path", type=base.FOLDER)
@click.option(
    "--layers", is_flag=True, help="Run it, and show what each layer costs on this machine."
)
@click.option(
    "--lint",
    "rules",
    type=click.Choice(["tensorrt", "tensorrt8"]),
    help="Name every form that TensorRT (10 and 11, or 8) refuses or slows on; exit with 8 if it "
    "refuses one.",
)
@click.option(
    "--dla", is_flag=True, help="Report what the DLA of a Jetson would take of it, and why not all."
)
@base.threads
@base.common
def inspect(
    path: Path, layers: bool, rules: str | None, dla: bool, threads: int | None, output: Output
) -> None:
    """Show what is in an ONNX file or a bundle."""
    from gnet_opt import operations
    from gnet_opt.cli import render
    from gnet_opt.errors import ConfigError, GateFailedError, IntegrityError

    if rules and layers:
        raise ConfigError("--lint reads the file and --layers runs it: pass one of them.")
    if dla and (rules or layers):
        raise ConfigError("--dla is a report of its own: leave out --lint and --layers.")
    if layers:
        timed = operations.inspect_layers(path, threads=threads, progress=output.progress)
        for note in timed["notes"]:
            output.note(note)
        output.result(timed, *render.executed(timed["executed"]))
        return
    if threads is not None:
        raise ConfigError(
            "--threads says how layers are timed: pass --layers, too, or leave it out."
        )
    if rules:
        linted = operations.lint(path, rules)
        output.result(linted, *render.findings(linted))
        if linted["errors"]:
            raise GateFailedError(
                f"{linted['file']} has {linted['errors']} of the forms that {rules} refuses or "
                "computes otherwise. Mend what the findings call an error, and lint it again."
            )
        return
    if dla:
        reported = operations.dla(path)
        output.result(reported, *render.dla(reported, every=output.verbose))
        return
    found = operations.inspect(path)
    model = found["model"]
    shown: list[Any] = []
    if found["bundle"]:
        try:
            summary = render.provenance(found["bundle"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{path}: the manifest is damaged ({error!r}). Build the bundle again."
            ) from error
        shown += [
            summary,
            render.listing(
                "files",
                ("path", "kind", "size", "SHA-256"),
                [
                    (a["path"], a["kind"], render.megabytes(a["bytes"]), a["sha256"][:16])
                    for a in found["artifacts"]
                ],
            ),
        ]
    rows = [
        (
            layer["name"],
            layer["operator"],
            layer["precision"],
            "x".join(str(size) for size in layer["weight"]),
            f"{layer['macs'] / 1e6:.1f}",
            "" if layer["scale"] is None else f"{layer['scale']:.3g}",
            "" if layer["zero_point"] is None else str(layer["zero_point"]),
        )
        for layer in model["layers"]
    ]
    columns = ("layer", "operator", "precision", "weight", "MMAC", "scale", "zero point")
    shown += [
        render.listing("layers", columns, rows),
        f"{model['input']} -> {model['output']}, opset {model['opset']}",
        ", ".join(f"{count} {name}" for name, count in model["operators"].items()),
        f"{model['parameters']:,} weights, {model['macs'] / 1e9:.3f} GMAC, "
        f"{100 * model['macs_int8_share']:.1f} % of them in INT8",
    ]
    output.result(found, *shown)


@gnet_opt.command()
@click.argument("name", required=False)
@base.common
def targets(name: str | None, output: Output) -> None:
    """List the targets, or show one; this machine's are marked."""
    from gnet_opt import backends, target
    from gnet_opt.cli import render

    if name is not None:
        shown = target.find(name).to_dict()
        rows = [(key, render.short(value)) for key, value in shown.items() if key != "evidence"]
        evidence = [(e["claim"], e["source"], e["date"]) for e in shown["evidence"]]
        output.result(
            shown,
            render.listing(shown["name"], ("", ""), rows),
            render.listing("evidence", ("claim", "source", "date"), evidence),
        )
        return
    found = [
        {**t.to_dict(), "installed": backends.get(t.backend).probe().available}
        for t in target.shipped()
    ]
    listed = [
        (
            ("* " if t["this_machine"] else "  ") + t["name"],
            ", ".join(t["aliases"]),
            t["backend"] + ("" if t["installed"] else " (not installed)"),
            " ".join(t["precisions"]),
            t["summary"],
        )
        for t in found
    ]
    columns = ("target", "aliases", "backend", "precisions", "summary")
    output.result(
        found,
        render.listing("targets", columns, listed),
        "* describes this machine. `--target cpu` chooses its most specific one.",
    )


@gnet_opt.command()
@click.argument("images", metavar="SET", type=base.FOLDER)
@base.output_option(True, "Folder for the weights and the model card.")
@click.option("--validation", type=base.FOLDER, help="Folder of labelled pictures to measure on.")
@click.option(
    "--recipe", type=click.Choice(["paper", "modern"]), default="modern", show_default=True
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the images.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step.")
@click.option("--learning-rate", type=float, help="At the start.")
@click.option("--precision", type=click.Choice(["bf16", "fp32"]), help="Of the arithmetic.")
@click.option("--min-crop", type=float, help="Least area of a random crop, 0..1.")
@click.option("--early-epochs", type=click.IntRange(0), help="First epochs on smaller crops.")
@click.option("--early-size", type=click.IntRange(32), help="Side of those crops, in pixels.")
@click.option("--seed", type=int, help="Of weights, order and augmentation.")
@click.option("--init", "start", help="MODEL to start from instead of random weights.")
@click.option("--name", help="Name in the model card.")
@click.option("--license", "licence", default="", help="Licence in the model card.")
@click.option("--source", default="", help="Source in the model card.")
@click.option("--resume", is_flag=True, help="Go on after an interruption.")
@base.threads
@base.force
@base.common
def train(
    images: Path,
    out: Path,
    validation: Path | None,
    recipe: str,
    start: str | None,
    name: str | None,
    licence: str,
    source: str,
    resume: bool,
    force: bool,
    output: Output,
    **choices: Any,
) -> None:
    """Train a GoogLeNet on the labelled pictures of SET."""
    from gnet_opt.cli import render
    from gnet_opt.errors import require
    from gnet_opt.files import check_writable
    from gnet_opt.images import ImageSet
    from gnet_opt.stages import train as training
    from gnet_opt.stages.load import load
    from gnet_opt.stages.training.recipe import RECIPES

    require("torch", "build", "train a model")
    if not resume:
        check_writable(out / training.CARD, force=force)
    chosen = {key: value for key, value in choices.items() if value is not None}
    pictures = ImageSet.open(images)
    done = training.train(
        pictures,
        out,
        RECIPES[recipe](**chosen),
        validation=ImageSet.open(validation, classes=pictures.classes) if validation else None,
        init=load(start).module if start else None,
        resume=resume,
        name=name,
        license=licence,
        source=source,
        progress=output.progress,
        log=output.note,
    )
    rows = [("weights", str(done.weights)), ("model card", str(done.card))]
    if done.top1 is not None:
        rows.append(("top-1, %", f"{100 * done.top1:.2f} ({done.validation_images} pictures)"))
    rows.append(("time", f"{done.seconds / 60:.1f} min"))
    value = {
        "card": str(done.card),
        "seconds": done.seconds,
        "top1": None if done.top1 is None else 100 * done.top1,
        "validation_images": done.validation_images,
        "weights": str(done.weights),
    }
    output.result(value, render.listing("trained", ("", ""), rows))


@gnet_opt.command()
@base.common
def doctor(output: Output) -> None:
    """Tell what this machine is, what is installed, and what each missing extra would bring."""
    from gnet_opt import backends, operations, target
    from gnet_opt.cli import render
    from gnet_opt.errors import ConfigError
    from gnet_opt.machine import this_machine
    from gnet_opt.preflight import preflight
    from gnet_opt.versions import tools

    machine = this_machine().to_dict()
    try:
        cpu = target.detect().name
    except ConfigError as error:
        cpu = str(error)
    probes = {name: backends.get(name).probe() for name in backends.names()}
    build = operations.build_probe()
    ready = preflight()
    value = {
        "backends": {
            name: {"available": p.available, "detail": p.detail, "version": p.version}
            for name, p in probes.items()
        },
        "build": build,
        "cpu_target": cpu,
        "jetson": None if ready.board is None else ready.to_dict(),
        "machine": machine,
        "tools": tools(),
    }
    rows = [(key, render.short(item)) for key, item in machine.items()]
    rows.append(("--target cpu means", cpu))
    found = [
        (name, "yes" if p.available else "no", p.version, p.detail) for name, p in probes.items()
    ]
    missing = build["missing"]
    state = "ready" if not missing else f"missing {', '.join(missing)}: {build['install']}"
    output.result(
        value,
        render.listing("machine", ("", ""), rows),
        render.listing("backends", ("backend", "usable", "version", "detail"), found),
        f"Building bundles (extra `build`): {state}",
        *render.board(ready),
    )


def _load(
    model: str | None, card: Path | None, weights: str | None, command: str, output: Output
) -> Model:
    from gnet_opt.errors import require
    from gnet_opt.stages.load import load

    for module in ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        require(module, "build", "read a checkpoint and build from it")
    if model is None:
        output.note(_DEMO.format(command=command))
    return load(model, card=card, weights=weights)


def _calibration(model: str | None, folder: Path | None, loaded: Model) -> ImageSet:
    from gnet_opt import paths
    from gnet_opt.errors import ConfigError
    from gnet_opt.images import ImageSet

    if folder is None and model is None:
        folder = paths.demo_calibration()
    if folder is None:
        raise ConfigError(
            "Calibration pictures are missing: pass --calibration with a folder of 100 or more "
            "pictures like those the model will see. Random data would ruin the ranges."
        )
    return ImageSet.open(folder, classes=loaded.labels)


def _evaluation(
    model: str | None, calibration: Path | None, folder: Path | None, loaded: Model
) -> ImageSet | None:
    from gnet_opt import paths
    from gnet_opt.images import ImageSet

    if folder is None and model is None and calibration is None:
        folder = paths.demo_evaluation()
    return None if folder is None else ImageSet.open(folder, classes=loaded.labels)


def _batch_value(text: str) -> Any:
    return 1 if text == "1" else text


def _slug(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip("-.") or "model"
