"""Every kind of source: recognised by itself, and the same pairs from each."""

import json
import pickle
from pathlib import Path

import pytest

from clip_refine.build import absolute_source, open_source, split_name
from clip_refine.config import DataConfig
from clip_refine.data import recognise
from clip_refine.data.datasets import ImageOnHub, hub_paths
from clip_refine.data.pairs import fingerprint, image_fingerprint
from clip_refine.data.rows import Written
from clip_refine.errors import ConfigError, DataError
from tests.data.layouts import (
    LAYOUTS,
    drawn,
    opened,
    write_coco,
    write_hub,
    write_image_folder,
    write_images,
    write_karpathy,
    write_parquet,
    write_parquet_with_paths,
    write_saved,
    write_shards,
    write_table,
    write_token,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_pairs_from_every_layout(layout: str, tmp_path: Path):
    pairs = drawn()
    source = opened(LAYOUTS[layout](tmp_path / "data", pairs))
    assert source.kind.startswith(layout.partition(" (")[0])
    assert source.captions == tuple(tuple(texts) for _, _, texts in pairs)
    assert [source.image_bytes(i) for i in range(len(source))] == [c for _, c, _ in pairs]
    assert [image_fingerprint(source, i) for i in range(len(source))] == [
        fingerprint(content) for _, content, _ in pairs
    ]
    assert source.load_image(2).getpixel((3, 3))[0] in range(70, 90)
    assert source.skipped == source.uncaptioned == ()


@pytest.mark.parametrize("layout", ["CSV table", "Parquet", "WebDataset", "JSON lines (content)"])
def test_sources_travel_to_worker_processes(layout: str, tmp_path: Path):
    source = opened(LAYOUTS[layout](tmp_path / "data", drawn()))
    there = pickle.loads(pickle.dumps(source))
    assert there.captions == source.captions
    assert there.load_image(3).tobytes() == source.load_image(3).tobytes()


def test_one_line_says_what_was_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = write_coco(tmp_path, drawn())
    open_source(name, DataConfig())
    assert capsys.readouterr().err == f"{name}: COCO captions, 4 images, 12 captions.\n"


def test_a_kind_can_be_forced(tmp_path: Path):
    name = write_table(tmp_path, drawn(), name="pairs.data")
    with pytest.raises(DataError, match=r"pairs.data: not a kind of source"):
        open_source(name, DataConfig())
    assert len(open_source(name, DataConfig(kind="table"))) == 4
    assert len(open_source(f"{name}#kind=table", DataConfig(kind="coco"))) == 4
    with pytest.raises(ConfigError, match="no kind 'tables'. There are table, token"):
        open_source(f"{name}#kind=tables", DataConfig())


def test_settings_behind_a_source():
    assert split_name("a#b.csv") == ("a#b.csv", {})
    assert split_name("a.json#split=val&images=x/y") == (
        "a.json",
        {"split": "val", "images": "x/y"},
    )
    assert absolute_source("hf:a/b#split=test") == "hf:a/b#split=test"
    assert absolute_source("toy") == "toy"
    here = Path.cwd()
    assert absolute_source("x-{0..3}.tar") == f"{here}/x-{{0..3}}.tar"
    assert absolute_source("a.json#images=b") == f"{here}/a.json#images={here}/b"


def test_a_split_of_what_has_none_is_refused(tmp_path: Path):
    name = write_table(tmp_path, drawn())
    with pytest.raises(ConfigError, match=r"split 'test' was asked for, but .* table has no split"):
        open_source(f"{name}#split=test", DataConfig(), training=False)
    with pytest.raises(ConfigError, match=r"split 'train' was asked for"):
        open_source(name, DataConfig(split="train"))
    # the split of the training source is none of the evaluation pairs'
    assert len(open_source(name, DataConfig(split="train"), training=False)) == 4


@pytest.mark.parametrize("where", ["image_folder", "#"])
def test_an_image_folder_elsewhere(tmp_path: Path, where: str):
    name = write_coco(tmp_path / "here", drawn())
    (tmp_path / "here" / "val2017").rename(tmp_path / "there")
    with pytest.raises(DataError, match="not found"):
        open_source(name, DataConfig())
    if where == "#":
        assert len(open_source(f"{name}#images={tmp_path / 'there'}", DataConfig())) == 4
    else:
        assert len(open_source(name, DataConfig(image_folder=tmp_path / "there"))) == 4
    with pytest.raises(DataError, match="no such folder. Check --data.image-folder"):
        open_source(name, DataConfig(image_folder=tmp_path / "nowhere"))


def test_splits_of_a_karpathy_file(tmp_path: Path):
    name = write_karpathy(tmp_path, drawn())
    assert len(opened(name, split="train")) == 2
    assert len(opened(name, split="train+restval")) == 4
    with pytest.raises(DataError, match="has no split 'val', only restval, test, train"):
        opened(name, split="val")
    with pytest.raises(DataError, match=r"x.jpg not found"):
        open_source(name, DataConfig(), training=False)  # takes test where there is no val


@pytest.mark.parametrize("write", [write_coco, write_token, write_table])
def test_a_split_file_chooses(tmp_path: Path, write):
    name = write(tmp_path / "data", drawn())
    listed = tmp_path / "Flickr_8k.trainImages.txt"
    listed.write_text("000.jpg\n003.png\n")
    assert len(opened(name, split_file=listed)) == 2
    karpathy = Path(write_karpathy(tmp_path, drawn()))
    assert len(opened(name, split_file=karpathy, split="restval")) == 2
    with pytest.raises(DataError, match="no split file. Give Karpathy's JSON"):
        opened(name, split_file=Path(write_coco(tmp_path / "more", drawn())))


def test_splits_of_a_dataset(tmp_path: Path):
    name = write_hub(tmp_path / "hub", drawn())
    assert len(open_source(name, DataConfig())) == 4
    assert len(open_source(name, DataConfig(), training=False)) == 1
    assert len(open_source(f"{name}#split=train", DataConfig(split="test"), training=False)) == 4
    assert len(opened(name, split="train[:3]")) == 3
    with pytest.raises(DataError, match="has no split 'dev', only test, train"):
        opened(name, split="dev")


def test_splits_of_a_saved_dataset(tmp_path: Path):
    import datasets

    saved = datasets.load_from_disk(write_saved(tmp_path, drawn()))
    parts = datasets.DatasetDict({"train": saved, "val": saved.select([1])})
    parts.save_to_disk(str(tmp_path / "both"))
    assert len(opened(str(tmp_path / "both"))) == 4
    assert len(open_source(str(tmp_path / "both"), DataConfig(), training=False)) == 1


def test_rows_of_two_splits_are_told_apart(tmp_path: Path):
    import datasets

    saved = datasets.load_from_disk(write_saved(tmp_path, drawn()))
    datasets.DatasetDict({"train": saved, "val": saved}).save_to_disk(str(tmp_path / "both"))
    names = {opened(str(tmp_path / "both"), split=part).image_name(0) for part in ("train", "val")}
    assert names == {f"{tmp_path / 'both'} ({part}), row 0" for part in ("train", "val")}


@pytest.mark.parametrize(
    ("address", "followed"),
    [
        ("hf://datasets/me/mine@1/a.jpg", True),
        ("zip://a.jpg::hf://datasets/me/mine@1/all.zip", True),
        ("https://elsewhere/?hf://datasets/", False),
        ("https://elsewhere/a::hf://datasets/me/mine", False),
    ],
)
def test_only_addresses_on_the_hub_are_followed(address: str, followed: bool):
    [row] = hub_paths([Written("row 0", address, ("text",))], "me/mine")
    assert isinstance(row.image, ImageOnHub) == followed


def test_image_files_of_a_dataset_on_the_hub(tmp_path: Path):
    """`datasets` gives those as absolute paths into its caches, which are followed there alone."""
    write_image_folder(tmp_path / "hub", drawn())
    source = opened(f"hf:{tmp_path / 'hub'}")
    assert [source.image_bytes(i) for i in range(4)] == [content for _, content, _ in drawn()]
    elsewhere = write_parquet_with_paths(tmp_path / "data", [(str(tmp_path / "x.png"), b"", ["a"])])
    assert elsewhere.endswith("paths.parquet")
    with pytest.raises(DataError, match="x.png' is an absolute path"):
        opened(f"hf:{tmp_path / 'data'}")


def test_a_dataset_that_is_not_there():
    with pytest.raises(DataError, match=r"hf:nobody/nothing: cannot be read"):
        opened("hf:nobody/nothing")


def test_splits_of_an_image_folder(tmp_path: Path):
    write_image_folder(tmp_path, drawn())
    write_images(tmp_path / "test", drawn(1))
    (tmp_path / "test" / "metadata.csv").write_text("file_name,text\n000.jpg,one\n")
    assert len(opened(str(tmp_path))) == 4
    assert len(opened(str(tmp_path), split="test")) == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [("a.jpg#0\tx", "token"), ("image,caption\n", "table"), ('{"image": "a"}\n', "jsonl")],
)
def test_text_files_are_told_apart(tmp_path: Path, content: str, kind: str):
    (tmp_path / "captions.txt").write_text(content)
    assert recognise(str(tmp_path / "captions.txt")) == kind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "neither COCO captions .* nor Karpathy's"),
        ('{"images": 3}', "neither COCO captions .* nor Karpathy's"),
        ('{"images": [', "is no valid JSON"),
        ("words", "not a kind of source that can be read"),
    ],
)
def test_what_is_no_source(tmp_path: Path, content: str, message: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message):
        recognise(str(tmp_path / "x.json"))


