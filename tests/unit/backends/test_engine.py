"""What TensorRT and TensorRT-RTX share, against fakes: no machine that tests run on has a GPU.

`test_tensorrt_names` holds every name that is used against the libraries themselves.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import onnx.helper as oh
import pytest
from fake_tensorrt import Driver, FakeTensorRt, plan_of

from gnet_opt.backends import _gpu
from gnet_opt.backends._build_options import BuildOptions
from gnet_opt.backends._engine import EngineRecord, Library, open_engine, record_of
from gnet_opt.backends._engine_build import build_apart, main
from gnet_opt.backends._gpu import Gpu, require_gpu
from gnet_opt.errors import BackendError, ConfigError, MissingDependencyError
from gnet_opt.files import sha256_file

RTX = Library(module="tensorrt_rtx", title="TensorRT-RTX", again="build it again")
ORIN = Gpu(name="Orin", compute_capability="8.7", cuda="12.6")
SHAPE = (3, 2, 2)
WEIGHTS = np.arange(48, dtype=np.float32).reshape(12, 4)


def classifier(
    batch: int | str = 1, *, inputs: int = 1, outputs: int = 1, half: bool = False
) -> bytes:
    """A network that multiplies the picture with `WEIGHTS`."""
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    weights = WEIGHTS.astype(np.float16 if half else np.float32)
    nodes = [oh.make_node("Flatten", ["input"], ["flat"])]
    nodes += [oh.make_node("MatMul", ["flat", "w"], [f"logits{n}"]) for n in range(outputs)]
    graph = oh.make_graph(
        nodes,
        "classifier",
        [
            oh.make_tensor_value_info("input" + "2" * n, kind, [batch, *SHAPE])
            for n in range(inputs)
        ],
        [oh.make_tensor_value_info(f"logits{n}", kind, [batch, 4]) for n in range(outputs)],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())


def profile(least: int, usual: int, most: int) -> dict[str, list[list[int]]]:
    return {"input": [[batch, *SHAPE] for batch in (least, usual, most)]}


# --- the record -------------------------------------------------------------------------------


def put(folder: Path, plan: bytes, **changes: Any) -> Path:
    """An engine with its record, and the model that it was built from."""
    path = folder / "model.engine"
    path.write_bytes(plan)
    (folder / "model.onnx").write_bytes(b"model")
    record = EngineRecord(
        backend="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("8.6", "12.0"),
        model_sha256=sha256_file(folder / "model.onnx"),
        engine_sha256=sha256_file(path),
    )
    replace(record, **changes).write(record_of(path))
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of the fake library."""
    return put(tmp_path, plan_of("1.7.1", classifier()))


def test_a_record_on_disk(engine: Path) -> None:
    path = engine.with_name("model.engine.json")
    assert json.loads(path.read_text()) == {
        "backend": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "12.0"],
        "cuda": "",
        "engine_sha256": sha256_file(engine),
        "gpu": "",
        "hardware_compatibility": "",
        "model": "model.onnx",
        "model_sha256": sha256_file(engine.with_name("model.onnx")),
        "schema": "gnet-opt/engine/1",
        "version": "1.7.1",
        "version_compatible": False,
    }
    record = EngineRecord.read(path)
    assert record.compute_capabilities == ("8.6", "12.0")
    record.check(engine, RTX, "1.7.1", ORIN)
    engine.with_name("model.onnx").unlink()  # then there is nothing to compare with
    record.check(engine, RTX, "1.7.1", ORIN)


def test_a_record_of_an_earlier_gnet_opt(engine: Path) -> None:
    path = record_of(engine)
    values = json.loads(path.read_text())
    since = ("cuda", "gpu", "hardware_compatibility", "model", "version_compatible")
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in since}))
    EngineRecord.read(path).check(engine, RTX, "1.7.1", ORIN)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "gnet-opt/engine/2"}', '{"schema": "gnet-opt/engine/1"}']
)
def test_a_damaged_record(text: str, engine: Path) -> None:
    path = record_of(engine)
    path.write_text(text)
    with pytest.raises(BackendError) as caught:
        EngineRecord.read(path)
    assert str(caught.value).startswith(f"{path} cannot be read (")
    assert str(caught.value).endswith("Copy the bundle again, or build it again.")
    path.unlink()
    with pytest.raises(BackendError, match="cannot be read"):
        EngineRecord.read(path)


