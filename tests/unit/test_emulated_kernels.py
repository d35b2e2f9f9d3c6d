"""The parts of benchmarks/emulated_kernels.py: what they promise, and how they skip and fail."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gnet_opt.machine import Machine

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as for a script, whose folder comes first
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    yield from load("emulated_kernels")


@pytest.fixture(scope="module")
def cpus() -> Iterator[ModuleType]:
    yield from load("foreign_cpus")


@pytest.fixture(scope="module")
def processes() -> Iterator[ModuleType]:
    yield from load("emulated_processes")


def host(cpus: ModuleType) -> Any:
    """This machine as a CPU of its own."""
    return cpus.Cpu(
        name="host",
        python=(sys.executable,),
        environment=dict(os.environ),
        facts={"how": "as it is"},
    )


def machine(architecture: str, *instructions: str) -> Machine:
    return Machine(
        architecture=architecture,
        instructions=frozenset(instructions),
        cpu="A CPU",
        board="",
        cores=2,
        system="Linux",
    )


# What the emulated core is told of itself.


def test_hwcap_of_a_cortex_a76_has_the_dot_product(cpus: ModuleType) -> None:
    # As qemu 7.2 gives it.
    names = cpus.hwcap_names(0x119FFB)

    assert {"asimd", "asimddp", "fphp", "atomics"} <= set(names)
    assert "sve" not in names and "evtstrm" not in names
    assert cpus.hwcap_names(0) == []


def test_cpuinfo_is_read_as_the_core(cpus: ModuleType) -> None:
    from gnet_opt.machine import parse_flags

    text = cpus.cpuinfo("cortex-a76", ["fp", "asimd", "asimddp"], 2)

    assert parse_flags(text) == {"fp", "asimd", "asimddp"}
    assert text.count("processor\t: ") == 2
    assert "processor\t: 1\n" in text
    assert text.count("CPU part\t: 0xd0b\n") == 2
    assert text.endswith("\n\n")


def test_the_cores_part_numbers_differ(cpus: ModuleType) -> None:
    texts = {cpus.cpuinfo(core, [], 1) for core in cpus.ARM_CORES}
    assert len(texts) == len(cpus.ARM_CORES)


def test_dot_products_are_counted_by_their_codes(cpus: ModuleType) -> None:
    # sdot and udot, vector and by element, and udot on 64 bits; then two that are neither.
    log = """\
