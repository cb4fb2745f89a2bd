"""Tasks on images with captions: retrieval, mixed search, score usefulness, geometry."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import resampled_means, resampled_medians
from clip_refine.evaluation.chunks import unit_sides
from clip_refine.evaluation.embed import EmbeddedPairs
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.mixed_search import mixed_search_queries
from clip_refine.evaluation.outcome import Bootstrap, Outcome, means
from clip_refine.evaluation.ranks import average_precision, median_rank
from clip_refine.evaluation.retrieval import all_retrieval_ranks
from clip_refine.evaluation.separation import CosineDistribution, separation

PROTOCOLS = {
    "all-captions": "all captions of an image are its own",
    "first-caption": "one caption an image, the first; not comparable with all-captions",
}
KS = (1, 5, 10)


def with_protocol(pairs: EmbeddedPairs, protocol: str) -> EmbeddedPairs:
    """All captions, or the first of each image."""
    if protocol == "all-captions":
        return pairs
    first = pairs.first_caption_features
    return EmbeddedPairs(pairs.image_features, first, torch.arange(len(first)))


def retrieval_task(pairs: EmbeddedPairs, *, protocol: str, bootstrap: Bootstrap) -> Outcome:
    """Recall at 1, 5 and 10, median rank and mAP in both directions.

    Args:
        pairs: Images and all their captions.
        protocol: A key of `PROTOCOLS`.
        bootstrap: For the intervals.
    """
    pairs = with_protocol(pairs, protocol)
    owners, image_count = pairs.text_to_image, len(pairs.image_features)
    every = all_retrieval_ranks(pairs.image_features, pairs.text_features, owners)
    scores: dict[str, float] = {}
    resampled: dict[str, Tensor] = {}
    directions = {
        "image_to_text": (every.image_to_text, torch.arange(image_count)),
        "text_to_image": (every.text_to_image, owners),
    }
    for direction, (ranks, images_of_queries) in directions.items():
        far = torch.iinfo(ranks.dtype).max
        best = ranks.masked_fill(ranks < 0, far).amin(dim=1)
        columns = {f"{direction}_recall@{k}": best < k for k in KS}
        columns[f"{direction}_mAP"] = average_precision(ranks)
        median = f"{direction}_median_rank"
        scores |= means(columns) | {median: median_rank(best)}
        resampled |= bootstrap.of_queries(columns, images_of_queries, image_count)
        resampled[median] = _medians(best, images_of_queries, image_count, bootstrap)
    return Outcome(_sentence(protocol), _counts(pairs), scores, resampled)


def mixed_search_task(pairs: EmbeddedPairs, *, protocol: str, bootstrap: Bootstrap) -> Outcome:
    """NDCG@10, the share of text first, and the rank of the right image; as `retrieval_task`."""
    pairs = with_protocol(pairs, protocol)
    owners, image_count = pairs.text_to_image, len(pairs.image_features)
    found = mixed_search_queries(pairs.image_features, pairs.text_features, owners)
    columns = {"ndcg@10": found.ndcg, "text_first_share": found.text_first}
    medians = _medians(found.image_rank, owners, image_count, bootstrap)
    return Outcome(
        protocol="every caption searches all images and all other captions; relevant are its "
        f"image and that image's other captions; {_sentence(protocol)}",
        counts=_counts(pairs),
        scores=means(columns) | {"median_image_rank": median_rank(found.image_rank)},
        resampled=bootstrap.of_queries(columns, owners, image_count)
        | {"median_image_rank": medians},
    )


def separation_task(
    pairs: EmbeddedPairs, *, protocol: str, false_positive_rate: float, bootstrap: Bootstrap
) -> Outcome:
    """AUC of the cosine, and what the threshold at few false positives finds.

    Intervals are over captions' own pairs; wrong pairs and the threshold stay as they are.

    Args:
        pairs: Images and all their captions.
        protocol: A key of `PROTOCOLS`.
        false_positive_rate: Share of wrong pairs that the threshold may let through.
        bootstrap: For the intervals.
    """
    pairs = with_protocol(pairs, protocol)
    owners, image_count = pairs.text_to_image, len(pairs.image_features)
    found = separation(
        pairs.image_features,
        pairs.text_features,
        owners,
        false_positive_rate=false_positive_rate,
    )
    recall = f"recall@{100 * false_positive_rate:g}%_false_positives"
    columns = {"auc": found.pair_auc, recall: found.pair_found}
    return Outcome(
        protocol="cosines of every caption with its own image against those with every other; "
        f"{_sentence(protocol)}",
        counts=_counts(pairs) | {"wrong_pairs": found.wrong_pairs.pairs},
        scores={
            **means(columns),
            "threshold": found.threshold,
            "true_pair_mean": found.true_pairs.mean,
            "true_pair_deviation": found.true_pairs.deviation,
            "wrong_pair_mean": found.wrong_pairs.mean,
            "wrong_pair_deviation": found.wrong_pairs.deviation,
        },
        resampled=bootstrap.of_queries(columns, owners, image_count),
        details={
            "histogram_range": [-1, 1],
            "true_pairs": _histogram(found.true_pairs),
            "wrong_pairs": _histogram(found.wrong_pairs),
        },
    )


def geometry_task(pairs: EmbeddedPairs, *, bootstrap: Bootstrap) -> Outcome:
    """The shape of the shared space; intervals for what is a mean over pairs or follows from such.

    Args:
        pairs: Images and all their captions; the first of each image is taken.
        bootstrap: For the intervals; its seed is that of `linear_separability`'s split, too.
    """
    pairs = with_protocol(pairs, "first-caption")
    sides = pairs.image_features, pairs.text_features
    return Outcome(
        protocol="every image with its first caption",
        counts=_counts(pairs),
        scores=geometry(*sides, seed=bootstrap.seed),
        resampled=_resampled_geometry(*sides, bootstrap),
    )


def _resampled_geometry(
    image_features: Tensor, text_features: Tensor, bootstrap: Bootstrap
) -> dict[str, Tensor]:
    image_unit, text_unit = unit_sides(image_features, text_features)
    cosines = (image_unit * text_unit).sum(dim=1, keepdim=True)
    columns = torch.cat([image_unit - text_unit, cosines], dim=1)
    drawn = resampled_means(columns, **bootstrap.draws)
    squared, cosine = drawn[:, :-1].square().sum(dim=1), drawn[:, -1]
    return {
        "centroid_distance": squared.sqrt(),
        "centroid_squared_over_dim": squared / image_unit.shape[1],
        "true_pair_cosine": cosine,
        "alignment": 2 - 2 * cosine,
        "residual_alignment": 2 - 2 * cosine - squared,
    }


def _medians(ranks: Tensor, owners: Tensor, image_count: int, bootstrap: Bootstrap) -> Tensor:
    return resampled_medians(ranks, owners, image_count, **bootstrap.draws) + 1


def _sentence(protocol: str) -> str:
    return f"{protocol}: {PROTOCOLS[protocol]}"


def _counts(pairs: EmbeddedPairs) -> dict[str, int]:
    return {"images": len(pairs.image_features), "captions": len(pairs.text_features)}


def _histogram(distribution: CosineDistribution) -> Mapping[str, object]:
    return {"pairs": distribution.pairs, "histogram": distribution.histogram.tolist()}
