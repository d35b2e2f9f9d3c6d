from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint

import pytest

from gnet_opt import backends
from gnet_opt.backends import _boundary
from gnet_opt.errors import BackendError, ConfigError, ModelError
from gnet_opt.target import shipped


def entry_points(*entries: tuple[str, str]):  # type: ignore[no-untyped-def]
    def fake(*, group: str) -> list[EntryPoint]:
        assert group == "gnet_opt.backends"
        return [EntryPoint(name, value, group) for name, value in entries]

    return fake


def test_names_are_sorted_and_cover_the_shipped_targets() -> None:
    assert list(backends.names()) == sorted(backends.names())
    assert {target.backend for target in shipped()} <= set(backends.names())
    for name in backends.names():
        assert backends.get(name).name == name


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        backends.get("OpenVino")
    assert str(caught.value) == (
        "There is no backend 'OpenVino'. Did you mean openvino? Known are onnxruntime, openvino, "
        "reference, tensorrt, tensorrt-rtx; an installed package adds one with an entry point in "
        "the group gnet_opt.backends."
    )
    with pytest.raises(ConfigError, match=r"'zzz'\. Known are"):
        backends.get("zzz")


def test_a_package_adds_a_backend_but_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ("mine", "gnet_opt.backends.onnxruntime:ReferenceBackend")
    monkeypatch.setattr(backends, "entry_points", entry_points(mine, ("openvino", "evil:Class")))
    assert "mine" in backends.names()
    assert type(backends.get("mine")).__name__ == "ReferenceBackend"
    assert type(backends.get("openvino")).__name__ == "OpenVinoBackend"


@pytest.mark.parametrize("value", ["no_such_module_here:Class", "gnet_opt.backends:Nothing"])
def test_a_broken_package_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "entry_points", entry_points(("mine", value)))
    with pytest.raises(BackendError) as caught:
        backends.get("mine")
    assert str(caught.value).startswith(f"Loading the backend mine from {value} failed: ")
    assert str(caught.value).endswith(". Reinstall or remove the package that brings it.")


def test_translated_chains_and_trims() -> None:
    foreign = RuntimeError(
        "Exception from src/inference/src/cpp/core.cpp:117:\n"
        "Check 'ok' failed at src/frontends/ir/src/model.cpp:219:\nTag is not closed.\n\n"
    )
    with pytest.raises(BackendError) as caught, _boundary.translated("Loading x", "Do y."):
        raise foreign
    assert str(caught.value) == "Loading x failed: Tag is not closed. Do y."
    assert caught.value.__cause__ is foreign


def test_translated_names_a_silent_error_and_shortens_a_long_one() -> None:
    with pytest.raises(BackendError) as caught, _boundary.translated("A", "B."):
        raise MemoryError
    assert str(caught.value) == "A failed: MemoryError. B."
    with pytest.raises(BackendError) as caught, _boundary.translated("A", "B."):
        raise ValueError("x" * 10_000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("error", [ModelError("ours"), KeyboardInterrupt(), SystemExit(3)])
def test_translated_lets_our_errors_and_the_user_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, _boundary.translated("A", "B."):
        raise error
    assert caught.value is error


def test_probe_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = type(sys)("odd_runtime")
    odd.__spec__ = None
    monkeypatch.setitem(sys.modules, "odd_runtime", odd)
    assert not _boundary.probe_package("odd_runtime", ("odd",), "odd").available
    assert not _boundary.probe_package("no_parent.child", ("odd",), "odd").available
    unversioned = _boundary.probe_package("json", ("no-such-distribution",), "odd")
    assert (unversioned.available, unversioned.version) == (True, "unknown")


def test_version_is_found_under_any_of_the_distributions() -> None:
    probe = _boundary.probe_package("numpy", ("no-such-distribution", "numpy"), "x")
    assert re.fullmatch(r"\d+\.\d+.*", probe.version)
