"""`gnet-opt quantize` on several targets: accuracy, latency, sizes, time and memory.

Two networks: the embedded demo model with its own image sets, and the 2014 original with its real
weights and the ImageNet sample where GNET_OPT_DATA has them (every fifth picture in name order to
calibrate, the other 400 to evaluate).

Every build runs in a process of its own. Memory is the peak of that process and of what it starts;
`after export` is everything from calibration to the measured latency, evaluation left out.

    python benchmarks/main_job.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
DATA = Path(os.environ.get("GNET_OPT_DATA", ROOT.parent / "shared" / "data"))
TARGETS = ("cpu", "jetson", "raspberry-pi-5")


def build(network: str, target_name: str) -> dict[str, Any]:
    """Run one build in this process; called in a process of its own."""
    from gnet_opt import paths, pipeline, planning, target
    from gnet_opt.images import ImageSet
    from gnet_opt.stages.load import load

    if network == "demo":
        model = load(None)
        calibration = ImageSet.open(paths.demo_calibration(), classes=model.labels)
        evaluation = ImageSet.open(paths.demo_evaluation(), classes=model.labels)
    else:
        model = load(DATA / "bvlc_googlenet.toml")
        images = ImageSet.open(DATA / "imagenet-sample")
        order = sorted(range(len(images)), key=lambda i: images.files[i].name)
        calibration = images.take(order[::5])
        evaluation = images.take([i for rank, i in enumerate(order) if rank % 5])
    with tempfile.TemporaryDirectory() as folder:
        job = planning.plan(
            model,
            target.find(target_name),
            Path(folder) / "bundle",
            calibration=calibration,
            evaluation=evaluation,
        )
        result = pipeline.build(job)
        manifest = dict(result.bundle.manifest)
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    # A deferred build has no latency.
    stages = ("calibrate", "quantize", "compile", "golden", "latency")
    after = sum(result.seconds.get(stage, 0.0) for stage in stages)
    return {
        "accuracy": manifest["accuracy"],
        "after_export_seconds": after,
        "calibration": manifest["calibration"],
        "latency": manifest["latency"],
        "model": manifest["model"],
        "peak_rss_bytes": peak * 1024,
        "rejected": result.rejected,
        "seconds": dict(result.seconds),
        "sizes": dict(result.sizes),
        "target": manifest["target"]["name"],
        "tools": manifest["tools"],
    }


def measure() -> Path:
    """Build every network for every target, and write the result file."""
    from gnet_opt import target
    from gnet_opt.files import dump_json, write_text
    from gnet_opt.machine import this_machine

    networks = ["demo"]
    if (DATA / "bvlc_googlenet.toml").is_file():
        networks.append("bvlc")
    else:
        print(f"{DATA} has no bvlc_googlenet.toml: the 2014 original is left out.")
    builds = []
    for network in networks:
        for name in TARGETS:
            command = [sys.executable, __file__, "--build", network, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
            row = json.loads(done.stdout.splitlines()[-1])
            builds.append(row)
            print(
                f"{row['model']['name']} for {row['target']}: after export "
                f"{row['after_export_seconds']:.1f} s, peak {row['peak_rss_bytes'] / 1e9:.2f} GB"
            )
    result = {
        "builds": builds,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": this_machine().to_dict(),
        "schema": "gnet-opt/main-job/1",
    }
    path = RESULTS / f"main_job-{target.detect().name}.json"
    write_text(path, dump_json(result))
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", nargs=2, metavar=("NETWORK", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        print(json.dumps(build(*options.build)))
    else:
        print(measure())


if __name__ == "__main__":
    main()
