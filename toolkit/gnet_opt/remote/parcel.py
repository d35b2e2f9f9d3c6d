"""What is copied to a device: gnet-opt's own source, the inputs, and the job's description."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from gnet_opt import __version__
from gnet_opt.errors import ConfigError, IntegrityError
from gnet_opt.files import dump_json, sha256_file, sha256_text
from gnet_opt.remote.connection import device_program

PARCEL = "parcel.json"
OUT = PurePosixPath("out")
"""Where a job leaves its results, as a word of its command."""

_PACKAGE = Path(__file__).resolve().parents[1]
_DEMO = "_data"
"""The demo model and its pictures in a wheel; nothing on a device needs them."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something to run on a device.

    Attributes:
        command: The words after the name of Python. A `Path` is a file or folder of this machine
            that is copied; a `PurePosixPath` is a place below the job's folder, such as `OUT`.
        backends: Names of the backends that it uses, whose runtimes the device must have.
        shown: Gives the files, as text by name, that show the result file to people. The device
            cannot write where it was reached from, so they are written again here. May raise
            `IntegrityError` for what is no result file.
    """

    command: tuple[str | PurePath, ...]
    backends: tuple[str, ...] = ()
    shown: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda document: {}


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """Everything that a job needs on the device, ready to copy.

    Attributes:
        command: The words after the name of Python; paths are relative to the job's folder.
        files: What to copy, by path in the job's folder: a file of this machine, or bytes.
        digests: SHA-256 of each.
        places: The paths of the user's inputs as the user gave them, by path in the job's folder.
    """

    command: tuple[str, ...]
    files: Mapping[str, bytes | Path]
    digests: Mapping[str, str]
    places: Mapping[str, str]

    @classmethod
    def pack(cls, work: Work) -> Parcel:
        """Gather the files of a work.

        Raises:
            ConfigError: An input does not exist, or it is a folder without files.
        """
        files: dict[str, bytes | Path] = {
            "device.py": device_program().encode(),
            "package.tar.gz": package(),
        }
        command, places = [], {}
        for index, word in enumerate(work.command):
            if isinstance(word, Path):
                place = f"inputs/{index}/{word.absolute().name}"
                places[place] = str(word)
                files.update(_below(word, place))
                command.append(place)
            else:
                command.append(str(word))
        digests = {
            path: hashlib.sha256(content).hexdigest()
            if isinstance(content, bytes)
            else sha256_file(content)
            for path, content in files.items()
        }
        return cls(command=tuple(command), files=files, digests=digests, places=places)

    def content(self, path: str) -> bytes:
        """The bytes of a file, by its path in the job's folder.

        Raises:
            IntegrityError: It cannot be read any more.
        """
        content = self.files[path]
        if isinstance(content, bytes):
            return content
        try:
            return content.read_bytes()
        except OSError as error:
            raise IntegrityError(
                f"{content} cannot be read any more ({error}). Run the command again."
            ) from error

    @property
    def description(self) -> str:
        """The text of `parcel.json`, which the device works from."""
        return dump_json({"command": list(self.command), "files": dict(self.digests)})

    @property
    def key(self) -> str:
        """One text for equal commands on equal files."""
        return sha256_text(self.description)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.files.values()
        )

    def as_typed(self, text: str) -> str:
        """A message from the device with the user's own paths in it."""
        for place, typed in self.places.items():
            text = text.replace(place, typed)
        return text


def _below(path: Path, place: str) -> dict[str, Path]:
    if path.is_file():
        return {place: path}
    found = {
        f"{place}/{inner.relative_to(path).as_posix()}": inner
        for inner in sorted(path.rglob("*"))
        if inner.is_file()
    }
    if not found:
        raise ConfigError(f"{path} has no files that could be copied to the device.")
    return found


def package() -> bytes:
    """gnet-opt's source as a .tar.gz, the same bytes for the same source.

    It carries the metadata that a version is read from, so that nothing need be installed.
    """
    name = f"gnet_opt-{__version__}.dist-info/METADATA"
    entries = {name: f"Metadata-Version: 2.1\nName: gnet-opt\nVersion: {__version__}\n".encode()}
    for path in sorted(_PACKAGE.rglob("*")):
        inner = path.relative_to(_PACKAGE)
        if path.is_file() and "__pycache__" not in inner.parts and inner.parts[0] != _DEMO:
            entries[f"gnet_opt/{inner.as_posix()}"] = path.read_bytes()
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for inner_name, content in entries.items():
            entry = tarfile.TarInfo(inner_name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
