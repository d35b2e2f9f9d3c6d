from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gnet_opt.errors import CalibrationError
from gnet_opt.images import ImageSet, check_disjoint


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def in_folders(root: Path) -> Path:
    for index, name in enumerate(["cat/b.png", "cat/a.png", "ant/z.png", "dog/m.png"]):
        draw(root / name, index)
    return root


def in_table(root: Path, text: str, files: int = 3) -> Path:
    for index in range(files):
        draw(root / f"{index}.png", index)
    (root / "labels.csv").write_bytes(text.encode())
    return root


def names(images: ImageSet) -> list[str]:
    return [path.name for path in images.files]


def numbered(count: int, labelled: bool = True) -> ImageSet:
    files = tuple(Path(f"{index}.png") for index in range(count))
    labels = tuple(index * 10 for index in range(count)) if labelled else None
    return ImageSet(name="numbered", files=files, labels=labels)


def test_one_folder_a_class_in_name_order(tmp_path: Path) -> None:
    images = ImageSet.open(in_folders(tmp_path / "set"))
    assert names(images) == ["z.png", "a.png", "b.png", "m.png"]
    assert images.labels == (0, 1, 1, 2)
    assert images.classes == ("ant", "cat", "dog")
    assert images.name == "set"


def test_one_folder_a_class_in_the_order_of_the_model(tmp_path: Path) -> None:
    images = ImageSet.open(in_folders(tmp_path), classes=["dog", "bee", "cat", "ant"])
    assert images.labels == (3, 2, 2, 0)
    assert images.classes == ("dog", "bee", "cat", "ant")


def test_classes_txt_gives_the_order_of_the_folders(tmp_path: Path) -> None:
    in_folders(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"dog\r\ncat\r\n\r\nant\r\n")
    images = ImageSet.open(tmp_path, classes=["other", "names"])
    assert images.labels == (2, 1, 1, 0)


def test_an_empty_class_folder_keeps_its_index(tmp_path: Path) -> None:
    in_folders(tmp_path)
    (tmp_path / "bee").mkdir()
    draw(tmp_path / ".thumbnails" / "x.png", 9)
    images = ImageSet.open(tmp_path)
    assert images.classes == ("ant", "bee", "cat", "dog")
    assert images.labels == (0, 2, 2, 3)


def test_labels_by_index_in_the_order_of_the_table(tmp_path: Path) -> None:
    images = ImageSet.open(in_table(tmp_path, "file,label\n2.png,7\n0.png, 1\n"))
    assert names(images) == ["2.png", "0.png"]
    assert images.labels == (7, 1)
    assert images.classes == ()


def test_labels_by_name_of_the_models_classes(tmp_path: Path) -> None:
    in_table(tmp_path, "label,file,note\nnut,0.png,x\nbolt,1.png,y\n")
    assert ImageSet.open(tmp_path, classes=["bolt", "gear", "nut"]).labels == (2, 0)


def test_labels_by_name_of_classes_txt(tmp_path: Path) -> None:
    in_table(tmp_path, "file,label\n0.png,nut\n1.png,bolt\n")
    (tmp_path / "classes.txt").write_text("nut\nbolt\n")
    images = ImageSet.open(tmp_path, classes=["bolt", "nut"])
    assert images.labels == (1, 0)  # the model's indices, whatever the set's own order is
    assert images.classes == ("bolt", "nut")
    assert ImageSet.open(tmp_path).labels == (0, 1)


def test_indices_of_classes_txt_become_the_models(tmp_path: Path) -> None:
    in_table(tmp_path, "file,label\n0.png,0\n1.png,1\n")
    (tmp_path / "classes.txt").write_text("nut\nbolt\n")
    assert ImageSet.open(tmp_path, classes=["bolt", "nut"]).labels == (1, 0)


def test_a_misspelt_class_folder_does_not_exchange_classes(tmp_path: Path) -> None:
    for name in ("bolts", "nut"):
        (tmp_path / name).mkdir()
        draw(tmp_path / name / "0.png", 0)
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path, classes=["nut", "bolt"])
    assert str(caught.value) == (
        f"{tmp_path} names bolts, which the model does not know, beside classes that it does. "
        "The model's classes are nut, bolt."
    )


def test_a_table_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    text = '\ufefffile,label\r\n0.png,"nut, hex"\r\n'
    images = ImageSet.open(in_table(tmp_path, text), classes=["nut, hex"])
    assert images.labels == (0,)


def test_a_plain_folder_has_no_labels(tmp_path: Path) -> None:
    for index, name in enumerate(["b.JPG", "a.webp", ".hidden.png"]):
        draw(tmp_path / name, index)
    (tmp_path / "README.txt").write_text("not a picture")
    images = ImageSet.open(tmp_path)
    assert names(images) == ["a.webp", "b.JPG"]
    assert images.labels is None
    assert len(images) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{table} needs a header with the columns file and label."),
        ("0.png,1\n", "{table} needs a header with the columns file and label."),
        ("file,label\n", "{table} lists no picture. Add rows file,label."),
        (
            "file,label\n0.png,1\nnone.png,1\n",
            "{table}, line 3: {folder}/none.png does not exist. Correct the column file.",
        ),
        (
            "file,label\n0.png,gnat\n",
            "{table}, line 2: the label 'gnat' is neither a class index nor a known class name.",
        ),
        (
            "file,label\n0.png\n",
            "{table}, line 2: the label '' is neither a class index nor a known class name.",
        ),
        (
            "file,label\n0.png,1.5\n",
            "{table}, line 2: the label '1.5' is neither a class index nor a known class name.",
        ),
    ],
)
def test_a_bad_table_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    in_table(tmp_path, text)
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path, classes=["ant"])
    assert str(caught.value) == message.format(table=tmp_path / "labels.csv", folder=tmp_path)


@pytest.mark.parametrize("name", ["labels.csv", "classes.txt"])
def test_text_of_another_encoding_is_named(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "0.png", 0)
    (tmp_path / "labels.csv").write_text("file,label\n0.png,0\n")
    (tmp_path / name).write_bytes("file,label\n0.png,Schlüssel\n".encode("latin-1"))
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name} cannot be read as UTF-8 text: ")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("a file")])
def test_what_is_no_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path / "set")
    assert str(caught.value) == (
        f"{tmp_path / 'set'} is not a folder. Pass a folder of pictures (ImageFolder layout, "
        "labels.csv, or plain)."
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty class").mkdir()
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no picture (.bmp, .jpeg, .jpg, .png, .ppm, .tif, .tiff, .webp). "
        "Pass a folder of pictures."
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
        "good; pass sets without common pictures."
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
