from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnet_opt.errors import ConfigError
from gnet_opt.files import (
    atomic_path,
    check_writable,
    dump_json,
    publish,
    sha256_file,
    sha256_text,
    staging_directory,
    write_text,
)

INTERRUPTIONS = [
    ValueError("bad"),
    KeyboardInterrupt(),
    OSError(errno.ENOSPC, "No space left on device"),
]


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def interrupt_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the rename number `number` (from 0) raise instead; those after it work."""
    real, calls = Path.rename, iter(range(100))

    def rename(self: Path, target: Path) -> Path:
        if next(calls) == number:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_file_reads_all_of_it(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_sha256_text_is_that_of_utf8() -> None:
    assert sha256_text("Größe") == hashlib.sha256("Größe".encode()).hexdigest()


def test_dump_json_has_one_form() -> None:
    assert dump_json({"b": [1], "a": {"d": "ü", "c": None}}) == (
        '{\n  "a": {\n    "c": null,\n    "d": "ü"\n  },\n  "b": [\n    1\n  ]\n}\n'
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dump_json_refuses_what_json_has_not(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"value": [value]})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_dump_json_keeps_values_whatever_the_order_of_keys(value: Any) -> None:
    def reverse(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: reverse(item[key]) for key in reversed(item)}
        return [reverse(entry) for entry in item] if isinstance(item, list) else item

    text = dump_json(value)
    assert json.loads(text) == value
    assert dump_json(reverse(value)) == text


def test_atomic_path_replaces_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # one file system, so that the rename is atomic
        assert temporary.suffix == ".txt"
        temporary.write_text("first")
        assert not path.exists()
    with atomic_path(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert entries(tmp_path) == ["new", "new/file.txt"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("old", ["old content", None])
def test_atomic_path_leaves_the_old_file(
    tmp_path: Path, error: BaseException, old: str | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert entries(tmp_path) == (["file"] if old else [])
    assert old is None or path.read_text() == old


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with staging_directory(tmp_path / "folder") as staging:
            publish(staging, tmp_path / "folder")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_write_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "Grüße\n")
    assert (tmp_path / "file").read_bytes() == "Grüße\n".encode()


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new", force=False)
    check_writable(tmp_path / "deep" / "new", force=False)
    check_writable(Path("new in the current folder"), force=False)
    check_writable(tmp_path, force=True, folder=True)
    with pytest.raises(ConfigError) as caught:
        check_writable(tmp_path, force=False)
    assert str(caught.value) == (
        f"{tmp_path} exists already. Pass --force to replace it, or another --output."
    )


def test_check_writable_knows_files_from_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file", force=True)
    with pytest.raises(ConfigError) as caught:
        check_writable(tmp_path, force=True)
    assert str(caught.value) == f"{tmp_path} is a folder. Pass the name of a file as --output."
    below = tmp_path / "file" / "deep" / "new"
    with pytest.raises(ConfigError) as caught:
        check_writable(below, force=True)
    assert str(caught.value) == (
        f"{tmp_path / 'file'} is no folder, so {below} cannot be. Choose another --output."
    )


def test_publish_makes_the_folder_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bundle"
    with staging_directory(path) as staging:
        assert staging.parent == path.parent
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("new")
        assert not path.exists()
        publish(staging, path)
    assert entries(path) == ["sub", "sub/file"]
    assert entries(tmp_path / "deep") == ["bundle", "bundle/sub", "bundle/sub/file"]


def test_publish_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "only in the old one").touch()
    with staging_directory(path) as staging:
        (staging / "new").touch()
        publish(staging, path)
    assert entries(tmp_path) == ["bundle", "bundle/new"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
def test_staging_directory_leaves_nothing_when_interrupted(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "bundle"
    with pytest.raises(type(error)), staging_directory(path) as staging:
        (staging / "half").touch()
        raise error
    assert entries(tmp_path) == []


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("number", [0, 1])
def test_publish_brings_the_old_folder_back_when_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "old").touch()
    interrupt_rename(monkeypatch, number, error)
    with pytest.raises(type(error)), staging_directory(path) as staging:
        (staging / "new").touch()
        publish(staging, path)
    assert entries(tmp_path) == ["bundle", "bundle/old"]


def test_the_umask_of_the_process_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads write meanwhile, and a file of theirs would be open to everybody."""

    def change(mask: int) -> int:
        raise AssertionError(f"the umask was set to {mask:o}")

    monkeypatch.setattr(os, "umask", change)
    write_text(tmp_path / "a.txt", "a")
    with staging_directory(tmp_path / "folder") as staging:
        publish(staging, tmp_path / "folder")
    assert (tmp_path / "folder").is_dir()
