import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clip_refine.losses import contrastive_loss, geodesic_mix, m2_mix_loss
from tests.losses.cases import made_inputs
from tests.reference import losses as loops
from tests.reference.draws import gradient, normals, repeatable, seeds, shuffled

shares = st.floats(0, 1)


def share(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def unit_pairs(*, seed: int, count: int = 4, dim: int = 5) -> tuple[Tensor, Tensor]:
    image, text = normalize(normals(2, count, dim, seed=seed), dim=2)
    return image, text


def test_geodesic_by_hand():
    # a third of the way from text (0, 1) to image (1, 0): 30 degrees
    axes = torch.eye(2, dtype=torch.float64)
    mixed = geodesic_mix(axes[:1], axes[1:], share(1 / 3))
    assert mixed.tolist()[0] == pytest.approx([0.5, math.sqrt(3) / 2])


@repeatable
@given(seed=seeds, value=shares)
def test_geodesic_equals_the_loop(seed: int, value: float):
    image, text = unit_pairs(seed=seed)
    mixed = geodesic_mix(image, text, share(value)).tolist()
    for row, (i, t) in zip(mixed, zip(image.tolist(), text.tolist(), strict=True), strict=True):
        assert row == pytest.approx(loops.geodesic_mix(i, t, value), abs=1e-12)


@repeatable
@given(seed=seeds, value=shares)
def test_geodesic_stays_on_the_sphere_and_divides_the_angle(seed: int, value: float):
    image, text = unit_pairs(seed=seed)
    mixed = geodesic_mix(image, text, share(value))
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(4, dtype=torch.float64))
    angle = (image * text).sum(dim=1).acos()
    torch.testing.assert_close((mixed * text).sum(dim=1), (value * angle).cos())
    torch.testing.assert_close((mixed * image).sum(dim=1), ((1 - value) * angle).cos())


@repeatable
@given(seed=seeds)
def test_geodesic_ends_at_image_and_text(seed: int):
    image, text = unit_pairs(seed=seed)
    torch.testing.assert_close(geodesic_mix(image, text, share(1)), image, atol=1e-15, rtol=0)
    torch.testing.assert_close(geodesic_mix(image, text, share(0)), text, atol=1e-15, rtol=0)


@repeatable
@given(seed=seeds, value=shares)
def test_geodesic_read_backwards(seed: int, value: float):
    image, text = unit_pairs(seed=seed)
    forth, back = (
        geodesic_mix(image, text, share(value)),
        geodesic_mix(text, image, share(1 - value)),
    )
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-4, 0.9e-3, 1.1e-3, math.pi - 1e-5])
def test_geodesic_is_safe_near_parallel_and_opposite(angle: float, dtype: torch.dtype):
    image = torch.tensor([[1.0, 0.0]], dtype=dtype, requires_grad=True)
    text = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=dtype)
    mixed = geodesic_mix(image, text, share(0.3))
    mixed.sum().backward()
    assert mixed.norm().item() == pytest.approx(1, abs=1e-6)
    assert image.grad is not None
    assert image.grad.isfinite().all()
    if angle < 1:
        expected = [math.cos(0.7 * angle), math.sin(0.7 * angle)]
        assert mixed.tolist()[0] == pytest.approx(
            expected, abs=1e-6 if dtype == torch.float32 else 1e-9
        )


def test_both_branches_of_the_geodesic_pass_gradcheck():
    image, text = unit_pairs(seed=1, count=2)
    # row 0 takes the straight line, row 1 the arc
    text = torch.stack([normalize(image[0] + 1e-5 * text[0], dim=0), text[1]])
    inputs = (image.requires_grad_(), text.requires_grad_())
    assert torch.autograd.gradcheck(lambda i, t: geodesic_mix(i, t, share(0.3)), inputs)


def test_by_hand():
    # image and text of each pair on opposite sides: x_0 = e0, y_0 = e1, x_1 = e1, y_1 = e0, so both
    # mixtures are the diagonal d; positives 0, negatives cos 45° = r: log(1 + e^r)
    image = torch.eye(2, dtype=torch.float64)
    loss = m2_mix_loss(image, image.flip(0), logit_scale=1.0, mix=share(0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(math.sqrt(0.5))), rel=1e-14)


@repeatable
@given(seed=seeds)
def test_shares_may_differ_by_pair(seed: int):
    image, text, *_ = made_inputs(4, 5, seed=seed)
    mix = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    expected = loops.m2_mix(image.tolist(), text.tolist(), 5, mix.tolist())
    loss = m2_mix_loss(image, text, logit_scale=5.0, mix=mix)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    order = shuffled(4, seed=seed)
    reordered = m2_mix_loss(image[order], text[order], logit_scale=5.0, mix=mix[order])
    torch.testing.assert_close(reordered, loss)


@repeatable
@given(seed=seeds, value=shares)
def test_exchanging_modalities_and_shares_changes_nothing(seed: int, value: float):
    image, text, *_ = made_inputs(seed=seed)
    forth = m2_mix_loss(image, text, logit_scale=5.0, mix=share(value))
    back = m2_mix_loss(text, image, logit_scale=5.0, mix=share(1 - value))
    torch.testing.assert_close(forth, back)


@repeatable
@given(seed=seeds, value=shares)
def test_coinciding_modalities_give_the_contrastive_loss(seed: int, value: float):
    image, *_ = made_inputs(seed=seed)
    mixed = m2_mix_loss(image, image, logit_scale=5.0, mix=share(value))
    torch.testing.assert_close(mixed, contrastive_loss(image, image, logit_scale=5.0))


def test_with_a_gap_mixtures_are_harder_than_the_originals():
    image, text, *_ = made_inputs(8, 16, seed=2)
    gap = torch.zeros(16, dtype=torch.float64)
    gap[0] = 4.0
    image, text = image + gap, text - gap
    plain = contrastive_loss(image, text, logit_scale=5.0)
    assert m2_mix_loss(image, text, logit_scale=5.0, mix=share(0.5)) > plain


def test_gradient_flows_through_the_mixtures():
    # the text of pair 1 reaches the image direction of pair 0 only as part of a mixture
    image, text, *_ = made_inputs(2, 5, seed=3)
    slopes = [
        gradient(lambda x, v=v: m2_mix_loss(image, x, logit_scale=5.0, mix=share(v)), at=text)
        for v in (0.2, 0.8)
    ]
    assert (slopes[0] - slopes[1]).abs().max() > 1e-3


def test_shares_of_another_shape_are_refused():
    image, text, *_ = made_inputs(4, 5, seed=4)
    with pytest.raises(ValueError, match=r"mix must be one number or one a pair.*\(4,\).*\(3,\)"):
        m2_mix_loss(image, text, logit_scale=1.0, mix=torch.zeros(3))
