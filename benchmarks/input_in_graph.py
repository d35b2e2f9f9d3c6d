"""What it gains to normalise pictures in the graph: `--input uint8` beside the float32 input.

For each backend, in float and in INT8, three ways from a picture file to logits, one picture after
the other:

- `float32`: `Preprocess.normalize` in NumPy, then a model that takes its values;
- `uint8`: the pixels, and the same model with the normalisation in front (`stages.pixels`);
- `float32, as usual`: as `float32`, but normalised by the expression that most programs have,
  `(pixels.astype(np.float32) - mean) / std` and then a transpose. The same values, more slowly.

Each way runs in a process of its own; they take turns in rounds, each in an order by chance, in
several sittings with new processes. Every picture is timed in four steps: decode, resize and crop,
normalise, infer. The first two are the same for all.

    python benchmarks/input_in_graph.py
    python benchmarks/input_in_graph.py --target x86-avx2 --backend onnxruntime
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends, paths, target
from gnet_opt.files import dump_json, write_text
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.model import Model
from gnet_opt.pictures import open_picture
from gnet_opt.preprocess import PixelArray, Preprocess
from gnet_opt.quantization import calibrate, quantize
from gnet_opt.runtime import Artifact
from gnet_opt.stages import prepare
from gnet_opt.stages.load import load
from gnet_opt.stages.pixels import take_pixels
from gnet_opt.target import Target
from gnet_opt.versions import tools

RESULTS = Path(__file__).with_name("results")
DATA = Path(os.environ.get("GNET_OPT_DATA", Path(__file__).parents[2] / "shared" / "data"))
STEPS = ("decode", "resize", "normalize", "infer")
PLAIN, PIXELS, USUAL = "float32", "uint8", "float32, as usual"
WARM_UP = 2
"""Turns of every process before the first round."""

Steps = list[tuple[int, int, int, int]]
"""Nanoseconds of the four steps of each picture of a turn."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way from a picture file to logits."""

    backend: str
    precision: str
    input: str
    artifact: Artifact
    preprocess: Preprocess

    @property
    def name(self) -> str:
        """Backend, precision and input in one text."""
        return f"{self.backend}, {self.precision}, {self.input}"

    def values(self, pixels: PixelArray) -> np.ndarray[Any, Any]:
        """What its model takes of one picture."""
        if self.input != USUAL:
            return self.preprocess.tensor(pixels)
        values = pixels[..., ::-1] if self.preprocess.channels == "bgr" else pixels
        mean = np.asarray(self.preprocess.mean, np.float32)
        std = np.asarray(self.preprocess.std, np.float32)
        normalized = (values.astype(np.float32) - mean) / std
        return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def work(way: Way, files: tuple[Path, ...], threads: int, asked: Connection) -> None:
    """Be the process of one way: run all pictures whenever asked, and answer with the times."""
    clock = time.perf_counter_ns
    with backends.get(way.backend).open(way.artifact, threads=threads) as runner:
        while asked.recv():
            steps: Steps = []
            for path in files:
                start = clock()
                with open_picture(path) as image:
                    image.load()
                    decoded = clock()
                    pixels = way.preprocess.pixels(image)
                resized = clock()
                values = way.values(pixels)
                normalized = clock()
                runner.run(values[None])
                inferred = clock()
                steps.append(
                    (
                        decoded - start,
                        resized - decoded,
                        normalized - resized,
                        inferred - normalized,
                    )
                )
            asked.send(steps)


