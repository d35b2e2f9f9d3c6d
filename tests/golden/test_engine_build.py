"""The command and the script for the device, word for word: a change shows in the diff of a commit.

`GNET_OPT_UPDATE_GOLDEN=1 python -m pytest tests/golden` writes the files anew.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gnet_opt.backends._trtexec import Input, build_command, build_script
from gnet_opt.target import Target, find, shipped

COMMANDS = Path(__file__).with_name("trtexec.json")
SCRIPT = Path(__file__).with_name("build_engine.sh")
VERSIONS = ("8.2", "8.5", "8.6", "10.3", "10.16", "11.4")
FREE = Input(name="input", picture=(3, 224, 224))
FORMS: dict[str, dict[str, Any]] = {
    "fp16": {"quantized": False, "half": True},
    "fp32": {"quantized": False, "half": False},
    "int8": {"quantized": True, "half": False},
    "int8, any batch": {"quantized": True, "half": False, "free": FREE},
}


def board(version: str) -> Target:
    return replace(find("jetson"), options={"tensorrt": version})


def compared(path: Path, text: str) -> None:
    if os.environ.get("GNET_OPT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_commands() -> None:
    made = {
        version: {form: build_command(board(version), **kinds) for form, kinds in FORMS.items()}
        for version in VERSIONS
    }
    compared(COMMANDS, json.dumps(made, indent=2) + "\n")


def test_script(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"a model")
    compared(SCRIPT, build_script(find("jetson"), model, quantized=True))


def test_script_of_a_model_that_takes_any_batch(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"a model")
    text = build_script(find("jetson"), model, quantized=True, free=FREE)
    changed = [
        line
        for line in text.splitlines()
        if line not in SCRIPT.read_text(encoding="utf-8").splitlines()
    ]
    command = json.loads(COMMANDS.read_text(encoding="utf-8"))["10.16"]["int8, any batch"]
    partial = command.replace("--saveEngine=model.engine", "--saveEngine=model.engine.partial")
    assert changed == [partial.replace("trtexec", '"$trtexec"', 1) + " || status=$?"]


# From the help texts and sources of NVIDIA's trtexec, and its migration guides:
# https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html
EVERYWHERE = {
    "--maxShapes",
    "--minShapes",
    "--noTF32",
    "--onnx",
    "--optShapes",
    "--saveEngine",
    "--timingCacheFile",
}
KNOWN = {
    "8.2": {"--int8", "--fp16", "--buildOnly", "--workspace"},
    "8.5": {"--int8", "--fp16", "--buildOnly", "--memPoolSize"},
    "8.6": {"--int8", "--fp16", "--skipInference", "--memPoolSize"},
    "10.3": {"--int8", "--fp16", "--stronglyTyped", "--skipInference", "--memPoolSize"},
    "10.16": {"--int8", "--fp16", "--stronglyTyped", "--skipInference", "--memPoolSize"},
    "11.4": {"--skipInference", "--memPoolSize"},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_option_is_one_of_its_version(version: str) -> None:
    for command in json.loads(COMMANDS.read_text(encoding="utf-8"))[version].values():
        program, *options = shlex.split(command)
        assert program == "trtexec"
        assert {option.partition("=")[0] for option in options} <= EVERYWHERE | KNOWN[version]


def test_the_versions_of_the_shipped_targets_are_among_these() -> None:
    versions = {t.options["tensorrt"] for t in shipped() if t.backend == "tensorrt"}
    assert versions <= set(VERSIONS)
