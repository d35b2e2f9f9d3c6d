from __future__ import annotations

import os
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gnet_opt.errors import CalibrationError
from gnet_opt.image_folder import SUFFIXES
from gnet_opt.images import ImageSet
from image_sets import draw, in_folders, names


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


def test_a_plain_folder_has_no_labels(tmp_path: Path) -> None:
    for index, name in enumerate(["b.JPG", "a.webp", ".hidden.png"]):
        draw(tmp_path / name, index)
    (tmp_path / "README.txt").write_text("not a picture")
    images = ImageSet.open(tmp_path)
    assert names(images) == ["a.webp", "b.JPG"]
    assert images.labels is None
    assert len(images) == 2


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty class").mkdir()
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no picture (.bmp, .gif, .jfif, .jpeg, .jpg, .pbm, .pgm, .png, .pnm, "
        ".ppm, .tif, .tiff, .webp). Pass a folder of pictures."
    )


def touch(root: Path, *files: str) -> Path:
    """Files that are only listed: what is in them does not matter."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def below(images: ImageSet, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in images.files]


def test_the_same_pictures_in_the_order_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) <= SUFFIXES
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    rng = random.Random(0)
    folders = ["b", "a", "a/x", "a/x/y", "a/x-1", "a/x y", "a/X", "a/\xe9", "10", "2/deep/deeper"]
    files = [
        f"{folder}/{rng.choice('aBc_-1')}{number}{rng.choice(['', '.v2'])}{suffix}"
        for folder in folders
        for number, suffix in enumerate([*IMG_EXTENSIONS, ".JPG", ".Png", ".txt", ".pngx"])
    ]
    touch(root, *files)
    touch(elsewhere, "1.png", "deep/2.jpg")
    (root / "a" / "link").symlink_to(elsewhere)
    (root / "b" / "one.png").symlink_to(elsewhere / "1.png")
    theirs = ImageFolder(str(root))
    ours = ImageSet.open(root)
    assert [str(path) for path in ours.files] == [path for path, _ in theirs.samples]
    assert ours.labels == tuple(theirs.targets)
    assert ours.classes == tuple(theirs.classes)
    assert len(ours) == 10 * 11 + 3


@pytest.mark.parametrize("suffix", [".pgm", ".pbm", ".pnm", ".gif", ".jfif"])
def test_more_endings_are_read(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path / "a.png", 0)
    (tmp_path / "a.png").rename(tmp_path / f"a{suffix}")
    images = ImageSet.open(tmp_path)
    assert names(images) == [f"a{suffix}"]
    images.check_readable()
    assert images.notes == ()


def test_circles_of_links_end(tmp_path: Path) -> None:
    root = touch(tmp_path / "set", "a/1.png", "a/deep/2.png", "b/3.png")
    for where, target in {
        "a/deep/up": "a",
        "a/all": ".",
        "b/above": "..",
        "a/again": "a/deep",
    }.items():
        (root / where).symlink_to(root / target)
    images = ImageSet.open(root)
    assert below(images, root) == ["a/1.png", "a/deep/2.png", "b/3.png"]
    assert images.labels == (0, 0, 1)
    assert images.notes == (
        f"Passed over in {root}: links to a folder that is there already: 4 "
        "(a/again, a/all, a/deep/up, ...).",
    )


def test_many_links_to_each_other_are_walked_once(tmp_path: Path) -> None:
    """Twenty folders with two links each to the next: a million ways to the last."""
    for number in range(20):
        touch(tmp_path / "elsewhere", f"{number}/{number}.png")
        for name in ("x", "y"):
            (tmp_path / "elsewhere" / str(number) / name).symlink_to(
                tmp_path / "elsewhere" / str(number + 1)
            )
    (tmp_path / "set").mkdir()
    touch(tmp_path / "set", "other/z.png")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere" / "0")
    assert len(ImageSet.open(tmp_path / "set")) == 21


def test_what_is_passed_over_is_counted_and_named_once(tmp_path: Path) -> None:
    root = touch(
        tmp_path / "set",
        *("a/1.png", "b/2.png", "b/deep/3.png", "loose.png", "classes.md", "LICENSE", "movie.mp4"),
        *("a/1.heic", "a/2.HEIC", "b/deep/x.avif", "b/no ending", "b/.hidden.png", "b/Thumbs.db"),
        *(".DS_Store", "__MACOSX/a/._1.png", "a/__MACOSX/._1.png", ".cache/4.png", "@eaDir/5.png"),
    )
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "a" / "self.png").symlink_to(root / "a" / "self.png")
    os.mkfifo(root / "b" / "pipe.png")
    images = ImageSet.open(root)
    assert below(images, root) == ["a/1.png", "b/2.png", "b/deep/3.png"]
    assert images.classes == ("a", "b")
    (note,) = images.notes
    start, _, rest = note.partition(": ")
    assert start == f"Passed over in {root}"
    assert rest.startswith("files with endings of no picture: 5 (.heic 2, ")
    for part in (
        ".avif 1",
        "no ending 1",
        ".mp4 1",
        "hidden: 2 (.cache, b/.hidden.png)",
        "of the system: 3 (@eaDir, __MACOSX, a/__MACOSX)",
        "links to nothing: 1 (a/gone.png)",
        "not readable: 1 (a/self.png)",
        "no regular files: 1 (b/pipe.png)",
        "pictures in no class folder: 1 (loose.png)",
    ):
        assert part in rest
    assert images.take([0]).notes == images.notes


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path / "set", "a/1.png", "a/locked/2.png")
    real = os.scandir

    def scandir(path: Path) -> os._ScandirIterator[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert ImageSet.open(root).notes == (f"Passed over in {root}: not readable: 1 (a/locked).",)
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(root / "a" / "locked")
    assert str(caught.value) == (
        f"{root / 'a' / 'locked'} cannot be read (Permission denied). Pass another folder."
    )


def test_an_empty_folder_says_what_it_has_instead(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.heic", "a/2.heic")
    with pytest.raises(CalibrationError, match=r"passed over: files .*: 2 \(\.heic 2\)\)\. Pass"):
        ImageSet.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["train/a/1.png", "val/a/2.png"], "train and val"),
        (["Train/1.png", "test/2.png", "figures/3.png"], "Train and test"),
        (["validation/a/1.png", "training/a/2.png", "valid/a/3.png"], "training and valid and"),
        (["train/a/1.png", "annotations/1.xml"], "train, which"),
    ],
)
def test_parts_of_a_set_are_not_classes(tmp_path: Path, files: Sequence[str], named: str) -> None:
    touch(tmp_path, *files)
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path, classes=["a", "b"])
    assert f"{tmp_path} holds {named}" in str(caught.value)
    assert f"not classes. Pass one of them, such as {tmp_path}/" in str(caught.value)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.png", "bus/2.png")
    assert ImageSet.open(tmp_path).classes == ("bus", "train")
    touch(tmp_path, "test/1.png")
    known = ["test", "train", "bus"]
    assert ImageSet.open(tmp_path, classes=known).labels == (2, 0, 1)
    (tmp_path / "classes.txt").write_text("bus\ntrain\ntest\n")
    assert ImageSet.open(tmp_path).labels == (0, 2, 1)


def test_folders_that_are_numbers_are_shown_in_their_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}/x.png" for number in range(1, 11)))
    images = ImageSet.open(tmp_path, classes=["ant", "bee"])
    assert images.classes[:3] == ("1", "10", "2")
    assert images.notes == (
        f"The class folders of {tmp_path} are numbers and are taken in the order of their names as "
        "text, as torchvision's ImageFolder does: folder 1 is class 0, folder 10 is class 1, "
        "folder 2 is class 2, folder 3 is class 3, .... If the model counts otherwise, write the "
        "names in its order into a classes.txt beside the folders.",
    )
    numbers = [str(number) for number in range(1, 11)]
    named = ImageSet.open(tmp_path, classes=numbers)
    assert (named.labels, named.notes) == ((0, 9, *range(1, 9)), ())
    (tmp_path / "classes.txt").write_text("\n".join(numbers))
    assert ImageSet.open(tmp_path).notes == ()


def test_folders_whose_order_is_that_of_the_numbers_need_no_warning(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number:02}/x.png" for number in range(12)))
    assert ImageSet.open(tmp_path).notes == ()


def test_names_in_another_spelling_are_the_models(tmp_path: Path) -> None:
    umlaut = unicodedata.normalize("NFD", "Kr\xe4he")
    touch(tmp_path, "Sun Flower/1.png", "ox-eye_daisy/2.png", f"{umlaut}/3.png", "rose/4.png")
    known = ["rose", "ox eye daisy", "sun_flower", "kr\xe4he"]
    images = ImageSet.open(tmp_path, classes=known)
    assert images.classes == tuple(known)
    assert images.labels == (3, 2, 1, 0)
    assert images.notes == (
        f"{tmp_path}: class names in another spelling were matched: {umlaut} is kr\xe4he, "
        "Sun Flower is sun_flower, ox-eye_daisy is ox eye daisy.",
    )


@pytest.mark.parametrize(
    ("folders", "known", "message"),
    [
        (["ROSE"], ["rose", "Rose"], "the class ROSE can be any of rose (0), Rose (1)."),
        (["crane"], ["crane", "x", "crane"], "the class crane can be any of crane (0), crane (2)."),
        (
            ["Rose", "rose"],
            ["rose"],
            "names Rose and rose, which are both the model's class rose.",
        ),
    ],
)
def test_names_that_fit_twice_are_refused(
    tmp_path: Path, folders: Sequence[str], known: Sequence[str], message: str
) -> None:
    touch(tmp_path, *(f"{name}/1.png" for name in folders))
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path, classes=known)
    assert message in str(caught.value)


def test_the_exact_name_wins(tmp_path: Path) -> None:
    touch(tmp_path, "Rose/1.png", "rose/2.png")
    images = ImageSet.open(tmp_path, classes=["rose", "Rose"])
    assert (images.labels, images.notes) == ((1, 0), ())


def test_classes_txt_in_another_spelling_and_one_that_does_not_fit(tmp_path: Path) -> None:
    touch(tmp_path, "ox-eye/1.png", "Rose/2.png")
    (tmp_path / "classes.txt").write_text("rose\nox eye\n")
    images = ImageSet.open(tmp_path)
    assert (images.labels, images.classes) == ((0, 1), ("rose", "ox eye"))
    assert images.notes == (
        f"{tmp_path}: class names in another spelling were matched: Rose is rose, "
        "ox-eye is ox eye.",
    )
    touch(tmp_path, "rose/3.png")
    with pytest.raises(CalibrationError, match=r"Two folders of .* are the same class of "):
        ImageSet.open(tmp_path)
    (tmp_path / "classes.txt").write_text("rose\n")
    assert ImageSet.open(tmp_path).classes == ("Rose", "ox-eye", "rose")
    (note,) = ImageSet.open(tmp_path).notes
    assert note == f"{tmp_path / 'classes.txt'} does not list ox-eye, so it is not used."


def test_a_folder_around_the_classes_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "flowers/daisy/1.png", "flowers/rose/2.png")
    images = ImageSet.open(tmp_path)
    assert images.classes == ("flowers",)
    assert images.notes == (
        f"{tmp_path} has one class, flowers, with pictures in daisy, rose. If those are the "
        f"classes, pass {tmp_path / 'flowers'}.",
    )
    assert ImageSet.open(tmp_path, classes=["Flowers", "trees"]).classes == ("Flowers", "trees")
    assert "If those" not in str(ImageSet.open(tmp_path, classes=["Flowers", "trees"]).notes)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", os.fsdecode(b"\xff")])
def test_a_class_that_no_list_can_hold(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "a/1.png", f"{name}/2.png")
    with pytest.raises(CalibrationError, match="Rename it") as caught:
        ImageSet.open(tmp_path)
    assert caught.value.args[0].isprintable()


def test_names_of_files_never_reach_a_note_raw(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/.\x1b[2J\n.png", "a/x.\x07")
    (note,) = ImageSet.open(tmp_path).notes
    assert note.isprintable()
    assert "\\x1b[2J" in note


def test_a_large_set_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only folders are asked for more than the listing says."""
    touch(tmp_path, *(f"{label}/{number}.jpg" for label in "ab" for number in range(200)))
    asked: list[str] = []
    real: Callable[..., os.stat_result] = os.stat

    def stat(path: str, **options: bool) -> os.stat_result:
        asked.append(str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert len(ImageSet.open(tmp_path)) == 400
    assert not [path for path in asked if path.endswith(".jpg")]
    assert len(asked) < 40
