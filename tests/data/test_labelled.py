"""Images with classes: torchvision's layouts, CUB's lists, rows of files, class names."""

import io
import json
import struct
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from clip_refine.data.images import decode_image, find_images
from clip_refine.data.labelled import (
    ImageOfRow,
    IndexedImages,
    choose_names,
    read_class_folders,
    read_cub,
    read_labelled_rows,
    read_listed_folders,
    read_texts,
    read_torchvision,
    readable,
)
from clip_refine.support.errors import DataError
from tests.data.files import encoded

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
    import pyarrow
    from pyarrow import parquet

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


def rows_of(folder: Path, contents: list[bytes | None], labels: list, **how):
    """Labelled rows of a Parquet file with these cells."""
    from pyarrow import parquet, table

    folder.mkdir()
    images = [data and {"bytes": data, "path": None} for data in contents]
    parquet.write_table(table({"image": images, "label": labels}), folder / "a.parquet")
    options = {"split": "test", "subset": None, "image": "image", "label": "label"}
    return read_labelled_rows(str(folder), **{**options, **how})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [["a", "b"], ["a"], ["b"]],
            r"row 0 has \['a', 'b'\] in column 'label', which is no class",
        ),
        (["a", None, "b"], r"row 1 has None in column 'label', which is no class"),
        ([-1, -1, -1], r"row 0 has -1 in column 'label', which is no class"),
        ([0.5, 1.5, 0.5], r"row 0 has 0.5 in column 'label', which is no class"),
        ([3, 3, 3], r"column 'label' has 1 class in 3 rows. Give two"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list, message: str):
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / "rows", [content("red")] * 3, labels)


def test_a_row_without_image(tmp_path: Path):
    with pytest.raises(DataError, match=r"'image' has no image in 1 of 3 rows, the first row 1"):
        rows_of(tmp_path / "rows", [content("red"), None, content("blue")], [0, 1, 0])


def test_rows_are_decoded_as_files_are(tmp_path: Path):
    """Turned by sound EXIF, as stored by broken EXIF, and refused where files are."""

    def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
        directory = struct.pack("<H", len(entries))
        for tag, kind, count, value in entries:
            directory += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0)

    turned, odd = (0x112, 3, 1, struct.pack("<H", 6)), (0x100, 2, 4, b"abc\0")
    photo = Image.new("RGB", (16, 8))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    contents = [
        encoded(photo, "JPEG", exif=exif(turned)),
        encoded(photo, "JPEG", exif=exif(turned, odd)),
        encoded(Image.new("F", (4, 4)), "TIFF"),
        encoded(Image.new("I", (4, 4)), "TIFF"),
        script,
    ]
    found = rows_of(tmp_path / "rows", contents, [0, 1, 0, 1, 0])
    assert found.load_image(0).size == (8, 16)
    assert found.load_image(1).size == decode_image(contents[1], "as a file").size
    assert found.image_bytes(1) == contents[1]
    for index, message in ((2, "32-bit pixels"), (3, "32-bit pixels"), (4, "not a readable")):
        with pytest.raises(DataError, match=rf"row {index}: .*{message}"):
            found.load_image(index)


def test_rows_with_paths_that_datasets_found(tmp_path: Path):
    picture(tmp_path / "a.png", "blue")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    row = ImageOfRow(table, 0, "image", "rows")
    assert row.read() == (tmp_path / "a.png").read_bytes()


def test_folders_that_programs_leave_behind_are_no_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("cat/0.png", "dog/1.png", ".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png"):
        picture(tmp_path / name, "red")
    (tmp_path / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    for name in ("cat/1.heic", "dog/2.heic"):
        (tmp_path / name).touch()
    for found in (
        read_class_folders(tmp_path, templates=("{}",)),
        read_listed_folders(tmp_path, None),
    ):
        assert (tuple(found.class_names), tuple(found.labels)) == (("cat", "dog"), (0, 1))
    said = f"{tmp_path}: 2 files are no images by their endings (2 .heic).\n"
    assert capsys.readouterr().err == 2 * said


def test_numbers_of_classes_are_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(11):
        picture(tmp_path / "cls" / str(number) / "0.png", "red")
    own = read_listed_folders(tmp_path / "cls", None).class_names
    assert own == tuple(map(str, range(11)))
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(11)))
    names, _ = choose_names(own, str(tmp_path / "names.txt"), naming="plain")
    assert names[10] == "name 10"
    assert "in this order: 0 = name 0, 1 = name 1, 2 = name 2, ..., 10" in capsys.readouterr().err
    picture(tmp_path / "cls" / "other" / "0.png", "red")
    assert read_listed_folders(tmp_path / "cls", None).class_names[:3] == ("0", "1", "10")


def test_two_classes_of_one_name_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = ("crane_1", "crane_2", "dog")
    choose_names(own, {"crane_1": "crane", "crane_2": "crane", "dog": "dog"}, naming="plain")
    assert "2 classes are called 'crane' (crane_1, crane_2)" in capsys.readouterr().err
    for name in ("a_b", "a b"):
        picture(tmp_path / name / "0.png", "red")
    read_class_folders(tmp_path, templates=("a {}.",))
    assert "2 classes are called 'a b'" in capsys.readouterr().err
    choose_names(own, None, naming="plain")
    assert not capsys.readouterr().err


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


def test_links_of_images_and_folders_are_followed_where_that_is_asked_for(tmp_path: Path):
    """Parts of ImageNet are made of links; folders with links in circles are as common."""
    for name in ("a", "b"):
        (tmp_path / "all" / name / "more").mkdir(parents=True)
        for image in ("1.png", "more/2.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / "all" / name / image)
        (tmp_path / "part" / name).mkdir(parents=True)
        (tmp_path / "part" / name / "1.png").symlink_to(tmp_path / "all" / name / "1.png")
    templates = ("a {}",)
    with pytest.raises(DataError, match=r"1.png: is a link out of .*--data.allow-outside"):
        read_class_folders(tmp_path / "part", templates=templates)
    found = read_class_folders(tmp_path / "part", templates=templates, links=True)
    assert [path.name for path in found.paths] == ["1.png", "1.png"]
    folder = tmp_path / "part" / "a"
    (folder / "1.png").unlink()
    (folder / "linked").symlink_to(tmp_path / "all" / "a" / "more")
    (folder / "circle").symlink_to(folder)
    with pytest.raises(DataError, match="linked: is a link out"):  # not passed over
        find_images(folder)
    assert find_images(folder, links=True)[0] == [folder / "linked" / "2.png"]
    (folder / "linked").unlink()
    (tmp_path / "notes.txt").touch()
    (folder / "notes.txt").symlink_to(tmp_path / "notes.txt")  # which nobody reads
    assert find_images(folder) == ([], {".txt": 1})


@pytest.mark.parametrize("name", ["names.txt", "names.json"])
def test_a_list_of_very_many_names_is_read(name: str, tmp_path: Path):
    """As of all species: more than settings may have."""
    names = [f"species number {number}" for number in range(60_000)]
    text = json.dumps(names) if name.endswith("json") else "\n".join(names)
    assert len(text) > 1 << 20
    (tmp_path / name).write_text(text)
    assert read_texts(tmp_path / name) == names
