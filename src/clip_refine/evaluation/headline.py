"""The few numbers that a comparison turns on, and how each moves with the images."""

import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import resampled_means
from clip_refine.evaluation.chunks import measured, unit_sides
from clip_refine.evaluation.retrieval import retrieval_ranks
from clip_refine.evaluation.scores import ModelFeatures
from clip_refine.evaluation.zero_shot import zero_shot_ranks


@measured
def resampled_headline(
    features: ModelFeatures, *, resamples: int, seed: int
) -> dict[str, list[float]]:
    """`gap`, `mean_recall@1` and `zero_shot_top1` with the images drawn anew, many times.

    An image brings its captions along; what is searched stays as it is. Each task's images are
    drawn for themselves. Two models' values belong together resample by resample.

    Args:
        features: Of one model.
        resamples: How often.
        seed: One for all models that are compared.
    """
    found = {
        "gap": _gap(features, resamples, seed),
        "mean_recall@1": _mean_recall_at_1(features, resamples, seed),
    }
    if features.tasks:
        found["zero_shot_top1"] = _zero_shot(features, resamples, seed)
    return {name: values.tolist() for name, values in found.items()}


def _gap(features: ModelFeatures, resamples: int, seed: int) -> Tensor:
    image_unit, text_unit = unit_sides(
        features.pairs.image_features[:, : features.dim],
        features.pairs.first_caption_features[:, : features.dim],
    )
    between_centroids = resampled_means(image_unit - text_unit, resamples=resamples, seed=seed)
    return torch.linalg.vector_norm(between_centroids, dim=1)


def _mean_recall_at_1(features: ModelFeatures, resamples: int, seed: int) -> Tensor:
    pairs = features.pairs
    ranks = retrieval_ranks(
        pairs.image_features,
        pairs.text_features,
        pairs.text_to_image,
        normalize=features.normalize,
    )
    image_hits = (ranks.image_to_text == 0).double()
    caption_hits = torch.zeros_like(image_hits)
    caption_hits.index_add_(0, pairs.text_to_image, (ranks.text_to_image == 0).double())
    caption_counts = pairs.text_to_image.bincount(minlength=len(image_hits)).double()
    columns = torch.stack([image_hits, caption_hits, caption_counts], dim=1)
    images, captions, counts = resampled_means(columns, resamples=resamples, seed=seed).T
    return (images + captions / counts) / 2


def _zero_shot(features: ModelFeatures, resamples: int, seed: int) -> Tensor:
    hits = [
        zero_shot_ranks(
            task.image_features, task.class_features, task.labels, normalize=features.normalize
        )
        == 0
        for task in features.tasks
    ]
    means = [
        resampled_means(task_hits, resamples=resamples, seed=seed + number)
        for number, task_hits in enumerate(hits, start=1)
    ]
    return torch.stack(means).mean(dim=0)
