"""The script that builds the engine, run by the shells of this machine with a false trtexec."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnet_opt.backends._trtexec import build_command, build_script
from gnet_opt.target import Target, find

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="the script is for the device's POSIX shell"
)

SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]
MODEL = b"a model"
BANNERS = {
    "8.2": "&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec --help",
    "8.5": "&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help",
    "8.5.10": "&&&& RUNNING TensorRT.trtexec [TensorRT v8510] # trtexec --help",
    "10.0": "&&&& RUNNING TensorRT.trtexec [TensorRT v100001] # trtexec --help",
    "10.3": "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --help",
    "10.16": "&&&& RUNNING TensorRT.trtexec [TensorRT v101601] [b3] # trtexec --help",
    "11.0": "&&&& RUNNING TensorRT.trtexec [TensorRT v110000] [b114] # trtexec --help",
    "11.4": "&&&& RUNNING TensorRT.trtexec [TensorRT v11.4.1.2] [b48] # trtexec --help",
}
"""As trtexec greets in public logs of each version."""


def shell(name: str) -> list[str]:
    return ["busybox", "sh"] if name == "busybox" else [name]


def board(version: str, name: str = "a-board") -> Target:
    return replace(find("jetson"), options={"tensorrt": version}, name=name)


def bundle(folder: Path, target: Target, **forms: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.onnx"
    model.write_bytes(MODEL)
    script = folder / "build_engine.sh"
    script.write_text(build_script(target, model, **{"quantized": True, **forms}))
    return folder


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def trtexec(folder: Path, banner: str, building: str = "") -> Path:
    """A false trtexec: it greets, and builds what it is asked for."""
    return executable(
        folder / "trtexec",
        f"""[ "$1" = --help ] && {{ printf '%s\\n' {shlex.quote(banner)}; exit 0; }}
printf '%s\\n' "$@" > arguments
for argument in "$@"; do
    case $argument in
        --saveEngine=*) printf 'an engine' > "${{argument#*=}}" ;;
        --timingCacheFile=*) printf 'timings' > "${{argument#*=}}" ;;
    esac