def test_a_record_with_a_key_too_many(engine: Path) -> None:
    path = record_of(engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    with pytest.raises(BackendError, match=r"cannot be read .*'more'"):
        EngineRecord.read(path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("model", "../model.onnx", "its model '../model.onnx' is no name of a file"),
        ("model", "..", "its model '..' is no name of a file"),
        ("model", "", "its model '' is no name of a file"),
        ("model", "a\0", "its model 'a\\x00' is no name of a file"),
        ("model", 5, "its model is of the wrong type"),
        ("gpu", None, "its gpu is of the wrong type"),
        ("version", "9" * 5000, "its version is none"),
        ("version_compatible", 1, "its version_compatible is of the wrong type"),
        ("compute_capabilities", "8.7", "its compute_capabilities is of the wrong type"),
        ("compute_capabilities", [[8]], "its compute_capabilities is of the wrong type"),
    ],
)
def test_a_record_with_a_hostile_value(key: str, value: object, problem: str, engine: Path) -> None:
    path = record_of(engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BackendError) as caught:
        EngineRecord.read(path)
    assert str(caught.value).startswith(f"{path} cannot be read ({problem}), so ")


def test_a_record_that_is_too_deep(engine: Path) -> None:
    record_of(engine).write_text("[" * 100_000)
    with pytest.raises(BackendError, match="cannot be read"):
        EngineRecord.read(record_of(engine))


