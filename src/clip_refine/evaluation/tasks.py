"""The tasks of a suite."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import (
    Bootstrap,
    Resampled,
    means,
    median_ranks,
    sums_in_groups,
)
from clip_refine.evaluation.classify import (
    CALIBRATION_BINS,
    calibration_bins,
    can_halve,
    confusion_pairs,
    few_shot_hits,
    linear_probe_hits,
    per_class_recall,
    probe_halves,
    zero_shot_predictions,
    zero_shot_ranks,
)
from clip_refine.evaluation.geometry import geometry, resampled_pairs
from clip_refine.evaluation.retrieval import retrieval_ranks
from clip_refine.evaluation.scores import KS, Outcome
from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    COLUMNS_AT_ONCE,
    Captions,
    average_precision,
    checked_owners,
    measured,
    median_rank,
    ndcg,
    partner_ranks,
    row_blocks,
    tie_width,
    unit_sides,
)
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.support.errors import DataError

# --------------------------------------------------------------------------------------------------
# Searching images and captions in one index with a text, and whether images stand a chance.


class MixedSearch(NamedTuple):
    """What every caption finds as a query, (M,) each."""

    ndcg: Tensor  # float64, NDCG at the depth asked for
    text_first: Tensor  # bool, whether the top hit is a caption
    image_rank: Tensor  # int64, how many items stand before the right image; 0 is the top


@measured
def mixed_search(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    k: int = 10,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """How well a text finds what belongs to it among images and captions together.

    The protocol: every caption is a query once; the index holds all images and all captions but
    the query itself; its image and the other captions of that image are relevant. Of equally near
    items (nearer than rounding) images stand before captions, then the lower index first.

    Args:
        image_features: (N, d), raw or unit.
        text_features: (M, d), raw or unit, at least two.
        text_to_image: (M,), the image that each caption describes; None where caption i describes
            image i.
        k: Depth of NDCG.
        chunk_size: Queries compared at once; bounds the memory, not the result.

    Returns:
        `ndcg@k`, the ideal over all relevant items, 0–1, higher is better; `text_first_share`, the
        share of queries whose top hit is a caption, 0–1; `median_image_rank`, 1-based rank of the
        right image, lower is better.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, or an image has no caption.

    Example:
        Captions are alike, images lie elsewhere: each query finds the other caption first, then its
        image.

        >>> image, text = torch.eye(3)[:2], torch.tensor([[0.1, 0, 1], [0, 0.1, 1]])
        >>> found = mixed_search(image, text)
        >>> {name: round(value, 4) for name, value in found.items()}
        {'ndcg@10': 0.6309, 'text_first_share': 1.0, 'median_image_rank': 2.0}
    """
    found = mixed_search_queries(
        image_features, text_features, text_to_image, k=k, chunk_size=chunk_size
    )
    return {
        f"ndcg@{k}": found.ndcg.mean().item(),
        "text_first_share": found.text_first.double().mean().item(),
        "median_image_rank": median_rank(found.image_rank),
    }


@measured
def mixed_search_queries(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    k: int = 10,
    chunk_size: int = CHUNK_SIZE,
) -> MixedSearch:
    """The same for every query; arguments and errors as in `mixed_search`."""
    image_unit, text_unit = unit_sides(image_features, text_features)
    count = len(image_unit)
    if len(text_unit) < 2:
        raise ValueError("one caption alone has no mixed index; pass two captions or more")
    owners = checked_owners(text_to_image, count, len(text_unit)).to(image_unit.device)
    tie = tie_width(image_unit.dtype)
    index = torch.cat([image_unit, text_unit])
    captions = Captions(owners, count)
    blocks = []
    for rows in row_blocks(len(text_unit), chunk_size):
        similarity = text_unit[rows] @ index.T
        similarity.diagonal(offset=count + rows.start).fill_(-torch.inf)
        others = captions.beside(rows)
        relevant = torch.cat([owners[rows, None], others + count * (others >= 0)], dim=1)
        ranks = partner_ranks(similarity, relevant, tie=tie)
        nearest_image = similarity[:, :count].amax(dim=1)
        nearest_text = similarity[:, count:].amax(dim=1)
        blocks.append(
            (ndcg(ranks, k=k), nearest_text > nearest_image + tie, ranks[:, 0].contiguous())
        )
    return MixedSearch(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


# --------------------------------------------------------------------------------------------------
# Score usefulness: can one threshold on the cosine tell true pairs from wrong ones?


# cosines are rounded to multiples of 1/GRID, the width below which they tie everywhere else
GRID = 2**19
HISTOGRAM_BINS = 256  # of the histograms that are kept, from −1 to 1


class CosineDistribution(NamedTuple):
    """Cosines of one kind of pairs."""

    # (bins,) int64, pairs in each of equally wide bins from −1 to 1, the left edge included
    histogram: Tensor
    pairs: int
    mean: float
    deviation: float  # of all of them, not of a sample


class Separation(NamedTuple):
    """True pairs against wrong pairs."""

    true_pairs: CosineDistribution  # every caption with its own image
    wrong_pairs: CosineDistribution  # every caption with every other image
    # chance that a true pair scores above a wrong one, equals counting half; 0–1, higher is better
    auc: float
    # the lowest cosine at and above which at most `false_positive_rate` of wrong pairs are
    threshold: float
    false_positive_rate: float  # what was asked for
    recall: float  # share of true pairs at and above the threshold, 0–1, higher is better
    pair_auc: Tensor  # (M,) float64, wrong pairs that each caption's own beats; `auc` is its mean
    pair_found: Tensor  # (M,) bool, whether each caption's own pair is at or above the threshold


@measured
def separation(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    false_positive_rate: float = 0.01,
    bins: int = HISTOGRAM_BINS,
    chunk_size: int = CHUNK_SIZE,
) -> Separation:
    """Distributions of the cosines of true and of wrong pairs, and what a threshold achieves.

    Cosines are rounded to the nearest multiple of 2⁻¹⁹ = 1.9e-6, so that all of them, 10¹⁰ for
    100,000 pairs, are kept as counts; everything is exact for the rounded ones. Source of AUC as a
    chance: Hanley and McNeil, Radiology 1982.

    Args:
        image_features: (N, d), raw or unit, at least two.
        text_features: (M, d), raw or unit.
        text_to_image: (M,), the image that each caption describes; None where caption i describes
            image i.
        false_positive_rate: Share of wrong pairs that the threshold may let through.
        bins: Of the histograms; a power of two up to 2²⁰.
        chunk_size: Captions compared at once; bounds the memory, not the result.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, there is one image only, an
            image has no caption, or an option is out of range.

    Example:
        True pairs have cosine 1, wrong ones 0.

        >>> found = separation(torch.eye(3), torch.eye(3))
        >>> found.true_pairs.mean, found.wrong_pairs.mean, found.auc, found.recall
        (1.0, 0.0, 1.0, 1.0)
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must be between 0 and 1, got {false_positive_rate}")
    if bins < 1 or 2 * GRID % bins:
        raise ValueError(f"bins must be a power of two up to {2 * GRID}, got {bins}")
    image_unit, text_unit = unit_sides(image_features, text_features)
    if len(image_unit) < 2:
        raise ValueError("one image alone has no wrong pair; pass two images or more")
    owners = checked_owners(text_to_image, len(image_unit), len(text_unit)).to(image_unit.device)
    every = torch.zeros(2 * GRID + 1, dtype=torch.int64, device=image_unit.device)
    true_places = []
    for rows in row_blocks(len(text_unit), chunk_size):
        similarity = text_unit[rows] @ image_unit.T
        true_places.append(_places(similarity.gather(1, owners[rows, None])[:, 0]))
        for columns in row_blocks(len(image_unit), 8 * COLUMNS_AT_ONCE):
            places = _places(similarity[:, columns]).flatten()
            every += places.bincount(minlength=len(every))
    own = torch.cat(true_places)
    true = own.bincount(minlength=len(every))
    wrong = every - true
    wrong_count = wrong.sum()
    below = wrong.cumsum(0) - wrong
    pair_auc = (below[own] + wrong[own].double() / 2) / wrong_count
    let_through = (wrong_count - below).double() / wrong_count
    threshold = int((let_through > false_positive_rate).sum())
    found = own >= threshold
    return Separation(
        true_pairs=_distribution(true, bins),
        wrong_pairs=_distribution(wrong, bins),
        auc=pair_auc.mean().item(),
        threshold=threshold / GRID - 1,
        false_positive_rate=false_positive_rate,
        recall=found.double().mean().item(),
        pair_auc=pair_auc.cpu(),
        pair_found=found.cpu(),
    )


