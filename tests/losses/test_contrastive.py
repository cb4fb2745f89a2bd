import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_refine.losses import contrastive_loss, sigmoid_contrastive_loss
from tests.losses.cases import made_inputs
from tests.reference.draws import gradient, normals, repeatable, seeds

EYE = torch.eye(2, dtype=torch.float64)


def test_by_hand():
    # rows (s, 0) and (0, s) with s = ln 3: probability ¾ of the own partner
    loss = contrastive_loss(EYE, EYE, logit_scale=math.log(3))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-14)


def test_indistinguishable_pairs_cost_the_logarithm_of_the_batch():
    same = torch.ones(7, 3, dtype=torch.float64)
    assert contrastive_loss(same, same, logit_scale=50.0).item() == pytest.approx(math.log(7))


@repeatable
@given(seed=seeds, factor=st.floats(0.01, 100))
def test_unit_features_forget_the_length_of_each_row(seed: int, factor: float):
    image, text, *_ = made_inputs(seed=seed)
    lengths = torch.linspace(1, factor, 4, dtype=torch.float64)[:, None]
    scaled = contrastive_loss(lengths * image, text, logit_scale=10.0)
    torch.testing.assert_close(scaled, contrastive_loss(image, text, logit_scale=10.0))


def test_gradient_in_the_logits_is_p_minus_one_hot():
    logits = normals(4, 4, seed=0)
    eye = torch.eye(4, dtype=torch.float64)
    slope = gradient(
        lambda x: contrastive_loss(eye, x.T, logit_scale=1.0, normalize=False), at=logits
    )
    both = logits.softmax(dim=1) + logits.softmax(dim=0) - 2 * eye
    torch.testing.assert_close(slope, both / (2 * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_may_be_learned(dtype: torch.dtype):
    image, text, *_ = made_inputs(seed=1)
    scale = torch.tensor(5.0, dtype=dtype, requires_grad=True)
    contrastive_loss(image, text, logit_scale=scale).backward()
    step = 1e-5
    higher = contrastive_loss(image, text, logit_scale=5 + step).item()
    lower = contrastive_loss(image, text, logit_scale=5 - step).item()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx((higher - lower) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale: float):
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        contrastive_loss(EYE, EYE, logit_scale=scale)
    with pytest.raises(ValueError, match="logit_scale must be positive"):
        sigmoid_contrastive_loss(EYE, EYE, logit_scale=scale, logit_bias=0.0)


def test_sigmoid_by_hand():
    # own logits ln 3 − 0, strangers' 0: −2 log ¾ − 2 log ½, over two pairs
    loss = sigmoid_contrastive_loss(EYE, EYE, logit_scale=math.log(3), logit_bias=0.0)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(2), rel=1e-14)


def test_the_sigmoid_loss_learns_scale_and_bias():
    image, text, *_ = made_inputs(seed=2)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, b: sigmoid_contrastive_loss(image, text, logit_scale=s, logit_bias=b),
        (scale, bias),
    )


def test_a_sigmoid_pair_depends_on_no_other_pair():
    # strangers at bias −1000 cost nothing, so each pair's own cost stands alone
    image, text, *_ = made_inputs(seed=3)
    whole = sigmoid_contrastive_loss(image, text, logit_scale=1.0, logit_bias=-1000.0)
    alone = [
        sigmoid_contrastive_loss(image[[i]], text[[i]], logit_scale=1.0, logit_bias=-1000.0)
        for i in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(alone).mean())


def test_masks_by_hand():
    # all students' cosines are 1; the teacher holds text 1 nearer to image 0 than its own
    same = torch.ones(3, 2, dtype=torch.float64)
    similarity = torch.tensor([[0.3, 0.4, 0.2], [0.1, 0.5, 0.2], [0.1, 0.2, 0.6]])
    teacher = similarity, torch.eye(3)
    loss = contrastive_loss(same, same, logit_scale=9.0, teacher_unit=teacher)
    assert loss.item() == pytest.approx((math.log(2) + 5 * math.log(3)) / 6)


def test_wrong_texts_by_hand():
    # image 0 at cosines 1, 0 of texts and 1, 1 of wrong ones, scale ln 2: 2 of 2 + 1 + 2 + 2
    wrong = torch.stack([EYE[0], 5 * EYE[0]])
    loss = contrastive_loss(EYE, EYE, logit_scale=math.log(2), wrong_text_features=wrong)
    to_texts = math.log(7 / 2) + math.log(5 / 2)  # image 1: 2 of 2 + 1 + 1 + 1
    assert loss.item() == pytest.approx((to_texts + 2 * math.log(3 / 2)) / 4, rel=1e-12)


def test_wrong_texts_get_a_gradient_and_none_of_them_change_nothing():
    image, text, _, _, wrong = made_inputs(seed=3)
    plain = contrastive_loss(image, text, logit_scale=7.0)
    none = contrastive_loss(image, text, logit_scale=7.0, wrong_text_features=wrong[:0])
    assert none.item() == plain.item()
    contrastive_loss(
        image, text, logit_scale=7.0, wrong_text_features=wrong.requires_grad_()
    ).backward()
    assert wrong.grad is not None
    assert wrong.grad.abs().min() > 0


def test_a_teacher_that_puts_every_pair_first_masks_nothing():
    image, text, *_ = made_inputs(seed=4)
    sure = torch.eye(4)
    settings = {"logit_scale": 7.0, "teacher_unit": (sure, sure)}
    assert contrastive_loss(image, text, **settings) == contrastive_loss(image, text, logit_scale=7)
    sigmoid = sigmoid_contrastive_loss(image, text, logit_bias=-2.0, **settings)
    assert sigmoid == sigmoid_contrastive_loss(image, text, logit_scale=7, logit_bias=-2)
