"""What quantizing each layer alone costs, by reference semantics.

One layer at a time is quantized, all others stay in float; its logits are compared with those of
the float model on the same pictures. The costs add up nearly, because the errors of different
layers have little to do with each other, so the ranking tells which layers to keep in float.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.bench import accuracy, binary
from gnet_opt.bench.process import Subject, started
from gnet_opt.errors import BackendError, ConfigError, require
from gnet_opt.files import atomic_path, check_writable, dump_json, sha256_file, sha256_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.model import Model
from gnet_opt.paths import chart_fonts
from gnet_opt.preprocess import FloatArray
from gnet_opt.progress import Progress, silent
from gnet_opt.quantization import Recipe, Statistics, quantize
from gnet_opt.quantization.cache import calibrate_cached
from gnet_opt.runtime import Artifact
from gnet_opt.stages import prepare
from gnet_opt.target import Scheme, Target
from gnet_opt.versions import tools

SCHEMA = "gnet-opt/sensitivity/1"
FILE = "sensitivity.jsonl"
PLOT = "sensitivity.svg"


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What quantizing one layer alone costs.

    Attributes:
        name: The Conv or Gemm.
        macs: Its multiply-accumulates for one picture.
        noise: Power of the error that it adds to the logits, relative to that of the logits.
        agreement: Percent of pictures on which top-1 stays.
    """

    name: str
    macs: int
    noise: float
    agreement: float

    @property
    def sqnr_db(self) -> float | None:
        """The noise as a signal to quantization noise ratio in dB, None where there is none."""
        return -10 * math.log10(self.noise) if self.noise > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """One line of a sensitivity file."""
        return {
            "agreement": self.agreement,
            "macs": self.macs,
            "name": self.name,
            "noise": self.noise,
            "sqnr_db": self.sqnr_db,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerCost:
        """Read one line of a sensitivity file.

        Raises:
            KeyError: A key is missing.
            ValueError: A value is not a finite number.
            TypeError: A value is of another type.
        """
        cost = cls(
            name=str(values["name"]),
            macs=int(values["macs"]),
            noise=float(values["noise"]),
            agreement=float(values["agreement"]),
        )
        if not (math.isfinite(cost.noise) and math.isfinite(cost.agreement)):
            raise ValueError("a cost is not finite")
        return cost


def ranked(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """The costliest first; equal ones by name."""
    return sorted(costs, key=lambda cost: (-cost.noise, cost.name))


def measure(
    model: Path,
    statistics: Statistics,
    scheme: Scheme,
    pictures: Sequence[FloatArray],
    *,
    recipe: Recipe | None = None,
    jobs: int = 1,
    known: Sequence[LayerCost] = (),
    found: Callable[[LayerCost], None] = lambda cost: None,
    progress: Progress = silent,
) -> list[LayerCost]:
    """Quantize each layer alone and measure the logits; every model runs in its own process.

    Args:
        model: The float ONNX file.
        statistics: What `gnet_opt.quantization.calibrate` saw with it.
        scheme: The target's integer form.
        pictures: Preprocessed pictures, float32 of shape (planes, height, width) each.
        recipe: What the target leaves open, None for the defaults.
        jobs: Layers that are measured at the same time, with one CPU thread each.
        known: Costs from an earlier, interrupted run; these layers are left out.
        found: Called with each cost as soon as it is known.
        progress: Shows the layers.

    Returns:
        The costs of all layers, the costliest first.

    Raises:
        ModelError: The file cannot be read, or has nothing to quantize.
        BackendError: A model cannot be run, or gives no finite logits.
    """
    require("onnx_ir", "build", "quantize a model")
    from gnet_opt.quantization.describe import describe

    recipe = recipe or Recipe()
    macs = {layer["name"]: layer["macs"] for layer in describe(model)["layers"]}
    names = _layers(model)
    costs = [cost for cost in known if cost.name in names]
    todo = [name for name in names if name not in {cost.name for cost in costs}]
    if not todo:
        return ranked(costs)
    with tempfile.TemporaryDirectory(prefix="gnet-opt-sensitivity-") as folder:
        inputs = Path(folder) / "pictures.npy"
        np.save(inputs, np.stack(pictures))
        float_logits = _logits(model, inputs, Path(folder) / "float")
        threshold = binary.threshold(model, float_logits.shape[1])

        def cost_of(name: str) -> LayerCost:
            place = Path(folder) / str(names.index(name))
            place.mkdir()
            alone = replace(recipe, keep_float=frozenset(names) - {name})
            quantize(model, place / "model.onnx", statistics, scheme, alone)
            logits = _logits(place / "model.onnx", inputs, place)
            (place / "model.onnx").unlink()
            return _compare(name, macs[name], float_logits, logits, threshold)

        with ThreadPoolExecutor(max_workers=jobs) as pool:
            futures = [pool.submit(cost_of, name) for name in todo]
            try:
                done = as_completed(futures)
                for future in progress(done, "Quantizing one layer alone", len(futures)):
                    costs.append(future.result())
                    found(costs[-1])
            except BaseException:
                # Ctrl-C or a failure: what has not begun does not begin.
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return ranked(costs)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What `rank` measured.

    Attributes:
        costs: Of all layers, the costliest first.
        file: The costs as JSON lines.
        plot: The picture of them; None where matplotlib is not installed.
        images: Pictures that it was measured on.
        set: Where these pictures came from.
        resumed: Layers whose costs an earlier, interrupted run had measured.
    """

    costs: tuple[LayerCost, ...]
    file: Path
    plot: Path | None
    images: int
    set: str
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """The ranking as `gnet-opt sensitivity --json` prints it."""
        return {
            "costs": [cost.to_dict() for cost in self.costs],
            "file": str(self.file),
            "images": self.images,
            "plot": None if self.plot is None else str(self.plot),
            "resumed": self.resumed,
            "semantics": "reference",
            "set": self.set,
        }


def rank(
    model: Model,
    target: Target,
    output: Path,
    *,
    calibration: ImageSet,
    images: ImageSet | None = None,
    count: int = 64,
    recipe: Recipe | None = None,
    cache: Path | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Ranking:
    """Rank the layers of a model by what quantizing each alone costs, and write the result.

    An interrupted run goes on where it stopped when it is started again with the same arguments.

    Args:
        model: What `gnet_opt.stages.load` gave.
        target: Its integer form is used; the figures are those of reference semantics.
        output: The folder for `FILE` and `PLOT`.
        calibration: Pictures to calibrate on.
        images: Pictures to measure on; those of `calibration` by default. Labels are not needed.
        count: At most this many of them, evenly over the set.
        recipe: What the target leaves open, None for the defaults.
        cache: Folder of calibration statistics from earlier runs, or None.
        jobs: Layers measured at the same time, None for one a CPU core.
        force: Whether other measurements in `output` are replaced.
        progress: Shows how far it is.
        tell: Called with sentences beside the result.

    Raises:
        ConfigError: The target has no INT8, or `output` has other measurements.
        GnetOptError: The model or the pictures cannot be used.
    """
    if "int8" not in target.precisions:
        raise ConfigError(
            f"The target {target.name} has no int8, so no layer can be quantized for it and there "
            "is nothing to rank. Choose another target; `gnet-opt targets` lists what each has."
        )
    check_writable(output / FILE, force=True)  # what may be replaced is decided when it is read
    recipe = recipe or Recipe()
    chosen = (images or calibration).spread(count)
    for note in dict.fromkeys((*calibration.remarks(), *chosen.remarks())):
        tell(note)
    pictures = [model.preprocess.load(path) for path in chosen.files]
    with tempfile.TemporaryDirectory(prefix="gnet-opt-") as scratch:
        exported = Path(scratch) / "float.onnx"
        prepare(model, np.stack(pictures[:4]), exported, progress=progress)
        head = describe_measurement(exported, model, calibration, chosen, target.scheme, recipe)
        file = SensitivityFile(output / FILE, head)
        known = file.open(force=force)
        seen = calibrate_cached(
            exported,
            model.preprocess,
            calibration,
            method=recipe.method,
            cache=cache,
            progress=progress,
            tell=tell,
        )
        costs = measure(
            exported,
            seen,
            target.scheme,
            pictures,
            recipe=recipe,
            jobs=jobs or this_machine().cores,
            known=known,
            found=file.add,
            progress=progress,
        )
    file.finish(costs)
    plot = output / PLOT
    drawn = draw(costs, plot, title=f"{model.name} for {target.name}")
    return Ranking(
        costs=tuple(costs),
        file=output / FILE,
        plot=plot if drawn else None,
        images=len(chosen),
        set=chosen.name,
        resumed=len(known),
    )


class SensitivityFile:
    """Costs as JSON lines, written as they are found, so that a run can go on where it stopped.

    The first line says what was measured; its `key` names everything that decides the costs.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Describe a file.

        Args:
            path: The file.
            head: What is measured, JSON-able; everything that decides the costs is in it.
        """
        self._path = path
        self._head = {**head, "key": sha256_text(dump_json(dict(head))), "schema": SCHEMA}

    def open(self, *, force: bool = False) -> list[LayerCost]:
        """Read the costs of an earlier run of the same measurement, and make ready to add.

        A last line that is not whole, as an interruption leaves it, is dropped.

        Raises:
            ConfigError: The file is of another measurement and `force` is not set, or is no
                sensitivity file.
        """
        costs: list[LayerCost] = []
        if self._path.exists():
            head, costs = _read(self._path)
            if head.get("key") != self._head["key"]:
                if not force:
                    raise ConfigError(
                        f"{self._path} has other measurements: {_difference(head, self._head)}. "
                        "Pass --force to replace it, or another --output."
                    )
                costs = []
        self._write(costs)
        return costs

    def add(self, cost: LayerCost) -> None:
        """Append one cost."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(_line(cost.to_dict()))

    def finish(self, costs: Sequence[LayerCost]) -> None:
        """Write all costs in their final order."""
        self._write(costs)

    def _write(self, costs: Sequence[LayerCost]) -> None:
        with atomic_path(self._path) as temporary:
            lines = [_line(self._head), *(_line(cost.to_dict()) for cost in costs)]
            temporary.write_text("".join(lines), encoding="utf-8")


def describe_measurement(
    exported: Path,
    model: Model,
    calibration: ImageSet,
    images: ImageSet,
    scheme: Scheme,
    recipe: Recipe,
) -> dict[str, Any]:
    """Everything that decides the costs, for the first line of a sensitivity file."""
    return {
        "calibration": {"digest": calibration.digest, "images": len(calibration)},
        "graph": sha256_file(exported),
        "images": {"digest": images.digest, "images": len(images), "set": images.name},
        "model": model.name,
        "preprocess": model.preprocess.to_dict(),
        "recipe": recipe.to_dict(),
        "scheme": scheme.to_dict(),
        "semantics": "reference",
        "tools": {n: v for n, v in tools().items() if n in ("gnet-opt", "numpy", "onnxruntime")},
    }


def draw(costs: Sequence[LayerCost], path: Path, *, title: str) -> bool:
    """Draw the costs as horizontal bars in an SVG file, the costliest on top.

    Returns:
        Whether it was drawn; False where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return False
    # Its list of fonts is made once, and kept where our own things are.
    os.environ.setdefault("MPLCONFIGDIR", str(chart_fonts()))
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    total = sum(cost.noise for cost in costs) or 1.0
    shares = [100.0 * cost.noise / total for cost in costs]
    names = [cost.name for cost in costs]
    # Equal costs give equal bytes.
    options: Any = {"svg.hashsalt": "gnet-opt", "font.size": 8, "text.parse_math": False}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(8.0, 1.2 + 0.19 * len(costs)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        bars = axes.barh(range(len(costs)), shares, color="#3b6ea8")
        labels = [
            "no error" if cost.sqnr_db is None else f"{cost.sqnr_db:.1f} dB" for cost in costs
        ]
        axes.bar_label(bars, labels, padding=3, fontsize=7, color="#444444")
        axes.set_yticks(range(len(costs)), names)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlim(0.0, 1.15 * max(shares) or 1.0)
        axes.set_xlabel("share of the summed error of the logits, %; SQNR of each layer alone")
        axes.set_title(f"What INT8 costs, layer by layer: {title}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    return True


def _layers(model: Path) -> list[str]:
    from gnet_opt.quantization.regions import compute_nodes, load_graph

    return [str(node.name) for node in compute_nodes(load_graph(model).graph)]


def _logits(model: Path, inputs: Path, folder: Path) -> FloatArray:
    """Logits of a model by reference semantics, from a process of its own."""
    folder.mkdir(exist_ok=True)
    artifact = Artifact(backend="reference", path=model, files=(("onnx", model),))
    subject = Subject(name=model.name, artifact=artifact, resolve="gnet_opt.backends:get")
    pictures: FloatArray = np.load(inputs, mmap_mode="r")
    np.save(folder / "first.npy", pictures[:1])
    with started(subject.name, folder / "stderr") as worker:
        worker.load(subject, folder / "first.npy", 1)
        return worker.run(inputs, folder / "logits.npy", timeout=60.0 + 10.0 * len(pictures))


def _compare(
    name: str, macs: int, before: FloatArray, after: FloatArray, threshold: float
) -> LayerCost:
    if not before.any():
        raise BackendError("All logits of the float model are zero. Check its weights.")
    compared = accuracy.compare(before, after, None, semantics="reference", threshold=threshold)
    noise = 0.0 if compared.sqnr_db is None else 10 ** (-compared.sqnr_db / 10)
    return LayerCost(name=name, macs=macs, noise=noise, agreement=compared.agreement)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, allow_nan=False) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], list[LayerCost]]:
    """The head and the costs of a sensitivity file; what is not whole is left out."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        head = json.loads(first)
        if not isinstance(head, dict) or head.get("schema") != SCHEMA:
            raise ValueError("its first line does not name the schema")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is no sensitivity file of this version ({error}). Choose another --output."
        ) from error
    return head, list({cost.name: cost for cost in _whole(lines)}.values())


def _whole(lines: Sequence[str]) -> Iterator[LayerCost]:
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            yield LayerCost.from_dict(json.loads(line))


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Which parts of two heads differ, by name."""
    names = sorted(set(one) | set(other))
    differing = [name for name in names if name != "key" and one.get(name) != other.get(name)]
    return f"{', '.join(differing) or 'its key'} differ"
