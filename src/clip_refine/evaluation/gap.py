"""How far apart images and texts lie: distances between the two clouds and within pairs.

All functions take unit features, row i of both a pair, and accumulate in float64.
"""

import math

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clip_refine.evaluation.chunks import ROWS_AT_ONCE, measured, row_blocks

SEPARABILITY_PAIRS = 10_000
"""Pairs at most that the logistic regression sees; more would cost memory and change nothing."""


@measured
def mean_row(unit: Tensor) -> Tensor:
    """Centroid of the rows, (d,) in float64, without a float64 copy of them all.

    Example:
        >>> mean_row(torch.eye(2)).tolist()
        [0.5, 0.5]
    """
    total = torch.zeros(unit.shape[1], dtype=torch.float64, device=unit.device)
    for rows in row_blocks(len(unit), ROWS_AT_ONCE):
        total += unit[rows].double().sum(dim=0)
    return total / len(unit)


@measured
def centroid_distance(image_unit: Tensor, text_unit: Tensor) -> float:
    """‖μ_image − μ_text‖, 0–2, lower is a smaller gap (Liang et al., NeurIPS 2022, section 2).

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (M, d), rows of norm 1.

    Returns:
        The distance, on the unit sphere's scale.

    Example:
        >>> round(centroid_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])), 4)
        1.4142
    """
    return torch.linalg.vector_norm(mean_row(image_unit) - mean_row(text_unit)).item()


@measured
def centroid_squared_over_dim(image_unit: Tensor, text_unit: Tensor) -> float:
    """‖μ_image − μ_text‖² / d, what the CLIP-Refine paper calls modality gap and prints × 10³.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (M, d), rows of norm 1.

    Returns:
        The squared distance a dimension, lower is a smaller gap.

    Example:
        >>> image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> centroid_squared_over_dim(image, text)
        1.0
    """
    return (mean_row(image_unit) - mean_row(text_unit)).square().mean().item()


@measured
def true_pair_cosine(image_unit: Tensor, text_unit: Tensor) -> float:
    """E x·y over pairs, −1 to 1, higher is nearer.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (N, d), rows of norm 1.

    Returns:
        The mean cosine of true pairs.

    Example:
        >>> true_pair_cosine(torch.eye(2), torch.eye(2))
        1.0
    """
    total = 0.0
    for rows in row_blocks(len(image_unit), ROWS_AT_ONCE):
        total += (image_unit[rows].double() * text_unit[rows].double()).sum().item()
    return total / len(image_unit)


@measured
def alignment(image_unit: Tensor, text_unit: Tensor) -> float:
    """E ‖x − y‖² over pairs (Wang and Isola, ICML 2020, section 4), 0–4, lower is nearer.

    Equal to 2 − 2 · `true_pair_cosine`, and to `residual_alignment` + `centroid_distance`².

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (N, d), rows of norm 1.

    Returns:
        The mean squared distance of true pairs.

    Example:
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        2.0
    """
    return _mean_squared_distance(image_unit, text_unit, torch.zeros(image_unit.shape[1]))


@measured
def residual_alignment(image_unit: Tensor, text_unit: Tensor) -> float:
    """E ‖(x − μ_image) − (y − μ_text)‖²: what is left of `alignment` with the gap taken out.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (N, d), rows of norm 1.

    Returns:
        The mean squared distance of true pairs after centring each modality, 0–4, lower is nearer.

    Example:
        One pair is its own centre.

        >>> residual_alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        0.0
    """
    gap = mean_row(image_unit) - mean_row(text_unit)
    return _mean_squared_distance(image_unit, text_unit, gap)


def _mean_squared_distance(image_unit: Tensor, text_unit: Tensor, shift: Tensor) -> float:
    shift = shift.to(image_unit.device, torch.float64)
    total = 0.0
    for rows in row_blocks(len(image_unit), ROWS_AT_ONCE):
        difference = image_unit[rows].double() - text_unit[rows].double() - shift
        total += difference.square().sum().item()
    return total / len(image_unit)


