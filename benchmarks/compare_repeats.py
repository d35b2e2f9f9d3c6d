"""Whether `gnet-opt compare` calls equal what is equal, and finds a slow-down that was planted.

Each repetition makes three runs of `gnet-opt bench`, in an order by chance: twice of one bundle as
it is, and once with a backend that adds a known share to every picture (`slowed_backend.py`). Then
`gnet-opt compare` is asked about the first two, and about the first and the slowed one. Exits with
1 where it is right in fewer than 19 of 20 of either.

    gnet-opt quantize --target cpu -o build/demo-cpu
    python benchmarks/compare_repeats.py build/demo-cpu
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import slowed_backend
from gnet_opt.bench import noise
from gnet_opt.bundle import Bundle
from gnet_opt.files import dump_json, sha256_file, write_text
from gnet_opt.machine import this_machine
from gnet_opt.versions import tools

RESULTS = Path(__file__).with_name("results")
SCHEMA = "gnet-opt/compare-repeats/2"
LEAST_RIGHT = 0.95
"""19 of 20."""

_COMMAND = [sys.executable, "-c", "from gnet_opt.cli import main; main()"]
_SLOWER = 8
"""Exit code of `compare --fail-if-slower` for a run that is slower."""


def plugin(folder: Path, backend: str, share: float) -> dict[str, str]:
    """Variables with which `gnet-opt` finds the slowed backend; its entry point is in `folder`."""
    metadata = folder / "slowed_backend-1.dist-info"
    metadata.mkdir()
    write_text(metadata / "METADATA", "Metadata-Version: 2.1\nName: slowed-backend\nVersion: 1\n")
    write_text(
        metadata / "entry_points.txt",
        f"[gnet_opt.backends]\n{slowed_backend.NAME} = slowed_backend:SlowedBackend\n",
    )
    before = os.environ.get("PYTHONPATH")
    path = [str(folder), str(Path(__file__).parent), *([before] if before else [])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        slowed_backend.BACKEND: backend,
        slowed_backend.SHARE: str(share),
    }


def gnet_opt(
    *arguments: str | Path, variables: dict[str, str], allowed: tuple[int, ...] = (0,)
) -> tuple[int, Any]:
    """Run the command with --json, and give its exit code and what it printed."""
    done = subprocess.run(
        [*_COMMAND, *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    if done.returncode not in allowed:
        raise SystemExit(f"gnet-opt {arguments[0]} exits with {done.returncode}: {done.stderr}")
    return done.returncode, json.loads(done.stdout)


def repetition(
    options: argparse.Namespace, folder: Path, variables: dict[str, str], chance: random.Random
) -> dict[str, Any]:
    """Three runs, and what `compare` says of them."""
    runs = ["first", "second", "slowed"]
    chance.shuffle(runs)
    for run in runs:
        arguments = ["bench", options.bundle, "-o", folder / run, "--quiet"]
        arguments += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        if options.threads is not None:
            arguments += ["--threads", str(options.threads)]
        if run == "slowed":
            arguments += ["--backend", slowed_backend.NAME]
        gnet_opt(*arguments, variables=variables)
    found: dict[str, Any] = {"order": runs}
    for other in ("second", "slowed"):
        code, told = gnet_opt(
            "compare",
            folder / "first" / "results.json",
            folder / other / "results.json",
            "--match",
            "index",
            "--fail-if-slower",
            "5%",
            variables=variables,
            allowed=(0, _SLOWER),
        )
        (row,) = told["rows"]
        rounds = {
            run: json.loads((folder / run / "results.json").read_text(encoding="utf-8"))[
                "subjects"
            ][0]["scenarios"]["single-stream"]["rounds_ms"]
            for run in ("first", other)
        }
        found[other] = {
            "control": row["control"],
            "failed": code == _SLOWER,
            "ratio": row["ratio"],
            "rounds_ms": rounds,
            "verdict": row["verdict"],
        }
    return found


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--share", type=float, default=0.1, help="of the planted slow-down")
    parser.add_argument("-o", "--output", type=Path, help="result file")
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle)
    backend = str(bundle.manifest["target"]["backend"])
    chance = random.Random(0)
    repetitions = []
    with tempfile.TemporaryDirectory(prefix="gnet-opt-repeats-") as scratch:
        variables = plugin(Path(scratch), backend, options.share)
        for index in range(options.repetitions):
            folder = Path(scratch) / str(index)
            folder.mkdir()
            repetitions.append(repetition(options, folder, variables, chance))
            told = repetitions[-1]
            print(
                f"{index + 1} of {options.repetitions}: {told['second']['verdict']} "
                f"({told['second']['ratio']['value']:.3f}); with {100 * options.share:g} % planted "
                f"{told['slowed']['verdict']} ({told['slowed']['ratio']['value']:.3f})",
                flush=True,
            )
    equal = sum(told["second"]["verdict"] == "equal" for told in repetitions)
    slower = sum(told["slowed"]["verdict"] == "slower" for told in repetitions)
    target = bundle.manifest["target"]["name"]
    out = options.output or RESULTS / f"compare_repeats-{target}.json"
    write_text(
        out,
        dump_json(
            {
                "backend": backend,
                "called_equal": equal,
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
                "drift": [noise.STEADIED_DRIFT, noise.DRIFT],
                "found_slower": slower,
                "machine": this_machine().to_dict(),
                "model_sha256": sha256_file(bundle.model),
                "repetitions": repetitions,
                "rounds": options.rounds,
                "schema": SCHEMA,
                "seconds": options.seconds,
                "share": options.share,
                "target": target,
                "threads": options.threads,
                "tools": tools(),
            }
        ),
    )
    count = len(repetitions)
    print(f"Equal called equal: {equal} of {count}; slow-down found: {slower} of {count}: {out}")
    sys.exit(min(equal, slower) < LEAST_RIGHT * count)


if __name__ == "__main__":
    main()