def _places(cosines: Tensor) -> Tensor:
    """Cosine −1 … 1 → 0 … 2·GRID."""
    return ((cosines + 1) * GRID).round_().clamp_(0, 2 * GRID).long()


def _distribution(counts: Tensor, bins: int) -> CosineDistribution:
    count = int(counts.sum())
    cosines = torch.arange(len(counts), dtype=torch.float64, device=counts.device) / GRID - 1
    mean = (counts * cosines).sum() / count
    variance = (counts * (cosines - mean).square()).sum() / count
    histogram = counts[:-1].view(bins, -1).sum(dim=1)
    histogram[-1] += counts[-1]
    return CosineDistribution(histogram.cpu(), count, mean.item(), variance.sqrt().item())


# --------------------------------------------------------------------------------------------------
# Tasks on images with captions: retrieval, mixed search, score usefulness, geometry.


PROTOCOLS = {
    "all-captions": "all captions of an image are its own",
    "first-caption": "one caption an image, the first; not comparable with all-captions",
}


def with_protocol(pairs: EmbeddedPairs, protocol: str) -> EmbeddedPairs:
    """All captions, or the first of each image."""
    if protocol == "all-captions":
        return pairs
    first = pairs.first_caption_features
    return EmbeddedPairs(pairs.image_features, first, torch.arange(len(first)))


