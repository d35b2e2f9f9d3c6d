"""What a build will do, checked as far as it can be before the work begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gnet_opt import backends, golden
from gnet_opt.bundle import MANIFEST
from gnet_opt.errors import CalibrationError, ConfigError, MissingDependencyError
from gnet_opt.files import check_writable
from gnet_opt.images import ImageSet, check_disjoint, with_labels_of
from gnet_opt.model import Model
from gnet_opt.pictures import note_turned
from gnet_opt.preprocess import INPUTS, Preprocess
from gnet_opt.printable import shown
from gnet_opt.quantization import DEFAULT_METHOD, METHODS, check_enough
from gnet_opt.runtime import TargetReader
from gnet_opt.target import PRECISIONS, Target

_FEW_IMAGES = 32
_FEW_FOR_AUTO = 40
"""Eight of them are held back to judge by."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose for a build.

    Attributes:
        precision: `int8`, `fp16`, `fp32`, or `auto`: the fastest of those that the target has, and
            of INT8 with some layers in float, that passes the gate.
        method: How ranges are chosen, one of `gnet_opt.quantization.METHODS`, or `auto`: the one
            that measures best on calibration pictures that are held back.
        bias_correction: Whether biases undo the mean error of the rounded weights.
        weight_search: Whether scales of weights may clip.
        max_drop: The most top-1 that INT8 may lose, in percentage points.
        samples: At most this many calibration pictures, taken at random.
        seed: Of that choice.
        batch: 1, or `dynamic`.
        input: What the model takes: `float32`, normalised values, or `uint8`, pixels that its own
            first nodes normalise.
        threads: CPU threads for measuring, or None for the runtime's own choice.
        cache: Folder of calibration statistics from earlier runs, or None to keep none.
        force: Whether an existing bundle is replaced.
    """

    precision: str = "int8"
    method: str = DEFAULT_METHOD
    bias_correction: bool = True
    weight_search: bool = False
    max_drop: float = 1.0
    samples: int = 256
    seed: int = 0
    batch: Literal[1, "dynamic"] = 1
    input: Literal["float32", "uint8"] = "float32"
    threads: int | None = None
    cache: Path | None = None
    force: bool = False

    def check(self, target: Target) -> None:
        """Refuse what cannot be built, before any work.

        Raises:
            ConfigError: A value is unknown, out of range or not for this target.
        """
        if self.precision not in (*PRECISIONS, "auto"):
            raise ConfigError(
                f"There is no precision {self.precision!r}; use {', '.join(PRECISIONS)} or auto."
            )
        if self.precision != "auto" and self.precision not in target.precisions:
            usable = " or ".join(f"--precision {precision}" for precision in target.precisions)
            raise ConfigError(
                f"The target {target.name} has no {self.precision}. Use {usable}, or another "
                "target; `gnet-opt targets` lists what each of them has."
            )
        if self.method not in (*METHODS, "auto"):
            raise ConfigError(
                f"There is no calibration method {self.method!r}; use auto or one of "
                f"{', '.join(METHODS)}."
            )
        if not self.max_drop >= 0.0:
            raise ConfigError(f"--max-drop is {self.max_drop}; it must be at least 0.")
        if self.samples < 1:
            raise ConfigError(f"--samples is {self.samples}; it must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads is {self.threads}; it must be at least 1.")
        if self.batch not in (1, "dynamic"):
            raise ConfigError(f"--batch is {self.batch}; it must be 1 or dynamic.")
        if self.input not in INPUTS:
            raise ConfigError(f"--input is {self.input}; it must be {' or '.join(INPUTS)}.")
        if self.input == "uint8":
            _check_pixels(target)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before the first computation; what `--dry-run` prints.

    Attributes:
        model: The loaded model.
        target: The target.
        options: What the user chose.
        calibration: The pictures to calibrate on.
        evaluation: The pictures to evaluate on, or None.
        golden: Where the golden inputs, which travel in the bundle, come from.
        semantics: `native` when this machine is the target, else `reference`.
        output: Where the bundle goes.
        notes: What was assumed or is left out, in plain sentences.
    """

    model: Model
    target: Target
    options: Options
    calibration: ImageSet
    evaluation: ImageSet | None
    golden: golden.Source
    semantics: Literal["native", "reference"]
    output: Path
    notes: tuple[str, ...]

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes the input of the model that ships.

        `model.preprocess` is how it becomes that of the network.
        """
        return replace(self.model.preprocess, input=self.options.input)

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--dry-run --json` prints it."""
        evaluation = self.evaluation
        return {
            "calibration": {"images": len(self.calibration), "set": self.calibration.name},
            "evaluation": evaluation and {"images": len(evaluation), "set": evaluation.name},
            "golden": self.golden.to_dict(),
            "input": self.options.input,
            "model": {"classes": self.model.classes, "name": self.model.name},
            "notes": list(self.notes),
            "output": str(self.output),
            "precision": self.options.precision,
            "semantics": self.semantics,
            "target": self.target.name,
        }


