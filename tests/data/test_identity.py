"""An image is what its file holds: the same in every source, under every name."""

import io
import os
import pickle
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from clip_refine.config import DataConfig
from clip_refine.data import (
    EveryCaption,
    Mixture,
    PairLoader,
    StreamMixture,
    Subset,
    hold_out,
    open_pairs,
    open_stream,
    stream_batches,
)
from clip_refine.data.images import ImageInMemory
from clip_refine.data.pairs import (
    CaptionedImages,
    as_pairs,
    image_fingerprint,
    image_groups,
)
from clip_refine.models import OpenClipEncoder
from clip_refine.roads import build
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.toy import ToyPairs
from tests.data.files import Files
from tests.data.layouts import (
    LAYOUTS,
    Pairs,
    drawn,
    opened,
    write_images,
    write_jsonl,
    write_jsonl_with_content,
    write_parquet,
    write_saved,
    write_shards,
    write_table,
)

STORED = {
    "Parquet": write_parquet,
    "JSON lines": write_jsonl_with_content,
    "saved": write_saved,
    "WebDataset": write_shards,
    "CSV of copies": write_table,
}


def noise(count: int, *, seed: int = 0) -> Pairs:
    """Small PNG files that all have one size, with two captions each."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        content = io.BytesIO()
        pixels = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(content, "PNG", compress_level=0)
        made.append(
            (f"{seed}{index:04}.png", content.getvalue(), [f"{seed} {index} {k}" for k in "ab"])
        )
    return made


def once_a_caption(pairs: Pairs) -> Pairs:
    """The same with a row and a name of its own for every caption, as many datasets have them."""
    return [
        (f"{number}-{name}", content, [text])
        for number in range(2)
        for name, content, texts in pairs
        for text in texts[number::2]
    ]


# --- one source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", STORED)
def test_an_image_stored_once_a_caption_is_one_image(layout: str, tmp_path: Path):
    pairs = noise(6)
    listed = opened(write_table(tmp_path / "listed", pairs))
    stored = opened(STORED[layout](tmp_path / "stored", once_a_caption(pairs)))
    assert stored.captions == listed.captions == tuple(tuple(texts) for _, _, texts in pairs)
    for index in range(6):
        assert image_fingerprint(stored, index) == image_fingerprint(listed, index)


def test_images_without_captions_are_no_copies_of_those_with_some(tmp_path: Path):
    write_images(tmp_path, [*drawn(2), ("copy.jpg", drawn(1)[0][1], ())])
    rows = '{"image": "copy.jpg", "caption": []}\n{"image": "000.jpg", "caption": "a"}\n'
    (tmp_path / "x.jsonl").write_text(rows)
    with pytest.raises(DataError, match="has no caption"):
        opened(str(tmp_path / "x.jsonl"))


def test_held_out_images_have_no_copy_in_training(tmp_path: Path):
    pairs = once_a_caption(noise(220))
    config = DataConfig(train=write_parquet(tmp_path, pairs))
    training, held_out = build.build_data(config, seed=3)
    assert len(training) == 120  # pyright: ignore
    assert len(held_out) == 100
    assert not contents(training) & contents(held_out)


def contents(pairs) -> set[str]:
    return {image_fingerprint(pairs, index) for index in range(len(pairs))}


# --- several sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_images_are_the_same_in_every_layout(layout: str, tmp_path: Path):
    here = opened(write_table(tmp_path / "here", drawn(4)))
    there = opened(LAYOUTS[layout](tmp_path / "there", drawn(4)))
    assert image_groups(here, there) == [[0, 1, 2, 3], [0, 1, 2, 3]] or same_groups(here, there)


def same_groups(here: CaptionedImages, there: CaptionedImages) -> bool:
    """Whether images of one content, and only those, have one number."""
    ours, theirs = image_groups(here, there)
    return all(
        (ours[i] == theirs[k]) == (image_fingerprint(here, i) == image_fingerprint(there, k))
        for i in range(len(here))
        for k in range(len(there))
    )


def test_groups_go_by_all_of_the_content(tmp_path: Path):
    """Files of one size, of one size and end, and of one content."""
    end = bytes(5000)
    made = {"a": b"1" + end, "b": b"2" + end, "c": b"1" + bytes(4999) + b"x", "d": b"1" + end}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "b", tmp_path / "link")
    paths = [tmp_path / name for name in (*"abcd", "link")]
    memory = [ImageInMemory(name, content) for name, content in made.items()]
    stored = CaptionedImages("x", "x", memory, [("t",)] * 4)
    numbers = image_groups(Files(tuple(paths)), stored, CaptionedImages("y", "y", paths, []))
    files, in_memory, places = (
        numbers[0],
        numbers[1],
        image_groups(CaptionedImages("y", "y", paths, [("t",)] * 5))[0],
    )
    assert len(set(files)) == 3
    assert files[0] == files[3] == in_memory[0] == in_memory[3]
    assert files[1] == files[4] == in_memory[1]
    assert files[2] == in_memory[2]
    assert [places.index(number) for number in places] == [0, 1, 2, 0, 1]


def test_drawn_images_go_by_name_and_pixels():
    many = ToyPairs("many", size=5)
    others = ToyPairs("many", size=8, seed=1)
    twice, again, different = image_groups(many, ToyPairs("many", size=8), others)
    assert again[:5] == twice
    assert len(set(again)) == 8
    assert not set(different) & set(again), "of one name, but other pixels"


def test_an_image_that_is_gone_is_named(tmp_path: Path):
    pairs = opened(write_table(tmp_path, drawn(2)))
    (tmp_path / "001.png").unlink()
    with pytest.raises(DataError, match=r"001.png: cannot be read \(No such file"):
        image_groups(pairs)


def copies(folder: Path, pairs: Pairs) -> list[str]:
    """Sources with the same images whose names do not show it."""
    os.symlink(folder / "listed", folder / "linked")
    return [
        write_table(folder / "copied", pairs),
        str(folder / "linked" / "captions.csv"),
        os.path.relpath(folder / "listed" / "captions.csv"),
        write_shards(folder / "shards", pairs),
        write_parquet(folder / "parquet", pairs),
    ]


def test_copies_in_a_mixture_stay_on_one_side(tmp_path: Path):
    pairs = noise(220)
    first = opened(write_table(tmp_path / "listed", pairs))
    for name in copies(tmp_path, pairs):
        mixture = Mixture([first, opened(name)])
        for source in (mixture, EveryCaption(mixture), Subset(mixture, range(440), "all")):
            training, held_out = hold_out(source, fraction=0.1, seed=1)
            assert len(contents(held_out)) == len(held_out) == 100
            assert len(contents(training)) == 120
            assert not contents(training) & contents(held_out)


def test_validation_pairs_that_are_trained_on_are_reported(tmp_path: Path, capsys):
    train = write_table(tmp_path / "listed", noise(20))
    other = noise(12, seed=1)
    for name in copies(tmp_path, [*noise(20), *other]):
        _, held_out = build.build_data(DataConfig(train=train, val=name), seed=0)
        said = " ".join(capsys.readouterr().err.split())
        count = len(held_out)
        assert f"Beware: 20 of the {count} held-out images are trained on, too" in said
        assert f"The first: {held_out.image_name(0)}." in said
    build.build_data(DataConfig(train=train, val=write_table(tmp_path / "x", other)), seed=0)
    assert "Beware" not in capsys.readouterr().err


def test_pairs_that_are_handed_to_compare_are_compared(tmp_path: Path, tiny_name: str, capsys):
    from clip_refine.config.runs import CompareConfig
    from clip_refine.roads.compare import compare

    config = CompareConfig.model_validate(
        {"model": {"name": tiny_name}, "out": tmp_path / "out", "recipes": ()}
    )
    pairs = ToyPairs("few", 150)
    with pytest.raises(DataError, match="too few"):
        compare(config, train_pairs=pairs, held_out=pairs, tasks=[])
    assert "Beware: 150 of the 150 held-out images" in capsys.readouterr().err


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_parquet, write_shards, write_jsonl])
def test_a_stream_is_checked_as_it_is_read(write, tmp_path: Path, tiny: OpenClipEncoder, capsys):
    name = write(tmp_path / "data", noise(24))
    val = write_table(tmp_path / "val", [*noise(15), *noise(5, seed=1)])
    data = DataConfig(train=name, val=val, streaming=True, shuffle_buffer=4)
    stream, held_out = build.build_data(data, seed=0)
    assert "Beware" not in capsys.readouterr().err
    settings = {"seed": 0, "batch_size": 12, "preprocess": tiny.preprocess}
    for steps, count in ((2, 15), (0, 15)):
        batches = stream_batches(
            stream,  # pyright: ignore
            steps=steps,
            tokenizer=tiny.tokenizer,
            **settings,
        )
        assert len(list(batches)) == steps
        said = " ".join(capsys.readouterr().err.split())
        assert f"Beware: {count} of the 20 held-out images are trained on, too" in said
        assert held_out.image_name(0) in said


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Stop what does not come to an end by itself."""

    def stop(*_) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_stream_with_fewer_pairs_than_a_batch_ends(tmp_path: Path, tiny: OpenClipEncoder):
    settings = {"preprocess": tiny.preprocess, "tokenizer": tiny.tokenizer, "batch_size": 8}
    name = write_shards(tmp_path, drawn(5))
    stream = open_stream(name)
    with within(30):
        with pytest.raises(DataError, match=r"tar: 5 pairs, fewer than a batch of 8"):
            list(stream_batches(stream, seed=0, steps=10**6, **settings))
        mixture = StreamMixture([stream, stream], (1, 1))  # begins anew, as mixtures do
        assert len(list(stream_batches(mixture, seed=0, steps=2, **settings))) == 2
        pairs = open_pairs(name)
        with pytest.raises(DataError, match=r"tar: 5 pairs, fewer than a batch of 8"):
            next(PairLoader(pairs, **settings).epoch(plan(pairs)))