def test_what_is_loaded_is_what_was_checked(
    engine: Path, library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces the engine right after it was checked."""
    checked = EngineRecord.problem

    def problem(self: EngineRecord, *where: Any) -> str:
        found = checked(self, *where)
        engine.write_bytes(plan_of("1.7.1", classifier(), more="another"))
        return found

    monkeypatch.setattr(EngineRecord, "problem", problem)
    changed = pytest.raises(
        BackendError, match=r"was changed while it was read .* Build it again\.$"
    )
    with changed, open_engine(engine, RTX):
        pass


def test_a_stale_engine(engine: Path) -> None:
    record = EngineRecord.read(record_of(engine))
    with pytest.raises(BackendError) as caught:
        record.check(engine, RTX, "1.8.0", ORIN)
    assert str(caught.value) == (
        f"{engine} was built by TensorRT-RTX 1.7.1 and runs with no other, but this "
        "machine has 1.8.0. Install 1.7.1, or build it again."
    )
    engine.with_name("model.onnx").write_bytes(b"another model")
    with pytest.raises(BackendError, match=r"the model\.onnx beside it .* Build it again\.$"):
        record.check(engine, RTX, "1.7.1", ORIN)
    engine.write_bytes(b"another engine")
    with pytest.raises(BackendError, match=r"was changed after it was built .* Build it again\.$"):
        record.check(engine, RTX, "1.7.1", ORIN)
    engine.unlink()
    with pytest.raises(BackendError, match=r"does not exist\. Build it again\.$"):
        record.check(engine, RTX, "1.7.1", ORIN)


@pytest.mark.parametrize(
    ("name", "capability", "level", "fits"),
    [
        ("Orin", "8.7", "", True),
        ("NVIDIA RTX A2000", "8.7", "", False),
        ("Orin", "8.6", "", False),
        ("NVIDIA RTX A2000", "8.6", "ampere_plus", True),
        ("NVIDIA Thor", "11.0", "ampere_plus", True),
        ("Tesla T4", "7.5", "ampere_plus", False),
    ],
)
def test_an_engine_of_another_gpu(
    name: str, capability: str, level: str, fits: bool, engine: Path
) -> None:
    record = replace(
        EngineRecord.read(record_of(engine)),
        gpu="Orin",
        compute_capabilities=("8.7",),
        hardware_compatibility=level,
    )
    here = Gpu(name=name, compute_capability=capability, cuda="13.0")
    assert record.problem(engine, RTX, "1.7.1", here) == (
        ""
        if fits
        else f"{engine} was built for Orin (compute capability 8.7), but this machine has {name} "
        f"(compute capability {capability})"
    )


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.16.1", True),
        ("10.16.1", "10.3.0", False),
        ("10.3.0", "11.4.0", False),
    ],
)
def test_a_version_compatible_engine(built: str, here: str, fits: bool, engine: Path) -> None:
    record = replace(EngineRecord.read(record_of(engine)), version=built, version_compatible=True)
    problem = record.problem(engine, RTX, here, ORIN)
    assert (problem == "") == fits
    assert fits or "runs with later ones of its major version, but" in problem


# --- the GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (None, "the driver's libno-such-driver.so.1 was not found"),
        (Driver(code=100), "the driver's cuInit gives the error 100"),
        (Driver(count=0), "the driver finds none"),
        (object(), "the driver's libno-such-driver.so.1 is incomplete: 'object' object has no "),
    ],
)
def test_a_machine_without_a_gpu(
    driver: object, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gpu, "_DRIVER", "libno-such-driver.so.1")
    if driver is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(BackendError) as caught:
        require_gpu("b/model.engine was not run", "Run it elsewhere.")
    text = str(caught.value)
    assert text.startswith(
        f"b/model.engine was not run: this machine has no NVIDIA GPU that can be used ({problem}"
    )
    assert text.endswith("). Run it elsewhere.")


def test_a_driver_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libcuda.so.1"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_gpu, "_DRIVER", str(broken))
    with pytest.raises(BackendError, match=r"the driver's .*libcuda\.so\.1 cannot be loaded: "):
        require_gpu("It was not run", "Run it elsewhere.")


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert require_gpu("It was not run", "Run it elsewhere.") == ORIN


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("code", [0, 803])
def test_a_driver_in_c(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and order of the arguments, which a fake in Python does not show."""
    (tmp_path / "driver.c").write_text(fake_tensorrt.DRIVER)
    library = tmp_path / "libcuda.so.1"
    build = ["cc", "-shared", "-fPIC", f"-DCODE={code}", "-o", str(library)]
    subprocess.run([*build, str(tmp_path / "driver.c")], check=True, capture_output=True)
    monkeypatch.setattr(_gpu, "_DRIVER", str(library))
    if code:
        with pytest.raises(BackendError, match="the driver's cuInit gives the error 803"):
            require_gpu("It was not run", "Run it elsewhere.")
        return
    found = require_gpu("It was not run", "Run it elsewhere.")
    assert found == Gpu(name="A GPU", compute_capability="12.1", cuda="13.2")


# --- running ----------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRt]:
    gpu = fake_tensorrt.Gpu()
    fake = FakeTensorRt("1.7.1", gpu, names="11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.module("tensorrt_rtx"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.module())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    yield fake
    # Whatever happened, all memory was given back.
    assert gpu.is_empty


def opened(engine: Path) -> Any:
    return open_engine(engine, RTX)


def test_runs_on_the_fake_gpu(engine: Path, library: FakeTensorRt) -> None:
    pictures = np.random.default_rng(0).normal(size=(2, 1, 3, 2, 2)).astype(np.float32)
    with opened(engine) as runner:
        assert runner.device_ns is None
        first = runner.run(pictures[0])
        kept = first.copy()
        second = runner.run(np.asfortranarray(pictures[1]))
        np.testing.assert_array_equal(first, kept)
        assert runner.device_ns > 0
    assert (first.shape, first.dtype) == ((1, 4), np.float32)
    for got, picture in ((first, pictures[0]), (second, pictures[1])):
        np.testing.assert_allclose(got[0], picture.ravel() @ WEIGHTS, rtol=1e-5)
    with pytest.raises(BackendError, match="was closed"):
        runner.run(pictures[0])


def test_any_batch_of_the_profile(tmp_path: Path, library: FakeTensorRt) -> None:
    plan = plan_of("1.7.1", classifier("N"), shapes=profile(2, 4, 6))
    path = put(tmp_path, plan)
    pictures = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype(np.float32)
    expected = pictures.reshape(6, -1) @ WEIGHTS
    with opened(path) as runner:
        for count in (6, 2, 3, 3, 6):
            logits = runner.run(pictures[:count])
            assert logits.shape == (count, 4)
            np.testing.assert_allclose(logits, expected[:count], rtol=1e-5)
        for count in (1, 7):
            with pytest.raises(BackendError) as caught:
                runner.run(np.zeros((count, *SHAPE), np.float32))
            assert str(caught.value) == (
                f"{path} takes 2 to 6 pictures at once, but got {count}. Split the batch, or build "
                "the bundle again for a target whose options.batches go so far."
            )
        library.fails = {"shape"}
        with pytest.raises(BackendError, match="failed: the shape is outside of the profile"):
            runner.run(pictures[:4])
        with pytest.raises(BackendError, match=r"takes float32 of shape \(N, 3, 2, 2\), but got"):
            runner.run(np.zeros((2, 3, 2, 3), np.float32))


def test_a_wrong_picture(engine: Path, library: FakeTensorRt) -> None:
    with opened(engine) as runner, pytest.raises(BackendError) as caught:
        runner.run(np.zeros((2, 3, 2, 2), np.float32))
    assert str(caught.value).startswith(f"{engine} takes float32 of shape (1, 3, 2, 2), but got ")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("deserialize", "it gave no reason"),
        ("context", "no kernels for this GPU"),
        ("address", "it gave no reason"),
    ],
)
def test_an_engine_that_the_library_refuses(
    fails: str, said: str, engine: Path, library: FakeTensorRt
) -> None:
    library.fails = {fails}
    with pytest.raises(BackendError) as caught, opened(engine):
        pass
    assert str(caught.value) == (
        f"Loading {engine} with TensorRT-RTX failed: {said}. "
        "Check the bundle with `gnet-opt verify`."
    )


