import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_refine.losses import alignment_loss, feature_distillation_loss, logit_distillation_loss
from tests.losses.cases import made_inputs
from tests.reference.draws import gradient, normals, repeatable, rotation, seeds

ROW = torch.tensor([[1.0, 2.0]], dtype=torch.float64)


def test_features_by_hand():
    # moved by (1, 2) and by (0, 3): 5/2 + 9/2
    text = torch.tensor([[4.0, 4.0]], dtype=torch.float64)
    teacher_text = torch.tensor([[4.0, 1.0]], dtype=torch.float64)
    assert feature_distillation_loss(ROW, text, 0 * ROW, teacher_text).item() == 7.0


def test_shifted_features_by_hand():
    # targets (1, 0) and (4, 1) - (1, 0): the image is (0, 2) away, the text (1, 3)
    text, teacher_text = torch.tensor([[4.0, 4.0]]), torch.tensor([[4.0, 1.0]])
    shift = torch.tensor([1.0, 0.0])
    loss = feature_distillation_loss(ROW.float(), text, 0 * text, teacher_text, shift=shift)
    assert loss.item() == 4 / 2 + 10 / 2


@repeatable
@given(seed=seeds)
def test_shifting_the_targets_is_shifting_the_teacher(seed: int):
    image, text, teacher_image, teacher_text, _ = made_inputs(seed=seed)
    shift = normals(5, seed=seed + 1)
    torch.testing.assert_close(
        feature_distillation_loss(image, text, teacher_image, teacher_text, shift=shift),
        feature_distillation_loss(image, text, teacher_image + shift, teacher_text - shift),
    )


def test_half_the_gap_lets_the_centroids_meet():
    image, text, *_ = made_inputs(seed=3)
    shift = (text.mean(0) - image.mean(0)) / 2
    moved = (image + shift, text - shift)
    torch.testing.assert_close(moved[0].mean(0), moved[1].mean(0))
    assert feature_distillation_loss(*moved, image, text, shift=shift).item() < 1e-24


def test_a_shift_of_another_shape_is_refused():
    image, text, *_ = made_inputs(seed=1)
    with pytest.raises(ValueError, match=r"shift is \(4,\), expected \(5,\)"):
        feature_distillation_loss(image, text, image, text, shift=torch.zeros(4))


def test_logits_by_hand():
    eye, ones = torch.eye(2), torch.ones(2, 2)
    # student similarities all 1 in the first column and 1 elsewhere; the teacher's are the eye's
    assert logit_distillation_loss(eye, ones, eye, eye).item() == 0.5
    assert logit_distillation_loss(eye, ones, eye, eye, temperature=0.5).item() == 2.0


@repeatable
@given(seed=seeds)
def test_nothing_moved_costs_nothing(seed: int):
    image, text, *_ = made_inputs(seed=seed)
    assert feature_distillation_loss(image, text, image, text).item() == 0
    assert logit_distillation_loss(image, text, image, text).item() == 0


@repeatable
@given(seed=seeds)
def test_features_may_shift_together_with_the_teachers(seed: int):
    inputs = made_inputs(seed=seed)[:4]
    shift = normals(5, seed=seed + 1)
    shifted = feature_distillation_loss(*(rows + shift for rows in inputs))
    torch.testing.assert_close(shifted, feature_distillation_loss(*inputs))


@repeatable
@given(seed=seeds)
def test_logits_do_not_see_a_rotation_of_the_student_but_features_do(seed: int):
    image, text, *_ = made_inputs(seed=seed)
    turn = rotation(5, seed=seed)
    turned = (image @ turn, text @ turn)
    assert logit_distillation_loss(*turned, image, text).item() == pytest.approx(0, abs=1e-24)
    assert feature_distillation_loss(*turned, image, text).item() > 1e-6


def test_feature_gradient():
    image, text, teacher_image, teacher_text, _ = made_inputs(seed=1)
    slope = gradient(
        lambda x: feature_distillation_loss(x, text, teacher_image, teacher_text), at=image
    )
    torch.testing.assert_close(slope, 2 * (image - teacher_image) / image.numel())


def test_feature_distillation_needs_the_teachers_dimension():
    image, text, *_ = made_inputs(4, 5, seed=2)
    wide = made_inputs(4, 6, seed=2)
    with pytest.raises(ValueError, match=r"teacher image features .* \(4, 5\), got \(4, 6\)"):
        feature_distillation_loss(image, text, wide.image, wide.text)


def test_alignment_by_hand():
    apart = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    together = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert alignment_loss(apart, together).item() == 12.5
    # on the sphere: cosines 0.6 and −1, so 0.8 and 4 squared
    other = torch.tensor([[2.0, 0.0], [0.0, -5.0]])
    assert alignment_loss(apart, other, normalize=True).item() == pytest.approx(2.4)


@repeatable
@given(seed=seeds, factor=st.floats(0.01, 100))
def test_alignment_shift_and_scale(seed: int, factor: float):
    image, text, *_ = made_inputs(seed=seed)
    shift = normals(5, seed=seed + 1)
    torch.testing.assert_close(
        alignment_loss(image + shift, text + shift), alignment_loss(image, text)
    )
    torch.testing.assert_close(
        alignment_loss(factor * image, text, normalize=True),
        alignment_loss(image, text, normalize=True),
    )
