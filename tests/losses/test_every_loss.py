"""What holds for every loss alike: loops, order, precision, gradients, shapes."""

import pytest
import torch
from hypothesis import given

from tests.losses.cases import CASES, Case, Inputs, made_inputs
from tests.reference.draws import repeatable, rotation, seeds, shuffled

every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_loss
@repeatable
@given(seed=seeds)
def test_equals_the_naive_loop(case: Case, seed: int):
    inputs = made_inputs(seed=seed)
    expected = case.loop(*(rows.tolist() for rows in inputs))
    assert case.loss(inputs).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@every_loss
@repeatable
@given(seed=seeds)
def test_the_order_of_pairs_does_not_matter(case: Case, seed: int):
    inputs = made_inputs(6, seed=seed)
    order = shuffled(6, seed=seed)
    reordered = Inputs(*(rows[order] for rows in inputs))
    torch.testing.assert_close(case.loss(reordered), case.loss(inputs), rtol=1e-12, atol=1e-12)


@every_loss
@repeatable
@given(seed=seeds)
def test_a_common_rotation_does_not_matter(case: Case, seed: int):
    inputs = made_inputs(seed=seed)
    turn = rotation(5, seed=seed)
    turned = Inputs(*(rows @ turn for rows in inputs))
    torch.testing.assert_close(case.loss(turned), case.loss(inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_pair_symmetric], ids=lambda case: case.name
)
@repeatable
@given(seed=seeds)
def test_exchanging_the_modalities_does_not_matter(case: Case, seed: int):
    image, text, teacher_image, teacher_text, references = inputs = made_inputs(seed=seed)
    exchanged = Inputs(text, image, teacher_text, teacher_image, references)
    torch.testing.assert_close(case.loss(exchanged), case.loss(inputs), rtol=1e-12, atol=1e-12)


@every_loss
def test_gradcheck(case: Case):
    inputs = made_inputs(3, 4, seed=1)
    image, text = inputs.image.requires_grad_(), inputs.text.requires_grad_()

    def of_student(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return case.loss(inputs._replace(image=image, text=text))

    assert torch.autograd.gradcheck(of_student, (image, text))


@every_loss
def test_no_gradient_flows_into_teacher_or_references(case: Case):
    inputs = Inputs(*(rows.requires_grad_() for rows in made_inputs(seed=2)))
    case.loss(inputs).backward()
    assert inputs.image.grad is not None
    assert inputs.text.grad is not None
    assert all(rows.grad is None for rows in inputs[2:])


@every_loss
def test_autocast_does_not_reach_the_arithmetic(case: Case):
    # m²-mix takes its share in float64 in the table, which would widen everything
    torch_inputs = made_inputs(seed=3, dtype=torch.float32)
    outside = case.loss(torch_inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.loss(torch_inputs)
        still_on = (torch_inputs.image @ torch_inputs.text.T).dtype
    assert inside.dtype == outside.dtype
    assert inside.item() == outside.item()
    assert still_on == torch.bfloat16


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_widened(case: Case, dtype: torch.dtype):
    half = made_inputs(seed=4, dtype=dtype)
    widened = Inputs(*(rows.float() for rows in half))
    assert case.loss(half).dtype in (torch.float32, torch.float64)
    assert case.loss(half).item() == case.loss(widened).item()


@every_loss
def test_gradients_come_back_in_the_features_own_dtype(case: Case):
    inputs = made_inputs(seed=5, dtype=torch.bfloat16)
    image = inputs.image.requires_grad_()
    case.loss(inputs).backward()
    assert image.grad is not None
    assert image.grad.dtype == torch.bfloat16


@every_loss
def test_float32_is_near_float64(case: Case):
    exact = made_inputs(seed=6)
    rounded = Inputs(*(rows.float() for rows in exact))
    assert case.loss(rounded).item() == pytest.approx(case.loss(exact).item(), rel=1e-5, abs=1e-5)
    assert case.loss(exact).dtype == torch.float64


@every_loss
def test_one_pair_gives_a_finite_loss_and_gradient(case: Case):
    inputs = made_inputs(1, seed=7)
    image = inputs.image.requires_grad_()
    loss = case.loss(inputs)
    loss.backward()
    assert loss.isfinite()
    assert image.grad is not None
    assert image.grad.isfinite().all()


@every_loss
def test_large_similarities_stay_finite(case: Case):
    inputs = Inputs(*(100 * rows for rows in made_inputs(seed=8, dtype=torch.float32)))
    image = inputs.image.requires_grad_()
    loss = case.loss(inputs)
    loss.backward()
    assert loss.isfinite()
    assert image.grad is not None
    assert image.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize(
    ("image_shape", "text_shape"),
    [((4, 5), (3, 5)), ((4, 5), (4, 6)), ((5,), (5,)), ((0, 5), (0, 5)), ((2, 4, 5), (2, 4, 5))],
)
def test_shapes_that_are_no_pairs_are_refused(case: Case, image_shape, text_shape):
    inputs = made_inputs(seed=9)
    wrong = inputs._replace(image=torch.zeros(image_shape), text=torch.zeros(text_shape))
    with pytest.raises(ValueError, match="image and text features must both be") as caught:
        case.loss(wrong)
    assert str(image_shape) in str(caught.value)
    assert str(text_shape) in str(caught.value)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.uses_teacher], ids=lambda case: case.name
)
def test_a_teacher_of_another_batch_is_refused(case: Case):
    inputs = made_inputs(4, seed=10)
    other = made_inputs(3, seed=10)
    wrong = inputs._replace(teacher_image=other.image, teacher_text=other.text)
    with pytest.raises(ValueError, match="teacher"):
        case.loss(wrong)
