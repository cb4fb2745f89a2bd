"""Images with classes: torchvision's layouts, CUB's lists, rows of files, class names."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clip_refine.data.labelled import (
    IndexedImages,
    choose_names,
    read_cub,
    read_labelled_rows,
    read_listed_folders,
    read_texts,
    read_torchvision,
    readable,
)
from clip_refine.support.errors import DataError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), COLOURS[colour]).save(path)


def content(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(images, index: int) -> tuple[int, ...]:
    return images.load_image(index).getpixel((4, 4))


def test_torchvisions_food(tmp_path: Path):
    meta = {"apple_pie": ["apple_pie/1"], "steak": ["steak/7", "steak/8"]}
    for names in meta.values():
        for name in names:
            picture(tmp_path / "food-101" / "images" / f"{name}.jpg", "red")
    (tmp_path / "food-101" / "meta").mkdir()
    (tmp_path / "food-101" / "meta" / "test.json").write_text(json.dumps(meta))
    found = read_torchvision("Food101", tmp_path, split="test")
    assert (found.class_names, found.labels) == (("apple_pie", "steak"), (0, 1, 1))
    assert found.image_name(2).endswith("food-101/images/steak/8.jpg")
    assert found.load_image(0).size == (8, 8)


def test_torchvisions_caltech(tmp_path: Path):
    for name in ("BACKGROUND_Google", "ant", "zebra"):
        for number in (1, 2):
            file = f"image_{number:04}.jpg"
            picture(tmp_path / "caltech101" / "101_ObjectCategories" / name / file, "green")
    found = read_torchvision("Caltech101", tmp_path, split=None)
    assert (found.class_names, found.labels) == (("ant", "zebra"), (0, 0, 1, 1))
    assert found.image_name(3) == "Caltech101[3]"
    assert found.load_image(3).mode == "RGB"


def test_torchvisions_pets(tmp_path: Path):
    lines = ["Bombay_1 2 1 1", "Abyssinian_3 1 1 1", "Bombay_2 2 1 1"]
    annotations = tmp_path / "oxford-iiit-pet" / "annotations"
    annotations.mkdir(parents=True)
    (annotations / "test.txt").write_text("\n".join(lines))
    for line in lines:
        picture(tmp_path / "oxford-iiit-pet" / "images" / f"{line.split()[0]}.jpg", "blue")
    found = read_torchvision("OxfordIIITPet", tmp_path, split="test")
    assert (found.class_names, found.labels) == (("Abyssinian", "Bombay"), (1, 0, 1))


def test_what_torchvision_does_not_find(tmp_path: Path):
    with pytest.raises(DataError, match="torchvision's CIFAR10 cannot be read"):
        read_torchvision("CIFAR10", tmp_path, split="test")


def test_cub_by_its_own_lists(tmp_path: Path):
    (tmp_path / "classes.txt").write_text("1 001.Black_footed_Albatross\n2 002.Ovenbird\n")
    (tmp_path / "images.txt").write_text("1 001.A/a.jpg\n2 002.B/b.jpg\n3 002.B/c.jpg\n")
    (tmp_path / "image_class_labels.txt").write_text("1 1\n2 2\n3 2\n")
    (tmp_path / "train_test_split.txt").write_text("1 0\n2 1\n3 0\n")
    found = read_cub(tmp_path, split="test")
    assert found.labels == (0, 1)
    assert [path.name for path in found.paths] == ["a.jpg", "c.jpg"]
    assert read_cub(tmp_path, split="train").labels == (1,)
    (tmp_path / "train_test_split.txt").write_text("1 0\n2 1\n")
    with pytest.raises(DataError, match="lists have 3, 3 and 2 images"):
        read_cub(tmp_path, split="test")
    (tmp_path / "images.txt").unlink()
    with pytest.raises(DataError, match=r"images.txt: cannot be read as a list of CUB"):
        read_cub(tmp_path, split="test")


def test_folders_with_a_list(tmp_path: Path):
    for name in ("YoYo/v_1.jpg", "YoYo/v_2.jpg", "Archery/v_3.jpg"):
        picture(tmp_path / "frames" / name, "red")
    (tmp_path / "list.txt").write_text("YoYo/v_2.avi 1\nArchery/v_3.avi 2\n")
    found = read_listed_folders(tmp_path / "frames", tmp_path / "list.txt")
    assert found.class_names == ("Archery", "YoYo")
    assert [path.name for path in found.paths] == ["v_3.jpg", "v_2.jpg"]
    (tmp_path / "list.txt").write_text("YoYo/other.avi\n")
    with pytest.raises(DataError, match="none of its 1 images"):
        read_listed_folders(tmp_path / "frames", tmp_path / "list.txt")


def test_folders_with_a_list_of_names_that_two_folders_have(tmp_path: Path):
    for name in ("YoYo/v_1.jpg", "YoYo/v_2.jpg", "Archery/v_1.jpg", "Archery/v_2.jpg"):
        picture(tmp_path / "frames" / name, "red")
    (tmp_path / "list.txt").write_text("YoYo/v_2.avi 1\nArchery/v_1.avi 2\n")
    found = read_listed_folders(tmp_path / "frames", tmp_path / "list.txt")
    assert [str(path.relative_to(tmp_path / "frames")) for path in found.paths] == [
        "Archery/v_1.jpg",
        "YoYo/v_2.jpg",
    ]


def test_rows_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [{"bytes": content(colour), "path": None} for colour in ("red", "blue", "red")]
    table = pyarrow.table({"image": images, "label": ["warm", "cold", "warm"]})
    (tmp_path / "rows").mkdir()
    parquet.write_table(table, tmp_path / "rows" / "a.parquet")
    options = {"split": "test", "subset": None, "image": "image", "label": "label"}
    found = read_labelled_rows(str(tmp_path / "rows"), **options)
    assert (found.class_names, found.labels) == (("cold", "warm"), (1, 0, 1))
    assert colour_of(found, 1) == (0, 0, 255)
    with pytest.raises(DataError, match=r"no column 'kind', only image, label"):
        read_labelled_rows(str(tmp_path / "rows"), **{**options, "label": "kind"})


def test_transparent_parts_are_white_as_in_files():
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    rows = IndexedImages("rows", ("a", "b"), (0,), lambda index: clear)
    assert rows.load_image(0).getpixel((0, 0)) == (255, 255, 255)


def test_rows_of_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    with tarfile.open(tmp_path / "rows" / "0.tar", "w") as archive:
        for number, (colour, label) in enumerate((("red", "1"), ("green", "0"))):
            for ending, data in (("png", content(colour)), ("cls", label.encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    found = read_labelled_rows(
        str(tmp_path / "rows"), split="test", subset=None, image="png", label="cls"
    )
    assert (found.class_names, found.labels) == (("0", "1"), (1, 0))
    assert colour_of(found, 1) == (0, 255, 0)


def test_a_folder_without_rows(tmp_path: Path):
    with pytest.raises(DataError, match=r"no .parquet or .tar file"):
        read_labelled_rows(str(tmp_path), split="test", subset=None, image="i", label="l")


def test_names_are_made_readable():
    assert readable("airplane_cabin", "plain") == "airplane cabin"
    assert readable("church/outdoor", "plain") == "church outdoor"
    assert readable("ApplyEyeMakeup", "camel-case") == "apply eye makeup"
    assert readable("002.Laysan_Albatross", "numbered") == "Laysan Albatross"


def test_whose_names_were_used_is_said(tmp_path: Path):
    own = ("AnnualCrop", "River")
    assert choose_names(own, None, naming="camel-case") == (
        ("annual crop", "river"),
        "the source's own, camel-case",
    )
    mapping = {"River": "a river", "AnnualCrop": "crops"}
    assert choose_names(own, mapping, naming="plain") == (("crops", "a river"), "the suite's")
    path = tmp_path / "names.txt"
    path.write_text("fields\nrivers\n")
    assert choose_names(own, str(path), naming="plain") == (("fields", "rivers"), str(path))
    with pytest.raises(DataError, match=r"'River' is not among them \(1 of 2 missing\)"):
        choose_names(own, {"AnnualCrop": "crops"}, naming="plain")
    with pytest.raises(DataError, match="1000 names for 2 classes"):
        choose_names(own, "open_clip", naming="plain")


def test_lists_of_texts(tmp_path: Path):
    for name, text in (("a.json", '["x", "y"]'), ("a.yaml", "- x\n- y\n"), ("a.txt", "x\n\ny\n")):
        (tmp_path / name).write_text(text)
        assert read_texts(tmp_path / name) == ["x", "y"]
    (tmp_path / "bad.yaml").write_text("- 3\n")
    with pytest.raises(DataError, match="expected a list of texts"):
        read_texts(tmp_path / "bad.yaml")
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "nowhere.txt")