def retrieval_task(pairs: EmbeddedPairs, *, protocol: str, bootstrap: Bootstrap) -> Outcome:
    """Recall at 1, 5 and 10, median rank and mAP in both directions."""
    pairs = with_protocol(pairs, protocol)
    sides = pairs.image_features, pairs.text_features, pairs.text_to_image
    statistics = []
    for direction, ranks in retrieval_ranks(*sides, every=True)._asdict().items():
        owners = pairs.text_to_image if direction == "text_to_image" else None
        best = ranks.masked_fill(ranks < 0, torch.iinfo(ranks.dtype).max).amin(dim=1)
        columns = {f"{direction}_recall@{k}": best < k for k in KS}
        columns[f"{direction}_mAP"] = average_precision(ranks)
        statistics += [
            means(columns, owners),
            median_ranks(f"{direction}_median_rank", best, owners),
        ]
    numbers = bootstrap.numbers(len(pairs.image_features), *statistics)
    return Outcome(_sentence(protocol), _counts(pairs), numbers)


def mixed_search_task(pairs: EmbeddedPairs, *, protocol: str, bootstrap: Bootstrap) -> Outcome:
    """NDCG@10, the share of text first, and the rank of the right image; as `retrieval_task`."""
    pairs = with_protocol(pairs, protocol)
    owners = pairs.text_to_image
    found = mixed_search_queries(pairs.image_features, pairs.text_features, owners)
    return Outcome(
        protocol="every caption searches all images and all other captions; relevant are its "
        f"image and that image's other captions; {_sentence(protocol)}",
        counts=_counts(pairs),
        numbers=bootstrap.numbers(
            len(pairs.image_features),
            means({"ndcg@10": found.ndcg, "text_first_share": found.text_first}, owners),
            median_ranks("median_image_rank", found.image_rank, owners),
        ),
    )


def separation_task(
    pairs: EmbeddedPairs, *, protocol: str, false_positive_rate: float, bootstrap: Bootstrap
) -> Outcome:
    """AUC of the cosine, and what the threshold at few false positives finds.

    Intervals are over captions' own pairs; wrong pairs and the threshold stay as they are.
    """
    pairs = with_protocol(pairs, protocol)
    owners = pairs.text_to_image
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
        numbers={
            **bootstrap.numbers(len(pairs.image_features), means(columns, owners)),
            "threshold": Resampled(found.threshold),
            "true_pair_mean": Resampled(found.true_pairs.mean),
            "true_pair_deviation": Resampled(found.true_pairs.deviation),
            "wrong_pair_mean": Resampled(found.wrong_pairs.mean),
            "wrong_pair_deviation": Resampled(found.wrong_pairs.deviation),
        },
        details={"histogram_range": [-1, 1]}
        | {
            name: {"pairs": kind.pairs, "histogram": kind.histogram.tolist()}
            for name, kind in (("true_pairs", found.true_pairs), ("wrong_pairs", found.wrong_pairs))
        },
    )


def geometry_task(pairs: EmbeddedPairs, *, bootstrap: Bootstrap) -> Outcome:
    """The shape of the shared space; intervals for means over pairs and what follows from such."""
    pairs = with_protocol(pairs, "first-caption")
    sides = pairs.image_features, pairs.text_features
    found = geometry(*sides, seed=bootstrap.seed)
    return Outcome(
        protocol="every image with its first caption",
        counts=_counts(pairs),
        numbers={name: Resampled(value) for name, value in found.items()}
        | resampled_pairs(*unit_sides(*sides), bootstrap),
    )


def _sentence(protocol: str) -> str:
    return f"{protocol}: {PROTOCOLS[protocol]}"


def _counts(pairs: EmbeddedPairs) -> dict[str, int]:
    return {"images": len(pairs.image_features), "captions": len(pairs.text_features)}


# --------------------------------------------------------------------------------------------------
# Tasks on images with classes: zero-shot classification and probes.


HALVES = "half of the images of each class train, the other half tests"
TRAIN_SOURCE = "trained on a source of its own"


