"""What the report's charts are drawn from: a joint plane, histograms, spectra."""

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from clip_refine.evaluation.chunks import CHUNK_SIZE, ROWS_AT_ONCE, measured, row_blocks
from clip_refine.evaluation.gap import mean_row
from clip_refine.evaluation.paired import Measured
from clip_refine.evidence import Histograms, Point, Spectra

FITTED_PAIRS = 5000
"""Pairs at most that the plane is fitted on."""

COMPARED_IMAGES = 2000
"""Images at most whose cosines with all captions of others are counted."""

BINS = 60
_FINE_BINS = 4000


@measured
def joint_plane(
    before: Measured, after: Measured, drawn: Tensor, *, seed: int
) -> tuple[list[Tensor], Point, int]:
    """Both models' unit features of some pairs in one plane.

    Args:
        before: The model as it came.
        after: The refined one.
        drawn: (n,) positions of the pairs wanted.
        seed: Of the pairs that the plane is fitted on, where there are many.

    Returns:
        (n, 2) points of the images before, texts before, images after, texts after; the share of
        the variance along each axis; how many pairs the plane was fitted on.
    """
    sides = [before.image_unit, before.text_unit, after.image_unit, after.text_unit]
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.randperm(len(sides[0]), generator=generator)[:FITTED_PAIRS]
    pca = PCA(2, random_state=seed)
    pca.fit(torch.cat([side[fitted].cpu().double() for side in sides]).numpy())
    points = [torch.from_numpy(pca.transform(side[drawn].cpu().double().numpy())) for side in sides]
    first, second = pca.explained_variance_ratio_.tolist()
    return points, (first, second), len(fitted)


@measured
def cosine_histograms(before: Measured, after: Measured) -> Histograms:
    """Cosines of images with their own first captions and with those of others, in common bins."""
    counts = [_fine_counts(side) for side in (before, after)]
    together = torch.stack([*counts[0], *counts[1]])
    filled = together.sum(dim=0).nonzero()[:, 0]
    first, last = int(filled[0]), int(filled[-1]) + 1
    width = -(-(last - first) // BINS)
    count = -(-(last - first) // width)
    padded = torch.zeros(4, count * width, dtype=torch.float64)
    padded[:, : last - first] = together[:, first:last]
    shares = padded.view(4, count, width).sum(dim=2)
    shares /= shares.sum(dim=1, keepdim=True)
    edges = [(first + width * number) * 2 / _FINE_BINS - 1 for number in range(count + 1)]
    rows = [tuple(float(f"{share:.4g}") for share in row) for row in shares.tolist()]
    return Histograms(
        edges=tuple(round(edge, 6) for edge in edges),
        true_before=rows[0],
        wrong_before=rows[1],
        true_after=rows[2],
        wrong_after=rows[3],
    )


def _fine_counts(side: Measured) -> tuple[Tensor, Tensor]:
    """Counts of true and wrong pairs in narrow bins from −1 to 1."""
    images, texts = side.image_unit, side.text_unit
    wrong = torch.zeros(_FINE_BINS, dtype=torch.float64)
    step = max(1, len(images) // COMPARED_IMAGES)
    chosen = torch.arange(0, len(images), step)
    for rows in row_blocks(len(chosen), CHUNK_SIZE):
        similarity = images[chosen[rows]] @ texts.T
        others = torch.ones_like(similarity, dtype=torch.bool)
        others[torch.arange(len(similarity)), chosen[rows]] = False
        wrong += _count(similarity[others])
    return _count(side.cosines), wrong


def _count(cosines: Tensor) -> Tensor:
    cosines = cosines.clamp(-1, 1).float().cpu()  # rounding may leave 1 behind
    return torch.histc(cosines, _FINE_BINS, -1, 1).double()


@measured
def spectra(before: Measured, after: Measured) -> Spectra:
    """Singular values of the centred unit features over the root of their number."""
    return Spectra(
        image_before=_singular_values(before.image_unit),
        text_before=_singular_values(before.text_unit),
        image_after=_singular_values(after.image_unit),
        text_after=_singular_values(after.text_unit),
    )


def _singular_values(unit: Tensor) -> tuple[float, ...]:
    mean = mean_row(unit)
    covariance = torch.zeros(unit.shape[1], unit.shape[1], dtype=torch.float64)
    for rows in row_blocks(len(unit), ROWS_AT_ONCE):
        centred = (unit[rows].double() - mean).cpu()
        covariance += centred.T @ centred / len(unit)
    values = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0).sqrt()
    return tuple(float(f"{value:.4g}") for value in values.tolist())
