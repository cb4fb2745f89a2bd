"""Comparisons of an image with texts of nearly the same words."""

import pytest
import torch
from hypothesis import given
from torch.nn.functional import normalize

from clip_refine.data.labelled import Compositions
from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.classify import compositions
from tests.evaluation.measured import task_on_layout
from tests.reference import metrics as loops
from tests.reference.draws import normals, repeatable, rotation, seeds


@repeatable
@given(seed=seeds)
def test_winogrounds_scores_equal_the_naive_loop(seed: int):
    image, texts = normals(20, 4, seed=seed), normals(20, 4, seed=seed + 1)
    # of image 2i: texts 2i and 2i + 1; of image 2i + 1 the other way round
    order = torch.arange(20).view(-1, 2)
    found = compositions(
        image, texts[torch.cat([order, order.flip(1)], dim=1).flatten()], paired=True
    )
    scores = normalize(texts) @ normalize(image).T
    for item in range(10):
        block = scores[2 * item : 2 * item + 2, 2 * item : 2 * item + 2].tolist()
        text, picture = loops.winoground(block)
        assert bool(found["text_score"][item]) == text
        assert bool(found["image_score"][item]) == picture
        assert bool(found["group_score"][item]) == (text and picture)


@repeatable
@given(seed=seeds)
def test_two_and_three_texts_equal_the_naive_loop(seed: int):
    image, text = normals(15, 4, seed=seed), normals(45, 4, seed=seed + 1)
    three = compositions(image, text)
    two = compositions(image, text.view(15, 3, 4)[:, [0, 2]].flatten(0, 1))
    for item in range(15):
        i = normalize(image[item], dim=0).tolist()
        own, also, wrong = normalize(text[3 * item : 3 * item + 3]).tolist()
        first, second = (
            loops.dot(i, own) > loops.dot(i, wrong),
            loops.dot(i, also) > loops.dot(i, wrong),
        )
        assert bool(two["composition_accuracy"][item]) == first
        assert bool(three["composition_accuracy"][item]) == (first and second)
        alone = loops.dot(own, also) > max(loops.dot(own, wrong), loops.dot(also, wrong))
        assert bool(three["text_only_accuracy"][item]) == alone


@repeatable
@given(seed=seeds)
def test_a_rotation_and_lengths_change_nothing(seed: int):
    image, text, turn = (
        normals(8, 4, seed=seed),
        normals(16, 4, seed=seed + 1),
        rotation(4, seed=seed),
    )
    before = compositions(image, text, paired=True)
    after = compositions(3 * image @ turn, 2 * text @ turn, paired=True)
    for name, right in before.items():
        assert torch.equal(after[name], right)


def test_what_ties_is_wrong():
    same = torch.ones(2, 3)
    found = compositions(same, torch.ones(4, 3), paired=True)
    assert not any(right.any() for right in found.values())


def test_categories_and_images_that_come_twice():
    image = torch.eye(3)[[0, 0, 1]]
    text = torch.eye(3)[[0, 1, 1, 0, 1, 0]]  # right, wrong, right
    layout = Compositions(["swap", "swap", "add"], [0, 0, 1], paired=False)
    found = task_on_layout("composition", image, text, layout, Bootstrap(50))
    numbers = {name: number.value for name, number in found.numbers.items()}
    assert numbers == pytest.approx(
        {
            "composition_accuracy": 2 / 3,
            "composition_accuracy@swap": 0.5,
            "composition_accuracy@add": 1.0,
        }
    )
    # the first image brings both of its items along: a resample has 1/2, 2/3 or 1
    drawn = found.numbers["composition_accuracy"].draws
    assert {round(value, 4) for value in drawn.tolist()} <= {0.5, 0.6667, 1.0}


def test_shapes_that_do_not_fit():
    for images, texts, paired in ((3, 7, False), (3, 6, True), (2, 6, True), (2, 8, False)):
        with pytest.raises(ValueError, match=f"Got {images} images and {texts} texts"):
            compositions(torch.ones(images, 3), torch.ones(texts, 3), paired=paired)
