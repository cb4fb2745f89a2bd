"""Differences of two models on the same items: points by the scores, intervals by a naive loop."""

import pytest
import torch

from clip_refine.evaluation.scores import (
    ModelFeatures,
    TaskFeatures,
    measure,
    paired_differences,
    score_features,
)
from clip_refine.models.embed import EmbeddedPairs


def features(seed: int) -> ModelFeatures:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(30, 8, generator=generator)
    owners = torch.arange(30).repeat_interleave(torch.arange(30) % 3 + 1)
    text = image[owners] + torch.randn(len(owners), 8, generator=generator) + 0.5
    labels = torch.arange(24) % 6
    classes = torch.randn(6, 8, generator=generator)
    images = classes[labels] + torch.randn(24, 8, generator=generator)
    return ModelFeatures(
        EmbeddedPairs(image, text, owners), [TaskFeatures("shapes", images, classes, labels)]
    )


def test_points_are_the_differences_of_the_scores():
    sides = features(0), features(1)
    before, after = (score_features(side, seed=0) for side in sides)
    found = paired_differences(*(measure(side) for side in sides), seed=0, resamples=50)
    for group in ("geometry", "retrieval"):
        for path, difference in found.items():
            if path.startswith(f"{group}."):
                name = path.removeprefix(f"{group}.")
                change = getattr(after, group)[name] - getattr(before, group)[name]
                assert difference.mean == pytest.approx(change, abs=1e-6), path
    top1 = after.zero_shot["shapes"]["top1"] - before.zero_shot["shapes"]["top1"]
    assert found["zero_shot.shapes.top1"].mean == pytest.approx(top1)
    assert found["zero_shot_top1"].mean == pytest.approx(top1)
    assert {path for path in found if path.startswith("retrieval.")} == {
        f"retrieval.{name}" for name in before.retrieval
    }
    assert all(side.low <= side.high for side in found.values())


def test_intervals_by_drawing_images_one_by_one():
    sides = [measure(side) for side in (features(2), features(3))]
    found = paired_differences(*sides, seed=5, resamples=40)
    generator = torch.Generator().manual_seed(5)
    owners = sides[0].features.pairs.text_to_image
    drawn = torch.randint(30, (40, 30), generator=generator)
    changes, cosines = [], []
    for images in drawn:
        captions = torch.cat([(owners == image).nonzero()[:, 0] for image in images])
        recalls = [(side.ranks.text_to_image[captions] < 5).double().mean() for side in sides]
        changes.append(recalls[1] - recalls[0])
        cosines.append((sides[1].cosines - sides[0].cosines)[images].double().mean())
    for path, values in (
        ("retrieval.text_to_image_recall@5", changes),
        ("geometry.true_pair_cosine", cosines),
    ):
        ends = torch.quantile(torch.stack(values), torch.tensor([0.025, 0.975]).double())
        assert [found[path].low, found[path].high] == pytest.approx(ends.tolist(), abs=1e-6)


def test_a_model_does_not_differ_from_itself():
    side = measure(features(4))
    for difference in paired_differences(side, side, seed=0, resamples=20).values():
        assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
