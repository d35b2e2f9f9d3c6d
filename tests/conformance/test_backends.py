"""What every backend must do, whichever runtime is behind it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance import models
from gnet_opt import backends
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.errors import BackendError, MissingDependencyError
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import INTEGERS, Artifact, Backend
from gnet_opt.stages.pixels import take_pixels
from gnet_opt.target import find

TARGET = find("openvino-cpu")

# Backends that open an artifact on this machine; the others must say why they do not.
RUNNABLE = [name for name in backends.names() if not name.startswith("tensorrt")]
MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "reference": "onnxruntime"}

# Float: another order of summation (134 dB and more seen). INT8: OpenVINO gives the reference's
# integers but where a rounding flips (60 dB); ONNX Runtime rounds biases to integers (41 dB).
# Measured with AVX512-VNNI and AMX, OpenVINO also limited to AVX2 by ONEDNN_MAX_CPU_ISA; there
# eight-bit weights saturate and fall to 17 dB, so the models here have seven-bit ones.
FLOAT_DB, INT8_DB = 90.0, 30.0

PLANES = {"gray": 1, "rgba": 4}
"""Models of other channels than three."""


@pytest.fixture(scope="session")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float and Q/DQ models."""
    folder = tmp_path_factory.mktemp("onnx")
    images = models.pictures(8, seed=1)
    nets = {"float": models.float_net(), "plain": models.float_net(lrn=False)}
    nets["u8"] = models.quantize(nets["float"], images, "u8", weight_bits=7)
    nets["s8"] = models.quantize(nets["float"], images, "s8", weight_bits=7)
    nets["plain-u8"] = models.quantize(nets["plain"], images, "u8", weight_bits=7)
    nets["dynamic"] = models.float_net(batch="N")
    nets["dynamic-u8"] = models.quantize(nets["dynamic"], images, "u8", weight_bits=7)
    for name, planes in PLANES.items():
        nets[name] = models.float_net(planes=planes)
        few = models.pictures(8, seed=1, planes=planes)
        nets[f"{name}-u8"] = models.quantize(nets[name], few, "u8", weight_bits=7)
    return {name: models.save(net, folder / f"{name}.onnx") for name, net in nets.items()}


PIXELS = Preprocess(resize=models.SIDE, crop=models.SIDE, channels="bgr", input="uint8")


