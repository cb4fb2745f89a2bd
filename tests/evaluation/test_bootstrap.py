"""Resampled means against a loop over draws; intervals that cover what they should."""

import pytest
import torch

from clip_refine.evaluation.bootstrap import interval, resampled_means


def naive(values: torch.Tensor, resamples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    rows = [torch.stack([values[i].double() for i in row]).mean(dim=0) for row in drawn.tolist()]
    return torch.stack(rows)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (1,)])
def test_it_is_the_mean_over_drawn_items(shape: tuple[int, ...]):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    means = resampled_means(values, resamples=20, seed=4)
    assert means.shape == (20, *shape[1:])
    assert torch.allclose(means, naive(values, 20, 4))


def test_one_seed_draws_the_same_items_for_every_model():
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    difference = resampled_means(first, resamples=30, seed=2) - resampled_means(
        second, resamples=30, seed=2
    )
    assert torch.allclose(difference, resampled_means(first - second, resamples=30, seed=2))


def test_blocks_do_not_change_the_means(monkeypatch: pytest.MonkeyPatch):
    from clip_refine.evaluation import bootstrap

    values = torch.arange(10.0)
    whole = resampled_means(values, resamples=9, seed=1)
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 20)
    assert torch.equal(resampled_means(values, resamples=9, seed=1), whole)


def test_the_spread_is_the_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    means = resampled_means(values, resamples=4000, seed=0)
    assert float(means.std()) == pytest.approx(float(values.std()) / 20, rel=0.05)
    low, high = interval(means - float(values.mean()))
    assert low < 0 < high
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.08)


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match="0 items"):
        resampled_means(torch.zeros(0), resamples=3, seed=0)
    with pytest.raises(ValueError, match="0 resamples"):
        resampled_means(torch.zeros(3), resamples=0, seed=0)