----------------
IN:
0x5500000000:  4e829420  .byte    0x20, 0x94, 0x82, 0x4e
0x5500000004:  6e829420  .byte    0x20, 0x94, 0x82, 0x6e
0x5500000008:  4f82e020  .byte    0x20, 0xe0, 0x82, 0x4f
0x550000000c:  6fa2e820  .byte    0x20, 0xe8, 0xa2, 0x6f
0x5500000010:  2e829420  .byte    0x20, 0x94, 0x82, 0x2e
0x5500000014:  4e229c20  mul      v0.16b, v1.16b, v2.16b
0x5500000018:  d503201f  nop
"""
    assert cpus.count_dot_products(log.splitlines()) == {"sdot": 2, "udot": 3}


def test_a_traced_cpu_is_the_same_one_and_writes_a_log(cpus: ModuleType, tmp_path: Path) -> None:
    cpu = dataclasses.replace(host(cpus), python=("qemu", "-cpu", "cortex-a76", "python"))

    traced = cpus.traced(cpu, tmp_path / "log")

    log = str(tmp_path / "log")
    assert traced.python == ("qemu", "-d", "in_asm", "-D", log, "-cpu", "cortex-a76", "python")
    assert traced.environment == cpu.environment


# What is fetched, once, into one folder.


def test_a_part_is_made_once_and_again_for_another_recipe(cpus: ModuleType, tmp_path: Path) -> None:
    calls: list[str] = []

    def make(staging: Path) -> Mapping[str, Any]:
        calls.append("made")
        (staging / "file").write_text(f"{len(calls)}")
        return {"number": len(calls)}

    path = tmp_path / "deep" / "part"
    assert cpus.part(path, {"packages": ("a", "b")}, make) == (path, {"number": 1})
    assert cpus.part(path, {"packages": ("a", "b")}, make) == (path, {"number": 1})
    assert len(calls) == 1
    assert cpus.part(path, {"packages": ("a", "c")}, make) == (path, {"number": 2})
    assert (path / "file").read_text() == "2"
    assert cpus.contents(path) == {"number": 2}
    assert [p.name for p in path.parent.iterdir()] == ["part"]


def test_a_part_that_fails_leaves_the_old_one(cpus: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "part"
    cpus.part(path, {"version": 1}, lambda staging: {"version": 1})

    def fail(staging: Path) -> Mapping[str, Any]:
        (staging / "half").touch()
        raise cpus.UnavailableError("the network is gone")

    with pytest.raises(cpus.UnavailableError, match=r"^the network is gone$"):
        cpus.part(path, {"version": 2}, fail)

    assert cpus.part(path, {"version": 1}, fail) == (path, {"version": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


@pytest.mark.skipif(shutil.which("apt-config") is None, reason="apt is not installed")
def test_apt_is_kept_off_the_system(cpus: ModuleType, tmp_path: Path) -> None:
    configuration = tmp_path / "apt.conf"
    configuration.write_text(cpus.apt_configuration(tmp_path), encoding="utf-8")

    told = subprocess.run(
        ["apt-config", "dump"],
        env={**os.environ, "APT_CONFIG": str(configuration)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    settings = dict(line.rstrip(";").split(" ", 1) for line in told.splitlines() if " " in line)
    for name in ("State", "State::status", "Cache", "Etc::sourcelist", "Etc::sourceparts", "Log"):
        found = {key.lower(): value for key, value in settings.items()}[f"Dir::{name}".lower()]
        assert found.startswith(f'"{tmp_path}'), name
    assert '"arm64"' in told


# Machines that cannot.


@pytest.mark.parametrize("target", ["arm64", "raspberry-pi-5", "x86-avx2"])
@pytest.mark.parametrize(
    ("system", "architecture"), [("Darwin", "aarch64"), ("Windows", "x86_64"), ("Linux", "aarch64")]
)
def test_another_system_skips_with_the_reason(
    kernels: ModuleType,
    cpus: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    system: str,
    architecture: str,
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(cpus, "this_machine", lambda: machine(architecture, "avx2"))

    code = kernels.main([target, "--folder", str(tmp_path / "f"), "-o", str(tmp_path / "results")])

    assert code == 77
    said = capsys.readouterr().err
    assert said == f"SKIPPED: it needs Linux on x86-64, and this is {system} on {architecture}.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def linux(cpus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(cpus, "this_machine", lambda: machine("x86_64", "avx2", "avx512f"))


@pytest.mark.usefixtures("linux")
def test_without_apt_there_is_no_arm(
    cpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(cpus.UnavailableError, match=r"^apt-get is not installed$"):
        cpus.arm(tmp_path, "cortex-a76")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("linux")
def test_without_debians_key_nothing_is_fetched(
    cpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cpus, "KEYRING", tmp_path / "no.gpg")
    with pytest.raises(cpus.UnavailableError, match=r"no\.gpg is missing \(Debian's package"):
        cpus.arm(tmp_path / "folder", "cortex-a76")


@pytest.mark.usefixtures("linux")
def test_without_network_the_reason_is_apts(
    cpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key.gpg").touch()
    (tmp_path / "bin").mkdir()
    script = (
        "#!/bin/sh\necho 'W: slow' >&2\necho 'E: Could not resolve deb.debian.org.' >&2\nexit 100"
    )
    for name in ("apt-get", "dpkg-deb"):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(cpus, "KEYRING", tmp_path / "key.gpg")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(cpus.UnavailableError) as caught:
        cpus.arm(tmp_path / "folder", "cortex-a76")
    reason = "apt-get update of bookworm failed: E: Could not resolve deb.debian.org"
    assert str(caught.value) == reason
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.usefixtures("linux")
def test_without_the_packages_here_the_versions_are_unknown(
    cpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "part", lambda path, recipe, make: (path, {}))
    monkeypatch.setattr(cpus, "PACKAGES", ("onnxruntime-that-is-not-there",))
    with pytest.raises(cpus.UnavailableError, match=r"^onnxruntime-that-is-not-there is not ins"):
        cpus.arm(tmp_path, "cortex-a76")


@pytest.mark.usefixtures("linux")
def test_without_a_compiler_nothing_hides_vnni(
    cpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(cpus.UnavailableError, match="needs a C compiler"):
        cpus.without_vnni(tmp_path)


def test_a_cpu_without_avx2_cannot_stand_for_one(
    cpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(cpus, "this_machine", lambda: machine("x86_64", "sse4_1"))
    with pytest.raises(cpus.UnavailableError, match=r"^this CPU \(A CPU\) has no AVX2$"):
        cpus.without_vnni(tmp_path)


def test_hidden_instructions_are_gone_and_kernels_saturate(
    kernels: ModuleType, cpus: ModuleType, tmp_path: Path
) -> None:
    try:
        cpu = cpus.without_vnni(tmp_path)
    except cpus.UnavailableError as error:
        pytest.skip(str(error))

    assert "AVX2" in cpu.facts["features"]
    assert not any(name.startswith("AVX512") for name in cpu.facts["features"])
    for backend in ("onnxruntime", "openvino"):
        found = kernels.probe(cpu, backend, tmp_path / backend)
        assert found["outputs"] == 64 * 6 * 6
        assert found["wrong_percent"] > 20, backend


# Processes.

SLOW = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"


def test_children_end_with_their_block(
    cpus: ModuleType, processes: ModuleType, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    with pytest.raises(KeyboardInterrupt), processes.Children() as children:
        child = children.start(host(cpus), ["-c", SLOW, str(started)], tmp_path / "log")
        while not started.exists():
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert child.returncode == -signal.SIGKILL


def test_a_process_that_hangs_is_ended(
    cpus: ModuleType, processes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.5)
    with pytest.raises(processes.FailedError, match=r"^It did not end in 0 s on host: "):
        processes.run_python(host(cpus), ["-c", SLOW, str(tmp_path / "x")], tmp_path / "log")


WRITE = """
import sys, numpy as np
first, last, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if first == int(sys.argv[4]):
    sys.exit("broken here")