def plan(pairs):
    import torch

    from clip_refine.data import EpochPlan

    return EpochPlan.draw(pairs, generator=torch.Generator())


# --- what Python callers give ---------------------------------------------------------------------


def test_a_list_of_pairs(tmp_path: Path):
    write_images(tmp_path, drawn(2))
    image = Image.open(tmp_path / "000.jpg")
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    given = [
        (image, "one"),
        (str(tmp_path / "001.png"), ["two", "three"]),
        (tmp_path / "001.png", ("four",)),
        (image.copy(), "five"),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "clear"),
    ]
    pairs = as_pairs(given)
    assert pairs.captions == (("one", "five"), ("two", "three", "four"), ("clear",))
    assert pairs.load_image(0).tobytes() == image.convert("RGB").tobytes()
    assert pairs.load_image(2).getpixel((0, 0)) == (255, 255, 255)
    assert as_pairs(pairs) is pairs
    assert as_pairs([(turned, "turned")]).load_image(0).size == (12, 16)


def test_a_dataset_in_memory():
    import datasets

    pairs = noise(3)
    images = [{"bytes": content, "path": None} for _, content, texts in pairs for _ in texts]
    captions = [text for _, _, texts in pairs for text in texts]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": images, "text": captions}
    found = as_pairs(datasets.Dataset.from_dict(rows, features=features))
    assert found.captions == tuple(tuple(texts) for _, _, texts in pairs)
    assert found.image_bytes(2) == pairs[2][1]