@pytest.mark.parametrize("left", range(4))
def test_a_gpu_without_memory(left: int, engine: Path, library: FakeTensorRt) -> None:
    library.gpu.allocations_left = left
    with pytest.raises(BackendError, match="gives cudaErrorMemoryAllocation"), opened(engine):
        pass


def test_a_run_that_fails(engine: Path, library: FakeTensorRt) -> None:
    picture = np.zeros((1, 3, 2, 2), np.float32)
    with opened(engine) as runner:
        library.fails = {"execute"}
        for _ in range(2):  # what was said before is not said again
            with pytest.raises(BackendError) as caught:
                runner.run(picture)
            assert str(caught.value) == (
                f"Running {engine} with TensorRT-RTX failed: out of registers. "
                "Check the bundle with `gnet-opt verify`."
            )
            library.gpu.queue.clear()


@pytest.mark.parametrize("form", [{"outputs": 2}, {"inputs": 2}, {"half": True}])
def test_an_engine_of_no_classifier(
    form: dict[str, Any], tmp_path: Path, library: FakeTensorRt
) -> None:
    path = put(tmp_path, plan_of("1.7.1", classifier(**form)))
    with pytest.raises(BackendError, match="one input and one output in float32"), opened(path):
        pass


def test_a_stale_engine_does_not_reach_the_library(engine: Path, library: FakeTensorRt) -> None:
    record = EngineRecord.read(record_of(engine))
    replace(record, version="1.6.0").write(record_of(engine))
    with pytest.raises(BackendError, match=r"this machine has 1\.7\.1\. Install 1\.6\.0"):
        opened(engine).__enter__()


