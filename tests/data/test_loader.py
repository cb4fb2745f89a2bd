"""The same pairs whatever the number of workers and processes."""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_refine.data import (
    EpochPlan,
    hold_out,
    image_batches,
    pair_batches,
    read_class_folders,
    read_table,
)
from clip_refine.data.loader import swap_words
from clip_refine.models import OpenClipEncoder
from clip_refine.support.errors import DataError, FailedError
from clip_refine.toy import ToyPairs


def plan_of(pairs: ToyPairs, seed: int) -> EpochPlan:
    return EpochPlan.draw(pairs, generator=torch.Generator().manual_seed(seed))


def batches(pairs: ToyPairs, model: OpenClipEncoder, **settings: int):
    return list(
        pair_batches(
            pairs,
            plan_of(pairs, 1),
            batch_size=16,
            preprocess=model.preprocess,
            tokenizer=model.tokenizer,
            **settings,
        )
    )


def test_workers_change_nothing(pairs: ToyPairs, tiny: OpenClipEncoder):
    for alone, helped in zip(batches(pairs, tiny), batches(pairs, tiny, workers=2), strict=True):
        assert alone.indices == helped.indices
        assert torch.equal(alone.pixels, helped.pixels)
        assert torch.equal(alone.tokens, helped.tokens)


def test_processes_share_each_batch_in_order(pairs: ToyPairs, tiny: OpenClipEncoder):
    whole = batches(pairs, tiny)
    halves = [batches(pairs, tiny, rank=rank, processes=2) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert batch.indices == [*first.indices, *second.indices]


def test_an_epoch_uses_each_image_once_and_leaves_out_an_incomplete_batch(pairs: ToyPairs):
    listed = plan_of(pairs, 0).batches(24)
    assert [len(batch) for batch in listed] == [24, 24]
    used = [index for batch in listed for index in batch]
    assert len(set(used)) == len(used)


def test_captions_are_drawn_evenly_and_anew():
    pairs = ToyPairs("draws", size=3000, captions_per_image=3)
    first, again, other = plan_of(pairs, 0), plan_of(pairs, 0), plan_of(pairs, 1)
    assert first == again
    assert first.caption_choice != other.caption_choice
    counts = torch.bincount(torch.tensor(first.caption_choice), minlength=3)
    assert counts.min() > 900


def test_tokens_belong_to_the_drawn_captions(pairs: ToyPairs, tiny: OpenClipEncoder):
    plan = plan_of(pairs, 1)
    batch = batches(pairs, tiny)[0]
    texts = [pairs.captions[i][plan.caption_choice[i]] for i in batch.indices]
    assert torch.equal(batch.tokens, tiny.tokenizer(texts))


@pytest.mark.parametrize("workers", [0, 2])
def test_wrong_captions_come_along_and_are_a_function_of_seed_and_caption(
    pairs: ToyPairs, tiny: OpenClipEncoder, workers: int
):
    swapping = batches(pairs, tiny, swap_seed=3, workers=workers)
    for batch, plain in zip(swapping, batches(pairs, tiny), strict=True):
        assert torch.equal(batch.tokens, plain.tokens)
        assert (plain.wrong_tokens, batch.wrong_tokens is None) == (None, False)
        choice = plan_of(pairs, 1).caption_choice
        own = [pairs.captions[index][choice[index]] for index in batch.indices]
        expected = tiny.tokenizer([swap_words(text, 3) or text for text in own])
        for found in (batch, batch.to(torch.device("cpu"))):
            assert torch.equal(found.wrong_tokens, expected)


@pytest.mark.parametrize(
    ("caption", "swapped"),
    [
        ("two dogs and three cats", {"two cats and three dogs", "three dogs and two cats"}),
        ("A man riding a horse.", {"A horse riding a man."}),
        ("a red star, a  blue ring", {"a red ring, a  blue star", "a blue star, a  red ring"}),
        ("a cat and a dog", {None}),  # the same in either order
        ("a cat, a dog", {None}),
        ("a cat, a dog and a bird", {None}),
        (
            "a red cat, a dog and a bird",
            {"a red dog, a cat and a bird", "a red bird, a dog and a cat"},
        ),
        ("a cat, a dog on a mat", {"a mat, a dog on a cat", "a cat, a mat on a dog"}),
        ("a black dog next to a white dog", {None}),
        ("a black dog over a white dog", {"a white dog over a black dog"}),
        ("a cat under a dog", {"a dog under a cat"}),
        ("a Man on a man", {None}),
        ("a small red star", {None}),  # its adjectives say the same in either order
        ("ein Hund auf der Wiese", {None}),
        ("  ", {None}),
    ],
)
def test_two_words_change_places_where_that_says_something_else(
    caption: str, swapped: set[str | None]
):
    assert {swap_words(caption, seed) for seed in range(20)} == swapped


words = st.lists(st.sampled_from(["a", "cat,", "red", "and", "the", "on", "ring", "of"]))


@given(caption=st.text(max_size=40) | words.map(" ".join))
def test_a_swapped_caption_has_the_same_words_two_of_them_elsewhere(caption: str):
    swapped = swap_words(caption, 1)
    if swapped is not None:
        found = [re.findall(r"\w+(?:['’-]\w+)*", one) for one in (caption, swapped)]
        assert sorted(found[0]) == sorted(found[1])
        assert sum(a != b for a, b in zip(*found, strict=True)) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_lost_after_the_check_is_named(table: Path, tiny: OpenClipEncoder, workers: int):
    source = read_table(table)
    source.places[5].write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"^\S*005.png: is not a readable image"):
        list(image_batches(source, batch_size=8, preprocess=tiny.preprocess, workers=workers))


