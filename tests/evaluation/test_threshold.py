"""A probability that a pair fits, and thresholds that do on other images what they promise."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from clip_refine.evaluation.bootstrap import Bootstrap, interval
from clip_refine.evaluation.classify import expected_calibration_error
from clip_refine.evaluation.separation import (
    fit_probability,
    measure_cutoffs,
    nonsense,
    threshold_numbers,
)


def drawn(count: int, noise: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 64, generator=generator)
    texts = images + noise * torch.randn(count, 64, generator=generator)
    return images, texts


def test_what_is_promised_holds_on_other_images():
    images, texts = drawn(2000)
    found = fit_probability(
        images, texts, torch.arange(2000), nonsense_features=torch.randn(40, 64)
    )
    assert found.images == (1000, 1000)
    assert found.calibration_error < 0.02
    precise, rare = found.cutoffs["precision"], found.cutoffs["false_positive_rate"]
    assert precise.precision == pytest.approx(0.9, abs=0.02)
    assert rare.false_positive_rate == pytest.approx(0.01, abs=0.003)
    assert rare.recall is not None
    assert precise.recall is not None
    assert 0 < rare.recall < precise.recall < 1
    # among a thousand images chance alone finds one: the check says so
    assert rare.nonsense_found is not None
    assert rare.nonsense_found > 0.5
    # said and true agree in every bin with many pairs
    assert all(abs(said - true) < 0.1 for said, true, count in found.reliability if count > 100)
    assert sum(count for *_, count in found.reliability) == 2000
    at = precise.cosine
    assert at is not None
    by_hand = 1 / (1 + math.exp(-(found.slope * at + found.intercept)))
    assert found.probability(at) == pytest.approx(by_hand)


def test_a_shift_of_all_cosines_moves_the_threshold_with_them():
    """Raw cosines of 0.25 and 0.30 mean nothing by themselves; the probability does."""
    images, texts = drawn(1000)
    plain = fit_probability(images, texts, torch.arange(1000))
    again = fit_probability(images * 7, texts * 3, torch.arange(1000))
    assert again.cutoffs["precision"].recall == plain.cutoffs["precision"].recall
    cone = torch.cat([torch.full((1000, 1), 12.0), images], dim=1)
    other = torch.cat([torch.full((1000, 1), 12.0), texts], dim=1)
    narrow = fit_probability(cone, other, torch.arange(1000))
    low, high = plain.cutoffs["precision"].cosine, narrow.cutoffs["precision"].cosine
    assert low is not None
    assert high is not None
    assert high > low + 0.2
    assert narrow.calibration_error < 0.05


def test_captions_of_an_image_are_on_one_side_and_never_wrong_for_it():
    images, _ = drawn(60)
    texts = images.repeat_interleave(2, dim=0)
    owners = torch.arange(60).repeat_interleave(2)
    found = fit_probability(images, texts, owners, precision=0.99)
    cutoff = found.cutoffs["precision"]
    assert (cutoff.precision, cutoff.recall, cutoff.nonsense_found) == (1.0, 1.0, None)


def test_a_steep_slope_has_a_probability_everywhere():
    far = torch.tensor([[1.0, 0.0], [0.999, 0.04471], [-1.0, 0.0], [-0.999, -0.04471]]).repeat(
        20, 1
    )
    found = fit_probability(far, far, torch.arange(80)).model_copy(update={"slope": 3000.0})
    assert (found.probability(-1.0), found.probability(1.0)) == (0.0, 1.0)


def test_it_is_measured_on_images_that_it_was_not_fitted_on():
    images, texts = drawn(400)
    _, second = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tensor_split(2)
    texts[second] = torch.randn(200, 64, generator=torch.Generator().manual_seed(4))
    found = fit_probability(images, texts, torch.arange(400))
    precise = found.cutoffs["precision"].precision
    assert precise is not None
    assert precise < 0.7  # where nothing fits, a half is right by chance
    assert found.calibration_error > 0.2


def test_wrong_pairs_are_not_all_held_at_once():
    images, texts = (side.repeat(1, 8) for side in drawn(1000))  # so that resamples take less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fit_probability(images, texts, torch.arange(1000))
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    assert largest < 10 * texts[:500].nbytes  # 50 wrong images of each would be 50 times that


def test_thresholds_of_another_model_are_measured_on_this_ones_cosines():
    """A smaller gap moves all cosines, so that the old threshold lets nearly everything through."""
    images, texts = drawn(400)
    owners, cone = torch.arange(400), torch.full((400, 1), 12.0)
    before = fit_probability(images, texts, owners)
    narrow = torch.cat([cone, images], dim=1), torch.cat([cone, texts], dim=1)
    after = fit_probability(*narrow, owners)
    kept = measure_cutoffs(before.cutoffs, *narrow, owners)
    assert kept["precision"].cosine == before.cutoffs["precision"].cosine
    assert kept["precision"].precision == pytest.approx(0.5, abs=0.05)
    rare = kept["false_positive_rate"].false_positive_rate
    assert rare is not None
    assert rare > 0.8
    assert measure_cutoffs(after.cutoffs, *narrow, owners) == after.cutoffs
    numbers = threshold_numbers(after, before, *narrow, owners, Bootstrap(200))
    assert numbers["precision@first_threshold"].value == pytest.approx(kept["precision"].precision)
    assert numbers["recall@first_threshold"].value == pytest.approx(kept["precision"].recall)
    assert numbers["false_positives@first_threshold"].value == pytest.approx(rare)
    assert numbers["calibration_error"].value == pytest.approx(after.calibration_error)
    own = threshold_numbers(after, after, *narrow, owners, Bootstrap(200))
    share = own["precision@first_threshold"]
    assert share.value == pytest.approx(after.cutoffs["precision"].precision)
    low, high = interval(share)
    assert low is not None
    assert high is not None
    assert 0.8 < low < share.value < high < 0.99


def test_the_interval_of_the_calibration_error_holds_what_many_images_show():
    """Fitted on few, so that it is off by something, which 20 times as many others show."""
    images, texts = drawn(8000)
    few = slice(0, 400)
    found = fit_probability(images[few], texts[few], torch.arange(400))
    assert found.calibration_interval is not None
    low, high = found.calibration_interval
    assert low is not None
    assert high is not None
    assert 0 <= low < found.calibration_error <= high < 0.2
    unit = [side / side.norm(dim=1, keepdim=True) for side in (images[400:], texts[400:])]
    cosines = torch.cat([(unit[0] * side).sum(1) for side in (unit[1], unit[1].roll(1, 0))])
    said = torch.tensor([found.probability(float(cosine)) for cosine in cosines])
    fits = torch.arange(len(said)) < len(said) // 2
    truth = expected_calibration_error(said, fits, bins=10)
    assert low <= truth <= high


def test_what_cannot_be():
    images, texts = drawn(39)
    with pytest.raises(ValueError, match="39 images are too few; pass 40 or more"):
        fit_probability(images, texts, torch.arange(39))
    images, texts = drawn(50)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_probability(images, texts, torch.arange(50), precision=1.0)
    # texts that have nothing to do with their images reach no precision of .99 that holds
    unrelated = fit_probability(images, texts.flip(0), torch.arange(50), precision=0.999)
    cutoff = unrelated.cutoffs["precision"]
    assert cutoff.cosine is None or (cutoff.precision or 0) < 0.999


def test_nonsense_is_drawn_the_same_twice():
    assert nonsense(5) == nonsense(5) != nonsense(5, seed=1)
    assert all(set(text) <= set("abcdefghijklmnopqrstuvwxyz ") for text in nonsense())
