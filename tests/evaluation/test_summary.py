"""Rows → one line a recipe, with numbers worked by hand."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from clip_refine.evaluation.bootstrap import Bootstrap, norm_of_mean
from clip_refine.evaluation.classify import linear_probe
from clip_refine.evaluation.scores import (
    ModelFeatures,
    TaskFeatures,
    probe_features,
    resampled_headline,
    score_features,
    spread,
    summarise,
)
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import ComparisonRow
from clip_refine.results.metrics import pareto_best


def row(recipe: str, seed: int, gap: float, recall: float, top1: float, probe: float):
    recalls = {
        f"{way}_recall@{k}": recall + shift
        for way, shift in (("image_to_text", 0.1), ("text_to_image", -0.1))
        for k in (1, 5, 10)
    }
    return ComparisonRow(
        recipe=recipe,
        seed=seed,
        learning_rate=None if recipe == "pre-trained" else 1e-5,
        steps=3,
        pairs=30,
        geometry={"centroid_distance": gap},
        retrieval=recalls,
        zero_shot={"a": {"top1": top1 - 0.1}, "b": {"top1": top1 + 0.1}},
        linear_probe={"a": probe, "b": probe},
        selection=0.5,
        seconds=seed,
        peak_memory=1.0,
    )


def test_the_headline_by_hand():
    numbers = row("x", 0, 0.8, 0.5, 0.6, 0.7).headline
    assert numbers == pytest.approx(
        {
            "gap": 0.8,
            "image_to_text_recall@1": 0.6,
            "text_to_image_recall@1": 0.4,
            "mean_recall@1": 0.5,
            "mean_recall@10": 0.5,
            "zero_shot_top1": 0.6,
            "linear_probe": 0.7,
        }
    )


def test_mean_deviation_and_difference_over_seeds():
    rows = [
        row("pre-trained", 1, 0.8, 0.4, 0.6, 0.7),
        row("mine", 1, 0.5, 0.4, 0.5, 0.7),
        row("mine", 2, 0.7, 0.6, 0.5, 0.7),
    ]
    resampled = [
        {"gap": [0.8, 0.9]},
        {"gap": [0.4, 0.5]},
        {"gap": [0.6, 0.7]},
    ]
    untouched, mine = summarise(rows, resampled, untouched="pre-trained")
    assert (untouched.runs, mine.runs) == (1, 2)
    assert untouched.scores["gap"] == spread([0.8])
    assert untouched.difference == {}
    assert mine.scores["gap"].mean == pytest.approx(0.6)
    assert mine.scores["gap"].deviation == pytest.approx(0.1 * 2**0.5)
    assert mine.scores["zero_shot.b.top1"].mean == pytest.approx(0.6)
    assert mine.seconds.mean == 1.5
    gap = mine.difference["gap"]
    # both resamples differ by -0.3 on average over seeds, and an interval holds its own number
    assert (gap.mean, gap.low, gap.high) == pytest.approx((-0.2, -0.3, -0.2))
    assert untouched.pareto_best
    assert mine.pareto_best


def scores(gap: float, recall: float, zero_shot: float, probe: float) -> dict[str, float]:
    return {
        "gap": gap,
        "mean_recall@1": recall,
        "zero_shot_top1": zero_shot,
        "linear_probe": probe,
        "seconds": 9.0,
    }


def test_pareto_best_by_hand():
    found = pareto_best(
        {
            "untouched": scores(0.9, 0.5, 0.6, 0.7),
            "dominated": scores(0.9, 0.5, 0.6, 0.6),
            "smaller gap": scores(0.1, 0.4, 0.6, 0.7),
            "its twin": scores(0.1, 0.4, 0.6, 0.7),
            "worse twin": scores(0.1, 0.4, 0.5, 0.7),
        }
    )
    assert found == {"untouched", "smaller gap", "its twin"}
    assert pareto_best({"only": scores(1, 0, 0, 0)}) == {"only"}


def features(*, normalize: bool = True, seed: int = 0) -> ModelFeatures:
    generator = torch.Generator().manual_seed(seed)
    image, first, second = torch.randn(3, 30, 6, generator=generator)
    texts = torch.stack([image + first, image + second], dim=1).reshape(60, 6)
    owners = torch.arange(30).repeat_interleave(2)
    labels = torch.arange(30) % 3
    task = TaskFeatures("t", image, torch.randn(3, 6, generator=generator), labels)
    return ModelFeatures(EmbeddedPairs(image, texts, owners), [task], normalize=normalize)


def naive(found: ModelFeatures, rows: Sequence[int]) -> dict[str, float]:
    """Gap and recall with the images of `rows`, searching the whole set."""
    unit = found.pairs.image_features / found.pairs.image_features.norm(dim=1, keepdim=True)
    text = found.pairs.text_features / found.pairs.text_features.norm(dim=1, keepdim=True)
    similarity = unit @ text.T
    gap = torch.stack([unit[i] - text[2 * i] for i in rows]).mean(dim=0).norm()
    to_text = [int(similarity[i].argmax()) // 2 == i for i in rows]
    to_image = [int(similarity[:, 2 * i + c].argmax()) == i for i in rows for c in (0, 1)]
    recall = (sum(to_text) / len(to_text) + sum(to_image) / len(to_image)) / 2
    return {"gap": float(gap), "mean_recall@1": recall}


def headline_draws(found: ModelFeatures, *, resamples: int, seed: int) -> dict[str, list[float]]:
    probes = probe_features(found, seed=0)
    return resampled_headline(found, probes, resamples=resamples, seed=seed)


def test_the_resampled_headline_against_a_loop():
    found = features()
    resampled = headline_draws(found, resamples=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(30, (5, 30), generator=generator).tolist()
    for number, rows in enumerate(drawn):
        recall = naive(found, rows)["mean_recall@1"]
        assert resampled["mean_recall@1"][number] == pytest.approx(recall, abs=1e-6)
    unit = found.pairs.image_features / found.pairs.image_features.norm(dim=1, keepdim=True)
    text = found.pairs.text_features[::2] / found.pairs.text_features[::2].norm(dim=1, keepdim=True)
    gap = norm_of_mean(unit - text, Bootstrap(5, 3))
    assert gap.value == pytest.approx(naive(found, range(30))["gap"], abs=1e-6)
    assert resampled["gap"] == pytest.approx(gap.draws.tolist(), abs=1e-6)
    assert set(resampled) == {"gap", "mean_recall@1", "zero_shot_top1", "linear_probe"}
    many = headline_draws(found, resamples=3000, seed=1)
    mean = sum(many["zero_shot_top1"]) / 3000
    assert mean == pytest.approx(score_features(found, seed=0).zero_shot["t"]["top1"], abs=0.01)


def test_a_probe_is_resampled_over_its_test_images():
    found = features()
    draws = torch.tensor(headline_draws(found, resamples=4000, seed=1)["linear_probe"]).double()
    [task] = found.tasks
    accuracy = linear_probe(task.image_features, task.labels, seed=0)
    assert float(draws.mean()) == pytest.approx(accuracy, abs=0.01)
    # 15 of the 30 images test it
    assert float(draws.std()) == pytest.approx((accuracy * (1 - accuracy) / 15) ** 0.5, rel=0.05)
    assert headline_draws(replace(found, tasks=[]), resamples=5, seed=1).keys() == {
        "gap",
        "mean_recall@1",
    }


def test_identical_models_differ_by_exactly_zero():
    same = [headline_draws(features(), resamples=50, seed=0) for _ in range(2)]
    rows = [row("pre-trained", 0, 0.8, 0.5, 0.6, 0.7), row("copy", 0, 0.8, 0.5, 0.6, 0.7)]
    difference = summarise(rows, same, untouched="pre-trained")[1].difference
    assert {(d.mean, d.low, d.high) for d in difference.values()} == {(0.0, 0.0, 0.0)}


def test_models_of_one_kind_have_intervals_that_cover_zero():
    pair = [headline_draws(features(seed=seed), resamples=400, seed=0) for seed in (1, 2)]
    rows = [row("pre-trained", 0, 0.8, 0.5, 0.6, 0.7), row("other", 0, 0.8, 0.5, 0.6, 0.7)]
    for difference in summarise(rows, pair, untouched="pre-trained")[1].difference.values():
        assert difference.low < 0 < difference.high
