"""The training-free peers once more, as loops over Python floats, only to compare with.

Each gives the whole matrix of scores, rows images and columns texts, from unit features.
"""

import math

from tests.reference.losses import Rows, dot, unit
from tests.reference.metrics import centroid


def less(rows: Rows, taken: list[float], share: float) -> Rows:
    return [[value - share * t for value, t in zip(row, taken, strict=True)] for row in rows]


def scores(image: Rows, text: Rows) -> Rows:
    return [[dot(i, t) for t in text] for i in image]


def mean_centring(image: Rows, text: Rows, fitted_image: Rows, fitted_text: Rows) -> Rows:
    image_moved = unit(less(image, centroid(fitted_image), 1))
    text_moved = unit(less(text, centroid(fitted_text), 1))
    return scores(image_moved, text_moved)


def distribution_normalisation(
    image: Rows, text: Rows, fitted_image: Rows, fitted_text: Rows
) -> Rows:
    image_mean, text_mean = centroid(fitted_image), centroid(fitted_text)
    return scores(less(image, image_mean, 0.5), less(text, text_mean, 0.5))


def modality_shift(
    image: Rows, text: Rows, fitted_image: Rows, fitted_text: Rows, strength: float
) -> Rows:
    pairs = zip(centroid(fitted_image), centroid(fitted_text), strict=True)
    gap = [of_image - of_text for of_image, of_text in pairs]
    return scores(unit(less(image, gap, strength / 2)), unit(less(text, gap, -strength / 2)))


def bias(item: list[float], references: Rows, neighbours: int, alpha: float) -> float:
    nearest = sorted((dot(item, reference) for reference in references), reverse=True)
    nearest = nearest[:neighbours]
    return alpha * math.fsum(nearest) / len(nearest)


def image_to_text_nnn(
    image: Rows, text: Rows, reference_images: Rows, neighbours: int, alpha: float
) -> Rows:
    """Images are the queries, so texts are corrected, by reference images."""
    return [[dot(i, t) - bias(t, reference_images, neighbours, alpha) for t in text] for i in image]


def text_to_image_nnn(
    image: Rows, text: Rows, reference_texts: Rows, neighbours: int, alpha: float
) -> Rows:
    """Texts are the queries, so images are corrected, by reference texts."""
    return [[dot(i, t) - bias(i, reference_texts, neighbours, alpha) for t in text] for i in image]
