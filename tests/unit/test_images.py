from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnet_opt.errors import CalibrationError
from gnet_opt.images import ImageSet, check_disjoint
from image_sets import draw, in_table


def numbered(count: int, labelled: bool = True) -> ImageSet:
    files = tuple(Path(f"{index}.png") for index in range(count))
    labels = tuple(index * 10 for index in range(count)) if labelled else None
    return ImageSet(name="numbered", files=files, labels=labels)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("a file")])
def test_what_is_no_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path / "set")
    assert str(caught.value) == (
        f"{tmp_path / 'set'} is not a folder. Pass a folder of pictures (ImageFolder layout, "
        "labels.csv, or plain)."
    )


@given(count=st.integers(1, 40), wanted=st.integers(1, 50) | st.none(), seed=st.integers(0, 2**32))
def test_a_sample_is_a_subset_in_order_and_repeats(
    count: int, wanted: int | None, seed: int
) -> None:
    images = numbered(count)
    sample = images.sample(wanted, seed)
    assert len(sample) == min(count, count if wanted is None else wanted)
    assert sample == images.sample(wanted, seed)
    assert sample.labels is not None
    indices = [int(path.stem) for path in sample.files]
    assert indices == sorted(set(indices))
    assert sample.labels == tuple(index * 10 for index in indices)
    unlabelled = numbered(count, labelled=False).sample(wanted, seed)
    assert unlabelled.labels is None
    assert unlabelled.files == sample.files  # labels do not decide which pictures are taken


def test_another_seed_is_another_sample_of_all_pictures() -> None:
    samples = [numbered(20).sample(5, seed).files for seed in range(40)]
    assert len(set(samples)) > 30
    assert {path for files in samples for path in files} == set(numbered(20).files)


def test_the_digest_is_of_contents_order_and_labels(tmp_path: Path) -> None:
    images = ImageSet.open(in_table(tmp_path / "a", "file,label\n0.png,1\n1.png,2\n"))
    renamed = in_table(tmp_path / "b", "file,label\nx.png,1\ny.png,2\n")
    with pytest.raises(CalibrationError):
        ImageSet.open(renamed)
    for old, new in (("0.png", "x.png"), ("1.png", "y.png")):
        (renamed / old).rename(renamed / new)
    assert ImageSet.open(renamed).digest == images.digest
    others = [
        images.take([1, 0]),
        images.take([0]),
        ImageSet(name="a", files=images.files, labels=(1, 3)),
        ImageSet(name="a", files=images.files),
        ImageSet(name="a", files=(images.files[0], images.files[0]), labels=(1, 2)),
    ]
    assert len({images.digest, *(other.digest for other in others)}) == 6


def test_check_labels_accepts_exactly_the_models_classes(tmp_path: Path) -> None:
    numbered(3).check_labels(21)
    with pytest.raises(CalibrationError) as caught:
        numbered(3).check_labels(20)
    assert str(caught.value) == (
        "2.png has label 20, but the model has 20 classes (0..19). "
        "Use labels of the model's own classes."
    )
    in_table(tmp_path, "file,label\n0.png,-1\n")
    with pytest.raises(CalibrationError, match=r"0\.png has label -1, but the model has 3 "):
        ImageSet.open(tmp_path).check_labels(3)


def test_check_labels_needs_labels() -> None:
    with pytest.raises(CalibrationError) as caught:
        numbered(3, labelled=False).check_labels(5)
    assert str(caught.value) == (
        "The image set numbered has no labels, and accuracy needs them. Use one folder a class, "
        "or a labels.csv with the columns file,label."
    )


def test_a_renamed_copy_is_found(tmp_path: Path) -> None:
    for index in range(3):
        draw(tmp_path / "calibration" / f"{index}.png", index)
        draw(tmp_path / "evaluation" / f"{index}.png", 10 + index)
    calibration, evaluation = (
        ImageSet.open(tmp_path / name) for name in ("calibration", "evaluation")
    )
    check_disjoint(calibration, evaluation)
    copy = tmp_path / "evaluation" / "another name.jpg"
    shutil.copyfile(tmp_path / "calibration" / "1.png", copy)
    with pytest.raises(CalibrationError) as caught:
        check_disjoint(calibration, ImageSet.open(tmp_path / "evaluation"))
    assert str(caught.value) == (
        "1 of 4 evaluation pictures are calibration pictures too, for example "
        f"{tmp_path / 'calibration' / '1.png'} and {copy}. Accuracy measured on them would be too "
        "good. Pass sets without common pictures."
    )


