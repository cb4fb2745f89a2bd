"""Alignment, evenness of the pairs' middles, likeness of covariances: what must hold of any."""

import pytest
import torch

from clip_refine.losses import centroid_uniformity_loss, covariance_loss
from tests.losses.cases import made_inputs
from tests.reference.draws import gradient, rotation


def test_middles_that_are_one_cost_nothing_and_a_simplex_least():
    same = torch.ones(4, 3, dtype=torch.float64)
    assert centroid_uniformity_loss(same, same).item() == pytest.approx(0, abs=1e-12)
    # three points on a circle at 120°: squared distances of 3
    angles = 2 * torch.pi * torch.arange(3, dtype=torch.float64) / 3
    even = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert centroid_uniformity_loss(even, even).item() == pytest.approx(-6)


def test_no_step_takes_a_number_for_every_pair_of_pairs_and_dimension(
    monkeypatch: pytest.MonkeyPatch,
):
    """As the gradient of `pdist` does on a GPU: 0.5 GB for 512 pairs of 512 dimensions."""
    monkeypatch.setattr(torch, "pdist", None)
    image, text, *_ = made_inputs(6, seed=3)
    assert centroid_uniformity_loss(image, text) < 0


def test_a_step_along_the_gradient_spreads_the_middles():
    image, text, *_ = made_inputs(6, seed=3)
    before = centroid_uniformity_loss(image, text)
    slope = gradient(lambda x: centroid_uniformity_loss(x, text), at=image)
    assert centroid_uniformity_loss(image - 0.1 * slope, text) < before


def test_covariances_forget_partners_means_and_signs_but_not_turns():
    image, text, *_ = made_inputs(6, seed=4)
    loss = covariance_loss(image, text)
    torch.testing.assert_close(covariance_loss(image, text.flip(0)), loss)
    assert covariance_loss(image, -image).item() == pytest.approx(0, abs=1e-30)
    assert covariance_loss(image, image @ rotation(5, seed=0)) > 0.01
