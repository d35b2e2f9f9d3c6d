"""Ctrl-C for the processes that tests start."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Processes that are started here take SIGINT as in a terminal.

    A shell lets its background jobs ignore SIGINT, and whatever these start inherits that: the
    tests in `make test &`, and the commands that they interrupt.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
