"""What `gnet-opt bench` adds to a query: our loop beside the runtime's own, on the same files.

- *ours*: the worker process of `gnet-opt bench`.
- *bare*: a loop around OpenVINO's infer request or ONNX Runtime's session, with the same options
  and nothing of ours in it.
- *benchmark_app*: OpenVINO's own program in its synchronous mode. ONNX Runtime's perf test is part
  of no package.

All take turns in rounds; ours and bare keep their processes, benchmark_app starts anew. Pass a
bundle for OpenVINO and one for ONNX Runtime, or either:

    gnet-opt quantize --target cpu -o build/cpu
    gnet-opt quantize --target raspberry-pi-5 -o build/ort
    python benchmarks/overhead.py build/cpu build/ort
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends
from gnet_opt.backends.openvino import import_quietly
from gnet_opt.bench.host import HostState
from gnet_opt.bench.process import Subject, WorkerProcess, started
from gnet_opt.bundle import Bundle
from gnet_opt.files import dump_json, write_text
from gnet_opt.golden import Golden
from gnet_opt.machine import this_machine
from gnet_opt.runtime import Artifact
from gnet_opt.versions import tools

RESULTS = Path(__file__).with_name("results")
_WARM_UP = 2.0
_APP_SECONDS = 2  # benchmark_app takes whole seconds
# As its own entry point, but that it cannot report home.
_APP = """
import sys
sys.modules["openvino_telemetry"] = None
from openvino.tools.benchmark.main import main
main()
"""


def bare_query(backend: str, model: str, picture: str, threads: int) -> Callable[[], object]:
    """One query of the runtime, as its documentation has it."""
    batch = np.load(picture)
    if backend == "openvino":
        openvino = import_quietly()
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        request.set_input_tensor(0, openvino.Tensor(batch))
        return lambda: request.infer()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: batch}
    return lambda: session.run(None, given)


def be_bare(backend: str, model: str, picture: str, threads: int) -> None:
    """For each line of stdin, a number of seconds, time queries and print what came out."""
    query = bare_query(backend, model, picture, threads)
    for line in sys.stdin:
        samples = []
        begin = now = time.perf_counter_ns()
        end = begin + int(float(line) * 1e9)
        while now < end:
            before = time.perf_counter_ns()
            query()
            now = time.perf_counter_ns()
            samples.append(now - before)
        print(json.dumps({"elapsed_ns": now - begin, "samples_ns": samples}), flush=True)


@contextlib.contextmanager
def bare(artifact: Artifact, picture: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A process of `be_bare`."""
    names = [artifact.backend, str(artifact.path), str(picture), str(threads)]
    process = subprocess.Popen(
        [sys.executable, __file__, "--bare", *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def turn_of_bare(process: subprocess.Popen[str], seconds: float) -> dict[str, float]:
    """Median of a query, and a query's share of the whole time, in microseconds."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{seconds}\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    samples = answer["samples_ns"]
    return {
        "p50_us": statistics.median(samples) / 1e3,
        "period_us": answer["elapsed_ns"] / len(samples) / 1e3,
    }


def turn_of_ours(worker: WorkerProcess, seconds: float) -> dict[str, float]:
    """The same of ours; half of the time for each of the two figures."""
    counted = {"count": 1, "seconds": seconds / 2}
    single = worker.ask({"do": "measure", **counted}, seconds + 60)
    whole = worker.ask({"do": "offline", "batch": 1, **counted}, seconds + 60)
    return {
        "p50_us": statistics.median(single["samples_ns"]) / 1e3,
        "period_us": whole["elapsed_ns"] / whole["pictures"] / 1e3,
    }


def turn_of_benchmark_app(model: Path, threads: int) -> dict[str, float]:
    """The median that benchmark_app prints, in microseconds."""
    options = ["-api", "sync", "-hint", "none", "-nstreams", "1", "-nthreads", str(threads)]
    files = ["-m", str(model), "-d", "CPU", "-infer_precision", "f32"]
    done = subprocess.run(
        [sys.executable, "-c", _APP, *files, *options, "-t", str(_APP_SECONDS)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return {"p50_us": parse_benchmark_app(done.stdout)}


def parse_benchmark_app(text: str) -> float:
    """The median latency in what benchmark_app printed, in microseconds."""
    found = re.search(r"Median:\s+([\d.]+) (us|ms)", text)
    if found is None:
        raise ValueError(f"benchmark_app printed no median: {text[-400:]}")
    return float(found[1]) * (1e3 if found[2] == "ms" else 1.0)


def compare(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """What ours adds to a query of the bare loop, and how the medians agree, paired by round."""

    def summed(values: list[float]) -> dict[str, float]:
        return {"high": max(values), "low": min(values), "median": statistics.median(values)}

    names = [name for name in rounds[0] if name != "ours"]
    return {
        "added_p50_us": summed([r["ours"]["p50_us"] - r["bare"]["p50_us"] for r in rounds]),
        "added_us": summed([r["ours"]["period_us"] - r["bare"]["period_us"] for r in rounds]),
        "p50_over": {
            name: summed([r["ours"]["p50_us"] / r[name]["p50_us"] for r in rounds])
            for name in names
        },
        "rounds": rounds,
    }


def measure(root: Path, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure one bundle."""
    bundle = Bundle.open(root)
    bundle.check()
    backend = backends.get(bundle.manifest["target"]["backend"])
    artifact = backend.artifact(bundle.root)
    subject = Subject(name="ours", artifact=artifact, resolve="gnet_opt.backends:get")
    chance = random.Random(0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        picture = folder / "input.npy"
        pixels = Golden.read(bundle.path("golden")).pixels[:1]
        np.save(picture, bundle.preprocess.normalize(pixels))
        worker = stack.enter_context(started("ours", folder / "stderr"))
        worker.load(subject, picture, threads)
        worker.ask({"do": "warm", "seconds": _WARM_UP}, 60)
        process = stack.enter_context(bare(artifact, picture, threads))
        turn_of_bare(process, _WARM_UP)
        turns: dict[str, Callable[[], dict[str, float]]] = {
            "bare": lambda: turn_of_bare(process, seconds),
            "ours": lambda: turn_of_ours(worker, seconds),
        }
        if backend.name == "openvino":
            turns["benchmark_app"] = lambda: turn_of_benchmark_app(artifact.path, threads)
        found = []
        for _ in range(rounds):
            order = chance.sample(sorted(turns), len(turns))
            found.append({name: turns[name]() for name in order})
    return {
        "backend": backend.name,
        "model": bundle.manifest["model"]["name"],
        "precision": bundle.manifest["precision"],
        **compare(found),
    }


def main() -> None:
    """Measure, write the result file and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        backend, model, picture, threads = options.bare
        be_bare(backend, model, picture, int(threads))
        return
    if not options.bundles:
        parser.error("pass at least one bundle")
    start = HostState.read()
    measured = [
        measure(root, options.threads, options.rounds, options.seconds) for root in options.bundles
    ]
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "end": HostState.read().to_dict(),
        "machine": this_machine().to_dict(),
        "results": measured,
        "schema": "gnet-opt/overhead/1",
        "start": start.to_dict(),
        "threads": options.threads,
        "tools": tools(),
    }
    for row in measured:
        added = row["added_us"]
        ratios = ", ".join(
            f"p50 {ratio['median']:.3f} of {name}'s [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            for name, ratio in row["p50_over"].items()
        )
        print(
            f"{row['model']} {row['precision']}, {row['backend']}: {added['median']:+.1f} µs a "
            f"query [{added['low']:+.1f}, {added['high']:+.1f}], {ratios}"
        )
    out = options.output or RESULTS / f"overhead-{options.threads}t.json"
    write_text(out, dump_json(result))
    print(out)


if __name__ == "__main__":
    main()
