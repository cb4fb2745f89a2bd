"""What a linear classifier can still read from frozen image features."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clip_refine.evaluation.chunks import measured, unit_rows

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation, C in scikit-learn, that the probe chooses from."""


@measured
def linear_probe(image_features: Tensor, labels: Tensor, *, seed: int = 0) -> float:
    """Accuracy of a logistic regression that was trained on half of the images on the other half.

    Within each class half of the images (the odd one too) train it. Features are scaled to norm 1,
    then every dimension to mean 0 and deviation 1 by the training half, so that neither the model's
    norms nor its cone matter. C is the best of `STRENGTHS` (the lowest of equals) on half of the
    training half; the final fit uses all of that. Source of the protocol: Radford et al.,
    ICML 2021, arXiv 2103.00020, section 3.2, with a smaller sweep.

    Args:
        image_features: (N, d), raw or unit.
        labels: (N,) whole numbers, the class of each image.
        seed: Of both splits.

    Returns:
        The share of test images whose class is found, 0-1; higher is better.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, there are fewer than two
            classes, or no class has two images.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
        >>> linear_probe(features, torch.tensor([0, 0, 1, 1]))
        1.0
    """
    unit = unit_rows("image features", image_features).cpu().double().numpy()
    classes = _checked(labels, len(unit))
    generator = np.random.default_rng(seed)
    train, test = stratified_halves(classes, generator)
    fit, validation = (train[half] for half in stratified_halves(classes[train], generator))
    chosen = STRENGTHS[len(STRENGTHS) // 2]
    if len(validation):
        accuracies = _accuracies(unit, classes, fit, validation, STRENGTHS)
        chosen = STRENGTHS[int(np.argmax(accuracies))]
    return _accuracies(unit, classes, train, test, (chosen,))[0]


def stratified_halves(
    classes: NDArray[np.int64], generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two sorted lists of positions, half of each class in either; the odd one goes to the first.

    Example:
        >>> first, second = stratified_halves(np.array([0, 0, 1]), np.random.default_rng(0))
        >>> len(first), len(second)
        (2, 1)
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for label in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == label)).tolist()
        half = (len(members) + 1) // 2
        sides[0].extend(members[:half])
        sides[1].extend(members[half:])
    first, second = (np.array(sorted(side), dtype=np.int64) for side in sides)
    return first, second


def _checked(labels: Tensor, count: int) -> NDArray[np.int64]:
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels must be ({count},) whole numbers, one an image; "
            f"got {tuple(labels.shape)} of {labels.dtype}"
        )
    sizes = labels.unique(return_counts=True)[1]
    if len(sizes) < 2 or int(sizes.max()) < 2:
        raise ValueError(
            "a linear probe needs two classes or more and two images of some class; "
            f"got {len(sizes)} classes with {int(sizes.max())} images at most"
        )
    return labels.cpu().long().numpy()


def _accuracies(
    unit: NDArray[np.float64],
    classes: NDArray[np.int64],
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    strengths: tuple[float, ...],
) -> list[float]:
    """Accuracy on `test` after a fit on `train` for each strength, weak fits first."""
    scaler = StandardScaler().fit(unit[train])
    train_rows, test_rows = scaler.transform(unit[train]), scaler.transform(unit[test])
    classifier = LogisticRegression(max_iter=500, warm_start=True)
    accuracies = []
    for strength in strengths:
        classifier.set_params(C=strength)
        with warnings.catch_warnings():
            # the last digits of the weights do not change which class is nearest
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train_rows, classes[train])
        accuracies.append(float(classifier.score(test_rows, classes[test])))
    return accuracies
