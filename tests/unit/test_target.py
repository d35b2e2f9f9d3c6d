from __future__ import annotations

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

import cpuinfo
from gnet_opt import backends, target
from gnet_opt.errors import ConfigError
from gnet_opt.machine import Machine, parse_flags
from gnet_opt.target import Target, detect, find, shipped

FOLDER = Path(target.__file__).with_name("targets")
FILES = sorted(FOLDER.glob("*.toml"))

MINIMAL = """\
name = "board"
summary = "a board"
backend = "onnxruntime"
compile = "host"
precisions = ["int8", "fp32"]

[scheme]
activations = "u8"
symmetric = false
weight_bits = 8

[[evidence]]
claim = "it is so"
source = "measured"
date = "2026-11-23"
"""


def machine(text: str, architecture: str = "x86_64", board: str = "") -> Machine:
    return Machine(
        architecture=architecture,
        instructions=parse_flags(text),
        cpu="recorded",
        board=board,
        cores=4,
        system="Linux",
    )


def pretend(monkeypatch: pytest.MonkeyPatch, found: Machine) -> None:
    monkeypatch.setattr(target, "this_machine", lambda: found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_is_whole(path: Path) -> None:
    shown = Target.read(path)
    assert shown.name == path.stem
    assert shown.backend in backends.names()
    assert shown.summary
    # Maxwell has no INT8 arithmetic; FP16 is for NVIDIA alone.
    integer = [] if shown.name == "jetson-nano" else ["int8"]
    half = ["fp16"] if shown.backend.startswith("tensorrt") else []
    # Float is what `--precision auto` falls back to.
    assert list(shown.precisions) == [*integer, *half, "fp32"]
    for evidence in shown.evidence:
        assert evidence.claim
        assert re.match(r"https://|measured, |Arm |Intel ", evidence.source)
        assert datetime.date.fromisoformat(evidence.date) <= datetime.date.today()
    json.dumps(shown.to_dict(), allow_nan=False)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_scheme_is_one_that_its_backend_fuses(path: Path) -> None:
    shown = Target.read(path)
    scheme = shown.scheme
    assert scheme.per_channel
    if shown.backend in ("tensorrt", "tensorrt-rtx"):
        assert (scheme.activations, scheme.symmetric, scheme.weight_bits) == ("s8", True, 8)
        assert shown.compile == ("device" if shown.backend == "tensorrt" else "host")
    else:
        # With s8 symmetric activations the ReLU stays a node and half of the network is float.
        assert (scheme.activations, scheme.symmetric) == ("u8", False)
        assert shown.compile == "host"
    assert scheme.results == (shown.backend == "onnxruntime")


def test_pairs_are_bounded_exactly_where_vnni_is_not_certain() -> None:
    assert {t.scheme.weight_bits for t in shipped()} == {8}
    bounded = {t.name for t in shipped() if t.scheme.saturating_pairs}
    assert bounded == {"openvino-cpu", "x86-avx2"}
    for shown in shipped():
        for scheme in shown.alternatives.values():
            # Another runtime on the same CPU saturates as well.
            assert scheme.saturating_pairs == shown.scheme.saturating_pairs
            assert scheme.weight_bits == 8


def test_an_alternative_is_another_backend_with_a_scheme_that_it_fuses() -> None:
    shown = {t.name: dict(t.alternatives) for t in shipped() if t.alternatives}
    assert {name: list(found) for name, found in shown.items()} == {
        "openvino-cpu": ["onnxruntime"],
        "x86-avx2": ["onnxruntime"],
        "x86-vnni": ["onnxruntime"],
    }
    for found in shown.values():
        scheme = found["onnxruntime"]
        # Of signed data ONNX Runtime fuses no convolution with a ReLU behind it, and of others only
        # those whose result is quantized.
        assert scheme.results
        assert (scheme.activations, scheme.symmetric, scheme.signed) == ("u8", False, "same")
    assert find("x86-vnni").scheme.signed == "s8"


def test_names_and_aliases_are_unique() -> None:
    names = [name for t in shipped() for name in (t.name, *t.aliases)]
    assert len(names) == len(set(names))
    assert "cpu" not in names
    assert len(shipped()) == len(FILES) >= 7


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("geforce-rtx", "rtx"),
        ("jetson", "jetson-orin-nano"),
        ("rpi5", "raspberry-pi-5"),
        ("raspberry-pi-5", "raspberry-pi-5"),
    ],
)
def test_find_by_name_or_alias(alias: str, name: str) -> None:
    assert find(alias).name == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("jetsen", " Did you mean jetson?"),
        ("Raspberry-Pi-4", " Did you mean raspberry-pi-5?"),
        ("CPU", " Did you mean cpu?"),
        ("x86-vnii", " Did you mean x86-vnni?"),
        ("zzz", ""),
    ],
)
def test_an_unknown_target_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name)
    assert str(caught.value) == (
        f"There is no target {name!r}.{hint} `gnet-opt targets` lists them; a path to a TOML "
        "file of your own works too."
    )


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (machine(cpuinfo.XEON_ICE_LAKE), "x86-vnni"),
        (machine(cpuinfo.ALDER_LAKE_N), "x86-vnni"),
        (machine(cpuinfo.HASWELL), "x86-avx2"),
        (machine(cpuinfo.SKYLAKE_X), "x86-avx2"),
        (machine(cpuinfo.ZEN_2), "x86-avx2"),
        (machine(cpuinfo.CORTEX_A76, "aarch64"), "arm64"),
        (machine(cpuinfo.CORTEX_A76, "aarch64", "Raspberry Pi 5 Model B Rev 1.0"), "arm64"),
    ],
    ids=["ice lake", "alder lake", "haswell", "skylake-x", "zen 2", "cortex-a76", "pi 5"],
)
def test_cpu_is_this_machines_own(
    monkeypatch: pytest.MonkeyPatch, found: Machine, name: str
) -> None:
    pretend(monkeypatch, found)
    assert find("cpu").name == detect().name == name
    assert find("cpu").is_this_machine()


