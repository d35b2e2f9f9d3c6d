"""Every name of TensorRT and CUDA that the package uses exists in the versions that it serves.

`tensorrt_names.json` has the public names of the classes that are used, by version. What is used
is read from the source: what follows `trt.`, and what follows a variable that `HOLDS` says the
class of.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_tensorrt import CUDA, NAMES

import gnet_opt.backends
from gnet_opt.backends._build_options import HARDWARE_COMPATIBILITY

FOLDER = Path(gnet_opt.backends.__file__).parent
FILES = ("_engine.py", "_engine_build.py", "tensorrt.py")

BUILDING = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
}
HOLDS = {
    "EngineRunner": {
        "_context": "IExecutionContext",
        "_engine": "ICudaEngine",
        "engine": "ICudaEngine",
        "runtime": "Runtime",
    },
    "_Build": BUILDING,
    "_described": {"error": "ParserError"},
}
"""Variables and attributes of `self` by the class or function that they stand in."""

FROM_10 = ("10.3.0", "10.16.1", "11.4.0")
UP_TO_10 = ("8.6.1", "10.3.0", "10.16.1")
EVERYWHERE = ("8.6.1", *FROM_10)
LOOKED_UP = {
    ("BuilderFlag", "FP16"): UP_TO_10,
    ("BuilderFlag", "INT8"): UP_TO_10,
    ("BuilderFlag", "VERSION_COMPATIBLE"): EVERYWHERE,
    ("HardwareCompatibilityLevel", "AMPERE_PLUS"): EVERYWHERE,
    ("IBuilderConfig", "progress_monitor"): FROM_10,
    ("IProgressMonitor", ""): FROM_10,
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): UP_TO_10,
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"): FROM_10,
    ("ParserError", "node_name"): FROM_10,
    ("ParserError", "node_operator"): FROM_10,
}
"""What is used only where it is there, with the versions that have it."""
ASKED_FOR_FIRST = {
    ("IBuilderConfig", "progress_monitor"),
    ("IProgressMonitor", ""),
    ("ParserError", "node_name"),
    ("ParserError", "node_operator"),
}
"""Those of them that the source names behind a `hasattr`; the others stand in quotes."""
ALONE_IN_RTX = {
    ("ComputeCapability", ""),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}
"""What only TensorRT-RTX has, and nobody else is asked for."""


def parts(node: ast.expr) -> list[str]:
    """`a.b.c` as a list; a call or an index in front of it is left out."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def used() -> set[tuple[str, str]]:
    """Pairs of a class and a name in it; the name is empty where the class itself is used."""
    return {pair for name in FILES for pair in used_in((FOLDER / name).read_text("utf-8"))}


def used_in(source: str) -> Iterator[tuple[str, str]]:
    """The same of one file's text; what Python gives every class is left out."""
    for scope in ast.parse(source).body:
        holds = HOLDS.get(getattr(scope, "name", ""), {})
        for node in ast.walk(scope):
            if not isinstance(node, ast.Attribute):
                continue
            names = [n for n in parts(node) if n != "self"]
            if names[:1] in (["trt"], ["_trt"]) and len(names) > 1:
                kind, *members = names[1:]
                yield kind, ""
                yield from ((kind, member) for member in members if not member.startswith("__"))
            elif len(names) > 1 and names[0] in holds:
                yield holds[names[0]], names[1]


def missing(pairs: set[tuple[str, str]], version: str) -> set[tuple[str, str]]:
    """Those of the pairs that a version does not have."""
    known = NAMES[version]
    return {
        (kind, name)
        for kind, name in pairs
        if kind not in known or (name and name not in known[kind])
    }


USED = {pair for pair in used() if not pair[0].startswith("__")}


@pytest.mark.parametrize("version", EVERYWHERE)
def test_a_version_has_every_name_that_is_used(version: str) -> None:
    assert len(USED) > 50
    assert missing(USED - set(LOOKED_UP) - ALONE_IN_RTX, version) == set()


@pytest.mark.parametrize(("pair", "versions"), LOOKED_UP.items())
def test_what_is_looked_up_is_where_it_is_said_to_be(
    pair: tuple[str, str], versions: tuple[str, ...]
) -> None:
    assert tuple(v for v in EVERYWHERE if not missing({pair}, v)) == versions


def test_what_a_version_lacks_is_named_only_behind_a_question() -> None:
    assert USED & set(LOOKED_UP) == ASKED_FOR_FIRST


def test_names_in_quotes_are_among_those_that_are_looked_up() -> None:
    quoted = {level.upper() for level in HARDWARE_COMPATIBILITY}
    for name in FILES:
        for node in ast.walk(ast.parse((FOLDER / name).read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                quoted |= set(re.findall(r"^[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*$", node.value))
    known = {name for _, name in LOOKED_UP}
    assert quoted - {"SM", "PYTHONSAFEPATH"} <= known
    assert {"INT8", "FP16", "STRONGLY_TYPED", "VERSION_COMPATIBLE"} <= quoted


@pytest.mark.parametrize(
    ("source", "pair"),
    [
        ("def f(trt): trt.Builder.platform_has_fast_int8", ("Builder", "platform_has_fast_int8")),
        ("def f(trt): trt.BuilderFlag.INT8", ("BuilderFlag", "INT8")),
        ("def f(trt): trt.IInt8EntropyCalibrator2()", ("IInt8EntropyCalibrator2", "")),
        (
            "class _Build:\n    def f(self, config): config.int8_calibrator = 1",
            ("IBuilderConfig", "int8_calibrator"),
        ),
        (
            "class EngineRunner:\n    def f(self): self._context.execute_async_v2()",
            ("IExecutionContext", "execute_async_v2"),
        ),
        (
            "class _Build:\n    def f(self): self._trt.OnnxParserFlag.NONE",
            ("OnnxParserFlag", "NONE"),
        ),
    ],
)
def test_a_name_that_is_gone_would_be_seen(source: str, pair: tuple[str, str]) -> None:
    assert pair in missing(set(used_in(source)), "11.4.0")


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_the_library_itself_has_them(name: str) -> None:
    trt = pytest.importorskip(name)
    expected = USED - set(LOOKED_UP) - (ALONE_IN_RTX if name == "tensorrt" else set())
    absent = {
        (kind, member)
        for kind, member in expected
        if not hasattr(trt, kind) or (member and not hasattr(getattr(trt, kind), member))
    }
    # The names of a severity stand in the enum in ILogger.
    assert {pair for pair in absent if pair[0] != "ILogger"} == set()
    assert {"ERROR", "INTERNAL_ERROR"} <= set(trt.ILogger.Severity.__members__)


def test_every_name_of_cuda_is_in_the_list_and_in_the_package() -> None:
    source = (FOLDER / "_engine.py").read_text("utf-8")
    found = set(re.findall(r"\bcuda[A-Z]\w+", source))
    members = {"cudaSuccess", "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"}
    assert found == {*CUDA, *members}
    cuda = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in CUDA if not hasattr(cuda, name)] == []
    assert hasattr(cuda.cudaError_t, "cudaSuccess")
    assert all(hasattr(cuda.cudaMemcpyKind, name) for name in members - {"cudaSuccess"})
    assert int(cuda.cudaStream_t(7)) == 7
