"""What changed since the first model: churn, and classes that lost more than chance explains."""

import pytest
import torch
from hypothesis import given
from scipy.stats import binomtest

from clip_refine.evaluation.bootstrap import Bootstrap
from clip_refine.evaluation.scores import Answers, against, churn, class_losses
from clip_refine.models.embed import EmbeddedPairs
from tests.evaluation.measured import task_on_classes, task_on_pairs
from tests.reference.draws import normals, repeatable, seeds, shuffled


@repeatable
@given(seed=seeds)
def test_churn_is_the_share_that_changed_and_knows_no_direction(seed: int):
    generator = torch.Generator().manual_seed(seed)
    was, now = torch.randint(3, (2, 20), generator=generator)
    owners = torch.arange(10).repeat_interleave(2)
    sides = {"text_to_image": Answers(was, owners)}, {"text_to_image": Answers(now, owners)}
    found = churn(*sides, Bootstrap(5))["text_to_image_churn"]
    changed = sum(a != b for a, b in zip(was.tolist(), now.tolist(), strict=True))
    assert found.value == pytest.approx(changed / 20)
    assert churn(*sides[::-1], Bootstrap(5))["text_to_image_churn"].value == found.value
    assert churn(sides[0], sides[0], Bootstrap(5))["text_to_image_churn"].draws.tolist() == [0] * 5


@repeatable
@given(seed=seeds)
def test_class_losses_equal_the_naive_loop_and_mirror_each_other(seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 3
    was, now = torch.rand(2, 60, generator=generator) < torch.tensor([[0.8], [0.4]])
    for loss in class_losses(was, now, labels):
        own = [i for i in range(60) if labels[i] == loss.label]
        lost = sum(bool(was[i]) and not now[i] for i in own)
        won = sum(bool(now[i]) and not was[i] for i in own)
        assert loss.images == 20
        assert loss.after - loss.before == pytest.approx((won - lost) / 20)
        assert loss.low - 1e-12 <= loss.after - loss.before <= loss.high + 1e-12
        # zero is left out exactly where McNemar's exact test says so at 5 % / 3 classes
        p = binomtest(won, won + lost).pvalue if won + lost else 1.0
        if abs(p - 0.05 / 3) > 1e-9:
            assert (loss.high < 0 or loss.low > 0) == (p < 0.05 / 3)
    mirrored = class_losses(now, was, labels)
    assert [loss.low for loss in mirrored] == pytest.approx(
        [-loss.high for loss in class_losses(was, now, labels)]
    )
    order = shuffled(60, seed=seed)
    assert class_losses(was[order], now[order], labels[order]) == class_losses(was, now, labels)


def test_all_classes_at_once_hold_as_often_as_they_say():
    # both models are right half of the time whatever the class: any loss beyond chance is false
    false = 0
    for seed in range(200):
        was, now = torch.rand(2, 400, generator=torch.Generator().manual_seed(seed)) < 0.5
        false += any(
            loss.high < 0 or loss.low > 0 for loss in class_losses(was, now, torch.arange(400) % 20)
        )
    assert false <= 0.05 * 200


def test_a_task_tells_which_classes_were_lost():
    classes = torch.eye(4)
    labels = torch.arange(80) % 4
    image = classes[labels] + 0.01 * normals(80, 4, seed=0)
    swapped = torch.where(labels[:, None] == 2, classes[3], image)
    of_classes = {"prompts": classes, "class_names": ["ant", "bee", "cat", "dog"]}
    first, second = (
        task_on_classes("zero-shot", side, labels, Bootstrap(5), **of_classes)
        for side in (image, swapped)
    )
    found = against(first, second, Bootstrap(5))
    assert found.numbers["churn"].value == 0.25
    assert found.numbers["classes_lost"].value == 1
    lost = [row for row in found.details["class_losses"] if row["high"] < 0]
    assert [row["class"] for row in lost] == ["cat"]
    assert (lost[0]["before"], lost[0]["after"], lost[0]["images"]) == (1.0, 0.0, 20)
    assert found.details["per_class"] == second.details["per_class"]


def test_retrieval_has_a_churn_of_either_direction():
    image = normals(12, 4, seed=0)
    pairs = EmbeddedPairs(image, image.clone(), torch.arange(12))
    moved = EmbeddedPairs(image, image.roll(1, 0), torch.arange(12))
    first, second = (
        task_on_pairs("retrieval", side, Bootstrap(5), protocol="all-captions")
        for side in (pairs, moved)
    )
    numbers = against(first, second, Bootstrap(5)).numbers
    assert numbers["image_to_text_churn"].value == numbers["text_to_image_churn"].value == 1.0
    assert "classes_lost" not in numbers