def labelled(*labels: int) -> ImageSet:
    return ImageSet(
        name="labelled",
        files=tuple(Path(f"{index}.png") for index in range(len(labels))),
        labels=labels,
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 9))
def test_varied_images_are_of_as_many_classes_as_possible(
    labels: list[int], count: int, seed: int
) -> None:
    images = labelled(*labels)
    chosen = images.varied(count, seed)
    assert chosen.labels is not None
    assert len(set(chosen.files)) == len(chosen) == min(count, len(images))
    assert chosen == images.varied(count, seed)
    for some in range(1, len(chosen) + 1):  # any beginning of it, too
        assert len(set(chosen.labels[:some])) == min(some, len(set(labels)))
    # No class has two more than another that still had some.
    taken = {label: chosen.labels.count(label) for label in set(labels)}
    most = max(taken.values())
    assert all(n >= most - 1 or n == labels.count(label) for label, n in taken.items())


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 9))
def test_varied_images_without_labels_are_from_all_over_the_set(
    size: int, count: int, seed: int
) -> None:
    images = numbered(size, labelled=False)
    chosen = sorted(int(path.stem) for path in images.varied(count, seed).files)
    count = min(count, size)
    assert len(chosen) == count
    for part, index in enumerate(chosen):
        assert part * size // count <= index < (part + 1) * size // count


def test_another_seed_chooses_other_images() -> None:
    for images in (numbered(100, labelled=False), labelled(*[i // 10 for i in range(100)])):
        assert images.varied(8, 0) != images.varied(8, 1)


@pytest.mark.parametrize("folder", ["", Path("missing")])
def test_no_path_and_a_wrong_one(folder: str | Path) -> None:
    said = "The path of an image set is empty" if folder == "" else "missing is not a folder"
    with pytest.raises(CalibrationError, match=said):
        ImageSet.open(folder)


def test_labels_that_count_from_one() -> None:
    images = ImageSet(name="x", files=(Path("a"), Path("b"), Path("c")), labels=(2, 1, 3))
    with pytest.raises(CalibrationError) as caught:
        images.check_labels(3)
    assert str(caught.value) == (
        "The labels of x are 1 to 3, but the model counts its classes from 0 to 2. Subtract 1 from "
        "each label, or write class names."
    )
    images.check_labels(4)


def test_a_picture_that_is_there_twice_is_told(tmp_path: Path) -> None:
    for name, seed in {
        "a/1.png": 1,
        "a/2.png": 2,
        "b/1.png": 1,
        "b/3.png": 2,
        "b/4.png": 2,
    }.items():
        draw(tmp_path / name, seed)
    images = ImageSet.open(tmp_path)
    assert images.remarks() == (
        f"3 of 5 pictures of {tmp_path.name} are copies of others in it, for example "
        f"{tmp_path / 'b' / '1.png'} of {tmp_path / 'a' / '1.png'}; 3 of them have another label "
        "there. Each counts as often as it is there.",
    )
    assert images.take([0, 1]).remarks() == ()
    (note,) = images.take([3, 4]).remarks()
    assert "label" not in note


def test_no_file_is_hashed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gnet_opt import images as module

    for number in range(6):
        draw(tmp_path / f"{number}.png", number)
    hashed: list[Path] = []
    real = module.sha256_file

    def count(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(module, "sha256_file", count)
    images = ImageSet.open(tmp_path)
    sample = images.sample(3, 0)
    assert sample.remarks() == images.spread(4).remarks() == images.remarks() == ()
    assert len(sample.digest) == len(images.digest)
    assert sorted(hashed) == sorted(images.files)


def test_remarks_on_names_that_are_not_the_models(tmp_path: Path) -> None:
    for index, name in enumerate(["a", "b"]):
        draw(tmp_path / name / "1.png", index)
    images = ImageSet.open(tmp_path, classes=["ant", "bee"])
    assert images.remarks(["ant", "bee"]) == (
        f"{tmp_path.name} names its classes (a, ...) unlike the model (ant, ...): they are taken "
        "in order.",
    )
    assert images.remarks() == ()
