from __future__ import annotations

import json
import math
import os
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from gnet_opt.bench import accuracy
from gnet_opt.bench.accuracy import Accuracy, Drop, Score, collect, collect_apart, compare
from gnet_opt.bench.process import Subject
from gnet_opt.errors import BackendError, CalibrationError, MissingDependencyError
from gnet_opt.files import dump_json
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import Artifact

FINITE = st.floats(-1e4, 1e4, width=32)
OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300)


@st.composite
def paired_logits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    shape = draw(st.tuples(st.integers(1, 12), st.integers(2, 9)))  # one: see test_binary
    # Few different values, so that ties are common.
    values = st.one_of(FINITE, st.sampled_from([0.0, 1.0, -1.0]))
    arrays = hnp.arrays(np.float32, shape, elements=values)
    labels = st.lists(st.integers(0, shape[1] - 1), min_size=shape[0], max_size=shape[0])
    return draw(arrays), draw(arrays), draw(labels)


@given(paired_logits())
def test_ranks_are_places_in_a_stable_sort(data: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    logits, _, labels = data
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    places = [row.tolist().index(label) for row, label in zip(order, labels, strict=True)]
    ranks = accuracy.ranks(logits, np.asarray(labels, np.int64))
    assert ranks.tolist() == places
    assert ((ranks == 0) == (logits.argmax(1) == labels)).all()


@given(paired_logits())
def test_compare_is_consistent(data: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    floats, quantized, labels = data
    result = compare(floats, quantized, labels, semantics="native")
    before, after, drop = result.float_score, result.quantized_score, result.drop
    assert before is not None and after is not None and drop is not None
    assert before == accuracy.score(floats, labels)
    assert drop.value == pytest.approx(before.top1 - after.top1)
    assert drop.ci95[0] < drop.ci95[1]
    assert (before.top5 is None) == (floats.shape[1] < 5)
    if before.top5 is not None:
        assert before.top1 <= before.top5 <= 100
    # No more pictures can change from right to wrong than change at all.
    assert abs(drop.value) <= 100 - result.agreement + 1e-9
    json.loads(dump_json(result.to_dict()))
    back = compare(quantized, floats, labels, semantics="native")
    assert back.drop is not None
    assert back.drop.value == -drop.value
    assert back.drop.ci95 == pytest.approx((-drop.ci95[1], -drop.ci95[0]))
    assert back.agreement == result.agreement


@given(paired_logits())
def test_identical_logits(data: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    logits, _, labels = data
    result = compare(logits, logits.copy(), labels, semantics="reference")
    assert result.agreement == 100
    assert result.sqnr_db is None
    assert result.float_score == result.quantized_score
    assert result.drop is not None and result.drop.value == 0
    low, high = result.drop.ci95
    assert low == pytest.approx(-high)


@given(OUTCOMES)
def test_the_interval_is_the_adjusted_wald_one(outcomes: list[tuple[bool, bool]]) -> None:
    a, b = (np.array(side) for side in zip(*outcomes, strict=True))
    # By hand: four cells, half an outcome added to each, then the paired Wald formula.
    cells = {(x, y): 0.5 + outcomes.count((x, y)) for x in (False, True) for y in (False, True)}
    n = sum(cells.values())
    p10, p01 = cells[True, False] / n, cells[False, True] / n
    half = 1.959964 * math.sqrt((p10 + p01 - (p10 - p01) ** 2) / n)
    drop = accuracy.paired_drop(a, b)
    assert drop.value == pytest.approx(100 * (a.mean() - b.mean()))
    expected = (100 * max(-1, p10 - p01 - half), 100 * min(1, p10 - p01 + half))
    assert drop.ci95 == pytest.approx(expected, abs=1e-4)
    assert -100 <= drop.ci95[0] < drop.ci95[1] <= 100


def test_the_interval_covers_the_truth() -> None:
    """Of 2,000 experiments with a true drop of 1 point about 95 % contain it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        cell = rng.choice(4, size=400, p=[0.72, 0.03, 0.02, 0.23])
        drop = accuracy.paired_drop(np.isin(cell, [0, 1]), np.isin(cell, [0, 2]))
        hits += drop.ci95[0] <= 1.0 <= drop.ci95[1]
    assert 0.93 <= hits / 2000 <= 0.98


def test_pairing_narrows_the_interval() -> None:
    right = np.arange(400) < 300
    low, high = accuracy.paired_drop(right, right).ci95
    assert high - low < 1.5  # two separate intervals would be over 8 points wide


@given(hnp.arrays(np.float32, (3, 4), elements=FINITE), st.floats(0.125, 64, width=32))
def test_sqnr_does_not_depend_on_scale(logits: np.ndarray, factor: float) -> None:
    noise = np.full_like(logits, 0.5)
    small = accuracy.sqnr_db(logits.astype(np.float64), (logits + noise).astype(np.float64))
    large = accuracy.sqnr_db(
        factor * logits.astype(np.float64), factor * (logits + noise).astype(np.float64)
    )
    assert (small is None) == (large is None)
    if small is not None:
        assert large == pytest.approx(small, abs=1e-6)


def test_sqnr_by_definition() -> None:
    logits = np.array([[3.0, 4.0]], np.float32)
    assert accuracy.sqnr_db(logits, logits + np.array([[0.3, -0.4]], np.float32)) == pytest.approx(
        20, abs=1e-4
    )
    assert accuracy.sqnr_db(np.zeros_like(logits), logits) is None


def test_manifest_form() -> None:
    logits = np.array([[9, 1, 2, 3, 4, 5], [0, 9, 1, 2, 3, 4]], np.float32)
    flipped = logits.copy()
    flipped[1, 0] = 10
    result = compare(logits, flipped, [0, 1], semantics="reference").to_dict()
    drop = result.pop("drop")
    assert result == {
        "agreement": 50.0,
        "float": {"top1": 100.0, "top5": 100.0},
        "images": 2,
        "quantized": {"top1": 50.0, "top5": 100.0},
        "semantics": "reference",
        "sqnr_db": pytest.approx(10 * math.log10((logits**2).sum() / 100)),
    }
    assert drop["value"] == 50.0
    assert isinstance(drop["ci95"], list)


def test_without_labels_there_is_no_score() -> None:
    logits = np.ones((2, 3), np.float32)
    result = compare(logits, 2 * logits, None, semantics="native")
    assert result == Accuracy(
        images=2,
        semantics="native",
        float_score=None,
        quantized_score=None,
        drop=None,
        agreement=100.0,
        sqnr_db=0.0,
    )
    assert result.to_dict()["float"] is None
    assert Score(top1=1.0, top5=None).to_dict() == {"top1": 1.0, "top5": None}
    assert Drop(value=1.0, ci95=(0.0, 2.0)).to_dict() == {"ci95": [0.0, 2.0], "value": 1.0}


def test_ties_go_to_the_lower_index() -> None:
    logits = np.zeros((2, 7), np.float32)
    assert accuracy.ranks(logits, np.array([0, 6])).tolist() == [0, 6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_named(bad: float) -> None:
    good = np.ones((2, 3), np.float32)
    broken = good.copy()
    broken[1, 2] = bad
    with pytest.raises(BackendError, match=r"^The quantized model gives logits that are not fin"):
        compare(good, broken, [0, 1], semantics="native")
    with pytest.raises(BackendError, match=r"^The float model"):
        compare(broken, good, [0, 1], semantics="native")


def test_what_does_not_fit() -> None:
    logits = np.ones((2, 3), np.float32)
    with pytest.raises(BackendError, match=r"shape \(2, 3\) and the quantized model of shape"):
        compare(logits, logits[:, :2], [0, 1], semantics="native")
    with pytest.raises(CalibrationError, match=r"There are 1 labels for 2 pictures"):
        compare(logits, logits, [0], semantics="native")
    with pytest.raises(CalibrationError, match=r"Labels go from 0 to 3, but the model has 3"):
        compare(logits, logits, [0, 3], semantics="native")
    with pytest.raises(CalibrationError, match="no picture"):
        compare(logits[:0], logits[:0], [], semantics="native")


class Mean:
    """A runner that gives the mean of each channel, times a factor from one picture on."""

    def __init__(self, factor: float = 1.0, start: int = 0) -> None:
        self.factor = factor
        self.start = start
        self.shapes: set[tuple[int, ...]] = set()

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.shapes.add(batch.shape)
        self.start -= 1
        factor = self.factor if self.start < 0 else 1.0
        return (batch.mean((2, 3)) * factor).astype(np.float32)


PREPROCESS = Preprocess(resize=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    for index in range(37):
        Image.new("RGB", (9, 8), (index, 2 * index, 3)).save(tmp_path / f"{index:02}.png")
    return ImageSet.open(tmp_path)


def test_collect_runs_every_model_on_every_picture_in_order(images: ImageSet) -> None:
    seen = []

    def progress(items, label, total=None):  # type: ignore[no-untyped-def]
        seen.append((label, total))
        yield from items

    one, two = Mean(), Mean(2.0)
    found = collect({"float": one, "int8": two}, images, PREPROCESS, progress)
    assert seen == [("Evaluating", 37)]
    assert one.shapes == two.shapes == {(1, 3, 8, 8)}
    expected = np.array([[i, 2 * i, 3] for i in range(37)], np.float32)
    np.testing.assert_allclose(found["float"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["int8"], 2 * expected, rtol=1e-6)
    assert list(found) == ["float", "int8"]
    assert found["float"].dtype == np.float32


def test_collect_names_the_model_and_the_picture(images: ImageSet) -> None:
    with pytest.raises(BackendError, match=r"^The int8 model gives logits .* on .*05\.png\. "):
        collect({"float": Mean(), "int8": Mean(np.inf, start=5)}, images, PREPROCESS)
    with pytest.raises(CalibrationError, match=r"The image set x is empty"):
        collect({"float": Mean()}, ImageSet(name="x", files=()), PREPROCESS)

    class Odd:
        def run(self, batch: np.ndarray) -> np.ndarray:
            return batch

    with pytest.raises(BackendError, match=r"The odd model gives an output of shape \(1, 3, 8"):
        collect({"odd": Odd()}, images, PREPROCESS)


FAKE = """
import contextlib, os, sys
import numpy as np
from gnet_opt.errors import MissingDependencyError

class Runner:
    def __init__(self, path): self.path = path
    def run(self, batch):
        kind = self.path.name
        if kind == "aborts" and batch.max() >= 4: os.abort()
        if kind == "refuses": raise RuntimeError("no such kernel")
        factor = {"double": 2, "not finite": np.inf}.get(kind, 1)
        logits = (batch.mean((2, 3)) * factor).astype(np.float32)
        return logits[None] if kind == "deep" else logits

class Fake:
    name = "fake"
    @contextlib.contextmanager
    def open(self, artifact, *, threads=None):
        print("a runtime that prints to stdout", flush=True)
        if artifact.path.name == "missing":
            raise MissingDependencyError("no runtime here")
        if artifact.path.name == "aborts":
            print("free(): invalid pointer", file=sys.stderr, flush=True)
        state = f"{os.getpid()} {threads}"
        (artifact.path.parent / f"state-{artifact.path.name}").write_text(state)
        yield Runner(artifact.path)

def get(name):
    return Fake()
"""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path_factory.mktemp("backend")
    (made / "fake_scores.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(made), prepend=os.pathsep)
    return made


def subject(folder: Path, kind: str) -> Subject:
    path = folder / kind
    artifact = Artifact(backend="fake", path=path, files=(("fake", path),))
    return Subject(name=kind, artifact=artifact, resolve="fake_scores:get")


def processes(folder: Path) -> dict[str, tuple[int, str]]:
    """The process and the threads of each model that was opened."""
    found = {}
    for path in folder.glob("state-*"):
        pid, threads = path.read_text().split()
        found[path.name.removeprefix("state-")] = (int(pid), threads)
    return found


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_collect_apart_gives_what_collect_gives(folder: Path, images: ImageSet) -> None:
    subjects = [subject(folder, "plain"), subject(folder, "double")]
    found = collect_apart(subjects, images, PREPROCESS, threads=3)
    expected = collect({"plain": Mean(), "double": Mean(2.0)}, images, PREPROCESS)
    assert list(found) == ["plain", "double"]
    for name, logits in expected.items():
        assert np.array_equal(found[name], logits)
        assert found[name].dtype == np.float32
    used = processes(folder)
    assert len({os.getpid(), *(pid for pid, _ in used.values())}) == 3
    assert {threads for _, threads in used.values()} == {"3"}
    assert not any(is_running(pid) for pid, _ in used.values())


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "aborts",
            r"worker for aborts died during 'run' \(signal 6\)\. .*free\(\): invalid pointer",
        ),
        ("refuses", r"worker for refuses died during 'load' .*RuntimeError: no such kernel"),
        ("not finite", r"The not finite model gives logits that are not finite .* on .*00\.png"),
        ("deep", r"The deep model gives an output of shape \(1, 1, 3\)"),
    ],
)
def test_a_model_that_fails_is_named_and_all_processes_end(
    folder: Path, images: ImageSet, kind: str, text: str
) -> None:
    with pytest.raises(BackendError, match=text):
        collect_apart([subject(folder, "plain"), subject(folder, kind)], images, PREPROCESS)
    assert not any(is_running(pid) for pid, _ in processes(folder).values())


def test_a_missing_runtime_keeps_its_class(folder: Path, images: ImageSet) -> None:
    with pytest.raises(MissingDependencyError, match=r"^missing: no runtime here$"):
        collect_apart([subject(folder, "missing")], images, PREPROCESS)


def test_an_interrupt_ends_the_processes(
    folder: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = folder / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def interrupted(items, label, total=None):  # type: ignore[no-untyped-def]
        for count, item in enumerate(items):
            if count == 20:
                assert list(temporary.iterdir())
                assert all(is_running(pid) for pid, _ in processes(folder).values())
                raise KeyboardInterrupt
            yield item

    subjects = [subject(folder, "plain"), subject(folder, "double")]
    with pytest.raises(KeyboardInterrupt):
        collect_apart(subjects, images, PREPROCESS, progress=interrupted)
    assert len(processes(folder)) == 2
    assert not any(is_running(pid) for pid, _ in processes(folder).values())
    assert list(temporary.iterdir()) == []


def test_a_picture_that_cannot_be_read_ends_the_processes(folder: Path, images: ImageSet) -> None:
    images.files[20].write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"20\.png cannot be read as a picture"):
        collect_apart([subject(folder, "plain")], images, PREPROCESS)
    assert not any(is_running(pid) for pid, _ in processes(folder).values())


def test_collect_apart_without_pictures_or_models(folder: Path, images: ImageSet) -> None:
    empty = ImageSet(name="x", files=())
    with pytest.raises(CalibrationError, match="The image set x is empty"):
        collect_apart([subject(folder, "plain")], empty, PREPROCESS)
    assert collect_apart([], images, PREPROCESS) == {}


@pytest.mark.parametrize(
    ("top1", "classes", "expected"),
    [
        (0.0, 10, True),  # features as classes
        (10.0, 10, True),
        (14.0, 10, False),
        (50.0, 2, True),
        (65.0, 2, False),
        (0.0, 1, False),  # one class: nothing to guess
    ],
)
def test_a_top1_that_is_no_better_than_guessing_is_told(
    top1: float, classes: int, expected: bool
) -> None:
    assert accuracy.below_chance(top1, classes) is expected


def test_the_sentence_about_guessing_counts_the_labels_of_the_set() -> None:
    labels = [0, 1] * 20
    note = accuracy.chance_note(Score(top1=0.0, top5=None), labels)
    assert note.startswith(
        "Warning: the top-1 of 0.00 % on 40 images of 2 classes is no better than guessing (50.00 "
    )
    assert accuracy.chance_note(Score(top1=90.0, top5=None), labels) == ""
