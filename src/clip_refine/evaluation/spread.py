"""How the features fill the sphere, and who crowds whom out of a nearest-neighbour list.

All functions take unit features, row i of both a pair. Those that need every similarity walk over
`chunk_size` rows of them at a time.
"""

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import (
    CHUNK_SIZE,
    COLUMNS_AT_ONCE,
    ROWS_AT_ONCE,
    measured,
    row_blocks,
    tie_width,
)
from clip_refine.evaluation.gap import mean_row


@measured
def uniformity_mean(
    image_unit: Tensor, text_unit: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> float:
    """E exp(−2 ‖z_i − z_j‖²) over all i < j of images and texts together.

    Source: Wang and Isola, ICML 2020, arXiv 2005.10242, section 4 with t = 2; their uniformity is
    the logarithm of this, the CLIP-Refine paper prints it without.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (N, d), rows of norm 1.
        chunk_size: Rows compared at once; bounds the memory, not the result.

    Returns:
        The mean, e⁻⁸ to 1, lower is more evenly spread.

    Example:
        Two points at squared distance 2: e⁻⁴.

        >>> round(uniformity_mean(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])), 5)
        0.01832
    """
    total = torch.zeros((), dtype=torch.float64, device=image_unit.device)
    for unit in (image_unit, text_unit):
        for rows in row_blocks(len(unit), chunk_size):
            kernel = _gaussian_kernel(unit[rows], unit[rows.start :])
            # rows against themselves count above the diagonal only
            within, beyond = kernel.split([len(kernel), kernel.shape[1] - len(kernel)], dim=1)
            total += within.double().triu_(diagonal=1).sum() + _sum(beyond)
    for rows in row_blocks(len(image_unit), chunk_size):
        total += _sum(_gaussian_kernel(image_unit[rows], text_unit))
    count = len(image_unit) + len(text_unit)
    return total.item() / (count * (count - 1) / 2)


def _gaussian_kernel(some_unit: Tensor, other_unit: Tensor) -> Tensor:
    """exp(−2 ‖·‖²) of every combination: ‖u − v‖² = 2 − 2 u·v for unit vectors."""
    return (some_unit @ other_unit.T).sub_(1).mul_(4).exp_()


def _sum(kernel: Tensor) -> Tensor:
    """Float64 sum of a block, without a float64 copy of it all."""
    total = torch.zeros((), dtype=torch.float64, device=kernel.device)
    for columns in kernel.split(COLUMNS_AT_ONCE, dim=1):
        total += columns.sum(dtype=torch.float64)
    return total


@measured
def text_first_share(
    image_unit: Tensor, text_unit: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> float:
    """Share of caption queries whose top hit is a caption, in an index of both modalities.

    The index of query i holds all images and all captions but i itself; where an image and a
    caption are equally near, the image counts as first.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (N, d), rows of norm 1.
        chunk_size: Queries compared at once; bounds the memory, not the result.

    Returns:
        The share, 0–1; a single space of meaning would give about ½ or less, CLIP models give 1.

    Example:
        Both captions are alike, and the images lie elsewhere.

        >>> text_first_share(torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]]))
        1.0
    """
    return float(text_first(image_unit, text_unit, chunk_size=chunk_size).double().mean())


@measured
def text_first(image_unit: Tensor, text_unit: Tensor, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """(N,) truth values whose mean is `text_first_share`; arguments as there."""
    tie = tie_width(text_unit.dtype)
    found = []
    for rows in row_blocks(len(text_unit), chunk_size):
        nearest_image = (text_unit[rows] @ image_unit.T).amax(dim=1)
        among_texts = text_unit[rows] @ text_unit.T
        among_texts.diagonal(offset=rows.start).fill_(-torch.inf)
        found.append(among_texts.amax(dim=1) > nearest_image + tie)
    return torch.cat(found)


@measured
def hubness_skewness(
    image_unit: Tensor, text_unit: Tensor, *, k: int = 10, chunk_size: int = CHUNK_SIZE
) -> float:
    """Skewness of how often a text is among the k nearest of the image queries.

    With n_j the number of images that have text j among their k nearest (equally near texts by
    lower index): E (n − μ)³ / (E (n − μ)²)^{3/2}. Source: Radovanović et al., "Hubs in Space",
    JMLR 2010, section 2.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (M, d), rows of norm 1.
        k: Neighbours a query.
        chunk_size: Queries compared at once; bounds the memory, not the result.

    Returns:
        The skewness, lower is fewer hubs; 0 where all texts are found equally often.

    Raises:
        ValueError: If `k` is below 1 or there are not more than k texts.

    Example:
        Three images point at text 0 and one at text 1: n = (3, 1, 0, 0), deviations (2, 0, −1, −1).

        >>> image, text = torch.eye(4)[[0, 0, 0, 1]], torch.eye(4)
        >>> round(hubness_skewness(image, text, k=1), 4)
        0.8165
    """
    if not 1 <= k < len(text_unit):
        raise ValueError(
            f"hubness with k = {k} needs k of at least 1 and more than k texts, "
            f"got {len(text_unit)} texts"
        )
    occurrences = torch.zeros(len(text_unit), dtype=torch.int64, device=text_unit.device)
    for rows in row_blocks(len(image_unit), chunk_size):
        similarity = image_unit[rows] @ text_unit.T
        occurrences += _nearest(similarity, k).reshape(-1).bincount(minlength=len(text_unit))
    deviation = occurrences.double() - occurrences.double().mean()
    variance = deviation.square().mean()
    if variance == 0:
        return 0.0
    return (deviation.pow(3).mean() / variance.pow(1.5)).item()


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """(Q, k) indices of the k largest a row, the lower index first among equals."""
    tie = tie_width(similarity.dtype)
    scores, nearest = similarity.topk(k + 1, dim=1)
    # which of several equals topk takes is not defined, so those rows are filled by index
    at_edge = (scores[:, k - 1] - scores[:, k] <= tie).nonzero()[:, 0]
    nearest = nearest[:, :k]
    for query in at_edge.tolist():
        row, last = similarity[query], scores[query, k - 1]
        above, equal = row > last + tie, (row - last).abs() <= tie
        in_order = torch.cat([above.nonzero()[:, 0], equal.nonzero()[:, 0]])
        nearest[query] = in_order[:k]
    return nearest


@measured
def effective_rank(image_unit: Tensor, text_unit: Tensor) -> float:
    """How many directions the features of both modalities together fill.

    exp(−Σ p log p), with p the eigenvalues of their joint covariance over its trace. Source: Roy
    and Vetterli, "The effective rank", EUSIPCO 2007, on the covariance.

    Args:
        image_unit: (N, d), rows of norm 1.
        text_unit: (M, d), rows of norm 1.

    Returns:
        1 to d, higher is more directions; 1 where all features coincide.

    Example:
        Four points at the ends of two equal axes fill two directions.

        >>> round(effective_rank(torch.eye(2), -torch.eye(2)), 4)
        2.0
    """
    dim, count = image_unit.shape[1], len(image_unit) + len(text_unit)
    shares = torch.tensor([len(image_unit) / count, len(text_unit) / count], dtype=torch.float64)
    mean = shares[0] * mean_row(image_unit) + shares[1] * mean_row(text_unit)
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=image_unit.device)
    for unit in (image_unit, text_unit):
        for rows in row_blocks(len(unit), ROWS_AT_ONCE):
            centred = unit[rows].double() - mean
            covariance += centred.T @ centred / count
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    # the variance of unit vectors is at most 1; below this it is rounding
    if eigenvalues.sum() < 1e-12:
        return 1.0
    probabilities = eigenvalues / eigenvalues.sum()
    return torch.special.entr(probabilities).sum().exp().item()
