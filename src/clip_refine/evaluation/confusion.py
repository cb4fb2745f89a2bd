"""What a zero-shot classifier takes for what, and how far its confidence can be trusted."""

from typing import NamedTuple

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import (
    CHUNK_SIZE,
    longest_row,
    measured,
    row_blocks,
    tie_width,
    unit_sides,
)

CALIBRATION_BINS = 15
"""Bins of confidence, as in Guo et al."""


class Predictions(NamedTuple):
    """What a classifier says of each image."""

    predicted: Tensor
    """(N,) int64, the most similar class; the lower index of equals."""
    confidence: Tensor
    """(N,) float64, its softmax probability."""


class Confusion(NamedTuple):
    """Images of one class that were taken for another."""

    label: int
    """The true class."""
    predicted: int
    """What they were taken for."""
    images: int
    """How many images."""
    share: float
    """Of all images of the true class, 0–1."""


@measured
def zero_shot_predictions(
    image_features: Tensor,
    class_features: Tensor,
    *,
    logit_scale: float = 100.0,
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> Predictions:
    """The nearest class of every image, and the probability that softmax gives it.

    Args:
        image_features: (N, d), raw or unit.
        class_features: (C, d), raw or unit, for example from `class_vectors`.
        logit_scale: Factor on similarities in the softmax, the model's own.
        normalize: Whether similarity is the cosine, or the dot product of features as given.
        chunk_size: Images compared at once; bounds the memory, not the result.

    Raises:
        ValueError: If shapes do not fit, or a row is zero or not finite.

    Example:
        >>> found = zero_shot_predictions(torch.eye(2), torch.eye(2), logit_scale=1.0)
        >>> found.predicted.tolist(), round(found.confidence[0].item(), 4)
        ([0, 1], 0.7311)
    """
    images, classes = unit_sides(image_features, class_features, names=("image", "class"))
    tie = tie_width(images.dtype)
    if not normalize:
        images, classes = image_features.to(images), class_features.to(classes)
        tie *= longest_row(images) * longest_row(classes)
    predicted, confidence = [], []
    for rows in row_blocks(len(images), chunk_size):
        similarity = images[rows] @ classes.T
        is_best = similarity >= similarity.amax(dim=1, keepdim=True) - tie
        best = is_best.to(torch.uint8).argmax(dim=1)  # the first of equals
        predicted.append(best)
        probability = (logit_scale * similarity.double()).softmax(dim=1)
        confidence.append(probability.gather(1, best[:, None])[:, 0])
    return Predictions(torch.cat(predicted), torch.cat(confidence))


@measured
def per_class_recall(predicted: Tensor, labels: Tensor, class_count: int) -> Tensor:
    """The share of each class's images that are found, 0–1; higher is better.

    Args:
        predicted: (N,) whole numbers, as in `Predictions`.
        labels: (N,) whole numbers, the true class of each image.
        class_count: How many classes there are.

    Returns:
        (class_count,) float64; NaN for a class without images.

    Example:
        >>> per_class_recall(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3).tolist()
        [0.5, 1.0, nan]
    """
    _check_classes(predicted, labels, class_count)
    labels = labels.to(predicted.device).long()
    hits = labels.bincount(weights=(predicted == labels).double(), minlength=class_count)
    return hits / labels.bincount(minlength=class_count)


@measured
def confusion_pairs(
    predicted: Tensor, labels: Tensor, class_count: int, *, limit: int | None = 20
) -> list[Confusion]:
    """The mistakes by true and predicted class, most frequent first, then by class.

    Args:
        predicted: (N,) whole numbers, as in `Predictions`.
        labels: (N,) whole numbers, the true class of each image.
        class_count: How many classes there are.
        limit: How many pairs at most; None for all.

    Example:
        >>> confusion_pairs(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 1]), 2)
        [Confusion(label=0, predicted=1, images=2, share=1.0)]
    """
    _check_classes(predicted, labels, class_count)
    labels = labels.to(predicted.device).long()
    images_per_class = labels.bincount(minlength=class_count)
    wrong = predicted != labels
    pair, count = (labels[wrong] * class_count + predicted[wrong]).unique(return_counts=True)
    order = (-count).argsort(stable=True)[:limit]
    found = []
    for number, times in zip(pair[order].tolist(), count[order].tolist(), strict=True):
        label, taken_for = divmod(number, class_count)
        found.append(Confusion(label, taken_for, times, times / int(images_per_class[label])))
    return found


@measured
def expected_calibration_error(
    confidence: Tensor, correct: Tensor, *, bins: int = CALIBRATION_BINS
) -> float:
    """How far confidence is from accuracy, on average over images; lower is better.

    ECE = Σ_m |B_m|/N · |accuracy(B_m) − confidence(B_m)|, with B_m the images whose confidence is
    in ((m−1)/M, m/M], M = `bins`. Source: Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017, arXiv 1706.04599, equation 3.

    Args:
        confidence: (N,) probability of the predicted class, 0–1.
        correct: (N,) whether that is the true one.
        bins: M, of equal width.

    Returns:
        0–1.

    Raises:
        ValueError: If shapes differ, there are no images or bins, or a confidence is not in 0–1.

    Example:
        Two images of confidence 0.9, one of them right: |0.5 − 0.9|.

        >>> round(expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([1, 0])), 6)
        0.4
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            "confidence and correct must both be (images,), at least one; "
            f"got {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, correct = confidence.double(), correct.to(confidence.device).double()
    if not ((confidence >= 0) & (confidence <= 1 + 1e-12)).all():
        raise ValueError("a confidence is not a probability from 0 to 1")
    place = calibration_bins(confidence, bins=bins)
    surplus = place.bincount(weights=correct - confidence, minlength=bins)
    return surplus.abs().sum().item() / len(confidence)


def calibration_bins(confidence: Tensor, *, bins: int = CALIBRATION_BINS) -> Tensor:
    """(N,) the bin of each confidence, from 0: the right edge belongs to a bin, the left does not.

    Example:
        >>> calibration_bins(torch.tensor([0.0, 0.5, 0.6]), bins=2).tolist()
        [0, 0, 1]
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence.double(), edges[1:-1])


def _check_classes(predicted: Tensor, labels: Tensor, class_count: int) -> None:
    for name, classes in (("predicted", predicted), ("labels", labels)):
        if classes.shape != (len(labels),) or classes.is_floating_point() or not len(labels):
            raise ValueError(
                f"{name} must be (images,) whole numbers, as many as labels and at least one; "
                f"got {tuple(classes.shape)} of {classes.dtype}"
            )
        if classes.min() < 0 or classes.max() >= class_count:
            raise ValueError(
                f"{name} must be from 0 to {class_count - 1}, "
                f"got {int(classes.min())} to {int(classes.max())}"
            )
