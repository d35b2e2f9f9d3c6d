"""Hashing, and writing in which a reader sees the old file or the new one, never half of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gnet_opt.errors import ConfigError
from gnet_opt.printable import printable_json


def is_file(path: Path) -> bool:
    """Whether a path is a file; False, too, for a name that is too long for the file system."""
    try:
        return path.is_file()
    except OSError:
        return False


def text_of(path: Path) -> str:
    """The text of a file of the system's, empty where it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """The SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def dump_json(value: Any) -> str:
    """JSON as gnet-opt writes it: sorted keys, two spaces, a newline at the end, no NaN.

    Whatever the strings hold, the text can be written as UTF-8 and shown on a terminal.
    """
    document = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return printable_json(document) + "\n"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` that becomes `path` when the block ends well.

    When the block raises (Ctrl-C and a full disk too) the temporary file is removed and `path`
    is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{path.suffix}")
    # The system takes the umask off, which only it can read without setting it.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path, *, force: bool, folder: bool = False) -> None:
    """Refuse early what cannot be written: nothing is overwritten unless `force` is set.

    Args:
        path: The file to write, or the folder.
        force: Whether a file may replace a file, and a folder a folder.
        folder: Whether `path` will be a folder.

    Raises:
        ConfigError: `path` exists and `force` is not set, or it cannot be there.
    """
    full = path.absolute()
    above = next((parent for parent in full.parents if parent.exists()), full)
    if full == above or full == Path.cwd():
        raise ConfigError(f"{path} cannot be replaced. Choose another --output.")
    if not above.is_dir():
        raise ConfigError(f"{above} is no folder, so {path} cannot be. Choose another --output.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{above} is not writable. Choose another --output.")
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path} is a link to nothing. Remove it, or choose another --output.")
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already. Pass --force to replace it, or another --output."
        )
    if path.is_dir() and not folder:
        raise ConfigError(f"{path} is a folder. Pass the name of a file as --output.")


@contextlib.contextmanager
def staging_directory(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` to fill, and remove it at the end unless it was published.

    It is on the file system of `path`, so that `publish` is one rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, path: Path) -> None:
    """Put a complete folder in the place of `path`; an older `path` goes only when it is there."""
    if not path.exists():
        staging.rename(path)
        return
    with staging_directory(path) as retired:
        old = retired / "old"
        try:
            path.rename(old)
            staging.rename(path)
        except BaseException:
            # Ctrl-C between the two renames, too, must not cost the older folder.
            if old.exists() and not path.exists():
                old.rename(path)
            raise