@pytest.mark.parametrize(
    "found", [machine(cpuinfo.CORE_2), machine("", "riscv64")], ids=["core 2", "riscv"]
)
def test_a_cpu_that_no_target_describes(monkeypatch: pytest.MonkeyPatch, found: Machine) -> None:
    pretend(monkeypatch, found)
    with pytest.raises(ConfigError) as caught:
        detect()
    assert str(caught.value) == (
        f"No shipped target matches this CPU ({found.architecture}, recorded). Name one with "
        "--target, or write a TOML file; `gnet-opt targets` lists what there is."
    )


def test_which_targets_a_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def native(found: Machine) -> set[str]:
        pretend(monkeypatch, found)
        return {t.name for t in shipped() if t.is_this_machine()}

    assert native(machine(cpuinfo.ZEN_2)) == {"x86-avx2", "openvino-cpu"}
    assert native(machine(cpuinfo.XEON_ICE_LAKE)) == {"x86-vnni", "openvino-cpu"}
    assert native(machine(cpuinfo.CORTEX_A76, "aarch64")) == {"arm64"}
    pi = machine(cpuinfo.CORTEX_A76, "aarch64", "Raspberry Pi 5 Model B Rev 1.0")
    assert native(pi) == {"arm64", "raspberry-pi-5"}
    older = machine(cpuinfo.CORTEX_A76, "aarch64", "Raspberry Pi 4 Model B Rev 1.4")
    assert native(older) == {"arm64"}
    orin = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    jetson = machine(cpuinfo.CORTEX_A76, "aarch64", orin)
    assert native(jetson) == {"arm64", "jetson-orin-nano"}


def test_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    for name in ("board.toml", "./board.toml", str(tmp_path / "board.toml")):
        board = find(name)
        assert board.name == "board"
        assert board.precisions == ("int8", "fp32")
        assert board.aliases == ()
        assert not board.is_this_machine()