def zero_shot_task(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    class_names: Sequence[str],
    logit_scale: float,
    bootstrap: Bootstrap,
) -> Outcome:
    """Top-1, top-5, mean per-class recall and calibration, with every class and confusion."""
    ranks = zero_shot_ranks(image_features, class_features, labels)
    found = zero_shot_predictions(image_features, class_features, logit_scale=logit_scale)
    correct = found.predicted == labels
    recall = per_class_recall(found.predicted, labels, len(class_features))
    sizes = labels.bincount(minlength=len(class_features))
    hits, drawn = sums_in_groups(correct, labels), sums_in_groups(torch.ones(len(labels)), labels)
    # as `expected_calibration_error`
    bins = calibration_bins(found.confidence)
    surplus = sums_in_groups(correct.double() - found.confidence, bins)
    numbers = bootstrap.numbers(
        len(labels),
        means({"top1": ranks == 0, "top5": ranks < 5}),
        # over the classes that have images in a resample
        lambda counts: {"mean_per_class_recall": (hits(counts) / drawn(counts)).nanmean(dim=1)},
        lambda counts: {
            "expected_calibration_error": surplus(counts).abs().sum(dim=1) / len(correct)
        },
    )
    # a sum of |accuracy − confidence|: noise makes it larger, as it does a distance
    error = numbers["expected_calibration_error"].without_bias(least=0.0)
    numbers = {**numbers, "expected_calibration_error": error}
    classes = zip(class_names, sizes.tolist(), recall.tolist(), strict=True)
    confusions = confusion_pairs(found.predicted, labels, len(class_features))
    return Outcome(
        protocol="every image once; the class with the nearest mean prompt",
        counts={"images": len(labels), "classes": len(class_features)},
        numbers=numbers,
        details={
            "per_class": [
                {"class": name, "images": size, "recall": value if size else None}
                for name, size, value in classes
            ],
            "confusions": [
                {
                    "class": class_names[pair.label],
                    "taken_for": class_names[pair.predicted],
                    "images": pair.images,
                    "share": pair.share,
                }
                for pair in confusions
            ],
            "logit_scale": logit_scale,
            "calibration_bins": CALIBRATION_BINS,
        },
    )


def linear_probe_task(
    image_features: Tensor,
    labels: Tensor,
    training: tuple[Tensor, Tensor] | None,
    *,
    bootstrap: Bootstrap,
) -> Outcome:
    """Accuracy of a logistic regression on the images that it was not fitted on.

    It is fitted on the features and classes of `training`, or else on half of the others; the seed
    of `bootstrap` is that of the splits, too.
    """
    generator = np.random.default_rng(bootstrap.seed)
    train, test, how = _split(image_features, labels, training, generator)
    correct, strength = linear_probe_hits(*train, *test, generator)
    return Outcome(
        protocol=f"logistic regression, {how}; C chosen on half of the training images",
        counts=_class_counts(train, test),
        numbers=bootstrap.numbers(len(correct), means({"accuracy": correct})),
        details={"C": strength},
    )


def few_shot_task(
    image_features: Tensor,
    labels: Tensor,
    training: tuple[Tensor, Tensor] | None,
    *,
    shots: Sequence[int],
    draws: int,
    bootstrap: Bootstrap,
) -> Outcome:
    """Mean accuracy over draws of few training images a class; arguments as `linear_probe_task`."""
    generator = np.random.default_rng(bootstrap.seed)
    train, test, how = _split(image_features, labels, training, generator)
    columns, deviations, by_draw = {}, {}, {}
    for count in shots:
        hits = few_shot_hits(*train, *test, shots=count, draws=draws, seed=bootstrap.seed)
        name = f"accuracy@{count}-shot"
        columns[name] = hits.double().mean(dim=0)
        of_draws = hits.double().mean(dim=1)
        by_draw[name] = of_draws.tolist()
        deviations[f"deviation_over_draws@{count}-shot"] = Resampled(of_draws.std().item())
    fewest = int(train[1].unique(return_counts=True)[1].min())
    return Outcome(
        protocol=f"logistic regression on K images a class, mean of {draws} draws; {how}",
        counts=_class_counts(train, test)
        | {"draws": draws, "fewest_training_images_a_class": fewest},
        numbers=bootstrap.numbers(len(test[1]), means(columns)) | deviations,
        details={"by_draw": by_draw},
    )


Split = tuple[Tensor, Tensor]


def _split(
    features: Tensor, labels: Tensor, training: Split | None, generator: np.random.Generator
) -> tuple[Split, Split, str]:
    if training is not None:
        return training, (features, labels), TRAIN_SOURCE
    if not can_halve(labels):
        raise DataError(
            "a probe on half of the images needs two classes, one of them with two images; there "
            f"are {len(labels)} images of {len(labels.unique())} classes. Name a `train` source."
        )
    train, test = probe_halves(features, labels, generator)
    return (features[train], labels[train]), (features[test], labels[test]), HALVES


def _class_counts(train: Split, test: Split) -> dict[str, int]:
    return {
        "images": len(test[1]),
        "training_images": len(train[1]),
        "classes": len(train[1].unique()),
    }
