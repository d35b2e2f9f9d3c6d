"""Which run is under way where, kept on this machine so that an interrupted command can go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.errors import ConfigError
from gnet_opt.files import dump_json, write_text


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one run: its folder on the device, and how the device was then.

    Attributes:
        path: The file of the record; it is there while the device holds anything of the run.
    """

    path: Path

    def load(self) -> dict[str, Any] | None:
        """The record, or None where there is none, or a damaged one."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and isinstance(found.get("folder"), str)
        return found if whole and isinstance(found.get("facts"), dict) else None

    def save(self, folder: str, facts: dict[str, Any]) -> None:
        """Write the record, before the folder is made."""
        write_text(self.path, dump_json({"facts": facts, "folder": folder}))

    def delete(self) -> None:
        """Forget the run; the device holds nothing of it any more."""
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self, place: str) -> Iterator[None]:
        """Hold the run, so that no second command does the same at the same time.

        Raises:
            ConfigError: Another process does it.
        """
        try:
            import fcntl
        except ImportError:  # not POSIX: the user takes care
            yield
            return
        lock = self.path.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                try:
                    # The system gives it back when the process ends, however it ends.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise ConfigError(
                        f"The same run on {place} is under way in another process of this "
                        "machine. Wait for it, or end it first."
                    ) from error
                if not _is_still(lock, handle):
                    continue
                try:
                    yield
                finally:
                    # Still held: whoever opened this very file meanwhile finds that it is gone.
                    lock.unlink(missing_ok=True)
                return
            finally:
                os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    """Whether a path leads to an open file; a lock on one that was removed keeps nobody out."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
