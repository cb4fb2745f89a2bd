"""What the report's charts are drawn from: a joint plane, histograms, spectra."""

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from clip_refine.evaluation.chunks import ROWS_AT_ONCE, measured, row_blocks
from clip_refine.evaluation.gap import mean_row
from clip_refine.evaluation.paired import Measured
from clip_refine.evaluation.separation import Separation, separation
from clip_refine.evidence import Histograms, Point, Spectra

FITTED_PAIRS = 5000
"""Pairs at most that the plane is fitted on."""

COMPARED_IMAGES = 5000
"""Images at most whose cosines with all captions of one another are counted."""

FALSE_POSITIVES = 0.01
"""Share of wrong pairs that the threshold may let through."""

BINS = 60
_FINE_BINS = 4096


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


def cosine_histograms(before: Measured, after: Measured, *, seed: int) -> Histograms:
    """Cosines of true and wrong pairs in common bins, and how well one threshold parts them.

    Args:
        before: The model as it came.
        after: The refined one.
        seed: Of the images that are compared, where there are more than `COMPARED_IMAGES`.
    """
    found = [_separation(side, seed) for side in (before, after)]
    kinds = [kind for side in found for kind in (side.true_pairs, side.wrong_pairs)]
    together = torch.stack([kind.histogram for kind in kinds]).double()
    filled = together.sum(dim=0).nonzero()[:, 0]
    first, last = int(filled[0]), int(filled[-1]) + 1
    width = -(-(last - first) // BINS)
    count = -(-(last - first) // width)
    padded = torch.zeros(len(kinds), count * width, dtype=torch.float64)
    padded[:, : last - first] = together[:, first:last]
    shares = padded.view(len(kinds), count, width).sum(dim=2)
    shares /= shares.sum(dim=1, keepdim=True)
    edges = [(first + width * number) * 2 / _FINE_BINS - 1 for number in range(count + 1)]
    rows = [tuple(float(f"{share:.4g}") for share in row) for row in shares.tolist()]
    return Histograms(
        edges=tuple(round(edge, 6) for edge in edges),
        true_before=rows[0],
        wrong_before=rows[1],
        true_after=rows[2],
        wrong_after=rows[3],
        auc=(found[0].auc, found[1].auc),
        threshold=(found[0].threshold, found[1].threshold),
        recall=(found[0].recall, found[1].recall),
    )


def _separation(side: Measured, seed: int) -> Separation:
    pairs = side.features.pairs
    count = len(pairs.image_features)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[:COMPARED_IMAGES].sort().values
    captions = torch.isin(pairs.text_to_image, chosen)
    owners = torch.searchsorted(chosen, pairs.text_to_image[captions])
    images, texts = pairs.image_features[chosen], pairs.text_features[captions]
    return separation(images, texts, owners, false_positive_rate=FALSE_POSITIVES, bins=_FINE_BINS)


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
