import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clip_refine.losses import contrastive_loss, hybrid_targets, hycd_loss
from tests.losses.cases import made_inputs
from tests.reference.draws import gradient, normals, repeatable, seeds

alphas = st.floats(0, 1)


def test_by_hand():
    # student logits 0, teacher logits (ln 3, 0; 0, ln 3): q = (¾, ¼), q̂ = (⅞, ⅛), p = (½, ½)
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = math.log(3) * torch.eye(2, dtype=torch.float64)
    loss = hycd_loss(student, student, teacher, torch.eye(2, dtype=torch.float64), alpha=0.5)
    by_hand = 7 / 8 * math.log(7 / 4) + 1 / 8 * math.log(1 / 4)
    assert loss.item() == pytest.approx(by_hand, rel=1e-14)


@repeatable
@given(seed=seeds, alpha=alphas)
def test_targets_are_probabilities(seed: int, alpha: float):
    targets = hybrid_targets(normals(4, 4, seed=seed), alpha=alpha)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert (targets >= 0).all()
    assert (targets.diagonal() >= alpha).all()


def loss_of_logits(logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """HyCD as a function of the similarities: eye @ logits.T.T gives them back."""
    eye = torch.eye(len(logits), dtype=logits.dtype)
    return hycd_loss(eye, logits.T, eye, teacher_logits.T, alpha=alpha)


@repeatable
@given(seed=seeds, alpha=alphas)
def test_gradient_in_the_logits_is_p_minus_targets(seed: int, alpha: float):
    logits, teacher_logits = normals(2, 4, 4, seed=seed)
    slope = gradient(lambda x: loss_of_logits(x, teacher_logits, alpha), at=logits)
    image_to_text = logits.softmax(dim=1) - hybrid_targets(teacher_logits, alpha=alpha)
    text_to_image = logits.T.softmax(dim=1) - hybrid_targets(teacher_logits.T, alpha=alpha)
    torch.testing.assert_close(slope, (image_to_text + text_to_image.T) / (2 * 4))


@repeatable
@given(seed=seeds, alpha=alphas)
def test_gradient_is_the_mixture_of_one_hot_and_teacher_cross_entropy(seed: int, alpha: float):
    logits, teacher_logits = normals(2, 4, 4, seed=seed)

    def cross_entropy(x: Tensor) -> Tensor:
        own = torch.arange(4)
        ce = torch.nn.functional.cross_entropy
        one_hot = ce(x, own) + ce(x.T, own)
        distilled = ce(x, teacher_logits.softmax(1)) + ce(x.T, teacher_logits.T.softmax(1))
        return (alpha * one_hot + (1 - alpha) * distilled) / 2

    slope = gradient(lambda x: loss_of_logits(x, teacher_logits, alpha), at=logits)
    torch.testing.assert_close(slope, gradient(cross_entropy, at=logits))


@repeatable
@given(seed=seeds)
def test_alpha_one_is_the_contrastive_loss(seed: int):
    image, text, teacher_image, teacher_text, _ = made_inputs(seed=seed)
    hybrid = hycd_loss(image, text, teacher_image, teacher_text, alpha=1.0)
    plain = contrastive_loss(image, text, logit_scale=1.0, normalize=False)
    torch.testing.assert_close(hybrid, plain)


@repeatable
@given(seed=seeds)
def test_alpha_one_on_unit_features_is_clips_loss_at_the_inverse_temperature(seed: int):
    image, text, teacher_image, teacher_text, _ = made_inputs(seed=seed)
    hybrid = hycd_loss(
        image, text, teacher_image, teacher_text, alpha=1.0, temperature=0.01, normalize=True
    )
    torch.testing.assert_close(hybrid, contrastive_loss(image, text, logit_scale=100.0))


@repeatable
@given(seed=seeds)
def test_alpha_zero_distils_and_costs_nothing_where_student_is_teacher(seed: int):
    image, text, *_ = made_inputs(seed=seed)
    loss = hycd_loss(image, text, image, text, alpha=0.0)
    slope = gradient(lambda x: hycd_loss(x, text, image, text, alpha=0.0), at=image)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


@repeatable
@given(seed=seeds, alpha=alphas)
def test_it_is_never_negative(seed: int, alpha: float):
    assert hycd_loss(*made_inputs(seed=seed)[:4], alpha=alpha) >= -1e-14


@repeatable
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_temperature_undoes_the_scale_of_raw_features(seed: int, factor: float):
    image, text, teacher_image, teacher_text, _ = made_inputs(seed=seed)
    scaled = hycd_loss(
        factor * image, text, factor * teacher_image, teacher_text, temperature=factor
    )
    torch.testing.assert_close(scaled, hycd_loss(image, text, teacher_image, teacher_text))


@repeatable
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_unit_features_forget_the_scale_of_a_tower(seed: int, factor: float):
    image, text, teacher_image, teacher_text, _ = made_inputs(seed=seed)
    options = {"temperature": 0.05, "normalize": True}
    scaled = hycd_loss(factor * image, text, teacher_image / factor, teacher_text, **options)
    plain = hycd_loss(image, text, teacher_image, teacher_text, **options)
    torch.testing.assert_close(scaled, plain)


def test_a_constant_added_to_all_similarities_does_not_matter():
    logits, teacher_logits = normals(2, 4, 4, seed=0)
    shifted = loss_of_logits(logits + 3.0, teacher_logits - 2.0, 0.5)
    torch.testing.assert_close(shifted, loss_of_logits(logits, teacher_logits, 0.5))


def test_temperature_may_be_a_tensor_and_learned_through_the_student_only():
    inputs = made_inputs(seed=1)[:4]
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = hycd_loss(*inputs, temperature=temperature)
    assert loss.item() == hycd_loss(*inputs, temperature=0.7).item()

    def with_teacher_at_07(student_temperature: Tensor) -> Tensor:
        image, text, teacher_image, teacher_text = inputs
        return hycd_loss(image / student_temperature, text, teacher_image / 0.7, teacher_text)

    (slope,) = torch.autograd.grad(loss, temperature)
    torch.testing.assert_close(slope, gradient(with_teacher_at_07, at=temperature))


def test_the_teacher_may_have_another_dimension():
    image, text, *_ = made_inputs(4, 5, seed=2)
    wide = made_inputs(4, 9, seed=3)
    assert hycd_loss(image, text, wide.image, wide.text).isfinite()


def test_a_certain_teacher_gives_no_nan():
    # probabilities of e^−2000 underflow to 0, whose logarithm is not finite
    certain = 2000 * torch.eye(3)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
    slope = gradient(lambda x: loss_of_logits(x, certain, 0.0), at=logits)
    assert loss_of_logits(logits, certain, 0.0).isfinite()
    assert slope.isfinite().all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_its_range_is_refused(alpha: float):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        hycd_loss(*made_inputs(seed=5)[:4], alpha=alpha)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature must be positive"):
        hycd_loss(*made_inputs(seed=5)[:4], temperature=temperature)


def test_a_temperature_of_many_numbers_is_refused():
    with pytest.raises(ValueError, match=r"temperature must be one number, got shape \(2,\)"):
        hycd_loss(*made_inputs(seed=5)[:4], temperature=torch.ones(2))
