"""Every command and every Python block of the README runs, as it stands there.

But that `bench` measures for a shorter time, and `sensitivity` on fewer pictures.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gnet_opt import paths
from gnet_opt.images import ImageSet

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
OURS = [line for line in COMMANDS if line.startswith("gnet-opt ")]


SHORTER = {
    "bench": ["--rounds", "2", "--seconds", "0.1"],
    "sensitivity": ["--count", "8"],
}
"""Options behind those of a command that takes long."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name, made of the demo model and images."""
    import torch
    from safetensors.torch import load_file

    from gnet_opt.stages.load import load

    folder = tmp_path_factory.mktemp("readme")
    card = load(None)
    weights = load_file(paths.demo_card().with_name("weights.safetensors"))
    torch.save(
        {name: tensor.float() for name, tensor in weights.items()}, folder / "my_googlenet.pth"
    )
    (folder / "my_card.toml").write_text(blocks("toml")[0], encoding="utf-8")
    for name, source, step in (
        ("calibration", paths.demo_calibration(), 6),
        ("evaluation", paths.demo_evaluation(), 20),
        ("training", paths.demo_calibration(), 5),
    ):
        images = ImageSet.open(source, classes=card.labels)
        assert images.labels is not None
        for path, label in list(zip(images.files, images.labels, strict=True))[::step]:
            target = folder / "pictures" / name / card.labels[label]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.name)
    shutil.copy(ImageSet.open(paths.demo_evaluation()).files[0], folder / "picture.jpg")
    return folder


def test_every_command_is_known() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        elif words[:2] == ["pip", "install"]:
            (extra,) = re.findall(r"\[(.*)\]", words[2])
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), line
        else:
            assert words[0] == "gnet-opt", line


@pytest.mark.slow
def test_commands_and_python_run(workshop: Path) -> None:
    # One after the other, because later ones use what earlier ones made.
    program = str(Path(sys.executable).with_name("gnet-opt"))
    for line in OURS:
        words = [program, *shlex.split(line, comments=True)[1:]]
        words += SHORTER.get(words[1], [])
        # The demo weights see another normalisation through the checkpoint without a card.
        done = subprocess.run(words, cwd=workshop, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=workshop,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (workshop / "my-bundle" / "manifest.json").is_file()
    assert (workshop / "python-bundle" / "manifest.json").is_file()


@pytest.mark.slow
def test_make_demo_command(tmp_path: Path) -> None:
    """What `make demo` runs after installing, read from the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^demo:.*\n\t\$\(BIN\)/gnet-opt (.*)$", makefile, re.MULTILINE)
    words = [str(Path(sys.executable).with_name("gnet-opt")), *shlex.split(line)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "top-1, %" in done.stdout
    assert "embedded demo model" in done.stderr
    assert (tmp_path / "build" / "demo-cpu" / "manifest.json").is_file()
