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


def fold(image: Rows, text: Rows, fitted_image: Rows, fitted_text: Rows, share: float) -> Rows:
    """W as a whole matrix, its entries one by one."""
    moved = []
    for rows, mean in ((image, centroid(fitted_image)), (text, centroid(fitted_text))):
        squared = dot(mean, mean)
        matrix = [
            [float(i == j) - share * a * b / squared for j, b in enumerate(mean)]
            for i, a in enumerate(mean)
        ]
        moved.append(unit([[dot(line, row) for line in matrix] for row in rows]))
    return scores(*moved)


def standardise(image: Rows, text: Rows, fitted_image: Rows, fitted_text: Rows) -> Rows:
    moved = []
    for rows, fitted in ((image, fitted_image), (text, fitted_text)):
        mean = centroid(fitted)
        deviation = [
            math.sqrt(math.fsum((value - m) ** 2 for value in column) / len(fitted))
            for column, m in zip(zip(*fitted, strict=True), mean, strict=True)
        ]
        centred = less(rows, mean, 1)
        moved.append(
            unit([[v / d for v, d in zip(row, deviation, strict=True)] for row in centred])
        )
    return scores(*moved)


def realign(image: Rows, text: Rows, fitted_image: Rows, fitted_text: Rows) -> Rows:
    image_mean, text_mean = centroid(fitted_image), centroid(fitted_text)
    spread = [
        math.fsum(dot(row, row) for row in less(rows, mean, 1)) / len(rows)
        for rows, mean in ((fitted_image, image_mean), (fitted_text, text_mean))
    ]
    scale = math.sqrt(spread[0] / spread[1])

    def moved(rows: Rows) -> Rows:
        scaled = [[scale * value for value in row] for row in less(rows, text_mean, 1)]
        return unit(less(scaled, image_mean, -1))

    again = less(less(moved(text), centroid(moved(fitted_text)), 1), image_mean, -1)
    return scores(image, unit(again))


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