def test_an_alternative_changes_what_its_table_names(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    more = "[alternatives.openvino]\n[alternatives.mine]\nweight_bits = 7\n"
    path.write_text(MINIMAL.replace("[[evidence]]", f"{more}[[evidence]]"))
    board = Target.read(path)
    assert list(board.alternatives) == ["openvino", "mine"]
    assert board.alternatives["openvino"] == board.scheme
    assert board.alternatives["mine"] == dataclasses.replace(board.scheme, weight_bits=7)
    path.write_text(MINIMAL)
    assert Target.read(path).alternatives == {}


def edited(old: str, new: str) -> str:
    assert old in MINIMAL
    return MINIMAL.replace(old, new)


FAULTS: list[tuple[str, str, str]] = [
    ('name = "board"\n', "", "name is missing. Compare a shipped target."),
    ('name = "board"', "name = 5", "name is 5; it must be a string."),
    ("weight_bits = 8\n", "", "scheme.weight_bits is missing. Compare a shipped target."),
    ("weight_bits = 8", "weight_bits = 6", "scheme.weight_bits is 6; it must be one of 7, 8."),
    ("weight_bits = 8", "weight_bits = 8.0", "scheme.weight_bits is 8.0; it must be an integer."),
    (
        'activations = "u8"',
        'activations = "u4"',
        "scheme.activations is 'u4'; it must be one of u8, s8.",
    ),
    ("symmetric = false", "symmetric = 0", "scheme.symmetric is 0; it must be true or false."),
    (
        "symmetric = false",
        "symmetric = true",
        "scheme.symmetric needs scheme.activations = 's8': an unsigned type has no zero point 0 "
        "in its middle.",
    ),
    (
        "symmetric = false",
        "symetric = false",
        "scheme.symetric is not known. Did you mean symmetric?",
    ),
    (
        "weight_bits = 8",
        'weight_bits = 8\nbias = "int32"',
        "scheme.bias is 'int32'; it must be one of float.",
    ),
    ('backend = "onnx', 'bakend = "onnx', "bakend is not known. Did you mean backend?"),
    (
        'compile = "host"',
        'compile = "cloud"',
        "compile is 'cloud'; it must be one of host, device.",
    ),
    (
        '["int8", "fp32"]',
        '["int8", "int4"]',
        "precisions is 'int4'; it must be one of int8, fp16, fp32.",
    ),
    ('["int8", "fp32"]', "[]", "precisions is empty; name at least fp32."),
    ('["int8", "fp32"]', '"int8"', "precisions is 'int8'; it must be a list of strings."),
    ('["int8", "fp32"]', "[8]", "precisions is [8]; it must be a list of strings."),
    (
        "[scheme]",
        'aliases = "b"\n[scheme]',
        "aliases is 'b'; it must be a list of strings.",
    ),
    ("[scheme]", "options = 5\n[scheme]", "options is 5; it must be a table."),
    ("[scheme]", "[skeme]", "the table [scheme] is missing. Compare a shipped target."),
    (
        "[[evidence]]",
        '[match]\nany_of = ["avx2"]\n[[evidence]]',
        "match.architecture is missing. Compare a shipped target.",
    ),
    (
        "[[evidence]]",
        '[match]\narchitecture = "x86_64"\nany_of = "avx2"\n[[evidence]]',
        "match.any_of is 'avx2'; it must be a list of strings.",
    ),
    (
        "weight_bits = 8",
        'weight_bits = 8\nresults = "all"',
        "scheme.results is 'all'; it must be true or false.",
    ),
    (
        "weight_bits = 8",
        "weight_bits = 8\nsaturating_pairs = 1",
        "scheme.saturating_pairs is 1; it must be true or false.",
    ),
    ("[scheme]", "alternatives = 5\n[scheme]", "alternatives is 5; it must be a table."),
    (
        "[scheme]",
        'alternatives = ["openvino"]\n[scheme]',
        "alternatives is ['openvino']; it must be a table.",
    ),
    (
        "[scheme]",
        '[alternatives]\nopenvino = "s8"\n[scheme]',
        "alternatives.openvino is 's8'; it must be a table.",
    ),
    (
        "[scheme]",
        "[alternatives.openvino]\nweight_bits = 6\n[scheme]",
        "alternatives.openvino.weight_bits is 6; it must be one of 7, 8.",
    ),
    (
        "[scheme]",
        "[alternatives.openvino]\nweight_bits = true\n[scheme]",
        "alternatives.openvino.weight_bits is True; it must be an integer.",
    ),
    (
        "[scheme]",
        '[alternatives.openvino]\nsignd = "s8"\n[scheme]',
        "alternatives.openvino.signd is not known. Did you mean signed?",
    ),
    (
        "[scheme]",
        "[alternatives.openvino]\nsymmetric = true\n[scheme]",
        "alternatives.openvino.symmetric needs alternatives.openvino.activations = 's8': an "
        "unsigned type has no zero point 0 in its middle.",
    ),
    (
        "[scheme]",
        "[alternatives.onnxruntime]\n[scheme]",
        "alternatives.onnxruntime is the backend of the target itself; its integer form stands in "
        "[scheme].",
    ),
    ('source = "measured"\n', "", "evidence[0].source is missing. Compare a shipped target."),
    (
        'date = "2026-11-23"',
        "date = 2026-11-23",
        "evidence[0].date is datetime.date(2026, 11, 23); it must be a string.",
    ),
    (
        MINIMAL[MINIMAL.index("[[evidence]]") :],
        "",
        "evidence is empty; say where the choices come from.",
    ),
    (
        "[scheme]",
        "evidence = 5\n[scheme]",
        "",  # TOML itself refuses: `evidence` is a list further down
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_a_fault_is_named_with_its_dotted_path(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "board.toml"
    path.write_text(edited(old, new))
    with pytest.raises(ConfigError) as caught:
        find(str(path))
    if message:
        assert str(caught.value) == f"{path}: {message}"
    else:
        assert str(caught.value).startswith(f"The target file {path} cannot be read: ")


def test_evidence_that_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    table = MINIMAL[: MINIMAL.index("[[evidence]]")]
    path.write_text(table.replace("[scheme]", "evidence = 5\n[scheme]"))
    with pytest.raises(ConfigError) as caught:
        find(str(path))
    assert str(caught.value) == f"{path}: evidence is 5; it must be a list of tables."


@pytest.mark.parametrize("data", [None, b"\xff\xfe", b"name = "])
def test_a_file_that_cannot_be_read(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "board.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        find(str(path))
    assert str(caught.value).startswith(f"The target file {path} cannot be read: ")


def test_what_json_shows() -> None:
    shown: dict[str, Any] = find("jetson").to_dict()
    assert sorted(shown) == sorted(
        [
            "aliases",
            "alternatives",
            "backend",
            "compile",
            "device",
            "evidence",
            "name",
            "options",
            "precisions",
            "scheme",
            "summary",
            "this_machine",
        ]
    )
    assert shown["scheme"] == {
        "activations": "s8",
        "bias": "float",
        "per_channel": True,
        "results": False,
        "saturating_pairs": False,
        "signed": "same",
        "symmetric": True,
        "weight_bits": 8,
    }
    assert shown["this_machine"] is False
    assert shown["alternatives"] == {}
    vnni = find("x86-vnni").to_dict()
    changed = {"results": True, "signed": "same"}
    assert vnni["alternatives"] == {"onnxruntime": {**vnni["scheme"], **changed}}


@pytest.mark.parametrize("name", ["", "a/b", "x\\ntouch PWNED", "../x"])
def test_a_name_that_could_be_a_path_or_a_script(tmp_path: Path, name: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL.replace('"board"', f'"{name}"'))
    with pytest.raises(ConfigError, match="a name starts with a letter or digit"):
        Target.read(path)


# From NVIDIA's pages, as the evidence of each file names them.
NVIDIA = {
    "jetson-agx-orin": ("7.2", "10.16", "3.12", "8.7"),
    "jetson-nano": ("4.6.1", "8.2.1", "3.6", "5.3"),
    "jetson-orin-nano": ("7.2", "10.16", "3.12", "8.7"),
    "jetson-orin-nx": ("7.2", "10.16", "3.12", "8.7"),
    "jetson-thor": ("7.2", "10.16", "3.12", "11.0"),
    "jetson-xavier-nx": ("5.1", "8.5.2", "3.8", "7.2"),
}


def test_every_jetson_says_what_it_carries() -> None:
    shown = {t.name: t for t in shipped() if t.name.startswith("jetson")}
    assert {
        name: tuple(
            t.device[key] for key in ("jetpack", "tensorrt", "python", "compute_capability")
        )
        for name, t in shown.items()
    } == NVIDIA
    for found in shown.values():
        # The command depends on the major and the minor version.
        given = found.options["tensorrt"]
        assert f"{found.device['tensorrt']}.".startswith(f"{given}.")
        chosen = [e for e in found.evidence if e.claim.startswith("Chosen for a new install")]
        assert len(chosen) == 1
        assert re.match(r"https://(\w+\.)?nvidia\.(com|github\.io)/", chosen[0].source)
