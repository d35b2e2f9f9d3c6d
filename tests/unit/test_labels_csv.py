from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnet_opt.errors import CalibrationError, GnetOptError
from gnet_opt.images import ImageSet
from gnet_opt.printable import one_line
from image_sets import draw, in_table, names


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


def test_a_table_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    text = '\ufefffile,label\r\n0.png,"nut, hex"\r\n'
    images = ImageSet.open(in_table(tmp_path, text), classes=["nut, hex"])
    assert images.labels == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{table} needs a header with the columns file and label; it is empty."),
        (
            "0.png,1\n",
            "{table} needs a header with the columns file and label; its first line is 0.png, 1. "
            "Write the line file,label above it.",
        ),
        ("file,label\n", "{table} lists no picture. Add rows file,label."),
        (
            "file,label\n0.png,1\nnone.png,1\n",
            "{table}, line 3: {folder}/none.png does not exist. Correct the column file.",
        ),
        (
            "file,label\n0.png,gnat\n",
            "{table}, line 2: the label 'gnat' is neither a class index nor a known class name. "
            "The classes are ant.",
        ),
        (
            "file,label\n0.png\n",
            "{table}, line 2 has no label. Write its class into the column label.",
        ),
        (
            "file,label\n0.png,1.5\n",
            "{table}, line 2: the label '1.5' is neither a class index nor a known class name. "
            "The classes are ant.",
        ),
    ],
)
def test_a_bad_table_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    in_table(tmp_path, text)
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(tmp_path, classes=["ant"])
    assert str(caught.value) == message.format(table=tmp_path / "labels.csv", folder=tmp_path)


KNOWN = ["nut", "hex bolt", "Schl\xfcssel"]


def refused(folder: Path, text: str | bytes, classes: list[str] | None = None) -> str:
    """What is said of a table; every message is fit for a terminal and of a sensible length."""
    in_table(folder, "")
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CalibrationError) as caught:
        ImageSet.open(folder, classes=classes or [])
    said: str = caught.value.args[0]
    assert said == one_line(said) and "\t" not in said
    assert len(said) < 800
    return said.replace(str(folder / "labels.csv"), "TABLE")


@pytest.mark.parametrize("header", ["file,label", "FILE,Label", " File , LABEL ", '"file","label"'])
def test_any_case_of_the_header(tmp_path: Path, header: str) -> None:
    assert ImageSet.open(in_table(tmp_path, f"{header}\n1.png,2\n")).labels == (2,)