def golden_images(asked: str | Path | None) -> ImageSet | Literal["drawn"] | None:
    """What a user asked for as golden inputs, for `plan`.

    Args:
        asked: A folder of images, the word `drawn`, or None. A folder of that name is `./drawn`.

    Raises:
        CalibrationError: The folder holds no picture.
        ConfigError: It is neither a folder nor that word.
    """
    if asked is None:
        return None
    if asked == "drawn":
        return "drawn"
    if not str(asked) or not Path(asked).is_dir():
        raise ConfigError(
            f"--golden is '{shown(asked)}'; it must be a folder of pictures, or the word drawn."
        )
    return ImageSet.open(asked)


def plan(
    model: Model,
    target: Target,
    output: Path,
    *,
    calibration: ImageSet,
    evaluation: ImageSet | None = None,
    golden_images: ImageSet | Literal["drawn"] | None = None,
    options: Options | None = None,
) -> Plan:
    """Check everything that can be checked before the work begins.

    Args:
        model: What `gnet_opt.stages.load` gave.
        target: What to build for.
        output: The folder of the bundle.
        calibration: Pictures to calibrate on; labels are not needed.
        evaluation: Labelled pictures to measure accuracy on. Without it, calibration pictures
            that were not sampled are used where there are enough.
        golden_images: Images of which some travel in the bundle as golden inputs, or `drawn` for
            drawn ones. Without it they are calibration images.
        options: What the user chose.

    Raises:
        ConfigError: An option does not fit, or `output` exists.
        CalibrationError: Labels do not fit the model, or the sets share a picture.
        MissingDependencyError: The backend cannot run here and would have to.
    """
    options = options or Options()
    options.check(target)
    _check_replaceable(output, options.force)
    backend = backends.get(target.backend)
    if isinstance(backend, TargetReader):
        backend.check(target)
    probe = backend.probe()
    if options.precision == "auto":
        for name in target.alternatives:
            backends.get(name)
    if target.compile == "host" and not probe.available:
        raise MissingDependencyError(probe.detail)
    notes = list(model.assumptions)
    chosen = calibration.sample(options.samples, options.seed)
    chosen.check_readable()
    notes += chosen.remarks()
    if "int8" in (target.precisions if options.precision == "auto" else [options.precision]):
        _check_enough(options.method, chosen)
    if len(chosen) < _FEW_IMAGES:
        notes.append(
            f"Only {len(chosen)} calibration pictures: ranges may be too narrow. "
            "100 or more are usual."
        )
    if evaluation is None:
        evaluation = _left_over(calibration, chosen, model.classes)
        if evaluation is not None:
            notes.append(
                f"No evaluation set was given: {len(evaluation)} pictures of {calibration.name} "
                "that are not used for calibration serve instead."
            )
    if evaluation is None:
        notes.append(
            "Accuracy is not measured and the gate is not applied: pass --eval with labelled "
            "pictures that are not calibration pictures."
        )
    else:
        check_disjoint(chosen, evaluation)
        evaluation.check_readable()
        if evaluation.labels is None:
            notes.append(
                "The evaluation pictures have no labels: agreement with the float model is "
                "measured, but the accuracy gate is not applied."
            )
        else:
            evaluation.check_labels(model.classes)
        known = model.labels if evaluation.labels is not None else ()
        notes += [note for note in evaluation.remarks(known) if note not in notes]
    sets = {"calibration": chosen.files, "evaluation": evaluation.files if evaluation else ()}
    preprocess = model.preprocess
    if turned := note_turned(sets, preprocess.orientation, preprocess.check):
        notes.append(turned)
    travels = _golden(golden_images, chosen, evaluation, options.seed)
    notes += [
        note for note in (travels.images.notes if travels.images else ()) if note not in notes
    ]
    if travels.kind == "calibration" and travels.images is not None:
        count = len(travels.images)
        notes.append(
            f"{golden.FILE} in the bundle shows {count} of the {len(chosen)} calibration images, "
            "resized, to whoever gets it. Use --golden drawn for drawn ones, or --golden FOLDER "
            "for others."
        )
    # What the device finishes is not there yet, even where this machine is the device.
    native = target.is_this_machine() and target.compile == "host"
    if not native:
        why = (
            "The engine is still to be built"
            if target.is_this_machine()
            else f"This machine is not {target.name}"
        )
        notes.append(
            f"{why}: accuracy is that of reference semantics, and latency is not measured here."
        )
    return Plan(
        model=model,
        target=target,
        options=options,
        calibration=chosen,
        evaluation=evaluation,
        golden=travels,
        semantics="native" if native else "reference",
        output=output,
        notes=tuple(notes),
    )


