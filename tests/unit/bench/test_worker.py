from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from gnet_opt.bench import worker


def test_running_before_loading_is_an_answer() -> None:
    answers = io.StringIO()
    request = {"do": "measure", "seconds": 0, "count": 1}
    worker.serve(io.StringIO(json.dumps(request) + "\n"), answers)
    assert json.loads(answers.getvalue()) == {
        "error": "The worker was asked to run before it loaded an artifact.",
        "kind": "BackendError",
    }


def test_the_end_of_the_input_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gnet_opt.bench.worker"],
        input="",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts a parent's memory to its child")
def test_peak_memory_is_the_process_own() -> None:
    ballast = bytearray(300_000_000)
    code = "from gnet_opt.bench.worker import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(done.stdout) < 200e6
    assert (worker.peak_rss() or 0) > len(ballast)
