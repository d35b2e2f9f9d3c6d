"""The rules of the house that the imports must keep; see "Layers" in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gnet_opt

ROOT = Path(gnet_opt.__file__).parent

ROOMS: tuple[tuple[str, ...], ...] = (
    # 0: errors and small helpers
    ("telemetry", "printable", "errors", "progress", "paths", "versions", "files", "machine"),
    # 1: values and protocols
    (
        "target",
        "runtime",
        "pictures",
        "preprocess",
        "texts",
        "class_names",
        "image_folder",
        "labels_csv",
        "images",
        "model",
        "cards",
        "bundle",
        "jetson",
        "preflight",
    ),
    # 2: the work; never each other
    ("stages", "quantization", "backends", "bench"),
    # 3: what puts them together
    (
        "drawn",
        "golden",
        "planning",
        "decision",
        "sensitivity",
        "search",
        "quantizer",
        "candidates",
        "scoring",
        "mixed",
        "choice",
        "pipeline",
        "operations",
        "evaluation",
        "benchmark",
        "remote",
    ),
    # 4: who calls
    ("", "cli", "__main__"),
)
"""The layers, and in each its modules: an import goes to a lower layer, or to the left in its own.

Only the packages of layer 2 know nothing of each other.
"""

LAYERS = {name: layer for layer, names in enumerate(ROOMS) for name in names}
ORDER = {name: place for names in ROOMS for place, name in enumerate(names)}
HELPERS = {"networks": "stages"}
"""`networks` holds torch modules and belongs to `stages`."""

HEAVY = {
    "asyncssh",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "torchvision",
}
# Imported inside functions only, so that they may import what they work with.
MAY_IMPORT_AT_TOP = {
    "networks.bn_inception": {"torch"},
    "networks.googlenet_caffe": {"torch"},
    "networks.lrn": {"torch"},
    "networks.outputs": {"torch"},
    "quantization.collect": set(),
    "quantization.describe": {"onnx_ir"},
    "quantization.dla": {"onnx_ir"},
    "quantization.equalize": {"onnx_ir"},
    "quantization.external": {"onnx_ir"},
    "quantization.graph": {"onnx_ir"},
    "quantization.half": {"onnx", "onnx_ir"},
    "quantization.lint": {"onnx_ir"},
    "quantization.placement": {"onnx_ir"},
    "quantization.postconditions": {"onnx_ir"},
    "quantization.regions": {"onnx_ir"},
    "quantization.surroundings": {"onnx_ir"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def package(module: str) -> str:
    first = module.split(".")[0]
    return HELPERS.get(first, first)


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt], *, inside_functions: bool) -> Iterator[ast.stmt]:
    for node in body:
        if is_type_checking(node):
            continue
        yield node
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and not inside_functions:
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), inside_functions=inside_functions)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, inside_functions=inside_functions)


def imported(module: str, *, inside_functions: bool) -> Iterator[str]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in statements(tree.body, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            if node.module == "gnet_opt" or node.module in FULL_NAMES:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in FULL_NAMES else node.module
            else:
                yield node.module


FULL_NAMES = {f"gnet_opt.{name}" if name else "gnet_opt" for name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_only(module: str) -> None:
    own = package(module)
    assert own in LAYERS, f"give {module} a layer"
    for name in imported(module, inside_functions=True):
        if name.split(".")[0] != "gnet_opt" or name == "gnet_opt":  # `__version__` is for all
            continue
        other = package(name.removeprefix("gnet_opt."))
        if other == own:
            continue
        down = LAYERS[other] < LAYERS[own]
        beside = LAYERS[other] == LAYERS[own] != 2 and ORDER[other] < ORDER[own]
        assert down or beside, f"{module} (layer {LAYERS[own]}) imports {name} ({LAYERS[other]})"


def test_no_module_imports_itself_through_others() -> None:
    """Inside a package, too, where the layers say nothing."""
    imports = {
        module: {
            name.removeprefix("gnet_opt.")
            for name in imported(module, inside_functions=False)
            if name.removeprefix("gnet_opt.") in MODULES
        }
        for module in MODULES
    }
    left = dict(imports)
    while lowest := {name for name, below in left.items() if not below & left.keys()}:
        left = {name: below for name, below in left.items() if name not in lowest}
    assert not left, f"these import each other in a circle, or a circle: {sorted(left)}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_inside_functions(module: str) -> None:
    top = {name.split(".")[0] for name in imported(module, inside_functions=False)}
    assert top & HEAVY <= MAY_IMPORT_AT_TOP.get(module, set())
    # Whoever imports such a module at the top imports its packages with it.
    if module not in MAY_IMPORT_AT_TOP:
        ours = set(imported(module, inside_functions=False))
        heavy = {f"gnet_opt.{name}" for name in MAY_IMPORT_AT_TOP}
        assert not ours & heavy


def test_the_list_of_exceptions_is_not_longer_than_needed() -> None:
    for module, allowed in MAY_IMPORT_AT_TOP.items():
        top = {name.split(".")[0] for name in imported(module, inside_functions=False)}
        through = any(
            f"gnet_opt.{other}" in set(imported(module, inside_functions=False))
            for other in MAY_IMPORT_AT_TOP
        )
        assert allowed <= top
        assert allowed or through, f"{module} needs no exception"


BARE = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    "Finds what PathFinder finds, but for the packages that a bare environment has not."

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {sorted(HEAVY)!r}:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE + code], capture_output=True, text=True, timeout=120
    )


def test_the_bare_environment_is_bare() -> None:
    done = run_bare("import torch")
    assert "No module named 'torch'" in done.stderr


def test_every_module_imports_in_a_bare_environment() -> None:
    names = [f"gnet_opt.{name}" if name else "gnet_opt" for name in MODULES]
    names = [name for name in names if name.removeprefix("gnet_opt.") not in MAY_IMPORT_AT_TOP]
    done = run_bare(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_prints_its_help_in_a_bare_environment() -> None:
    code = """
