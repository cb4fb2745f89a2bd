"""Every kind of source: recognised by itself, and the same pairs from each."""

import json
import pickle
from pathlib import Path

import pytest

from clip_refine.config import DataConfig
from clip_refine.data import Stream, open_pairs, recognise
from clip_refine.data.datasets import ImageOnHub, hub_paths
from clip_refine.data.pairs import fingerprint, image_fingerprint
from clip_refine.data.rows import Written
from clip_refine.data.sources import absolute_source, open_training, split_name
from clip_refine.support.errors import ConfigError, DataError
from tests.data.layouts import (
    LAYOUTS,
    Pairs,
    drawn,
    opened,
    write_coco,
    write_hub,
    write_image_folder,
    write_image_folder_csv,
    write_images,
    write_jsonl_with_content,
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
    open_pairs(name, DataConfig())
    assert capsys.readouterr().err == f"{name}: COCO captions, 4 images, 12 captions.\n"


def test_a_kind_can_be_forced(tmp_path: Path):
    name = write_table(tmp_path, drawn(), name="pairs.data")
    with pytest.raises(DataError, match=r"pairs.data: not a kind of source"):
        open_pairs(name, DataConfig())
    assert len(open_pairs(name, DataConfig(kind="table"))) == 4
    assert len(open_pairs(f"{name}#kind=table", DataConfig(kind="coco"))) == 4
    with pytest.raises(ConfigError, match="no kind 'tables'. There are token, table"):
        open_pairs(f"{name}#kind=tables", DataConfig())


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
    assert absolute_source("a.csv#split_file=x.txt") == f"{here}/a.csv#split_file={here}/x.txt"


def test_a_split_of_what_has_none_is_refused(tmp_path: Path):
    name = write_table(tmp_path, drawn())
    with pytest.raises(ConfigError, match=r"split 'test' was asked for, but .* table has no split"):
        open_pairs(f"{name}#split=test", DataConfig(), training=False)
    with pytest.raises(ConfigError, match=r"split 'train' was asked for"):
        open_pairs(name, DataConfig(split="train"))
    karpathy = write_karpathy(tmp_path / "k", drawn())
    listed = tmp_path / "list.txt"
    listed.write_text("000.jpg\n")
    with pytest.raises(ConfigError, match=r"no splits, and .*list.txt is a list without any"):
        open_pairs(name, DataConfig(split="train", split_file=listed))
    assert len(open_pairs(name, DataConfig(split="train", split_file=karpathy))) == 2


@pytest.mark.parametrize("where", ["image_folder", "#"])
def test_an_image_folder_elsewhere(tmp_path: Path, where: str):
    name = write_coco(tmp_path / "here", drawn())
    (tmp_path / "here" / "val2017").rename(tmp_path / "there")
    with pytest.raises(DataError, match="not found"):
        open_pairs(name, DataConfig())
    if where == "#":
        assert len(open_pairs(f"{name}#images={tmp_path / 'there'}", DataConfig())) == 4
    else:
        assert len(open_pairs(name, DataConfig(image_folder=tmp_path / "there"))) == 4
    with pytest.raises(DataError, match="no such folder. Check --data.image-folder"):
        open_pairs(name, DataConfig(image_folder=tmp_path / "nowhere"))


def test_splits_of_a_karpathy_file(tmp_path: Path):
    name = write_karpathy(tmp_path, drawn())
    assert len(opened(name, split="train")) == 2
    assert len(opened(name, split="train+restval")) == 4
    with pytest.raises(DataError, match="has no split 'val', only restval, test, train"):
        opened(name, split="val")
    with pytest.raises(DataError, match=r"x.jpg not found"):
        open_pairs(name, DataConfig(), training=False)  # takes test where there is no val


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


def write_jsonl_with_named_content(folder: Path, pairs: Pairs) -> str:
    name = Path(write_jsonl_with_content(folder, pairs))
    records = [json.loads(line) for line in name.read_text().splitlines()]
    for record, (image, _, _) in zip(records, pairs, strict=True):
        record["image"]["path"] = image
    name.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(name)


STORED = {
    "Parquet": write_parquet,
    "JSON lines (content)": write_jsonl_with_named_content,
    "dataset saved to disk": write_saved,
    "dataset on the Hub": write_hub,
    "WebDataset": write_shards,
}


@pytest.mark.parametrize("layout", STORED)
def test_a_split_file_chooses_stored_images(tmp_path: Path, layout: str):
    pairs = drawn()
    name = STORED[layout](tmp_path / "data", pairs)
    (tmp_path / "list.txt").write_text("003.png\n000.jpg\n")
    source = opened(name, split_file=tmp_path / "list.txt")
    assert [source.image_bytes(i) for i in (0, 1)] == [pairs[0][1], pairs[3][1]]
    assert len(source) == 2
    assert len(opened(f"{name}#split_file={tmp_path / 'list.txt'}")) == 2
    (tmp_path / "list.txt").write_text("004.jpg\n")
    with pytest.raises(DataError, match="list.txt: none of its 1 images is in"):
        opened(name, split_file=tmp_path / "list.txt")


def test_shards_are_chosen_by_their_keys(tmp_path: Path):
    (tmp_path / "list.txt").write_text("000\n002\n")
    assert len(opened(write_shards(tmp_path, drawn()), split_file=tmp_path / "list.txt")) == 2


def test_images_stored_without_names_cannot_be_chosen(tmp_path: Path):
    name = write_jsonl_with_content(tmp_path, drawn())
    (tmp_path / "list.txt").write_text("000.jpg\n")
    with pytest.raises(DataError, match="line 1: its image is stored without a file name, so"):
        opened(name, split_file=tmp_path / "list.txt")


def test_a_list_names_images_with_their_folders(tmp_path: Path):
    """Images of one name in two folders are two images."""
    for folder, start in (("a", 0), ("b", 2)):
        of_folder = zip(("000.jpg", "001.png"), drawn(4)[start:], strict=False)
        write_images(
            tmp_path / folder, [(name, content, ()) for name, (_, content, _) in of_folder]
        )
    rows = [f"{folder}/{name}" for folder in ("a", "b") for name in ("000.jpg", "001.png")]
    (tmp_path / "x.csv").write_text("image,caption\n" + "".join(f"{row},text\n" for row in rows))
    (tmp_path / "list.txt").write_text("a/000.jpg\n./b/001.png\n")
    source = opened(str(tmp_path / "x.csv"), split_file=tmp_path / "list.txt")
    found = [Path(source.image_name(i)).relative_to(tmp_path) for i in range(len(source))]
    assert list(map(str, found)) == ["a/000.jpg", "b/001.png"]
    (tmp_path / "list.txt").write_text("000.jpg\n")
    assert len(opened(str(tmp_path / "x.csv"), split_file=tmp_path / "list.txt")) == 2


def test_a_list_names_images_of_an_image_folder(tmp_path: Path):
    for folder in ("cats", "dogs"):
        write_table(tmp_path / folder, drawn(2), name="metadata.csv")
    write_images(tmp_path / "dogs", [("more.png", drawn(2)[1][1], ())])
    (tmp_path / "list.txt").write_text("cats/000.jpg\ndogs/001.png\n")
    source = opened(str(tmp_path), split_file=tmp_path / "list.txt")
    found = [Path(source.image_name(i)).relative_to(tmp_path) for i in range(len(source))]
    assert list(map(str, found)) == ["cats/000.jpg", "dogs/001.png"]
    assert source.uncaptioned == ()


def both_parts(data: DataConfig) -> tuple[list[str], list[str]]:
    """File names of the training pairs and of the held-out pairs."""
    train, held_out = (
        open_training(data),
        open_pairs(data.val or "", data.for_val(), training=False),
    )
    assert not isinstance(train, Stream)
    return tuple(
        [Path(part.image_name(i)).name for i in range(len(part))] for part in (train, held_out)
    )


def test_one_token_file_with_a_list_for_each_part(tmp_path: Path):
    """The protocol of Flickr8k."""
    name = write_token(tmp_path, drawn())
    (tmp_path / "train.txt").write_text("000.jpg\n001.png\n")
    (tmp_path / "dev.txt").write_text("003.png\n")
    lists = {"split_file": tmp_path / "train.txt", "val_split_file": tmp_path / "dev.txt"}
    parts = (["000.jpg", "001.png"], ["003.png"])
    assert both_parts(DataConfig(train=name, val=name, **lists)) == parts
    behind = [f"{name}#split_file={tmp_path / part}" for part in ("train.txt", "dev.txt")]
    assert both_parts(DataConfig(train=behind[0], val=behind[1])) == parts


def test_settings_of_training_are_none_of_the_held_out_pairs(tmp_path: Path):
    train = tmp_path / "train" / "x.csv"
    train_name = write_table(tmp_path / "train", drawn())
    train.write_text(Path(train_name).read_text().replace("file_name,caption", "pic,words"))
    val = write_karpathy(tmp_path / "val", drawn())
    (tmp_path / "list.txt").write_text("000.jpg\n")
    data = DataConfig(
        train=str(train),
        val=f"{val}#split=restval",
        image_column="pic",
        caption_column="words",
        split_file=tmp_path / "list.txt",
    )
    assert both_parts(data) == (["000.jpg"], ["001.png", "003.png"])
    swapped = DataConfig(
        train=val,
        split="restval",
        val=str(train),
        val_image_column="pic",
        val_caption_column="words",
    )
    assert both_parts(swapped) == (["001.png", "003.png"], [name for name, _, _ in drawn()])
    assert both_parts(DataConfig(train=val, split="restval", val=val, val_split="train")) == (
        ["001.png", "003.png"],
        ["000.jpg", "002.jpg"],
    )


def test_a_split_file_gives_the_validation_split_to_val(tmp_path: Path):
    name = write_token(tmp_path, drawn())
    splits = {"train": ["000.jpg", "001.png"], "val": ["002.jpg"], "test": ["003.png"]}
    images = [
        {"filename": image, "split": split, "sentences": []}
        for split, names in splits.items()
        for image in names
    ]
    file = tmp_path / "dataset_flickr8k.json"
    file.write_text(json.dumps({"images": images}))
    both = DataConfig(train=name, val=name, split_file=file, val_split_file=file)
    assert both_parts(both) == (splits["train"], splits["val"])


def test_settings_that_nobody_would_use_are_refused(tmp_path: Path):
    name = write_karpathy(tmp_path, drawn())
    with pytest.raises(ConfigError, match="data.split says how data.train .* --data.val-split"):
        DataConfig(val=name, split="test").for_val()
    with pytest.raises(ConfigError, match="val_split_file says how val is read, which is missing"):
        DataConfig(train=name, val_split_file=tmp_path / "x.txt")


def test_every_setting_of_a_source_can_stand_behind_it(tmp_path: Path):
    write_images(tmp_path / "there", drawn(3))
    rows = "".join(f"no,{name},words {name}\n" for name, _, _ in drawn(3))
    (tmp_path / "x.data").write_text(f"image,pic,words\n{rows}")
    karpathy = write_karpathy(tmp_path / "k", drawn())
    behind = f"kind=table&images={tmp_path / 'there'}&image_column=pic&caption-column=words"
    chosen = f"{behind}&split_file={karpathy}&split=restval"
    data = DataConfig(kind="coco", image_column="image", split="train")
    source = open_pairs(f"{tmp_path / 'x.data'}#{chosen}", data)
    assert list(source.captions) == [("words 001.png",)]


def test_splits_of_a_dataset(tmp_path: Path):
    name = write_hub(tmp_path / "hub", drawn())
    assert len(open_pairs(name, DataConfig())) == 4
    assert len(open_pairs(name, DataConfig(), training=False)) == 1
    assert len(open_pairs(f"{name}#split=train", DataConfig(split="test"), training=False)) == 4
    assert len(opened(name, split="train[:3]")) == 3
    with pytest.raises(DataError, match="has no split 'dev', only test, train"):
        opened(name, split="dev")


def test_splits_of_a_saved_dataset(tmp_path: Path):
    import datasets

    saved = datasets.load_from_disk(write_saved(tmp_path, drawn()))
    parts = datasets.DatasetDict({"train": saved, "val": saved.select([1])})
    parts.save_to_disk(str(tmp_path / "both"))
    assert len(opened(str(tmp_path / "both"))) == 4
    assert len(open_pairs(str(tmp_path / "both"), DataConfig(), training=False)) == 1


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


@pytest.mark.parametrize("write", [write_saved, write_image_folder_csv])
def test_a_split_of_a_folder_without_splits_is_refused(tmp_path: Path, write):
    with pytest.raises(ConfigError, match=r"split 'test' was asked for, but .* has no splits"):
        opened(write(tmp_path, drawn()), split="test")


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
    with pytest.raises(DataError, match=r"a folder without .*metadata.jsonl"):
        recognise(str(tmp_path))


def test_annotation_files_elsewhere_are_not_read():
    with pytest.raises(DataError, match="only .tar and .parquet files are read from elsewhere"):
        opened("https://example.org/captions.csv")


def test_captions_of_a_sample(tmp_path: Path):
    import tarfile

    from tests.data.layouts import add_sample

    (_, content, _), _, (_, other, _) = drawn(3)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        record = json.dumps({"caption": "from json", "better": "generated"}).encode()
        add_sample(tar, "a/0001", {"txt": b"\xef\xbb\xbfone\ntwo", "jpg": content, "json": record})
        add_sample(tar, "a/0002", {"json": record, "JPG": other})
        add_sample(tar, "a/._0002", {"jpg": b"what macOS adds"})
    source = opened(str(tmp_path / "x.tar"))
    assert source.captions == (("one\ntwo",), ("from json",))
    assert opened(str(tmp_path / "x.tar"), caption_column="better").captions[0] == ("generated",)


def test_parquet_columns(tmp_path: Path):
    name = write_parquet(tmp_path, drawn())
    with pytest.raises(DataError, match="has no column 'captions'.*Did you mean 'caption'"):
        opened(name, caption_column="captions")
