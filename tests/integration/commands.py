"""Run `gnet-opt` inside the test process, as a shell would."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.cli import run
from signals import interruptible


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def gnet_opt(*arguments: str | Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    handlers = {
        getattr(signal, name): signal.getsignal(getattr(signal, name))
        for name in ("SIGHUP", "SIGTERM")
        if hasattr(signal, name)
    }
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(code, out.getvalue(), err.getvalue())


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def started(*arguments: str | Path, temporary: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command in a process and session of its own, and end it in any case.

    Args:
        arguments: Of the command.
        temporary: Its folder for temporary files.

    Yields:
        The process, and a mark in its environment and in that of all processes that it starts.
    """
    mark = f"GNET_OPT_TEST_MARK={temporary}"
    name, _, value = mark.partition("=")
    code = "import sys; from gnet_opt.cli import main; main(sys.argv[1:])"
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, name: value, "TMPDIR": str(temporary)},
            start_new_session=True,
        )
    try:
        yield process, mark
    finally:
        process.kill()
        process.communicate()


def marked(mark: str) -> list[int]:
    """Processes that were started with a mark in their environment, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found
