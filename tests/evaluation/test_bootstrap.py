"""The driver against a loop over draws; intervals that cover what they should."""

import math

import pytest
import torch
from benchmarks.intervals import coverage, drawn_pairs

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, interval, means, norm_of_mean
from tests.reference.draws import normals


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


def test_an_interval_holds_its_value_and_leaves_out_no_more_on_the_other_side():
    draws = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert interval(Resampled(0.5, draws)) == pytest.approx((0.025, 0.975))
    # 1 % of the draws are above, so 4 % are left out below
    assert interval(Resampled(0.9901, draws)) == pytest.approx((0.04, 0.9901), abs=1e-4)
    assert interval(Resampled(1.5, draws)) == pytest.approx((0.05, 1.5))
    assert interval(Resampled(-0.5, draws)) == pytest.approx((-0.5, 0.95))
    assert interval(Resampled(0.5, draws - 0.5, 0.0)) == pytest.approx((0.0, 0.5))


def test_the_norm_of_a_mean_by_solving_for_the_truth_draw_by_draw():
    rows = normals(12, 3, seed=5).double() + torch.tensor([0.4, 0.0, 0.0])
    bootstrap = Bootstrap(30, 2)
    found = norm_of_mean(rows, bootstrap)
    mean = rows.mean(dim=0)
    norm = mean.norm().item()
    assert found.value == pytest.approx(norm)
    covariance = torch.cov(rows.T)
    traces = covariance.trace().item(), (covariance @ covariance).trace().item()
    unbiased = 11**2 / (10 * 13) * (traces[1] - traces[0] ** 2 / 11)
    spread, expected = math.sqrt(unbiased / traces[1]), traces[0] / 12
    drawn = torch.randint(12, (30, 12), generator=torch.Generator().manual_seed(2))
    for number, index in enumerate(drawn):
        error = (rows[index].mean(dim=0) - mean) * math.sqrt(12 / 11)
        squared = expected + spread * (error.square().sum().item() - expected)
        draw = found.draws[number].item()
        if draw > 0:  # a mean of this length in the found direction, off by the error's mirror
            along = -(error @ mean).item() / norm
            assert draw**2 + 2 * draw * along + squared == pytest.approx(norm**2)
        else:
            assert squared - draw**2 == pytest.approx(norm**2)


def test_the_norm_of_a_mean_is_that_of_one_row_and_turns_with_the_rows():
    row = torch.tensor([[3.0, 4.0]])
    assert norm_of_mean(row, Bootstrap(4)).draws.tolist() == [5.0] * 4
    rows = normals(40, 6, seed=1)
    turned = rows @ torch.linalg.qr(normals(6, 6, seed=2)).Q
    first, second = (norm_of_mean(side, Bootstrap(20)) for side in (rows, turned))
    assert torch.allclose(first.draws, second.draws, atol=1e-5)
    assert not any((first - first).draws)


def test_the_interval_of_no_gap_reaches_from_zero_to_what_was_found():
    # few rows, many columns: a resample's mean is longer than the rows' always
    rows = normals(50, 200, seed=0)
    found = norm_of_mean(rows, Bootstrap(200))
    again = torch.cat(list(Bootstrap(200).counts(50))) @ rows.double() / 50
    assert (again.norm(dim=1) > found.value).all()
    assert interval(found) == (0.0, found.value)


def test_of_two_gaps_within_noise_no_change_is_told():
    first, second = (normals(50, 20, seed=seed) for seed in (0, 1))
    one, two = (norm_of_mean(rows, Bootstrap(200)) for rows in (first, second))
    (_, high), (_, other_high) = interval(one), interval(two)
    assert high is not None
    assert other_high is not None
    low, above = interval(one - two)
    assert low is not None
    assert above is not None
    assert low <= -other_high
    assert above >= high
    # the same noise in both hides none of it
    shared = norm_of_mean(first + 0.001 * second, Bootstrap(200))
    low, above = interval(one - shared)
    assert low == pytest.approx(-high, rel=0.01)
    assert interval(one - one) == (0.0, 0.0)
    # but where one of them is clearly there, the change is
    far = norm_of_mean(first + 2, Bootstrap(200))
    low, _ = interval(far - two)
    assert low is not None
    assert low > 0


def test_intervals_of_the_gap_cover_the_truth():
    found = coverage(
        drawn_pairs(size=2000, dim=16, seed=0),
        count=100,
        trials=150,
        gaps=(0.0, 0.3, 1.2),
        changes=((0.8, 0.3), (0.8, 0.0)),
    )
    # 150 trials of 95 % are within 5 points of it nearly always
    assert all(0.9 <= share <= 1 for share in found.values()), found
    assert 0.93 <= sum(found.values()) / len(found) <= 0.985, found