def test_names_of_several_files(tmp_path: Path):
    write_shards(tmp_path / "data", drawn(6), shards=3)
    (tmp_path / "data" / "00000_stats.json").write_text("{}")
    for name in (f"{tmp_path}/data/0000{{0..2}}.tar", f"{tmp_path}/data/*.tar", f"{tmp_path}/data"):
        assert len(opened(name)) == 6
    with pytest.raises(DataError, match=r"00003.tar: no such file \(1 of 4 missing\)"):
        opened(f"{tmp_path}/data/0000{{0..3}}.tar")
    with pytest.raises(DataError, match="stands for no file"):
        opened(f"{tmp_path}/none*.tar")


def test_a_folder_without_captions(tmp_path: Path):
    write_images(tmp_path, drawn())
    with pytest.raises(DataError, match=r"a folder without metadata.jsonl"):
        recognise(str(tmp_path))


def test_annotation_files_elsewhere_are_not_read():
    with pytest.raises(DataError, match="only .tar and .parquet files are read from elsewhere"):
        opened("https://example.org/captions.csv")


def test_captions_of_a_sample(tmp_path: Path):
    import tarfile

    from tests.data.layouts import add_sample

    content = drawn(1)[0][1]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        record = json.dumps({"caption": "from json", "better": "generated"}).encode()
        add_sample(tar, "a/0001", {"txt": b"\xef\xbb\xbfone\ntwo", "jpg": content, "json": record})
        add_sample(tar, "a/0002", {"json": record, "JPG": content})
        add_sample(tar, "a/._0002", {"jpg": b"what macOS adds"})
    source = opened(str(tmp_path / "x.tar"))
    assert source.captions == (("one\ntwo",), ("from json",))
    assert opened(str(tmp_path / "x.tar"), caption_column="better").captions[0] == ("generated",)


def test_parquet_columns(tmp_path: Path):
    name = write_parquet(tmp_path, drawn())
    with pytest.raises(DataError, match="has no column 'captions'.*Did you mean 'caption'"):
        opened(name, caption_column="captions")
