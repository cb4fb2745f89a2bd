"""The driver against a loop over draws; intervals that cover what they should."""

import pytest
import torch

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, interval, means


def naive(values: torch.Tensor, resamples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    return torch.stack([torch.stack([values[i] for i in row]).mean() for row in drawn.tolist()])


def mean(values: torch.Tensor, resamples: int, seed: int) -> Resampled:
    return Bootstrap(resamples, seed).numbers(len(values), means({"it": values}))["it"]


@pytest.mark.parametrize("count", [7, 1])
def test_it_is_the_mean_and_the_mean_over_drawn_items(count: int):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1)).double()
    found = mean(values, 20, 4)
    assert found.value == pytest.approx(float(values.mean()))
    assert torch.allclose(found.draws, naive(values, 20, 4))


def test_one_seed_draws_the_same_items_for_every_model():
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    difference = mean(first, 30, 2) - mean(second, 30, 2)
    together = mean(first - second, 30, 2)
    assert difference.value == pytest.approx(together.value)
    assert torch.allclose(difference.draws, together.draws)


def test_blocks_do_not_change_the_means(monkeypatch: pytest.MonkeyPatch):
    from clip_refine.evaluation import bootstrap

    values = torch.arange(10.0)
    whole = mean(values, 9, 1)
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 20)
    assert torch.equal(mean(values, 9, 1).draws, whole.draws)


def test_the_spread_is_the_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = mean(values, 4000, 0)
    assert float(found.draws.std()) == pytest.approx(float(values.std()) / 20, rel=0.05)
    low, high = interval(found)
    assert low is not None
    assert high is not None
    assert low < float(values.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.08)


def test_numbers_with_draws_add_up_like_numbers():
    first, second = (Resampled(v, torch.tensor([v, 2 * v])) for v in (1.0, 3.0))
    half = (first + second) / 2
    assert (half.value, half.draws.tolist()) == (2.0, [2.0, 4.0])
    assert interval(Resampled(1.0) - Resampled(0.5)) == (None, None)


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match="0 images"):
        Bootstrap(3).numbers(0)
    with pytest.raises(ValueError, match="0 resamples"):
        Bootstrap(0).numbers(3)