@pytest.mark.parametrize(
    "file", ["file", "path", "FileName", "Image", "image_path", "Image Path", "img"]
)
@pytest.mark.parametrize("label", ["label", "Class", "target", "category", "class_id", "Class-ID"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_have_several_names_and_separators(
    tmp_path: Path, file: str, label: str, separator: str
) -> None:
    rows = [
        ["split", label, file, ""],
        ["a", "3", "1.png", ""],
        ["", "", "", ""],
        ["b", "0", "0.png"],
    ]
    text = "\r\n".join(separator.join(row) for row in rows)
    images = ImageSet.open(in_table(tmp_path, text))
    assert names(images) == ["1.png", "0.png"]
    assert (images.labels, images.notes) == ((3, 0), ())


def test_file_and_label_win_over_other_names(tmp_path: Path) -> None:
    text = "path,file,class,label\nx,1.png,nut,4\n"
    assert ImageSet.open(in_table(tmp_path, text)).labels == (4,)


def test_excels_own_first_line_and_blank_lines(tmp_path: Path) -> None:
    text = "sep=;\r\n;;\r\nfile;label\r\n\r\n;\r\n0.png;1,0\r\n"
    assert ImageSet.open(in_table(tmp_path, text)).labels == (1,)
    text = "\r\nfile;label\r\n\r\n9.png;1\r\n"
    assert refused(tmp_path, text).startswith("TABLE, line 4: ")


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_a_table_with_a_column_of_numbers_as_pandas_writes_it(tmp_path: Path, end: str) -> None:
    text = end.join([",file,label", "0,2.png,1.0", "1,0.png,0.0", ""])
    images = ImageSet.open(in_table(tmp_path, text))
    assert (names(images), images.labels) == (["2.png", "0.png"], (1, 0))


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a b" / "x.png", 0)
    draw(tmp_path / "odd\\name.png", 1)
    text = "file,label\ntrain\\a b\\x.png,1\n.\\0.png,2\nodd\\name.png,3\n"
    images = ImageSet.open(in_table(tmp_path, text))
    assert names(images) == ["x.png", "0.png", "odd\\name.png"]
    assert "Write paths relative to the folder of labels.csv." in refused(
        tmp_path, "file,label\nC:\\data\\x.png,1\n"
    )


@pytest.mark.parametrize(
    ("encoding", "mark", "note"),
    [
        ("utf-8", b"", False),
        ("utf-8", codecs.BOM_UTF8, False),
        ("utf-16-le", codecs.BOM_UTF16_LE, False),
        ("utf-16-be", codecs.BOM_UTF16_BE, False),
        ("utf-32-le", codecs.BOM_UTF32_LE, False),
        ("latin-1", b"", True),
        ("cp1252", b"", True),
    ],
)
@pytest.mark.parametrize("listed", ["labels.csv", "classes.txt"])
def test_encodings(tmp_path: Path, encoding: str, mark: bytes, note: bool, listed: str) -> None:
    texts = {
        "labels.csv": "file,label\r\n0.png,Schl\xfcssel\r\n",
        "classes.txt": "nut\r\nSchl\xfcssel",
    }
    in_table(tmp_path, "")
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / listed).write_bytes(mark + texts[listed].encode(encoding))
    images = ImageSet.open(tmp_path)
    assert images.labels == (1,)
    assert images.classes == ("nut", "Schl\xfcssel")
    said = f"{tmp_path / listed} is not UTF-8 and was read as Windows-1252."
    assert [text.startswith(said) for text in images.notes] == [True] * note


@pytest.mark.parametrize("label", ["1", "1.0", "1.", "1,0", "1.000", " 1 ", "Hex Bolt", "hex_bolt"])
def test_labels_as_programs_write_them(tmp_path: Path, label: str) -> None:
    images = ImageSet.open(in_table(tmp_path, f"file;label\n0.png;{label}\n"), classes=KNOWN)
    assert images.labels == (1,)
    assert images.notes == (
        (
            f"{tmp_path / 'labels.csv'}: class names in another spelling were matched: "
            f"{label} is hex bolt.",
        )
        if label[0] in "Hh"
        else ()
    )


def test_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    known = [str(number) for number in range(1, 11)]
    text = "file,label\n0.png,10\n1.png,1.0\n"
    assert ImageSet.open(in_table(tmp_path, text), classes=known).labels == (9, 0)
    assert "the label '0' is neither" in refused(tmp_path, "file,label\n0.png,0\n", known)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "file,daisy,rose,tulip\n0.png,0,1,0\n1.png,1.0,0,0\n",
            ("one column of 0 and 1 for each of 3 classes (daisy, rose, tulip; one-hot)", "label"),
        ),
        (
            "Image;daisy;rose\n0.png;1;1\n1.png;0;0\n",
            ("columns of 0 and 1 (daisy, rose), of which a picture has several or none", "one"),
        ),
        ("file,label\n0.png,0 1\n", ("line 2: the label '0 1' names several classes",)),
        ('file,label\n0.png,"[0, 2]"\n', ("the label '[0, 2]' names several classes",)),
        ("file,label\n0.png,nut|hex bolt\n", ("neither a class index",)),
        ("file,label\n0.png,Nut;Schl\xfcssel\n", ("'Nut;Schl\xfcssel' names several classes",)),
        ("file,label\n0.png,0\n0.png,1\n", ("line 3: ", "listed twice. Its labels differ.")),
        ("file,label\n0.png,0\n./0.png,0\n", ("listed twice. Remove one of the lines.",)),
    ],
)
def test_several_classes_a_picture_are_refused(
    tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    said = refused(tmp_path, text, KNOWN)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("id,breed\n0.png,1\n", "what it has is id, breed. Name the columns so. Also understood: "),
        ("file,label,label\n0.png,1,1\n", "several columns for the label: label, label."),
        ("path,image,label\n0.png,1,1\n", "several columns for the file: path, image. Name the"),
        ("file,label\n0.png,nut, hex\n", "line 2 has 3 cells, but the header 2. Put a text with"),
        ("file,label\n,1\n", "line 2 names no file."),
        ("file,label\n0.png,tulip\n", "list the class names in index order, one a line, in a cl"),
        ("file,label\n0.png," + "7" * 5000 + "\n", "neither a class index"),
        ("file,label\n" + "x" * 5000 + ".png,1\n", "does not exist."),
        ('file,label\n"a\nb\x1b[2J.png",1\n', "a\\nb\\x1b[2J.png does not exist."),
        ('file,label\n"0.png,1\n' + "1.png,1\n" * 20_000, "a quote may be missing."),
        ("file,label\n0.png," + "x" * 70_000, "line 2 has more than 65536 characters"),
        ("x" * 70_000, "line 1 has more than 65536 characters"),
        ("file,label\n0.png\0,1\n", "cannot be read as UTF-8 text. Save it as UTF-8."),
        ("file,label\n0.png,1\n".encode("utf-16-le"), "cannot be read as UTF-8 text."),
        (codecs.BOM_UTF16_LE + b"f\0i", "cannot be read as UTF-16 text."),
        (codecs.BOM_UTF16_LE + b"\0\xd8x", "cannot be read as UTF-16 text."),
        (b"PK\3\4 a workbook", "is a spreadsheet's own file or another archive. Save it as CSV."),
        (b"\x81\x8d", "cannot be read as UTF-8 text."),
    ],
)
def test_what_is_wrong_is_said_in_few_words(tmp_path: Path, text: str | bytes, part: str) -> None:
    assert part in refused(tmp_path, text)


def test_pictures_elsewhere_are_taken_and_told(tmp_path: Path) -> None:
    elsewhere = draw(tmp_path / "elsewhere" / "x.png", 7)
    root = in_table(tmp_path / "set", "")
    text = f"file,label\n0.png,0\n{elsewhere},1\n../elsewhere/../elsewhere/x.png,2\n"
    (root / "labels.csv").write_text(text)
    images = ImageSet.open(root)
    assert images.labels == (0, 1, 2)
    assert images.notes == (
        f"Pictures of {root / 'labels.csv'} that lie outside its folder: 2, for example "
        f"{elsewhere}.",
    )


def test_the_table_in_another_case(tmp_path: Path) -> None:
    in_table(tmp_path, "file,label\n1.png,5\n")
    (tmp_path / "labels.csv").rename(tmp_path / "Labels.CSV")
    assert ImageSet.open(tmp_path).labels == (5,)


@given(data=st.binary(max_size=200), header=st.sampled_from([b"", b"file,label\n", b"\xff\xfe"]))
def test_no_bytes_are_a_fault_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, header: bytes
) -> None:
    folder = tmp_path_factory.mktemp("set")
    (folder / "labels.csv").write_bytes(header + data)
    with pytest.raises(GnetOptError) as caught:
        ImageSet.open(folder, classes=["a"])
    said = caught.value.args[0]
    assert said == one_line(said) and "\t" not in said