done
{building}""",
    )


def run(
    folder: Path, tool: Path, *, by: str = "sh", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*shell(by), str(folder / "build_engine.sh")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "TRTEXEC": str(tool), "CDPATH": "/usr"},
        cwd=cwd or "/",
        timeout=60,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., Path]:
    def make(version: str, building: str = "") -> Path:
        return trtexec(tmp_path, BANNERS.get(version, ""), building)

    return make


@pytest.mark.parametrize("by", SHELLS)
def test_it_is_posix_shell(by: str, tmp_path: Path) -> None:
    script = bundle(tmp_path / "b", board("10.3")) / "build_engine.sh"
    done = subprocess.run([*shell(by), "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("by", SHELLS)
def test_builds(by: str, tmp_path: Path, tool: Callable[..., Path]) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    (folder / "model.engine.json").write_text("of an engine that `gnet-opt compile` built")
    done = run(folder, tool("10.3"), by=by)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "model.engine.json").exists()
    assert (folder / "model.engine").read_text() == "an engine"
    assert "model.engine.partial" not in names(folder)
    assert (folder / "model.engine.timing").read_text() == "timings"
    command = build_command(board("10.3"), quantized=True)
    asked = (folder / "arguments").read_text().splitlines()
    assert ["trtexec", *asked] == [
        word.replace("--saveEngine=model.engine", "--saveEngine=model.engine.partial")
        for word in shlex.split(command)
    ]


def test_is_started_from_anywhere(tmp_path: Path, tool: Callable[..., Path]) -> None:
    folder = bundle(tmp_path / "usr" / "bin", board("10.3"))  # CDPATH would lead to /usr/bin
    for script, cwd in (
        ("usr/bin/build_engine.sh", tmp_path),
        ("./build_engine.sh", folder),
        ("build_engine.sh", folder),
    ):
        (folder / "model.engine").unlink(missing_ok=True)
        relative = os.path.relpath(tool("10.3"), cwd)
        env = {"PATH": "/usr/bin:/bin", "TRTEXEC": relative, "CDPATH": "/"}
        done = subprocess.run(
            ["sh", script], capture_output=True, text=True, env=env, cwd=cwd, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (folder / "model.engine").exists()


@pytest.mark.parametrize("here", BANNERS)
@pytest.mark.parametrize("made_for", ["8.5", "10.3", "11.4.1"])
def test_another_major_version_is_refused(
    here: str, made_for: str, tmp_path: Path, tool: Callable[..., Path]
) -> None:
    folder = bundle(tmp_path / "b", board(made_for))
    done = run(folder, tool(here))
    major, wanted = here.split(".")[0], made_for.split(".")[0]
    if major == wanted:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == 2
    assert done.stderr == (
        f"trtexec is of TensorRT {major} here, but the bundle was made for TensorRT {made_for} "
        f"(a-board). Install TensorRT {wanted}, or build the bundle again for a target file whose "
        "options.tensorrt is the version here.\n"
    )
    assert names(folder) == {"build_engine.sh", "model.onnx"}


@pytest.mark.parametrize("banner", ["", "trtexec, some version", "[TensorRT v]", "[TensorRT vX]"])
def test_a_version_that_is_not_told_is_not_compared(banner: str, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    assert run(folder, trtexec(tmp_path, banner)).returncode == 0
    assert "model.engine" in names(folder)


def test_a_model_that_was_changed_is_refused(tmp_path: Path, tool: Callable[..., Path]) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    model = folder / "model.onnx"
    model.write_bytes(MODEL[:-1])
    done = run(folder, tool("10.3"))
    assert (done.returncode, done.stderr) == (
        6,
        "model.onnx is not the file that this bundle was made with. Copy the bundle again.\n",
    )
    model.unlink()
    done = run(folder, tool("10.3"))
    assert done.returncode == 6
    assert "model.onnx is not beside this script." in done.stderr
    assert names(folder) == {"build_engine.sh"}


def test_a_machine_without_sha256sum_builds(tmp_path: Path, tool: Callable[..., Path]) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    (folder / "model.onnx").write_bytes(b"another model")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "sed", "mv", "rm"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        ["/bin/sh", str(folder / "build_engine.sh")],
        capture_output=True,
        text=True,
        env={"PATH": str(programs), "TRTEXEC": str(tool("10.3"))},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.engine" in names(folder)


@pytest.mark.parametrize(
    ("building", "code"),
    [
        ("exit 1", 1),
        ("kill -9 $$", 137),  # what the kernel does when memory runs out
        ("kill -s TERM $PPID; sleep 1; exit 0", 143),
        ("kill -s INT $PPID; exit 130", 130),
        ("rm model.engine.partial", 7),
        (": > model.engine.partial", 7),
    ],
)
@pytest.mark.parametrize("by", SHELLS)
def test_a_build_that_ends_early_leaves_nothing_of_its_own(
    by: str, building: str, code: int, tmp_path: Path, tool: Callable[..., Path]
) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    (folder / "model.engine").write_text("of an earlier build")
    done = run(folder, tool("10.3", building), by=by)
    assert done.returncode == code
    assert names(folder) == {"arguments", "build_engine.sh", "model.engine", "model.onnx"}
    assert (folder / "model.engine").read_text() == "of an earlier build"
    if code in (1, 137):
        assert done.stderr.splitlines()[-1].startswith(
            f"trtexec failed with exit status {code}, and no engine was written."
        )


def test_a_full_disk(tmp_path: Path, tool: Callable[..., Path]) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    done = run(folder, tool("10.3", "printf 'an engine' > /dev/full || exit 1"))
    assert done.returncode == 1
    assert "no engine was written" in done.stderr
    assert names(folder) == {"arguments", "build_engine.sh", "model.onnx"}


def test_what_is_no_program_is_no_trtexec(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    text = tmp_path / "notes.txt"
    text.write_text("no program")
    for path in (text, tmp_path, tmp_path / "nothing"):
        done = run(folder, path)
        assert done.returncode == 3
        assert "set TRTEXEC to its path" in done.stderr


def test_a_trtexec_in_path_is_found(tmp_path: Path, tool: Callable[..., Path]) -> None:
    folder = bundle(tmp_path / "b", board("10.3"))
    done = subprocess.run(
        ["sh", str(folder / "build_engine.sh")],
        capture_output=True,
        text=True,
        env={"PATH": f"{tool('10.3').parent}:/usr/bin:/bin"},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


HOSTILE = st.text(
    st.sampled_from("ab-.\\ \t\n'\"$(){}`;&|<>*?#!~%\u00e9\u4e2d") | st.characters(codec="utf-8"),
    min_size=1,
    max_size=20,
).filter(lambda text: not {"\0", "\r"} & set(text))
FOLDERS = HOSTILE.filter(
    lambda text: "/" not in text and text not in (".", "..") and len(text.encode()) < 200
)


@settings(max_examples=20, deadline=None)
@given(name=HOSTILE, folder=FOLDERS)
def test_names_are_only_names(
    name: str, folder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("hostile")
    tool = trtexec(root, BANNERS["10.3"])
    made = bundle(root / folder / "$(touch injected)", board("10.3", name))
    done = run(made, tool)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert names(made) == {
        "arguments",
        "build_engine.sh",
        "model.engine",
        "model.engine.timing",
        "model.onnx",
    }
    # The one place that shows the name shows it as it is.
    refused = run(made, trtexec(root, BANNERS["8.2"]))
    assert f"made for TensorRT 10.3 ({name}). Install" in refused.stderr


@given(name=HOSTILE, quantized=st.booleans(), half=st.booleans())
def test_the_command_splits_into_its_arguments(name: str, quantized: bool, half: bool) -> None:
    words = shlex.split(build_command(board("8.6", name), quantized=quantized, half=half))
    assert words == [
        "trtexec",
        "--onnx=model.onnx",
        "--saveEngine=model.engine",
        *(["--int8"] if quantized else []),
        *(["--fp16"] if half else []),
        "--noTF32",
        "--memPoolSize=workspace:1024",
        "--skipInference",
        "--timingCacheFile=model.engine.timing",
    ]


def test_the_hash_is_that_of_the_model(tmp_path: Path) -> None:
    script = (bundle(tmp_path, board("10.3")) / "build_engine.sh").read_text()
    assert hashlib.sha256(MODEL).hexdigest() in script
