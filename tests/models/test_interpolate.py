"""Points on the line between two models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clip_refine.models.weights import interpolate_weights
from clip_refine.support.errors import ModelError

BASE = {"w": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3)}
REFINED = {"w": torch.tensor([3.0, 2.0]), "steps": torch.tensor(7)}
NAN = {**BASE, "w": torch.tensor([1.0, torch.nan])}


def test_the_ends_are_exact():
    assert torch.equal(interpolate_weights(BASE, REFINED, 0)["w"], BASE["w"])
    assert torch.equal(interpolate_weights(BASE, REFINED, 1)["w"], REFINED["w"])


@given(st.floats(0, 1))
def test_every_weight_moves_along_the_line(weight: float):
    mixed = interpolate_weights(BASE, REFINED, weight)
    for index in range(2):
        before, after = BASE["w"][index].item(), REFINED["w"][index].item()
        expected = (1 - weight) * before + weight * after
        assert mixed["w"][index].item() == pytest.approx(expected, abs=1e-6)
    assert mixed["steps"] == 7
    back = interpolate_weights(REFINED, BASE, 1 - weight)
    assert torch.allclose(back["w"], mixed["w"], atol=1e-6)


def test_half_precision_is_mixed_in_float32():
    base = {"w": torch.tensor([2048.0], dtype=torch.float16)}
    refined = {"w": torch.tensor([2050.0], dtype=torch.float16)}
    assert interpolate_weights(base, refined, 0.5)["w"].dtype == torch.float16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="1 weights differ in name or shape, the first is w"):
        interpolate_weights({**BASE, "w": torch.ones(3)}, REFINED, 0.5)
    with pytest.raises(ModelError, match="the first is extra"):
        interpolate_weights({**BASE, "extra": torch.ones(1)}, REFINED, 0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        interpolate_weights(BASE, REFINED, 1.5)


def test_weights_that_are_not_finite_are_refused():
    for sides in ((BASE, NAN), (NAN, REFINED)):
        with pytest.raises(ModelError, match="w: weights that are not finite"):
            interpolate_weights(*sides, 0.5)
