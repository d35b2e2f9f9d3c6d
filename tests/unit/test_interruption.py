"""Ctrl-C that hits Python where it cannot simply leave; each command is a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

INTERRUPTED = "Interrupted. Nothing half-written was left behind."


def command(work: str) -> subprocess.CompletedProcess[str]:
    """`gnet-opt` with some lines of Python for its work."""
    code = f"""
import os, signal, threading, time
from gnet_opt import cli

def work(*arguments, **options):
{work}
    time.sleep(20)

cli.base.gnet_opt.main = work
cli.main([])
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_while_a_lock_is_taken() -> None:
    """As where `threading.Condition` takes its lock again: it is released without being held."""
    done = command("""
    lock = threading.Lock()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    finally:
        lock.release()
""")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{INTERRUPTED}\n")


def test_a_fault_of_a_lock_alone_is_none() -> None:
    done = command("    threading.Lock().release()")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: release unlocked lock"


@pytest.mark.parametrize(
    ("name", "ignored"), [("SIGINT", "SIGHUP"), ("SIGTERM", "SIGHUP"), ("SIGTERM", "SIGINT")]
)
def test_in_a_destructor(name: str, ignored: str) -> None:
    """There Python prints the interruption and goes on."""
    done = command(f"""
    class Gone:
        def __del__(self):
            os.kill(os.getpid(), signal.{name})
    signal.signal(signal.{ignored}, signal.SIG_IGN)
    Gone()
""")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == INTERRUPTED


def test_a_fault_in_a_destructor_is_none() -> None:
    done = command("""
    class Gone:
        def __del__(self):
            raise ValueError("odd")
    Gone()
    return
""")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "ValueError: odd"
