"""Work done in processes of its own, watched, and kept so that it is not done twice."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.files import dump_json, write_text

_POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; negative for a signal.
        seconds: From its start to its end.
        peak_rss_bytes: The most memory that it had in RAM (VmHWM, read every 20 ms); None where
            not known. What it starts in turn is not counted.
        stopped: Why it was stopped, empty when it ended by itself.
    """

    code: int
    seconds: float
    peak_rss_bytes: int | None
    stopped: str

    def problem(self, log: Path) -> str:
        """Why it gave no result, with its last words; empty when it did."""
        if self.stopped or not self.code:
            return self.stopped
        how = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"ended with {how}: {lines[-1][-300:] if lines else 'it said nothing'}"


def watch(
    command: Sequence[str | Path],
    log: Path,
    *,
    timeout: float,
    memory: float,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run a process, and stop it when it takes too long or too much memory.

    Args:
        command: The program and its arguments.
        log: Where its stderr goes; its stdout goes beside, with the suffix `.out`.
        timeout: Seconds.
        memory: Bytes in RAM.
        environment: Variables beside those of this process.
    """
    peak: int | None = None
    stopped = ""
    with log.open("wb") as errors, log.with_suffix(".out").open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            while process.poll() is None and not stopped:
                # A process that has just ended has no memory any more.
                peak = _peak_rss(process.pid) or peak
                if peak is not None and peak > memory:
                    stopped = f"stopped at {memory / 1e9:g} GB of memory"
                elif time.perf_counter() - start > timeout:
                    stopped = f"stopped after {timeout:g} s"
                else:
                    time.sleep(_POLL_SECONDS)
        finally:
            # Ctrl-C ends what was started, too.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - start
    return Ended(code=process.returncode, seconds=seconds, peak_rss_bytes=peak, stopped=stopped)


@functools.cache
def without_network() -> tuple[str, ...]:
    """What a command starts with so that it reaches no network; empty where that is not possible.

    Linux gives a process a network of its own, with nothing in it, where it allows user namespaces.
    """
    prefix = ("unshare", "--map-root-user", "--net")
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return prefix


def once(
    record: Path, key: Mapping[str, Any], make: Callable[[], dict[str, Any]], *, force: bool
) -> tuple[dict[str, Any], bool]:
    """What `make` gives, or what it gave earlier from the same key.

    Args:
        record: The JSON file that keeps it.
        key: Everything that the result depends on.
        make: The work. It may leave other files beside the record.
        force: Whether it is done again in any case.

    Returns:
        The result, and whether it was kept from earlier.
    """
    wanted = json.loads(json.dumps(key))
    if not force and record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["key"] == wanted:
            return kept["value"], True
    # After Ctrl-C an older record would be believed, beside files that are half new.
    record.unlink(missing_ok=True)
    value = make()
    write_text(record, dump_json({"key": wanted, "value": value}))
    return value, False


def _peak_rss(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else None