@dataclass(frozen=True)
class ManyImages:
    name: str
    captions: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.captions)

    def load_image(self, index: int) -> Image.Image:
        raise NotImplementedError

    def image_name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize(("count", "expected"), [(200, 100), (5000, 100), (20_000, 200)])
def test_held_out_share(count: int, expected: int):
    source = ManyImages("many", [(f"caption {i}",) for i in range(count)])
    train, held_out = hold_out(source, fraction=0.01, seed=1)
    assert len(held_out) == expected
    assert sorted([*train.indices, *held_out.indices]) == list(range(count))
    assert held_out.captions[0] == source.captions[held_out.indices[0]]
    assert hold_out(source, fraction=0.01, seed=1)[1].indices == held_out.indices
    assert hold_out(source, fraction=0.01, seed=2)[1].indices != held_out.indices


def test_each_part_says_once_what_it_is():
    source = ManyImages("many", [("a caption",)] * 400)
    training, held_out = hold_out(source, fraction=0.01, seed=1)
    parts = [held_out, *hold_out(training, fraction=0.01, seed=1)]
    assert [part.name.removeprefix(source.name) for part in parts] == [
        *(" (held-out part)", " (training part)", " (selection part)"),
    ]


def test_too_few_images_to_hold_out():
    source = ManyImages("few", [("caption",)] * 150)
    with pytest.raises(DataError, match="few: 150 images, too few.*--data.val"):
        hold_out(source, fraction=0.01, seed=1)


def test_class_folders(tmp_path: Path):
    for name, count in (("sea_lion", 2), ("cat", 1)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")
    task = read_class_folders(tmp_path, templates=("a photo of a {}.",))
    assert task.class_names == ("cat", "sea lion")
    assert list(task.labels) == [0, 1, 1]
    assert task.name == tmp_path.name
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: class folder without images"):
        read_class_folders(tmp_path, templates=("{}",))
    with pytest.raises(DataError, match="no such folder"):
        read_class_folders(tmp_path / "nowhere", templates=("{}",))


class Fatal:
    """A preprocessing that ends its process, or its memory."""

    def __init__(self, killed: bool) -> None:
        self.killed = killed

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self.killed and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError


@pytest.mark.parametrize(("killed", "what"), [(True, "was killed"), (False, "ran out of memory")])
def test_a_worker_that_dies_is_one_clear_error(killed: bool, what: str, pairs: ToyPairs):
    batches = image_batches(pairs, batch_size=8, preprocess=Fatal(killed), workers=1)
    with pytest.raises(FailedError, match=f"process that decodes images {what}.*--train.workers"):
        list(batches)
