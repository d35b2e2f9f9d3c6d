from __future__ import annotations

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gnet_opt.bench.limits import Constraint, parse_cpus, parse_size
from gnet_opt.errors import ConfigError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux limits a process so")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", (0,)), ("0-3,6", (0, 1, 2, 3, 6)), (" 5 , 1-2", (1, 2, 5)), ("1,1,0-1", (0, 1))],
)
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", ",", "3-1", "a", "0-", "-1", "0;1", "1.5", "9" * 30])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--cpus is .*; write numbers and ranges, such as"):
        parse_cpus(text)


@given(st.sets(st.integers(0, 500), min_size=1))
def test_every_list_is_read_back(cpus: set[int]) -> None:
    assert parse_cpus(",".join(map(str, cpus))) == tuple(sorted(cpus))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * 2**20),
        ("512MiB", 512 * 2**20),
        ("512mb", 512 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("2g", 2**31),
        ("1000", 1000),
        ("64KB", 64_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1T5", "0", "0.2", "1e9", "512 Mo", "ib", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--memory is .*; write a size such as"):
        parse_size(text)


def test_a_constraint_is_read_back() -> None:
    for constraint in (Constraint(cpus=(0, 2), memory_bytes=5), Constraint(cpus=(1,))):
        assert constraint
        assert Constraint.from_dict(constraint.to_dict()) == constraint
        assert constraint.to_dict()["label"] == "constrained host"
    assert not Constraint()


@LINUX
def test_cpus_that_are_not_there_are_refused() -> None:
    own = os.sched_getaffinity(0)
    Constraint(cpus=tuple(own)).check()
    with pytest.raises(ConfigError, match=r"^--cpus names 99999, but this process may use"):
        Constraint(cpus=(min(own), 99999)).check()


@LINUX
def test_a_process_is_put_under_a_constraint() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = f"""
import os
from gnet_opt.bench.limits import Constraint
Constraint(cpus=({cpu},), memory_bytes=300_000_000).apply()
assert os.sched_getaffinity(0) == {{{cpu}}}
kept = bytearray(50_000_000)
try:
    bytearray(400_000_000)
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n", "")