@contextlib.contextmanager
def started(way: Way, files: tuple[Path, ...], threads: int) -> Iterator[Connection]:
    """A process of one way, ended whatever happens."""
    context = multiprocessing.get_context("spawn")  # no thread pool of this process in it
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(way, files, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def turn(process: Connection) -> Steps:
    """Ask a process for one turn."""
    process.send(True)
    steps: Steps = process.recv()
    return steps


def ways(
    model: Model,
    images: ImageSet,
    device: Target,
    names: list[str],
    folder: Path,
) -> list[Way]:
    """Float and INT8 for each backend as `gnet-opt quantize` makes them, with each input."""
    pixels = np.stack([model.preprocess.load_pixels(path) for path in images.files])
    inputs = model.preprocess.normalize(pixels)
    float_file = folder / "float.onnx"
    prepare(model, inputs[:4], float_file)
    seen = calibrate(float_file, inputs, histograms=False)
    found = []
    for name in names:
        scheme = device.scheme if name == device.backend else device.alternatives[name]
        int8_file = folder / f"int8-{name}.onnx"
        quantize(float_file, int8_file, seen, scheme)
        for precision, plain in (("float", float_file), ("INT8", int8_file)):
            taking = folder / f"{name}-{precision}-pixels.onnx"
            take_pixels(plain, taking, model.preprocess, pixels[:8])
            for kind, file in ((PLAIN, plain), (PIXELS, taking)):
                out = folder / f"{name}-{precision}-{kind}"
                out.mkdir()
                compiled = backends.get(name).compile(file, device, out)
                assert isinstance(compiled, Artifact)
                preprocess = model.preprocess
                if kind == PIXELS:
                    preprocess = Preprocess.from_dict({**preprocess.to_dict(), "input": "uint8"})
                for way in (kind, USUAL) if kind == PLAIN else (kind,):
                    found.append(
                        Way(
                            backend=name,
                            precision=precision,
                            input=way,
                            artifact=compiled,
                            preprocess=preprocess,
                        )
                    )
    return found


def measure(
    found: list[Way], files: tuple[Path, ...], threads: int, sittings: int, rounds: int
) -> dict[str, list[Steps]]:
    """The turns of every way, in interleaved rounds."""
    turns: dict[str, list[Steps]] = {way.name: [] for way in found}
    chance = random.Random(0)
    for _ in range(sittings):
        with contextlib.ExitStack() as stack:
            # All processes start at once, but each warms up alone.
            running = [
                (way.name, stack.enter_context(started(way, files, threads))) for way in found
            ]
            for _, process in running:
                for _ in range(WARM_UP):
                    turn(process)
            for _ in range(rounds):
                chance.shuffle(running)
                for name, process in running:
                    turns[name].append(turn(process))
    return turns


def summary(found: list[Way], turns: dict[str, list[Steps]]) -> dict[str, Any]:
    """Medians of each way, and what `uint8` gains within a round."""
    rows, gains = {}, []
    medians = {
        name: {
            **{
                step: [statistics.median(one[at] for one in steps) / 1e6 for steps in taken]
                for at, step in enumerate(STEPS)
            },
            "normalize and infer": [
                statistics.median(one[2] + one[3] for one in steps) / 1e6 for steps in taken
            ],
            "picture": [statistics.median(sum(one) for one in steps) / 1e6 for steps in taken],
        }
        for name, taken in turns.items()
    }
    for way in found:
        taken = medians[way.name]
        whole = taken["picture"]
        rows[way.name] = {
            "backend": way.backend,
            "input": way.input,
            "median_ms": {step: statistics.median(values) for step, values in taken.items()},
            "n": sum(len(steps) for steps in turns[way.name]),
            "precision": way.precision,
            "rounds_ms": taken,
            "spread": (max(whole) - min(whole)) / statistics.median(whole),
        }
    for way in (way for way in found if way.input == PIXELS):
        for beside in (PLAIN, USUAL):
            other = medians[f"{way.backend}, {way.precision}, {beside}"]
            own = medians[way.name]
            gains.append(
                {
                    "backend": way.backend,
                    "over": beside,
                    "precision": way.precision,
                    "saved_ms": quartiles(
                        [
                            theirs - ours
                            for theirs, ours in zip(
                                other["normalize and infer"],
                                own["normalize and infer"],
                                strict=True,
                            )
                        ]
                    ),
                    "times_as_fast": quartiles(
                        [
                            theirs / ours
                            for theirs, ours in zip(other["picture"], own["picture"], strict=True)
                        ]
                    ),
                }
            )
    return {"gains": gains, "ways": rows}


def quartiles(values: list[float]) -> dict[str, float]:
    """The median, and the middle half of the rounds."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"high": float(high), "low": float(low), "median": float(median)}


def main() -> None:
    """Measure, write the result file and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", action="append", choices=("openvino", "onnxruntime"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sittings", type=int, default=6, help="with new processes each")
    parser.add_argument("--rounds", type=int, default=4, help="in a sitting")
    parser.add_argument("--pictures", type=int, default=12, help="in a turn")
    parser.add_argument("--calibration", type=int, default=64, help="pictures")
    parser.add_argument("--target", default="cpu", help="whose integer form to use")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    networks = {"demo-machine-parts": (load(None), paths.demo_calibration())}
    card = DATA / "bvlc_googlenet.toml"
    if card.is_file():
        networks["bvlc-googlenet"] = (load(card), DATA / "imagenet-sample")
    else:
        print(f"{card} is absent: the 2014 original is left out.")
    device = target.find(options.target)
    result: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": this_machine().to_dict(),
        "networks": {},
        "schema": "gnet-opt/input-in-graph/1",
        "settings": {
            name: getattr(options, name)
            for name in ("calibration", "pictures", "rounds", "sittings", "threads")
        },
        "target": device.name,
        "tools": tools(),
    }
    for name, (model, folder) in networks.items():
        images = ImageSet.open(folder)
        with tempfile.TemporaryDirectory(prefix="gnet-opt-") as scratch:
            found = ways(
                model,
                images.spread(options.calibration),
                device,
                options.backend or ["openvino", "onnxruntime"],
                Path(scratch),
            )
            turns = measure(
                found,
                images.spread(options.pictures).files,
                options.threads,
                options.sittings,
                options.rounds,
            )
        measured = summary(found, turns)
        result["networks"][name] = {**measured, "set": images.name}
        print(f"{name}, {options.threads} thread(s)")
        for way, row in measured["ways"].items():
            times = ", ".join(f"{step} {row['median_ms'][step]:.2f}" for step in STEPS)
            spread = f"{100 * row['spread']:.0f} %"
            print(f"  {way}: {times} ms; n {row['n']}, spread of the picture {spread}")
        for gain in measured["gains"]:
            saved, faster = gain["saved_ms"], gain["times_as_fast"]
            print(
                f"  {gain['backend']}, {gain['precision']}: uint8 saves {saved['median']:.3f} ms "
                f"[{saved['low']:.3f}, {saved['high']:.3f}] over {gain['over']}; a picture is "
                f"{faster['median']:.3f} [{faster['low']:.3f}, {faster['high']:.3f}] times as fast"
            )
    out = options.output or RESULTS / f"input_in_graph-{device.name}-{options.threads}t.json"
    write_text(out, dump_json(result))
    print(out)


if __name__ == "__main__":
    main()