np.save(out, np.arange(first, last, dtype=np.float32)[:, None])
"""


def pieces(processes: ModuleType, folder: Path, broken: int = -1) -> tuple[Any, Any]:
    files = {p: folder / f"{p[0]}-{p[1]}.npy" for p in processes.chunks(50)}
    command: Mapping[tuple[int, int], Sequence[str]] = {
        p: ["-c", WRITE, str(p[0]), str(p[1]), str(file), str(broken)] for p, file in files.items()
    }
    return command, files


def test_chunks_cover_everything_once(processes: ModuleType) -> None:
    assert list(processes.chunks(50)) == [(0, 20), (20, 40), (40, 50)]
    assert list(processes.chunks(20)) == [(0, 20)]
    assert list(processes.chunks(2)) == [(0, 2)]


def test_pieces_are_put_together_in_order_and_not_done_twice(
    cpus: ModuleType, processes: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, files = pieces(processes, tmp_path)
    values = processes.run_chunks(host(cpus), command, files, jobs=2, label="A")
    assert values[:, 0].tolist() == list(range(50))
    assert capsys.readouterr().out.endswith("A: 50 of 50 pictures\n")

    # What is there counts, whoever made it.
    np.save(files[20, 40], np.full((20, 1), -1, np.float32))
    again = processes.run_chunks(host(cpus), command, files, jobs=2, label="A")
    assert again[:, 0].tolist() == [*range(20), *[-1] * 20, *range(40, 50)]
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_goes_on(
    cpus: ModuleType, processes: ModuleType, tmp_path: Path
) -> None:
    command, files = pieces(processes, tmp_path, broken=20)
    with pytest.raises(processes.FailedError) as caught:
        processes.run_chunks(host(cpus), command, files, jobs=1, label="A")
    log = tmp_path / "20-40.log"
    reason = f"A: the process ended with code 1 (broken here). The whole log: {log}"
    assert str(caught.value) == reason
    assert [file.is_file() for file in files.values()] == [True, False, False]

    command, _ = pieces(processes, tmp_path)
    before = files[0, 20].stat().st_mtime_ns
    values = processes.run_chunks(host(cpus), command, files, jobs=1, label="A")
    assert values.shape == (50, 1)
    assert files[0, 20].stat().st_mtime_ns == before


# Judging.


def test_the_probe_is_exact_in_reference_semantics(tmp_path: Path) -> None:
    from gnet_opt.backends.onnxruntime import open_reference

    for module in load("saturation_probe"):
        probe = module.make_probe(tmp_path / "probe.onnx")
        same = module.make_probe(tmp_path / "again.onnx")

    with open_reference(probe.model) as runner:
        found = runner.run(probe.inputs)
    np.testing.assert_array_equal(found, probe.expected)
    assert len(np.unique(found)) > 50
    assert probe.model.read_bytes() == same.model.read_bytes()


def test_convolutions_of_onnxruntime_are_counted(kernels: ModuleType) -> None:
    operators = ["QLinearConv"] * 3 + ["FusedConv", "Conv", "NhwcFusedConv", "ConvInteger", "LRN"]
    found = kernels.count_convolutions([(name, "") for name in operators])
    assert (found["integer"], found["float"]) == (4, 3)
    assert found["executed"]["QLinearConv"] == 3
    assert found["executed"]["LRN"] == 1


def test_convolutions_of_openvino_are_counted(kernels: ModuleType) -> None:
    nodes = [
        ("Convolution", "jit_avx2_I8"),
        ("Convolution", "jit_avx2_1x1_I8"),
        ("Convolution", "jit_avx2_f32"),
        ("Convert", "unknown_f32"),
        ("Const", "unknown_i8"),
    ]
    found = kernels.count_convolutions(nodes)
    assert (found["integer"], found["float"]) == (2, 1)
    assert "Convolution jit_avx2_I8" in found["executed"]
    assert not any(name.startswith("Const") for name in found["executed"])


def result(**changes: Any) -> dict[str, Any]:
    row = {
        "against_reference": {"agreement": 99.0, "identical": False, "sqnr_db": 36.5},
        "backend": "onnxruntime",
        "convolutions": {"executed": {}, "float": 2, "integer": 55},
        "cpu": {"name": "cortex-a76"},
        "evaluation": {"images": 100},
        "kernels": {"float": {"top1": 76.0}, "quantized": {"top1": 75.0}},
        "network": "demo",
        "probe": {"wrong_percent": 0.0},
        "reference": {"quantized": {"top1": 76.0}},
        "verify": {"exit_code": 0, "result": {}},
    }
    return {"runs": [{**row, **changes}], "target": "arm64"}


def test_a_good_result_has_no_faults(kernels: ModuleType) -> None:
    assert kernels.faults(result()) == []
    same = {"agreement": 100.0, "identical": True, "sqnr_db": None}
    assert kernels.faults(result(against_reference=same)) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"against_reference": {"agreement": 87.0, "identical": False, "sqnr_db": 13.6}},
            "13.6 dB against reference semantics; at least 30 dB are required.",
        ),
        (
            {"against_reference": {"agreement": 0.0, "identical": False, "sqnr_db": None}},
            "no signal against reference semantics; at least 30 dB are required.",
        ),
        (
            {"verify": {"exit_code": 6, "said": "gnet-opt: golden outputs differ"}},
            "`gnet-opt verify` ended with exit code 6 (gnet-opt: golden outputs differ).",
        ),
    ],
)
def test_faults_are_told(kernels: ModuleType, changes: dict[str, Any], fault: str) -> None:
    where = "arm64, demo, onnxruntime on cortex-a76"
    assert kernels.faults(result(**changes)) == [f"{where}: {fault}"]


def test_another_haswell_is_a_fault(kernels: ModuleType) -> None:
    row = {"backend": "openvino", "identical": False, "network": "demo"}
    found = kernels.faults({**result(), "cross_check": [row]})
    assert found == ["arm64, demo, openvino: an emulated Haswell gives other logits."]


def test_a_fault_ends_with_exit_code_1_and_a_written_result(
    kernels: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = {"agreement": 87.0, "identical": False, "sqnr_db": 13.6}
    rows = result(against_reference=bad)["runs"]
    monkeypatch.setattr(kernels, "measure", lambda *_: rows)
    monkeypatch.setattr(kernels, "DATA", tmp_path)

    assert kernels.main(["raspberry-pi-5", "-o", str(tmp_path)]) == 1

    written = json.loads((tmp_path / "emulated-raspberry-pi-5.json").read_text(encoding="utf-8"))
    assert written["runs"] == rows
    assert "FAILED: raspberry-pi-5, demo, onnxruntime on cortex-a76: 13.6 dB" in (
        capsys.readouterr().err
    )


def test_a_row_in_one_line(kernels: ModuleType) -> None:
    assert kernels.summary(result()["runs"][0]) == (
        "36.5 dB and 99.0 % agreement with reference semantics; top-1 75.0 % (reference 76.0 %, "
        "float 76.0 %, n = 100); 55 of 57 convolutions in integers; 0 % of the probe wrong"
    )


def test_agreement_and_noise_are_of_the_logits(kernels: ModuleType) -> None:
    reference = np.eye(4, dtype=np.float32)
    other = reference.copy()
    other[3] = [0, 1.1, 0, 1]
    found = kernels.compared(reference, other)
    assert found["agreement"] == 75.0
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(4 / 1.21), abs=1e-4)
    assert kernels.compared(reference, reference) == {
        "agreement": 100.0,
        "identical": True,
        "sqnr_db": None,
    }


def test_the_other_form_differs_in_the_scheme_alone(kernels: ModuleType) -> None:
    usual, other = kernels.target_of("arm64"), kernels.target_of("arm64.s8-symmetric")
    assert (other.scheme.activations, other.scheme.symmetric) == ("s8", True)
    assert (usual.scheme.activations, usual.scheme.symmetric) == ("u8", False)
    assert other.file == usual.file and other.backend == usual.backend


@pytest.mark.parametrize("arguments", [["arm"], ["arm64", "--images", "0"], ["--jobs", "0"]])
def test_what_cannot_be_is_refused(kernels: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        kernels.parse(arguments)
    assert caught.value.code == 2
