from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from gnet_opt.errors import ConfigError
from gnet_opt.remote.record import Record


def test_a_lock_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it another command ends and removes it."""
    record = Record(path=tmp_path / "run.json")
    lock = tmp_path / "run.lock"
    real, calls = fcntl.flock, []

    def flock(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            lock.unlink()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with record.alone("board"):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="under way in another process"), record.alone("b"):
            raise AssertionError("two commands hold one run")
    assert not lock.exists()
    with record.alone("board"):
        pass