@pytest.fixture(scope="session")
def pixel_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Models with a float input, each with the one that takes pixels and computes the same."""
    folder = tmp_path_factory.mktemp("pixels")
    images = PIXELS.normalize(models.pixel_pictures(8, seed=1))
    nets = {"float": models.float_net(), "dynamic": models.float_net(batch="N")}
    nets["u8"] = models.quantize(nets["float"], images, "u8", weight_bits=7)
    nets["s8"] = models.quantize(nets["float"], images, "s8", weight_bits=7)
    for name, planes in PLANES.items():
        few = pixel_preprocess(name).normalize(models.pixel_pictures(8, seed=1, planes=planes))
        nets[f"{name}-u8"] = models.quantize(
            models.float_net(planes=planes), few, "u8", weight_bits=7
        )
    files = {}
    for name, net in nets.items():
        plain, taking = folder / f"{name}.onnx", folder / f"{name}-pixels.onnx"
        pixels = models.pixel_pictures(1, planes=planes_of(name))
        take_pixels(models.save(net, plain), taking, pixel_preprocess(name), pixels)
        files[name] = (plain, taking)
    return files


def planes_of(net: str) -> int:
    return PLANES.get(net.removesuffix("-u8"), 3)


def pixel_preprocess(net: str) -> Preprocess:
    """How pixels become the input of a net of `pixel_files`."""
    channels: Any = net.removesuffix("-u8")
    if channels not in PLANES:
        return PIXELS
    numbers = (120.0,) * PLANES[channels], (50.0,) * PLANES[channels]
    return replace(PIXELS, channels=channels, mean=numbers[0], std=numbers[1])


@pytest.fixture(params=RUNNABLE)
def backend(request: pytest.FixtureRequest) -> Backend:
    found = backends.get(request.param)
    if not found.probe().available:
        pytest.skip(found.probe().detail)
    return found


def compiled(backend: Backend, model: Path, out: Path) -> Artifact:
    out.mkdir(exist_ok=True)
    artifact = backend.compile(model, TARGET, out)
    assert isinstance(artifact, Artifact)
    return artifact


def decibels(reference: np.ndarray, values: np.ndarray) -> float:
    noise = float(((reference.astype(np.float64) - values) ** 2).sum())
    return 10 * np.log10(float((reference.astype(np.float64) ** 2).sum()) / max(noise, 1e-30))


NETS = ["float", "plain", "u8", "s8", "plain-u8", "dynamic", "dynamic-u8"]
NETS += ["gray", "gray-u8", "rgba", "rgba-u8"]


@pytest.mark.parametrize("net", NETS)
def test_agrees_with_the_reference(
    backend: Backend, net: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files[net], tmp_path)
    images = models.pictures(16, seed=2, planes=planes_of(net))
    with open_reference(onnx_files[net], threads=1) as runner:
        expected = np.concatenate([runner.run(image[None]) for image in images])
    with backend.open(artifact, threads=1) as runner:
        actual = np.concatenate([runner.run(image[None]) for image in images])
    assert actual.dtype == np.float32
    assert actual.shape == (16, models.CLASSES)
    quantized = net.endswith(("u8", "s8"))
    assert decibels(expected, actual) >= (INT8_DB if quantized else FLOAT_DB)


def test_takes_any_batch_where_the_model_does(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["dynamic"], tmp_path)
    images = models.pictures(5)
    with backend.open(artifact, threads=1) as runner:
        together = runner.run(images)
        alone = np.concatenate([runner.run(image[None]) for image in images])
        again = runner.run(images)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(together, again)


@pytest.mark.parametrize("net", ["float", "u8"])
def test_is_deterministic_and_gives_a_copy(
    backend: Backend, net: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files[net], tmp_path)
    first, second = models.pictures(2)[:, None]
    with backend.open(artifact, threads=1) as runner:
        one = runner.run(first)
        kept = one.copy()
        two = runner.run(second)
        kept_two = two.copy()
        np.testing.assert_array_equal(one, kept)
        assert not np.shares_memory(one, two)
        assert not np.array_equal(one, two)
        one[:] = np.nan  # the caller owns it
        np.testing.assert_array_equal(runner.run(first), kept)
    # What it gave outlives it, and a second runner does not write into it either.
    np.testing.assert_array_equal(two, kept_two)
    with backend.open(artifact, threads=1) as runner:
        np.testing.assert_array_equal(runner.run(first), kept)
    np.testing.assert_array_equal(two, kept_two)


@pytest.mark.parametrize("writeable", [True, False])
def test_sees_what_its_input_holds_now(
    writeable: bool, backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    first, second = models.pictures(2)[:, None]
    memory = first.copy()
    given = memory.view()
    given.setflags(write=writeable)
    with backend.open(artifact, threads=1) as runner:
        one = runner.run(given)
        memory[:] = second
        two = runner.run(given)
        np.testing.assert_array_equal(two, runner.run(second))
        assert not np.array_equal(one, two)
        np.testing.assert_array_equal(memory, second)


@pytest.mark.parametrize("writeable", [True, False])
def test_does_not_take_nothing_for_what_it_was_given_last(
    writeable: bool, backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    given = models.pictures(1)
    given.setflags(write=writeable)
    nothing: Any = None
    with backend.open(artifact, threads=1) as runner:
        with pytest.raises((BackendError, AttributeError)):
            runner.run(nothing)
        runner.run(given)
        with pytest.raises((BackendError, AttributeError)):
            runner.run(nothing)


def test_does_not_change_its_input_or_need_it_contiguous(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["float"], tmp_path)
    image = models.pictures(1)
    strided = np.asfortranarray(image)
    strided.setflags(write=False)
    with backend.open(artifact, threads=1) as runner:
        np.testing.assert_array_equal(runner.run(strided), runner.run(image))


@pytest.mark.parametrize("net", ["float", "u8", "s8"])
def test_compiles_to_equal_bytes(
    backend: Backend, net: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifacts = [compiled(backend, onnx_files[net], tmp_path / name) for name in ("a", "b")]
    other = tmp_path / "c"
    other.mkdir()
    # Another process: no counter, hash seed or address may reach the files.
    code = (
        "import sys; from pathlib import Path; from gnet_opt import backends; "
        "from gnet_opt.target import find; backends.get(sys.argv[1]).compile("
        "Path(sys.argv[2]), find('openvino-cpu'), Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, backend.name, str(onnx_files[net]), str(other)]
    subprocess.run(command, check=True)
    artifacts.append(backend.artifact(other))
    contents = [[(k, p.name, p.read_bytes()) for k, p in a.files] for a in artifacts]
    assert contents[0] == contents[1] == contents[2]


def test_writes_only_what_it_lists(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(path for _, path in artifact.files)
    assert artifact.path in [path for _, path in artifact.files]
    assert artifact == backend.artifact(tmp_path)
    assert artifact.backend == backend.name


def test_compiles_inside_the_bundle(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    """The pipeline compiles in the folder that holds the portable model already."""
    model = tmp_path / "model.onnx"
    shutil.copyfile(onnx_files["u8"], model)
    before = (model.stat().st_ino, model.read_bytes())
    artifact = compiled(backend, model, tmp_path)
    assert (model.stat().st_ino, model.read_bytes()) == before
    with backend.open(artifact, threads=1) as runner:
        assert runner.run(models.pictures(1)).shape == (1, models.CLASSES)


@pytest.mark.parametrize("damage", ["empty", "half", "short", "noise"])
def test_damaged_files_are_backend_errors(
    backend: Backend, damage: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    for _, path in artifact.files:
        whole = path.read_bytes()
        noise = np.random.default_rng(0).bytes(len(whole))
        damaged = {"empty": b"", "half": whole[: len(whole) // 2], "short": whole[:-7]}
        path.write_bytes(damaged.get(damage, noise))
        # Noise of the right length is a legal weights file; only its SHA-256 tells.
        if not (path.suffix == ".bin" and damage == "noise"):
            with pytest.raises(BackendError) as caught, backend.open(artifact):
                pass
            message = str(caught.value)
            assert message.startswith(f"Loading {artifact.path} with ")
            assert message.endswith("build the bundle again.")
            assert caught.value.__cause__ is not None
        path.write_bytes(whole)


def test_missing_files_are_backend_errors(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    for _, path in artifact.files:
        away = path.rename(path.with_name("away"))
        with pytest.raises(BackendError, match=path.name), backend.open(artifact):
            pass
        away.rename(path)


def test_a_refused_model_is_a_backend_error(backend: Backend, tmp_path: Path) -> None:
    net = models.float_net()
    net.graph.node[-1].op_type = "Gemmm"
    model = models.save(net, tmp_path / "strange.onnx")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BackendError, match="Gemmm") as caught:
        backend.compile(model, TARGET, out)
    assert "strange.onnx" in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (np.zeros((1, 3, 5, 17), np.float32), "float32 of shape (1, 3, 5, 17)"),
        (np.zeros((2, 3, 17, 17), np.float32), "float32 of shape (2, 3, 17, 17)"),
        (np.zeros((3, 17, 17), np.float32), "float32 of shape (3, 17, 17)"),
        (np.zeros((1, 3, 17, 17), np.float64), "float64 of shape (1, 3, 17, 17)"),
    ],
)
def test_a_wrong_input_is_named(
    backend: Backend, batch: np.ndarray, got: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    with backend.open(artifact, threads=1) as runner:
        with pytest.raises(BackendError) as caught:
            runner.run(batch)
        assert str(caught.value) == (
            f"{artifact.path} takes float32 of shape (1, 3, 17, 17), but got {got}. "
            "Preprocess pictures with the bundle's own preprocess."
        )
        assert runner.run(models.pictures(1)).shape == (1, models.CLASSES)


def test_a_wrong_input_is_named_for_a_free_batch(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["dynamic"], tmp_path)
    with backend.open(artifact, threads=1) as runner:
        for shape in ((1, 3, 5, 5), (0, 3, 17, 17)):
            with pytest.raises(BackendError, match=r"takes float32 of shape \(N, 3, 17, 17\)"):
                runner.run(np.zeros(shape, np.float32))


def taking_pixels(backend: Backend) -> Backend:
    if not getattr(backend, "takes_pixels", False):
        pytest.skip(f"{backend.name} does not say that it takes pixels")
    return backend


@pytest.mark.parametrize("net", ["float", "u8", "s8", "dynamic", "gray-u8", "rgba-u8"])
def test_pixels_give_what_the_float_input_gives(
    backend: Backend, net: str, pixel_files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    plain, taking = pixel_files[net]
    artifact = compiled(taking_pixels(backend), taking, tmp_path)
    preprocess = pixel_preprocess(net)
    images = models.pixel_pictures(16, seed=2, planes=planes_of(net))
    with open_reference(plain, threads=1) as runner:
        expected = np.concatenate([runner.run(one[None]) for one in preprocess.normalize(images)])
    with backend.open(artifact, threads=1) as runner:
        actual = np.concatenate([runner.run(preprocess.tensor(image)[None]) for image in images])
        strided = np.asfortranarray(images[:1])
        np.testing.assert_array_equal(runner.run(strided), actual[:1])
        if net == "dynamic":
            np.testing.assert_allclose(runner.run(images), actual, rtol=1e-4, atol=1e-4)
    assert actual.dtype == np.float32
    if backend.name == "reference":
        np.testing.assert_array_equal(actual, expected)
    assert decibels(expected, actual) >= (INT8_DB if net.endswith("8") else FLOAT_DB)


def test_a_model_for_pixels_takes_no_floats(
    backend: Backend, pixel_files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    artifact = compiled(taking_pixels(backend), pixel_files["u8"][1], tmp_path)
    with backend.open(artifact, threads=1) as runner:
        for wrong, got in (
            (models.pictures(1), "float32 of shape (1, 3, 17, 17)"),
            (models.pictures(1).astype(np.uint8), "uint8 of shape (1, 3, 17, 17)"),
            (np.zeros((1, 17, 17, 3), np.float32), "float32 of shape (1, 17, 17, 3)"),
            (np.zeros((1, 17, 17, 3), np.int8), "int8 of shape (1, 17, 17, 3)"),
        ):
            with pytest.raises(BackendError) as caught:
                runner.run(wrong)
            assert str(caught.value) == (
                f"{artifact.path} takes uint8 of shape (1, 17, 17, 3), but got {got}. "
                "Preprocess pictures with the bundle's own preprocess."
            )
        assert runner.run(models.pixel_pictures(1)).shape == (1, models.CLASSES)


def test_a_profile_of_a_model_for_pixels(
    profiling: Backend, pixel_files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    artifact = compiled(taking_pixels(profiling), pixel_files["u8"][1], tmp_path)
    profile = profiling.profile(artifact, models.pixel_pictures(1), threads=1, runs=30)
    layers = [node for node in profile.nodes if node.kind == "layer"]
    assert len(layers) == 15
    assert len([node for node in layers if node.precision in INTEGERS]) >= 13
    unknown = {node.operator for node in profile.nodes if node.kind == "other"}
    assert not unknown & {"Cast", "Convert", "Div", "Gather", "Sub", "Transpose"}


def test_a_closed_runner_says_so(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(backend, onnx_files["float"], tmp_path)
    with pytest.raises(KeyError, match="from the block"), backend.open(artifact) as runner:
        raise KeyError("from the block")  # passes through as it is
    with pytest.raises(BackendError, match="was closed"):
        runner.run(models.pictures(1))


def test_a_missing_runtime_is_one_sentence(
    backend: Backend,
    onnx_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = compiled(backend, onnx_files["u8"], tmp_path)
    module = MODULES[backend.name]
    monkeypatch.setitem(sys.modules, module, None)
    probe = backend.probe()
    assert (probe.available, probe.version) == (False, "")
    install = f'pip install "gnet-opt[{backend.extra}]"'
    assert probe.detail == f"{module} is not installed: {install}"
    with pytest.raises(MissingDependencyError) as caught, backend.open(artifact):
        pass
    assert install in str(caught.value)
    with pytest.raises(MissingDependencyError):
        backend.compile(onnx_files["u8"], TARGET, tmp_path)


@pytest.mark.parametrize("name", backends.names())
def test_probe_does_not_import_the_runtime(name: str) -> None:
    code = (
        "import sys; from gnet_opt import backends\n"
        f"probe = backends.get({name!r}).probe()\n"
        "assert probe.available == bool(probe.version) == (not probe.detail), probe\n"
        "heavy = {'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'torch'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_runners_do_not_disturb_each_other(
    backend: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    images = models.pictures(2)[:, None]
    one = compiled(backend, onnx_files["float"], tmp_path / "one")
    two = compiled(backend, onnx_files["u8"], tmp_path / "two")
    alone = []
    for artifact in (one, two):
        with backend.open(artifact, threads=1) as runner:
            alone.append([runner.run(image) for image in images])
    with backend.open(one, threads=1) as a, backend.open(two, threads=1) as b:
        for index, image in enumerate(images):
            np.testing.assert_array_equal(a.run(image), alone[0][index])
            np.testing.assert_array_equal(b.run(image), alone[1][index])


# Backends that can tell what they execute here; the others must say who can.
PROFILING = [name for name in RUNNABLE if name != "reference"]


@pytest.fixture(params=PROFILING)
def profiling(request: pytest.FixtureRequest) -> Backend:
    found = backends.get(request.param)
    if not found.probe().available:
        pytest.skip(found.probe().detail)
    return found


@pytest.mark.parametrize("net", ["float", "u8", "dynamic-u8"])
def test_a_profile_tells_of_every_layer(
    profiling: Backend, net: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(profiling, onnx_files[net], tmp_path)
    before = sorted(tmp_path.iterdir())
    shown: list[int] = []

    def progress(items, label, total=None):  # type: ignore[no-untyped-def]
        for item in items:
            shown.append(item)
            yield item

    profile = profiling.profile(artifact, models.pictures(1), threads=1, runs=30, progress=progress)
    layers = [node for node in profile.nodes if node.kind == "layer"]
    assert len(layers) == 15
    integer = [node for node in layers if node.precision in INTEGERS]
    # Where a layer's result is float, some runtimes compute it in float.
    assert len(integer) == 0 if net == "float" else len(integer) >= 13
    assert profile.runs >= 30
    assert len(profile.rounds) == len(shown) >= 3
    assert all(node.microseconds >= 0 for node in profile.nodes)
    assert min(profile.rounds) > 0
    assert (profile.backend, profile.threads) == (profiling.name, 1)
    assert profile.version == profiling.probe().version
    assert sorted(tmp_path.iterdir()) == before


def test_a_profile_needs_a_picture_that_fits(
    profiling: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(profiling, onnx_files["u8"], tmp_path)
    with pytest.raises(BackendError, match=r"takes float32 of shape \(1, 3, 17, 17\)"):
        profiling.profile(artifact, np.zeros((1, 3, 5, 17), np.float32), threads=1, runs=1)


def test_a_profile_of_missing_or_damaged_files(
    profiling: Backend, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    artifact = compiled(profiling, onnx_files["u8"], tmp_path)
    artifact.path.write_bytes(artifact.path.read_bytes()[:-7])
    with pytest.raises(BackendError, match="Loading"):
        profiling.profile(artifact, models.pictures(1), threads=1, runs=1)
    artifact.path.unlink()
    with pytest.raises(BackendError, match=artifact.path.name):
        profiling.profile(artifact, models.pictures(1), threads=1, runs=1)


def test_a_profile_without_the_runtime(
    profiling: Backend,
    onnx_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = compiled(profiling, onnx_files["u8"], tmp_path)
    monkeypatch.setitem(sys.modules, MODULES[profiling.name], None)
    with pytest.raises(MissingDependencyError):
        profiling.profile(artifact, models.pictures(1), threads=1, runs=1)


@pytest.mark.parametrize("name", sorted(set(backends.names()) - set(PROFILING)))
def test_who_cannot_profile_says_what_can(name: str, tmp_path: Path) -> None:
    backend = backends.get(name)
    artifact = backend.artifact(tmp_path)
    with pytest.raises(BackendError) as caught:
        backend.profile(artifact, models.pictures(1))
    assert str(caught.value).startswith(f"{artifact.path}: ")
    advice = {
        "reference": "with the backend onnxruntime.",
        "tensorrt": "--separateProfileRun.",
        "tensorrt-rtx": "tensorrt-rtx/latest/performance/benchmarking.html",
    }
    assert str(caught.value).endswith(advice[name])
