"""One model before and after on the same items: differences with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import interval, resampled_means
from clip_refine.evaluation.chunks import measured, unit_sides
from clip_refine.evaluation.headline import resampled_headline
from clip_refine.evaluation.retrieval import RetrievalRanks, retrieval_ranks
from clip_refine.evaluation.scores import ModelFeatures
from clip_refine.evaluation.spread import text_first
from clip_refine.evaluation.zero_shot import zero_shot_ranks
from clip_refine.results import Interval

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Measured:
    """A model's features with what is known of every single item.

    Attributes:
        features: Of one model.
        image_unit: (N, d), rows of norm 1.
        text_unit: (N, d), the first captions, rows of norm 1.
        ranks: Of every image and caption.
        cosines: (N,) of each image with its first caption.
        text_first: (N,) whether a first caption finds another caption before any image.
        class_ranks: Task name → (n,) 0-based rank of each image's true class.
    """

    features: ModelFeatures
    image_unit: Tensor
    text_unit: Tensor
    ranks: RetrievalRanks
    cosines: Tensor
    text_first: Tensor
    class_ranks: Mapping[str, Tensor]


@measured
def measure(features: ModelFeatures) -> Measured:
    """Every single item's numbers, from features whose similarity is the cosine."""
    pairs = features.pairs
    image_unit, text_unit = unit_sides(pairs.image_features, pairs.first_caption_features)
    return Measured(
        features=features,
        image_unit=image_unit,
        text_unit=text_unit,
        ranks=retrieval_ranks(pairs.image_features, pairs.text_features, pairs.text_to_image),
        cosines=(image_unit * text_unit).sum(dim=1),
        text_first=text_first(image_unit, text_unit),
        class_ranks={
            task.name: zero_shot_ranks(task.image_features, task.class_features, task.labels)
            for task in features.tasks
        },
    )


@measured
def paired_differences(
    before: Measured, after: Measured, *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Score's path → after less before, with a 95 % paired bootstrap interval over the images.

    Paths are those of `Scores`, as in `retrieval.image_to_text_recall@1`, and `mean_recall@1` and
    `zero_shot_top1` for the means over both directions and over all tasks. An image brings its
    captions along; what is searched stays as it is. Scores that are no mean over items, such as the
    effective rank, have none.

    Args:
        before: The model as it came.
        after: The refined one, on the same items.
        seed: Of the images drawn.
        resamples: How often.
    """
    found = {
        **_headline(before, after, resamples, seed),
        **_geometry(before, after, resamples, seed),
        **_retrieval(before, after, resamples, seed),
    }
    for number, (task, ranks) in enumerate(before.class_ranks.items(), start=1):
        for name, depth in (("top1", 1), ("top5", 5)):
            change = (after.class_ranks[task] < depth).double() - (ranks < depth).double()
            drawn = resampled_means(change, resamples=resamples, seed=seed + number)
            found[f"zero_shot.{task}.{name}"] = _interval(float(change.mean()), drawn)
    return found


def _headline(before: Measured, after: Measured, resamples: int, seed: int) -> dict[str, Interval]:
    """The gap and the two means."""
    drawn = [
        resampled_headline(side.features, resamples=resamples, seed=seed)
        for side in (before, after)
    ]
    point = [_headline_now(side) for side in (before, after)]
    paths = {"gap": "geometry.centroid_distance"}
    return {
        paths.get(name, name): _interval(
            point[1][name] - point[0][name],
            torch.tensor(drawn[1][name]) - torch.tensor(drawn[0][name]),
        )
        for name in drawn[0]
    }


def _headline_now(side: Measured) -> dict[str, float]:
    gap = torch.linalg.vector_norm((side.image_unit - side.text_unit).double().mean(dim=0))
    hits = [(ranks == 0).double().mean() for ranks in side.ranks]
    top1 = [(ranks == 0).double().mean() for ranks in side.class_ranks.values()]
    return {
        "gap": float(gap),
        "mean_recall@1": float(sum(hits)) / 2,
        "zero_shot_top1": float(sum(top1)) / max(1, len(top1)),
    }


def _geometry(before: Measured, after: Measured, resamples: int, seed: int) -> dict[str, Interval]:
    """The means over pairs."""
    cosine = after.cosines.double() - before.cosines.double()
    names = ("true_pair_cosine", "alignment", "text_first_share")
    text_firsts = after.text_first.double() - before.text_first.double()
    changes = torch.stack([cosine, -2 * cosine, text_firsts], dim=1)
    drawn = resampled_means(changes, resamples=resamples, seed=seed)
    means = changes.mean(dim=0).tolist()
    return {
        f"geometry.{name}": _interval(means[column], drawn[:, column])
        for column, name in enumerate(names)
    }


def _retrieval(
    before: Measured, after: Measured, resamples: int, seed: int, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Interval]:
    owners = before.features.pairs.text_to_image
    counts = owners.bincount(minlength=len(before.cosines)).double()
    columns, texts = [], []
    for k in ks:
        columns.append(_hits(after.ranks.image_to_text, k) - _hits(before.ranks.image_to_text, k))
        change = _hits(after.ranks.text_to_image, k) - _hits(before.ranks.text_to_image, k)
        texts.append(torch.zeros_like(counts).index_add_(0, owners, change))
    table = torch.stack([*columns, *texts, counts], dim=1)
    drawn = resampled_means(table, resamples=resamples, seed=seed)
    means = table.mean(dim=0)
    found = {}
    for position, k in enumerate(ks):
        other = len(ks) + position
        found[f"retrieval.image_to_text_recall@{k}"] = _interval(
            float(means[position]), drawn[:, position]
        )
        found[f"retrieval.text_to_image_recall@{k}"] = _interval(
            float(means[other] / means[-1]), drawn[:, other] / drawn[:, -1]
        )
    return found


def _hits(ranks: Tensor, k: int) -> Tensor:
    return (ranks < k).double()


def _interval(mean: float, drawn: Tensor) -> Interval:
    low, high = interval(drawn)
    return Interval(mean=mean, low=low, high=high)