@measured
def relative_modality_gap(image_unit: Tensor, text_unit: Tensor) -> float:
    """Distance within pairs as a share of it plus the distance within a modality.

    a / (a + ½ (b_image + b_text)), with a = (1 − E x·y)/2 over true pairs and
    b = (1 − mean cosine of two different rows)/2 within one modality. 0 where pairs coincide, ½
    where a pair is as far apart as two strangers of one modality. Source: METHOD §3.

    Args:
        image_unit: (N, d), rows of norm 1, N ≥ 2.
        text_unit: (N, d), rows of norm 1.

    Returns:
        The ratio, 0–1, lower is a smaller gap; 0 where all rows of both coincide.

    Example:
        Pairs at cosine 0, strangers within a modality too: ½ / (½ + ½).

        >>> relative_modality_gap(torch.eye(2), torch.eye(2).flip(0))
        0.5
    """
    pair_distance = (1 - true_pair_cosine(image_unit, text_unit)) / 2
    image_distance = (1 - mean_cosine_of_strangers(image_unit)) / 2
    text_distance = (1 - mean_cosine_of_strangers(text_unit)) / 2
    whole = pair_distance + (image_distance + text_distance) / 2
    return pair_distance / whole if whole > 0 else 0.0


@measured
def mean_cosine_of_strangers(unit: Tensor) -> float:
    """Mean off-diagonal cosine, (‖Σ x_i‖² − Σ ‖x_i‖²) / (N (N − 1)), in O(N·d).

    Args:
        unit: (N, d), rows of norm 1, N ≥ 2.

    Returns:
        The mean, −1 to 1.

    Raises:
        ValueError: If there is only one row.

    Example:
        >>> mean_cosine_of_strangers(torch.eye(3))
        0.0
    """
    count = len(unit)
    if count < 2:
        raise ValueError("the mean cosine of two different rows needs at least 2 rows, got 1")
    own = sum(unit[rows].double().square().sum().item() for rows in row_blocks(count, ROWS_AT_ONCE))
    every = (count * mean_row(unit)).square().sum().item()
    return (every - own) / (count * (count - 1))


@measured
def linear_separability(image_unit: Tensor, text_unit: Tensor, *, seed: int = 0) -> float:
    """Held-out accuracy of a logistic regression that tells images from texts.

    Half of the pairs, drawn by `seed`, teach it and both sides of the other half test it, so no
    pair is on both sides of the split. Features are scaled by √d, which makes an average
    coordinate about 1 and leaves the answer independent of a rotation; the L2 penalty is
    scikit-learn's default C = 1. Above 10,000 pairs a seeded 10,000 are used.

    Args:
        image_unit: (N, d), rows of norm 1, N ≥ 2.
        text_unit: (N, d), rows of norm 1.
        seed: Of the split.

    Returns:
        Accuracy in 0–1: 1 where a plane separates the modalities, ½ where nothing does.

    Raises:
        ValueError: If there is only one pair.

    Example:
        >>> image, text = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)
        >>> linear_separability(image, text)
        1.0
    """
    count, dim = image_unit.shape
    if count < 2:
        raise ValueError("linear separability needs at least 2 pairs to split, got 1")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = order[:SEPARABILITY_PAIRS]
    taught, tested = order[: len(order) // 2], order[len(order) // 2 :]

    def labelled_rows(pairs: Tensor) -> tuple[Tensor, Tensor]:
        pairs = pairs.to(image_unit.device)
        rows = torch.cat([image_unit[pairs], text_unit[pairs]]).cpu() * math.sqrt(dim)
        return rows, torch.arange(2).repeat_interleave(len(pairs))

    rows, is_text = labelled_rows(taught)
    classifier = LogisticRegression(max_iter=1000).fit(rows.numpy(), is_text.numpy())
    rows, is_text = labelled_rows(tested)
    return float(classifier.score(rows.numpy(), is_text.numpy()))
