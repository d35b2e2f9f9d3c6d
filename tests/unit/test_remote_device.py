"""What runs on the device, as far as it needs no connection: the rest is in integration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gnet_opt.remote import device


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_other_processes_may_end_while_it_looks_for_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ended(path: Any, **options: Any) -> os.stat_result:
        # What Linux says of a process that is about to go.
        if str(path).startswith("/proc/"):
            raise ProcessLookupError(3, "No such process")
        return stat(path, **options)

    stat = os.stat
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, device.MARK: str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as ours:
        assert ours.stdout is not None
        ours.stdout.readline()
        monkeypatch.setattr(os, "stat", ended)
        found = device._marked(str(tmp_path))
        monkeypatch.undo()
        assert found == [ours.pid]
        ours.kill()