def _golden(
    asked: ImageSet | Literal["drawn"] | None,
    calibration: ImageSet,
    evaluation: ImageSet | None,
    seed: int,
) -> golden.Source:
    """Some of the images asked for, none of which is an evaluation image."""
    if asked == "drawn":
        return golden.Source(kind="drawn", images=None)
    if asked is None:
        # They are no evaluation images: the whole set was compared with those.
        return golden.Source(kind="calibration", images=calibration.varied(golden.COUNT, seed))
    images = asked.varied(golden.COUNT, seed)
    images.check_readable()
    if evaluation is not None:
        check_disjoint(
            images,
            evaluation,
            roles=("golden", "evaluation"),
            why="Evaluation pictures only measure what ships; the build looks at golden ones.",
        )
    return golden.Source(kind="folder", images=images)


def _check_pixels(target: Target) -> None:
    """Refuse pixels as the input where a backend of the target cannot give them to a model."""
    for name in (target.backend, *target.alternatives):
        if not getattr(backends.get(name), "takes_pixels", False):
            raise ConfigError(
                f"--input uint8 is not for {target.name}: the backend {name} gives a model "
                "float32 values only. Leave --input out, or choose another target."
            )


def _check_enough(method: str, images: ImageSet) -> None:
    if method != "auto":
        check_enough(method, len(images))
    elif (different := len(set(images.hashes))) < _FEW_FOR_AUTO:
        raise CalibrationError(
            f"The method auto holds back every fifth of the {different} different calibration "
            f"pictures to judge by, and needs at least {_FEW_FOR_AUTO}. Add pictures, or use "
            "--method minmax."
        )


def _left_over(calibration: ImageSet, chosen: ImageSet, classes: int) -> ImageSet | None:
    """Calibration pictures that were not sampled, as evaluation set, where they are enough."""
    used = set(chosen.hashes)
    indices = [i for i, digest in enumerate(calibration.hashes) if digest not in used]
    if len(indices) < _FEW_IMAGES:
        return None
    # Without labels that fit, the pictures still tell the agreement.
    return with_labels_of(calibration.take(indices), classes)


def _check_replaceable(output: Path, force: bool) -> None:
    """A bundle, or one that the gate refused, replaces bundles, not somebody's folder."""
    check_writable(output, force=force, folder=True)
    rejected = output.with_name(f"{output.name}.rejected")
    check_writable(rejected, force=force, folder=True)
    for path in (output, rejected):
        if path.exists() and not _is_bundle(path):
            raise ConfigError(
                f"{path} is not a bundle, so it is not replaced. Choose another --output."
            )


def _is_bundle(path: Path) -> bool:
    """Whether a path is a bundle of any version, or an empty folder."""
    if not path.is_dir():
        return False
    manifest = path / MANIFEST
    if manifest.is_file():
        return b"gnet-opt/bundle/" in manifest.read_bytes()
    return not any(path.iterdir())
