"""What `gnet-opt bench` adds to a query: our loop beside the runtime's own, on the same files.

- *ours*: the loop of `gnet-opt bench` around `Runner.run`.
- *bare*: a loop around the infer request or session that this runner holds, and nothing of ours.
- *benchmark_app*: OpenVINO's own program in its synchronous mode. ONNX Runtime's perf test is part
  of no package.

One model differs from itself by a few percent from one process to the next, hundreds of times what
is looked for. So ours and bare share a process and a request, and take turns of a few queries in an
order by chance; what ours adds is the median of the differences of neighbours. A second bare loop
takes its turns as well, and ours is held against the mean of both: what the second adds to the
first is nothing, and shows what the method can see. benchmark_app has a process of its own, as does
the worker of `gnet-opt bench` beside it, both anew in each round. Its clock runs inside the infer
request; ours, like any caller's, also sees what OpenVINO's Python binding does around that, which
is measured in each round and given apart.

Pass a bundle for OpenVINO and one for ONNX Runtime, or either:

    gnet-opt quantize --target cpu -o build/cpu
    gnet-opt quantize --target raspberry-pi-5 -o build/ort
    python benchmarks/overhead.py build/cpu build/ort
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from gnet_opt import backends
from gnet_opt.bench import scenarios
from gnet_opt.bench.host import HostState
from gnet_opt.bench.process import Subject, started
from gnet_opt.bundle import Bundle
from gnet_opt.files import dump_json, write_text
from gnet_opt.golden import Golden
from gnet_opt.machine import this_machine
from gnet_opt.runtime import Artifact, Backend, InputArray
from gnet_opt.versions import tools

Array = npt.NDArray[np.float64]

RESULTS = Path(__file__).with_name("results")
_WARM_UP = 2.0
_TURN = 16
"""Queries of a turn: few, so that neighbours meet the same machine, and enough for its first one,
which finds the loop out of the caches."""

_CLOCKED = 300
"""Queries whose time is taken by both clocks."""

_APP_SECONDS = 2  # benchmark_app takes whole seconds
_RESAMPLES = 1000
# As its own entry point, but that it cannot report home.
_APP = """
import sys
sys.modules["openvino_telemetry"] = None
from openvino.tools.benchmark.main import main
main()
"""


def bare_query(runner: Any, picture: InputArray) -> Callable[[], object]:
    """One query of the request or session inside a runner, with its logits read.

    As the documentation of the runtime has it. A request of OpenVINO keeps its last input.
    """
    runner.run(picture)
    if hasattr(runner, "_request"):
        request = runner._request
        return lambda: request.infer().to_tuple()[0]
    session = runner._session
    given = {session.get_inputs()[0].name: picture}
    return lambda: session.run(None, given)


Turn = tuple[list[int], int]
"""The time of each query of a loop, and of all together with what is between them, in ns."""


def bare_loop(query: Callable[[], object], count: int) -> Turn:
    """Run so many queries."""
    samples = []
    start = time.perf_counter_ns()
    for _ in range(count):
        before = time.perf_counter_ns()
        query()
        samples.append(time.perf_counter_ns() - before)
    return samples, time.perf_counter_ns() - start


def our_loop(query: Callable[[], object], count: int) -> Turn:
    """Run so many queries with the loop of `gnet-opt bench`.

    It collects garbage before the first one. That is once in the hundreds of queries of a round
    there, and would be once in a few here, so the time of all begins after it. The clock that tells
    so is a function of Python, whose calls count as ours.
    """
    ticks: list[int] = []

    def clock() -> int:
        ticks.append(time.perf_counter_ns())
        return ticks[-1]

    samples = scenarios.back_to_back(query, seconds=0, count=count, clock=clock)
    return samples, ticks[-1] - ticks[0]


def side_by_side(root: Path, threads: int, seconds: float) -> dict[str, list[list[float]]]:
    """Let the three loops take turns in this process.

    Returns:
        For each loop the median and the mean period of a query in each turn, in microseconds.
    """
    backend, artifact, picture = opened(root)
    chance = random.Random(0)
    with backend.open(artifact, threads=threads) as runner:
        bare = bare_query(runner, picture)
        loops: dict[str, Callable[[], Turn]] = {
            "again": lambda: bare_loop(bare, _TURN),
            "bare": lambda: bare_loop(bare, _TURN),
            "ours": lambda: our_loop(lambda: runner.run(picture), _TURN),
        }
        turns: dict[str, list[list[float]]] = {name: [] for name in loops}
        # What our loop would look through, and find in the caches of its first query.
        gc.collect()
        gc.freeze()
        measuring = time.perf_counter() + _WARM_UP
        end = measuring + seconds
        while (now := time.perf_counter()) < end:
            for name in chance.sample(sorted(loops), len(loops)):
                samples, together = loops[name]()
                if now >= measuring:
                    turns[name].append([statistics.median(samples) / 1e3, together / _TURN / 1e3])
    return turns


def compare(turns: dict[str, list[list[float]]]) -> dict[str, Any]:
    """What ours adds to the two bare loops, and the second of these to the first, by turns."""
    again, bare, ours = (np.array(turns[name]) for name in ("again", "bare", "ours"))
    return {"control": added(again, bare), "ours": added(ours, (bare + again) / 2)}


def added(loop: Array, bare: Array) -> dict[str, Any]:
    """What a loop adds to the bare one, paired by turn: medians, with 95 % intervals."""
    period, p50 = loop[:, 1] - bare[:, 1], loop[:, 0] / bare[:, 0]
    return {"added_us": _median(period), "p50_over": _median(p50)}


def _median(values: Array) -> dict[str, float]:
    """The median, and the 2.5th and 97.5th percentile of medians of values drawn again."""
    chance = np.random.default_rng(0)
    drawn = np.median(chance.choice(values, (_RESAMPLES, len(values))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {
        "high": float(high),
        "low": float(low),
        "median": float(np.median(values)),
        "n": len(values),
    }


def worker_p50_us(root: Path, threads: int, seconds: float) -> float:
    """The median of single queries in a worker of `gnet-opt bench`, in microseconds."""
    _, artifact, pictures = opened(root)
    subject = Subject(name="ours", artifact=artifact, resolve="gnet_opt.backends:get")
    with (
        tempfile.TemporaryDirectory() as folder,
        started("ours", Path(folder) / "stderr") as worker,
    ):
        picture = Path(folder) / "input.npy"
        np.save(picture, pictures)
        worker.load(subject, picture, threads)
        worker.ask({"do": "warm", "seconds": _WARM_UP}, 60)
        told = worker.ask({"do": "measure", "count": 1, "seconds": seconds}, seconds + 60)
    return float(statistics.median(told["samples_ns"])) / 1e3


def around_the_request_us(root: Path, threads: int) -> float:
    """What a bare query takes beyond the request's own clock, which is benchmark_app's.

    Returns:
        The median, in microseconds.
    """
    backend, artifact, picture = opened(root)
    with backend.open(artifact, threads=threads) as runner:
        query, request = bare_query(runner, picture), cast("Any", runner)._request
        beyond: list[float] = []
        for _ in range(_CLOCKED):
            (sample,), _ = bare_loop(query, 1)
            beyond.append(sample / 1e3 - request.latency * 1e3)
    return statistics.median(beyond)


def opened(root: Path) -> tuple[Backend, Artifact, InputArray]:
    """The backend of a bundle, its artifact, and a picture as its model takes it."""
    bundle = Bundle.open(root)
    bundle.check()
    backend = backends.get(bundle.manifest["target"]["backend"])
    pixels = Golden.read(bundle.path("golden")).pixels[:1]
    return backend, backend.artifact(bundle.root), bundle.preprocess.tensor(pixels)


def turn_of_benchmark_app(model: Path, threads: int) -> float:
    """The median that benchmark_app prints, in microseconds."""
    options = ["-api", "sync", "-hint", "none", "-nstreams", "1", "-nthreads", str(threads)]
    files = ["-m", str(model), "-d", "CPU", "-infer_precision", "f32"]
    done = subprocess.run(
        [sys.executable, "-c", _APP, *files, *options, "-t", str(_APP_SECONDS)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return parse_benchmark_app(done.stdout)


def parse_benchmark_app(text: str) -> float:
    """The median latency in what benchmark_app printed, in microseconds."""
    found = re.search(r"Median:\s+([\d.]+) (us|ms)", text)
    if found is None:
        raise ValueError(f"benchmark_app printed no median: {text[-400:]}")
    return float(found[1]) * (1e3 if found[2] == "ms" else 1.0)


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one bundle; the loops in a process of their own, for every start of it."""
    manifest = Bundle.open(root).manifest
    backend = manifest["target"]["backend"]
    command = [sys.executable, __file__, str(root), "--threads", str(options.threads)]
    command += ["--seconds", str(options.seconds), "--side-by-side"]
    turns: dict[str, list[list[float]]] = {}
    for _ in range(options.starts):
        told = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout
        for name, found in json.loads(told).items():
            turns.setdefault(name, []).extend(found)
    result: dict[str, Any] = {
        "backend": backend,
        "model": manifest["model"]["name"],
        "precision": manifest["precision"],
        "bare_p50_us": statistics.median(p50 for p50, _ in turns["bare"]),
        **compare(turns),
        "turns_us": turns,
    }
    if backend == "openvino":
        model = opened(root)[1].path
        rounds = [
            {
                "around": around_the_request_us(root, options.threads),
                "benchmark_app": turn_of_benchmark_app(model, options.threads),
                "ours": worker_p50_us(root, options.threads, _APP_SECONDS),
            }
            for _ in range(options.rounds)
        ]
        around, app, ours = (
            np.array([each[name] for each in rounds])
            for name in ("around", "benchmark_app", "ours")
        )
        result["benchmark_app"] = {
            "around_us": _median(around),
            "p50_over": _median(ours / app),
            "p50_over_by_its_clock": _median((ours - around) / app),
            "rounds_us": rounds,
        }
    return result


