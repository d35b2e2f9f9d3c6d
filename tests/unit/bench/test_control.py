"""The control load: the same work every time, on as many threads as asked for."""

from __future__ import annotations

import hashlib
import zlib
from types import SimpleNamespace

import pytest

from gnet_opt.bench import control


def test_every_thread_times_its_own_work() -> None:
    for threads in (1, 3):
        times = control.times_ns(threads)
        assert len(times) == threads * control.COUNT
        assert min(times) > 0


def test_the_threads_of_the_machine_and_no_more_than_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "_timed", lambda: [1])
    monkeypatch.setattr(control, "this_machine", lambda: SimpleNamespace(cores=2))
    assert control.times_ns(None) == [1, 1]
    assert control.times_ns(64) == [1] * control.MOST_THREADS


def test_where_no_thread_can_be_started_one_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(control, "ThreadPoolExecutor", refuse)
    assert len(control.times_ns(4)) == control.COUNT


def test_there_is_work_in_it() -> None:
    text = control._text()
    # The same on every machine, or their times would be of different work.
    digest = "617f203c980dc851412af6672cd19d03b9579d8d75b57a6b3ea796dc401e7b42"
    assert hashlib.sha256(text).hexdigest() == digest
    # What cannot be compressed would be copied, and what is all the same is done at once.
    assert 0.3 < len(zlib.compress(text)) / len(text) < 0.8
