"""Ctrl-C that hits Python where it cannot simply leave; each command is a process of its own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gnet_opt.remote import fleet
from signals import interruptible

INTERRUPTED = "Interrupted. Nothing half-written was left behind."


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """As in `make test &`: the shell lets these tests ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def command(work: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """`gnet-opt` with some lines of Python for its work, and one before it."""
    code = f"""
import os, signal, threading, time
from gnet_opt import cli
{before}

def work(*arguments, **options):
{work}
    time.sleep(20)

cli.base.gnet_opt.main = work
cli.main([])
"""
    with interruptible():
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


def test_whatever_the_shell_lets_the_tests_ignore(in_the_background: None) -> None:
    done = command("    os.kill(os.getpid(), signal.SIGINT)")
    assert (done.returncode, done.stderr) == (130, f"{INTERRUPTED}\n")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_what_the_caller_lets_it_ignore_stays_ignored(name: str) -> None:
    """As `nohup` does with SIGHUP, and a shell with SIGINT for a command in the background."""
    done = command(
        f"    os.kill(os.getpid(), signal.{name}); time.sleep(0.1); return",
        before=f"signal.signal(signal.{name}, signal.SIG_IGN)",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_ignored_stays_so_while_devices_work(in_the_background: None) -> None:
    async def look() -> tuple[object, object]:
        with fleet._cancelled_by_signals():
            return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    term = signal.getsignal(signal.SIGTERM)
    interrupt, terminate = asyncio.run(look())
    assert interrupt is signal.SIG_IGN
    assert terminate not in (signal.SIG_IGN, term)
    assert signal.getsignal(signal.SIGTERM) is term