from gnet_opt.cli import base, run
for name in (None, *sorted(base.gnet_opt.commands)):
    assert run([*([name] if name else []), "--help"]) == 0
"""
    done = run_bare(code)
    assert (done.returncode, done.stderr) == (0, "")
    commands = "bench compile doctor evaluate export inspect quantize targets train verify"
    for name in commands.split():
        assert f"Usage: gnet-opt {name} " in done.stdout


@pytest.mark.parametrize("command", ["doctor", "targets"])
def test_what_a_bare_machine_has_is_told(command: str) -> None:
    done = run_bare(f"from gnet_opt.cli import main; main(['{command}', '--json'])")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    if command == "targets":
        assert {target["name"]: target["installed"] for target in told}["openvino-cpu"] is False
        return
    assert told["backends"]["openvino"] == {
        "available": False,
        "detail": 'openvino is not installed: pip install "gnet-opt[openvino]"',
        "version": "",
    }
    assert set(told["build"]["missing"]) == HEAVY - {
        "asyncssh",
        "matplotlib",
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
    }
    assert told["build"]["install"] == 'pip install "gnet-opt[build]"'


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(["quantize", "--target", "jetson"], "torch"), (["inspect", "x.onnx"], "onnx_ir")],
)
def test_a_command_that_needs_more_says_so_in_one_sentence(
    arguments: list[str], package: str
) -> None:
    done = run_bare(f"from gnet_opt.cli import main; main({arguments!r})")
    assert done.returncode == 3
    assert done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"gnet-opt: {package} is needed to ")
    assert line.endswith('it is not installed. Install it with: pip install "gnet-opt[build]"')


def test_help_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys; from gnet_opt.cli import run; run(['--help']); run(['quantize', '--help']);"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.split())
    assert "gnet_opt" in loaded
    assert not loaded & (HEAVY | {"numpy", "PIL", "rich"})