def told(row: dict[str, Any]) -> str:
    """A result in a line."""

    def interval(figure: dict[str, float], digits: int) -> str:
        low, high = f"{figure['low']:.{digits}f}", f"{figure['high']:.{digits}f}"
        return f"{figure['median']:.{digits}f} [{low}, {high}]"

    ours, control = row["ours"], row["control"]
    line = (
        f"{row['model']} {row['precision']}, {row['backend']}, {row['bare_p50_us']:.0f} us a "
        f"query: {interval(ours['added_us'], 1)} us added (bare to itself "
        f"{interval(control['added_us'], 1)}), p50 {interval(ours['p50_over'], 4)} of the bare "
        f"one, n = {ours['added_us']['n']} turns of {_TURN}"
    )
    if "benchmark_app" in row:
        over, alike, around = (
            row["benchmark_app"][name]
            for name in ("p50_over", "p50_over_by_its_clock", "around_us")
        )
        line += (
            f"; {interval(over, 3)} of benchmark_app's, n = {over['n']}, and {interval(alike, 3)} "
            f"without the {interval(around, 0)} us around the request that its clock leaves out"
        )
    return line


def main() -> None:
    """Measure, write the result file and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--starts", type=int, default=3, help="processes that the loops share")
    parser.add_argument("--seconds", type=float, default=40.0, help="of such a process")
    parser.add_argument("--rounds", type=int, default=10, help="of benchmark_app beside ours")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--side-by-side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side_by_side:
        print(json.dumps(side_by_side(options.bundles[0], options.threads, options.seconds)))
        return
    start = HostState.read()
    measured = []
    for root in options.bundles:
        measured.append(measure(root, options))
        print(told(measured[-1]), flush=True)
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "end": HostState.read().to_dict(),
        "machine": this_machine().to_dict(),
        "results": measured,
        "schema": "gnet-opt/overhead/3",
        "start": start.to_dict(),
        "threads": options.threads,
        "tools": tools(),
        "turn_queries": _TURN,
    }
    out = options.output or RESULTS / f"overhead-{options.threads}t.json"
    write_text(out, dump_json(result))
    print(out)


if __name__ == "__main__":
    main()
