"""Pairs that share a caption are each other's partners: loops, limits, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from clip_refine import losses
from clip_refine.config import LossConfig
from clip_refine.losses import Objective, PairFeatures
from tests.losses.cases import MIX, Inputs, judged, judged_rows, made_inputs
from tests.reference import losses as loops
from tests.reference.draws import repeatable, seeds, shuffled

IDS = [3, 1, 3, 0, 1, 3]
Loss = Callable[[Inputs, Any], Tensor]

CASES: dict[str, tuple[Loss, Callable[..., float]]] = {
    "hycd": (
        lambda x, ids: losses.hycd_loss(*x[:4], alpha=0.3, temperature=0.7, caption_ids=ids),
        lambda i, t, ti, tt, r: loops.hycd(i, t, ti, tt, 0.3, 1 / 0.7, IDS),
    ),
    "contrastive": (
        lambda x, ids: losses.contrastive_loss(x.image, x.text, logit_scale=7.0, caption_ids=ids),
        lambda i, t, ti, tt, r: loops.contrastive(loops.unit(i), loops.unit(t), 7, IDS),
    ),
    "sigmoid": (
        lambda x, ids: losses.sigmoid_contrastive_loss(
            x.image, x.text, logit_scale=4.0, logit_bias=-2.0, caption_ids=ids
        ),
        lambda i, t, ti, tt, r: loops.sigmoid_contrastive(loops.unit(i), loops.unit(t), 4, -2, IDS),
    ),
    "m2-mix": (
        lambda x, ids: losses.m2_mix_loss(
            x.image, x.text, logit_scale=3.0, mix=MIX, caption_ids=ids
        ),
        lambda i, t, ti, tt, r: loops.m2_mix(i, t, 3, [0.3] * len(i), IDS),
    ),
}
every_loss = pytest.mark.parametrize(("loss", "loop"), CASES.values(), ids=CASES)


@every_loss
@repeatable
@given(seed=seeds)
def test_equals_the_naive_loop(loss: Loss, loop: Callable[..., float], seed: int):
    inputs = made_inputs(6, seed=seed)
    expected = loop(*(rows.tolist() for rows in inputs))
    assert loss(inputs, torch.tensor(IDS)).item() == pytest.approx(expected, rel=1e-12)


@every_loss
@repeatable
@given(seed=seeds)
def test_the_order_of_pairs_does_not_matter(loss: Loss, loop: Any, seed: int):
    inputs, order = made_inputs(6, seed=seed), shuffled(6, seed=seed)
    reordered = Inputs(*(rows[order] for rows in inputs))
    ids = torch.tensor(IDS)
    torch.testing.assert_close(loss(reordered, ids[order]), loss(inputs, ids))


@every_loss
def test_captions_that_all_differ_change_nothing(loss: Loss, loop: Any):
    inputs = made_inputs(6, seed=0)
    torch.testing.assert_close(loss(inputs, torch.arange(6)), loss(inputs, None))


@every_loss
def test_gradcheck(loss: Loss, loop: Any):
    inputs = made_inputs(6, 4, seed=1)

    def of_student(image: Tensor, text: Tensor) -> Tensor:
        return loss(inputs._replace(image=image, text=text), torch.tensor(IDS))

    student = inputs.image.requires_grad_(), inputs.text.requires_grad_()
    assert torch.autograd.gradcheck(of_student, student)


@every_loss
def test_one_caption_for_all_stays_finite(loss: Loss, loop: Any):
    inputs = made_inputs(4, seed=2)
    inputs.image.requires_grad_()
    value = loss(inputs, torch.zeros(4, dtype=torch.int64))
    value.backward()
    assert value.isfinite()
    assert inputs.image.grad is not None
    assert inputs.image.grad.isfinite().all()


@every_loss
def test_another_number_of_captions_is_refused(loss: Loss, loop: Any):
    with pytest.raises(ValueError, match=r"one number a pair, \(4,\); got \(3,\)"):
        loss(made_inputs(4, seed=3), torch.zeros(3))


def test_worked_by_hand():
    # softmax (e, 1)/(1 + e), target (½, ½): log(1 + e) − ½
    pairs = torch.eye(2)
    loss = losses.contrastive_loss(pairs, pairs, logit_scale=1.0, caption_ids=torch.tensor([5, 5]))
    assert loss.item() == pytest.approx(0.8132617, abs=1e-6)


def test_the_objective_passes_them_on():
    inputs, ids = made_inputs(6, seed=4), torch.tensor(IDS)
    weights = {"rafa_weight": 0.0, "contrastive_weight": 1.0, "m2_mix_weight": 1.0}
    terms = Objective(LossConfig(**weights))(
        PairFeatures(inputs.image, inputs.text),
        PairFeatures(inputs.teacher_image, inputs.teacher_text),
        None,
        logit_scale=torch.tensor(7.0),
        mix=MIX,
        caption_ids=ids,
    )
    assert terms.hycd == losses.hycd_loss(*inputs[:4], caption_ids=ids)
    own = {"logit_scale": torch.tensor(7.0), "caption_ids": ids}
    assert terms.contrastive == losses.contrastive_loss(*inputs[:2], **own)
    assert terms.m2_mix == losses.m2_mix_loss(*inputs[:2], mix=MIX, **own)


def masked(x: Inputs, ids: Any) -> Tensor:
    return losses.contrastive_loss(
        x.image, x.text, logit_scale=7.0, caption_ids=ids, teacher_unit=judged(x)
    )


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        (CASES["hycd"][0], True),
        (CASES["contrastive"][0], True),
        (CASES["sigmoid"][0], False),
        (CASES["m2-mix"][0], False),
        (masked, False),
    ],
)
def test_with_a_softmax_equal_captions_have_the_same_gradient_anyway(loss: Loss, same: bool):
    inputs = made_inputs(6, seed=5)
    first = torch.tensor([IDS.index(number) for number in IDS])
    own = inputs.image.requires_grad_(), inputs.text.requires_grad_()
    slopes = []
    for ids in (torch.tensor(IDS), None):
        shared = inputs._replace(text=own[1][first], teacher_text=inputs.teacher_text[first])
        slopes.append(torch.autograd.grad(loss(shared, ids), own))
    both = zip(*slopes, strict=True)
    assert all(torch.allclose(*sides, atol=1e-12) for sides in both) == same


def test_a_teacher_masks_no_partner():
    """Of those that share a caption the teacher holds one image nearer to it than another."""
    inputs, ids = made_inputs(6, seed=6), torch.tensor(IDS)
    sides = (loops.unit(side.tolist()) for side in inputs[:2])
    similarity = judged_rows(*(side.tolist() for side in inputs[2:4]))
    expected = loops.contrastive(*sides, 7, IDS, similarity)
    loss = masked(inputs, ids)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
