"""Score usefulness: can one threshold on the cosine tell true pairs from wrong ones?"""

from typing import NamedTuple

import torch
from torch import Tensor

from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    COLUMNS_AT_ONCE,
    checked_owners,
    measured,
    row_blocks,
    unit_sides,
)

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