class Photos:
    """As torch has datasets: a length, and what stands at a place."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


def test_a_dataset_as_torch_has_them(tmp_path: Path):
    image, other = (Image.new("RGB", (12, 16), colour) for colour in ("red", "green"))
    other.save(tmp_path / "other.png")
    items = [(image, "one"), (str(tmp_path / "other.png"), ["two", "three"]), (image, "four")]
    found = as_pairs(Photos(items))
    assert found.name == "Photos"
    assert found.captions == (("one", "four"), ("two", "three"))
    assert found.load_image(0).tobytes() == image.tobytes()
    assert found.image_name(0) == "Photos[0]"
    named = [{"picture": image, "words": "one"}, {"picture": other, "words": ["two"]}]
    data = DataConfig(image_column="picture", caption_column="words")
    for given in (named, Photos(named), pandas.DataFrame(named)):
        assert as_pairs(given, data).captions == (("one",), ("two",))
    again = pickle.loads(pickle.dumps(as_pairs(Photos(named), data)))  # as workers get it
    assert again.load_image(1).tobytes() == other.tobytes()


def test_images_that_are_handed_in_are_asked_for_once_at_the_start():
    """And by one thread at a time, as torch does."""
    asked: list[int] = []
    inside: list[int] = []
    images = [Image.new("RGB", (12, 16), (n, 0, 0)) for n in range(16)]

    class Counted(Photos):
        def __getitem__(self, number: int) -> Any:
            inside.append(number)
            assert len(inside) == 1
            asked.append(number)
            time.sleep(0.001)
            inside.clear()
            return super().__getitem__(number)

    found = as_pairs(Counted([(image, "a text") for image in images]))
    assert asked == [*range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(found.load_image, [0] * 32))
    assert len(asked) == 16 + 32


def test_columns_of_pairs_that_are_passed(tmp_path: Path):
    import datasets

    write_images(tmp_path, noise(120))
    rows = {
        "picture": [str(path) for path in sorted(tmp_path.glob("*.*g"))],
        "words": [f"text {number}" for number in range(120)],
    }
    given = datasets.Dataset.from_dict(rows)
    with pytest.raises(DataError, match=r"no image column among picture, words; .*data.image_col"):
        build.build_data(DataConfig(), seed=0, train_pairs=given)
    data = DataConfig(image_column="picture", caption_column="words", val="toy")
    train, held_out = build.build_data(data, seed=0, train_pairs=given)
    assert (len(as_pairs(train)), held_out.name) == (120, "toy-val")
    data = DataConfig(image_column="picture", caption_column="words")
    train, held_out = build.build_data(data, seed=0, train_pairs=given, held_out=given)
    assert held_out.captions[0] == ("text 0",)
    with pytest.raises(ConfigError, match=r"data.image_column: .* have no named values"):
        build.build_data(data, seed=0, train_pairs=[("a.jpg", "text")])
    named = [{"picture": path, "words": "a text"} for path in rows["picture"][:20]]
    _, held_out = build.build_data(data, seed=0, train_pairs=ToyPairs("t", size=8), held_out=named)
    assert len(held_out) == 20
    with pytest.raises(DataError, match="dict of 'train': give one of them"):
        build.build_data(data, seed=0, train_pairs={"train": given})
    with pytest.raises(DataError, match="IterableDataset: has no"):
        build.build_data(data, seed=0, train_pairs=given.to_iterable_dataset())


class Nameless:
    captions = (("a",),)

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a.jpg",)], r"pairs\[0\]: expected \(image, caption\), .* got \('a.jpg',\)"),
        ([(3, "text")], r"pairs\[0\]: expected"),
        ([("a.jpg", [])], r"pairs\[0\]: expected"),
        ([("a.jpg", [3])], r"pairs\[0\]: expected"),
        ([("nowhere.jpg", "text")], "image file nowhere.jpg not found"),
        ([], "without pairs"),
        (Nameless(), r"Nameless: has no name, load_image, image_name, so .* Give a list"),
        (3, "int: has no name, captions, __len__"),
        ("captions.csv", r"str: has no name, .*opened or streamed is named in data.train"),
        ({"train": [], "test": []}, "dict of 'train', 'test': give one of them"),
        (Photos([(torch.zeros(3, 8, 8), "a")]), r"Photos\[0\]: expected .* so without a transform"),
        ([{"a": 1, "b": 2}], r"pairs\[0\]: no image column among a, b"),
    ],
)
def test_what_is_no_source_of_pairs_is_refused_at_once(given, message: str):
    for roles in ({"train_pairs": given}, {"train_pairs": ToyPairs("t", 20), "held_out": given}):
        with pytest.raises(DataError, match=message):
            build.build_data(DataConfig(), seed=0, **roles)
