"""CSV and TSV: what is read, and what is refused with file and line."""

from pathlib import Path

import pytest
from PIL import Image

from clip_refine.data import read_table
from clip_refine.support.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def write(folder: Path, text: str | bytes, name: str = "captions.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_rows_of_one_image_become_its_captions(folder: Path):
    table = read_table(write(folder, "image,caption\na.png,one\nb.png,two\na.png,three\n"))
    assert [path.name for path in table.places] == ["a.png", "b.png"]
    assert table.captions == (("one", "three"), ("two",))
    assert len(table) == 2
    assert table.load_image(1).mode == "RGB"


@pytest.mark.parametrize("header", ["filepath\ttitle", "file_name\tcaption", "path\ttext"])
def test_known_columns_are_found(folder: Path, header: str):
    table = read_table(write(folder, f"{header}\na.png\tone\n", "x.tsv"))
    assert table.captions == (("one",),)


def test_columns_can_be_named(folder: Path):
    path = write(folder, "caption,pic,words\nno,a.png,yes\n")
    table = read_table(path, image_column="pic", caption_column="words")
    assert table.captions == (("yes",),)


def test_quotes_newlines_and_byte_order_mark(folder: Path):
    path = write(folder, b'\xef\xbb\xbfimage,caption\r\na.png,"one, ""two""\nthree"\r\n')
    assert read_table(path).captions == (('one, "two"\nthree',),)


def test_words_that_look_like_missing_values_stay_words(folder: Path):
    assert read_table(write(folder, "image,caption\na.png,NA\nb.png,null\n")).captions == (
        ("NA",),
        ("null",),
    )


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(folder, "image,caption\na.png,one\n")
    monkeypatch.chdir(folder.parent)
    assert read_table(Path(folder.name) / path.name).load_image(0).size == (8, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\nc.png,one\n", r"line 2: image file .*c.png not found"),
        ("image,caption\na.png,one\nb.png, \n", r"line 3: image 'b.png' has an empty caption"),
        ("a.JPG,a dog\nb.jpg,a cat\n", r"first line looks like a pair \(a.JPG, a dog\) and must"),
        ("picture,caption\na.png,one\n", r"no image column among picture, caption.*image-column"),
        ("image,words\na.png,one\n", r"no caption column among image, words.*caption-column"),
        ("image,caption\na.png,one,two\n", r"line 2: 3 fields, but the header has 2"),
        ('image,caption\na.png,"one\n', r"line 2: has a double quote that is never closed"),
        ("image,caption\n", "CSV table without pairs"),
        ("", "is empty. The first line must name the columns."),
        (
            b"image,caption\na.png,caf\xe9\n",
            r"line 2: image 'a.png' has a caption that is not UTF-8",
        ),
    ],
)
def test_bad_files(folder: Path, text: str | bytes, message: str):
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(folder, text))
    assert "captions.csv" in str(caught.value)


def test_unreadable_image_is_found_before_training(folder: Path):
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 2: .*b.png is not a readable image"):
        read_table(write(folder, "image,caption\nb.png,one\n"))


def test_many_bad_rows_are_counted(folder: Path):
    rows = "".join(f"missing{i}.png,words\n" for i in range(13))
    with pytest.raises(DataError, match="and 3 more bad rows") as caught:
        read_table(write(folder, "image,caption\n" + rows))
    lines = str(caught.value).splitlines()
    assert sum(line.endswith("not found.") for line in lines) == 10
    assert lines.count("Check the path.") == 1  # what they have in common
    assert "13 of 13 rows are bad (100.0%)" in str(caught.value)


def test_wrong_column_name_suggests(folder: Path):
    path = write(folder, "image,caption\na.png,one\n")
    with pytest.raises(DataError, match="Did you mean 'caption'"):
        read_table(path, caption_column="captions")


def test_missing_file():
    with pytest.raises(DataError, match="nowhere.csv: cannot be read"):
        read_table(Path("nowhere.csv"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(folder: Path, mode: str):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (8, 8)).save(folder / f"odd.{suffix}")
    table = read_table(write(folder, f"image,caption\nodd.{suffix},one\n"))
    assert table.load_image(0).mode == "RGB"


def test_truncated_image_names_itself(folder: Path):
    Image.effect_noise((64, 64), 50).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"line 2: \S*cut.jpg: cannot be decoded"):
        read_table(write(folder, "image,caption\ncut.jpg,one\n"))