def test_host_code_is_allowed_to_engines_that_need_it(
    tmp_path: Path, library: FakeTensorRt
) -> None:
    plan = plan_of("1.7.0", classifier(), flags=["VERSION_COMPATIBLE"])
    path = put(tmp_path, plan, version="1.7.0", version_compatible=True)
    with opened(path) as runner:
        assert runner.run(np.zeros((1, *SHAPE), np.float32)).shape == (1, 4)
    put(tmp_path, plan)
    with pytest.raises(BackendError, match="has host code, which is not allowed"), opened(path):
        pass


def test_cuda_without_its_package(
    engine: Path, library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingDependencyError) as caught, opened(engine):
        pass
    assert str(caught.value).startswith("cuda-bindings is needed to run model.engine")
    # One for CUDA 13 would not run with a driver for 12.6.
    assert str(caught.value).endswith('Install it for this driver: pip install "cuda-bindings<13"')


# --- the options ------------------------------------------------------------------------------


def test_options_are_read_and_written() -> None:
    assert BuildOptions.read({"tensorrt": "10.3"}, "t.toml") == BuildOptions()
    given = {
        "batches": [1, 4, 16],
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "workspace_mib": 256,
    }
    read = BuildOptions.read(given, "t.toml")
    assert read.batches == (1, 4, 16)
    assert read.to_dict() == given
    assert BuildOptions.read(json.loads(json.dumps(read.to_dict())), "t.toml") == read


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        *(
            ("batches", value, "the least, the usual and the greatest batch, such as [1, 8, 32]")
            for value in (8, [1, 8], [0, 1, 2], [8, 1, 32], [1, 8.0, 32], [True, 8, 32])
        ),
        ("workspace_mib", 0, "MiB, such as 1024"),
        ("workspace_mib", "1 GiB", "MiB, such as 1024"),
        ("version_compatible", 1, "true or false"),
        ("hardware_compatibility", "turing", "one of ampere_plus, or left out"),
    ],
)
def test_options_that_cannot_be_used(key: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BuildOptions.read({key: value}, "t.toml")
    assert str(caught.value) == f"t.toml: options.{key} is {value!r}; it must be {wanted}."


# --- building apart ---------------------------------------------------------------------------


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a module `tensorrt_rtx` with the given code in the way of the building process."""

    def made(code: str) -> Path:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "tensorrt_rtx.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        return tmp_path / "model.onnx"

    return made


def build(model: Path) -> str:
    return build_apart(RTX, model, model.with_suffix(".engine"), BuildOptions())


@pytest.mark.parametrize(
    ("code", "ended", "words"),
    [
        (
            "import os, signal, sys\nprint('assertion failed', file=sys.stderr, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGSEGV)",
            f"signal {int(signal.SIGSEGV)}",
            "assertion failed",
        ),
        ("import os\nos._exit(9)", "exit code 9", "none"),
        # What a library prints is no answer, and an answer that is cut short is none.
        ("import os\nprint('{}')\nos._exit(9)", "exit code 9", "{}"),
        (
            "import gc, io, os\n"
            "out = next(o for o in gc.get_objects() if isinstance(o, io.TextIOWrapper)"
            " and o.fileno() > 2)\n"
            "out.write('{\"vers')\nout.flush()\nos._exit(9)",
            "exit code 9",
            "none",
        ),
    ],
)
def test_a_compiler_that_crashes(
    code: str, ended: str, words: str, fake_compiler: Callable[[str], Path]
) -> None:
    model = fake_compiler(code)
    with pytest.raises(BackendError) as caught:
        build(model)
    assert str(caught.value) == (
        f"Compiling {model} with TensorRT-RTX failed: its process died ({ended}). Its last words: "
        f"{words}. Check the file with `gnet-opt inspect`, or export the model again."
    )


def test_a_compiler_that_cannot_be_imported(fake_compiler: Callable[[str], Path]) -> None:
    model = fake_compiler("raise ImportError('libtensorrt_rtx.so.1: no such file')")
    with pytest.raises(BackendError) as caught:
        build(model)
    assert "failed: libtensorrt_rtx.so.1: no such file. Check" in str(caught.value)


def requested(tmp_path: Path, library: FakeTensorRt, **changes: Any) -> dict[str, Any]:
    """What the building process answers, line by line, when it is asked in this process."""
    model = tmp_path / "model.onnx"
    request = {
        "compute_capabilities": [],
        "engine": str(tmp_path / "made" / "model.engine"),
        "model": str(model),
        "module": "tensorrt",
        "options": BuildOptions().to_dict(),
        "precisions": [],
        "timings": None,
        "title": "TensorRT",
        **changes,
    }
    (tmp_path / "made").mkdir(exist_ok=True)
    answers = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib, "import_module", lambda name: library.module())
        main(json.dumps(request), answers)
    lines = [json.loads(line) for line in answers.getvalue().splitlines()]
    return {"last": lines[-1], "before": lines[:-1]}


def test_every_error_of_the_parser_is_told(tmp_path: Path) -> None:
    class Refusing:
        num_errors = 2

        def __init__(self, network: object, log: object) -> None:
            pass

        def parse_from_file(self, model: str) -> bool:
            return False

        def get_error(self, index: int) -> Any:
            return library.ParserError(5 + index, f"no importer for it, {index}")

    fake = FakeTensorRt("11.4.0", fake_tensorrt.Gpu())
    library: Any = fake.module()
    library.OnnxParser = Refusing
    fake.module = lambda name="tensorrt": library  # type: ignore[method-assign]
    said = requested(tmp_path, fake, model="strange.onnx")
    assert said["last"] == {
        "error": (
            "Compiling strange.onnx with TensorRT failed: "
            "node 5 'a node' (DequantizeLinear): no importer for it, 0 (ModelImporter.cpp:180); "
            "node 6 'a node' (DequantizeLinear): no importer for it, 1 (ModelImporter.cpp:180). "
            "Check the file with `gnet-opt inspect`, or export the model again."
        )
    }


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "10.16.1", "11.4.0"])
def test_phases_are_told_where_the_library_tells_them(version: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(classifier())
    said = requested(tmp_path, FakeTensorRt(version, fake_tensorrt.Gpu()))
    assert said["last"] == {"version": version}
    expected: list[dict[str, Any]] = []
    for name, steps in (("Optimizing the graph", 3), ("Timing kernels", 4)):
        expected.append({"phase": name, "steps": steps})
        expected += [{"step": step} for step in range(steps)]
        expected.append({"ended": name})
    assert said["before"] == ([] if version == "8.6.1" else expected)


def test_an_engine_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(classifier())
    engine = tmp_path / "gone" / "model.engine"
    fake = FakeTensorRt("10.3.0", fake_tensorrt.Gpu())
    (error,) = requested(tmp_path, fake, engine=str(engine))["last"].values()
    assert error.startswith(
        f"TensorRT built an engine of {tmp_path / 'model.onnx'}, but it cannot be written ("
    )
    assert error.endswith("). Make room on the disk, and run the command again.")


def test_a_build_that_nobody_listens_to_stops(tmp_path: Path) -> None:
    """The monitor answers no: the process would compute for minutes otherwise."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    (tmp_path / "model.onnx").write_bytes(classifier())
    fake = FakeTensorRt("10.3.0", fake_tensorrt.Gpu(), fails={"forever"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "StringIO", Gone)
        with pytest.raises(IndexError):  # no line was written, and it came back
            requested(tmp_path, fake)
    assert list((tmp_path / "made").iterdir()) == []


def test_pictures_of_any_size_are_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(classifier("N"))
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    said = requested(tmp_path, FakeTensorRt("11.4.0", fake_tensorrt.Gpu()))
    assert said["last"] == {
        "error": (
            f"{tmp_path / 'model.onnx'} takes pictures of any size: its input has the shape "
            "(-1, 3, 2, -1). Export it with a fixed height and width."
        )
    }
