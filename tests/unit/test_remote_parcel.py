from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import gnet_opt
from gnet_opt.errors import ConfigError
from gnet_opt.remote import OUT, Work
from gnet_opt.remote.parcel import Parcel, package


def test_the_package_runs_from_its_archive_alone(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(package())) as archive:
        archive.extractall(tmp_path, filter="data")
        names = archive.getnames()
    assert not [name for name in names if "__pycache__" in name or "_data" in name]
    assert "gnet_opt/targets/raspberry-pi-5.toml" in names
    code = (
        "import gnet_opt, sys; from importlib.metadata import version;"
        "from gnet_opt.target import find; find('raspberry-pi-5');"
        "print(gnet_opt.__file__, version('gnet-opt'))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    started = subprocess.run(
        [sys.executable, "-B", "-m", "gnet_opt", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert started.stdout == f"gnet-opt, version {gnet_opt.__version__}\n"
    where = tmp_path / "gnet_opt" / "__init__.py"
    assert done.stdout.split() == [str(where), gnet_opt.__version__]


def test_the_same_source_is_the_same_archive() -> None:
    assert package() == package()


def test_a_key_stands_for_the_command_and_every_byte(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model").write_text("1")
    work = Work(command=("bench", folder, "-o", OUT))
    key = Parcel.pack(work).key
    assert Parcel.pack(work).key == key
    assert Parcel.pack(Work(command=("bench", folder, "--seed", "1", "-o", OUT))).key != key
    (folder / "model").write_text("2")
    assert Parcel.pack(work).key != key
    (folder / "model").write_text("1")
    assert Parcel.pack(work).key == key


def test_paths_become_places_and_messages_the_users_own_again(tmp_path: Path) -> None:
    file = tmp_path / "file name"
    file.write_bytes(b"12345")
    parcel = Parcel.pack(Work(command=("x", file, "--text", "a/b", "-o", OUT)))
    assert parcel.command == ("x", "inputs/1/file name", "--text", "a/b", "-o", "out")
    assert parcel.files["inputs/1/file name"] == file
    assert parcel.as_typed("inputs/1/file name: bad.") == f"{file}: bad."
    assert parcel.size == 5 + sum(
        len(content) for content in parcel.files.values() if isinstance(content, bytes)
    )


def test_an_input_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no files that could be copied"):
        Parcel.pack(Work(command=(tmp_path / "none",)))
