from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpuinfo import ALDER_LAKE_N, CORTEX_A76, HASWELL, SKYLAKE_X, XEON_ICE_LAKE, ZEN_2
from gnet_opt import machine
from gnet_opt.machine import Machine, parse_flags, this_machine


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    this_machine.cache_clear()
    yield
    this_machine.cache_clear()


@pytest.mark.parametrize(
    ("text", "has", "has_not"),
    [
        (XEON_ICE_LAKE, {"avx2", "avx512_vnni"}, {"avx_vnni", "vnmi", "of", "spectre_v1"}),
        (ALDER_LAKE_N, {"avx2", "avx_vnni"}, {"avx512_vnni", "avx512f"}),
        (HASWELL, {"avx2", "fma"}, {"avx512_vnni", "avx_vnni"}),
        (ZEN_2, {"avx2", "sse4a"}, {"avx512_vnni", "avx_vnni"}),
        (CORTEX_A76, {"asimd", "asimddp"}, {"avx2", "i8mm", "of"}),
    ],
    ids=["ice lake", "alder lake", "haswell", "zen 2", "cortex-a76"],
)
def test_flags_of_the_first_core(text: str, has: set[str], has_not: set[str]) -> None:
    flags = parse_flags(text)
    assert has <= flags
    assert not flags & has_not


def test_flags_are_all_words_of_the_line() -> None:
    assert parse_flags(SKYLAKE_X) == {
        *("fpu", "sse", "sse2", "ssse3", "fma", "sse4_1", "sse4_2", "avx", "f16c", "avx2"),
        *("avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"),
    }


@pytest.mark.parametrize("text", ["", "flags", "flags\t:\n", "nonsense\n\n:::\n"])
def test_no_flags_in_other_texts(text: str) -> None:
    assert parse_flags(text) == frozenset()


def describe(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, raw: str, board: str = "") -> Machine:
    texts = {"/proc/cpuinfo": cpuinfo, "/proc/device-tree/model": board}
    monkeypatch.setattr(machine, "text_of", lambda path: texts[str(path)])
    monkeypatch.setattr(machine.platform, "machine", lambda: raw)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    return this_machine()


def test_a_raspberry_pi(monkeypatch: pytest.MonkeyPatch) -> None:
    board = "Raspberry Pi 5 Model B Rev 1.0\0"
    found = describe(monkeypatch, CORTEX_A76, "aarch64", board)
    assert found.architecture == "aarch64"
    assert found.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.cpu == "aarch64"
    assert found.to_dict()["instructions"] == ["asimd", "asimddp", "asimdhp"]


@pytest.mark.parametrize(
    ("raw", "architecture"),
    [("AMD64", "x86_64"), ("x86_64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")],
)
def test_architectures_have_one_name(
    monkeypatch: pytest.MonkeyPatch, raw: str, architecture: str
) -> None:
    found = describe(monkeypatch, HASWELL, raw)
    assert found.architecture == architecture
    assert found.cpu == "Intel(R) Core(TM) i5-4590 CPU @ 3.30GHz"


def test_without_proc_numpy_tells_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    features = {"AVX2": True, "AVX512F": False, "AVX512_ICL": True, "SSE": True}
    fake = SimpleNamespace(__cpu_features__=features)
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: fake)
    found = describe(monkeypatch, "", "AMD64")
    assert found.instructions == {"avx2", "avx512_icl", "sse", "avx512_vnni"}


def test_without_any_source_no_flag_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(machine.importlib, "import_module", refuse)
    assert describe(monkeypatch, "", "x86_64").instructions == frozenset()


def test_the_numpy_here_still_has_its_table() -> None:
    import numpy as np

    if not hasattr(np, "_core"):
        pytest.skip("before NumPy 2 the table has another place")
    assert machine._numpy_flags()


def test_what_a_manifest_records() -> None:
    found = this_machine().to_dict()
    assert sorted(found) == ["architecture", "board", "cores", "cpu", "instructions", "system"]
    assert found["cores"] >= 1
    assert found["system"]
