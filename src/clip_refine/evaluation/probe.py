"""What a linear classifier can still read from frozen image features."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clip_refine.evaluation.chunks import measured, unit_rows

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation, C in scikit-learn, that the probe chooses from."""

FEW_SHOT_STRENGTH = 1e-2
"""C with few images a class, where none can be spared to choose it on."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class ProbeHits(NamedTuple):
    """Which test images a probe classifies right."""

    correct: Tensor
    """(T,) bool."""
    strength: float
    """C that was chosen."""


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
    generator = np.random.default_rng(seed)
    train, test = probe_halves(image_features, labels, generator)
    unit = unit_rows("image features", image_features)
    hits = linear_probe_hits(unit[train], labels[train], unit[test], labels[test], generator)
    return hits.correct.double().mean().item()


def probe_halves(
    image_features: Tensor, labels: Tensor, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Positions of the images that train and of those that test, half of each class.

    Raises:
        ValueError: As `linear_probe`.
    """
    _check_labels(image_features, labels)
    sizes = labels.unique(return_counts=True)[1]
    if len(sizes) < 2 or int(sizes.max()) < 2:
        raise ValueError(
            "a linear probe needs two classes or more and two images of some class; "
            f"got {len(sizes)} classes with {int(sizes.max())} images at most"
        )
    halves = stratified_halves(labels.cpu().long().numpy(), generator)
    return torch.from_numpy(halves[0]), torch.from_numpy(halves[1])


@measured
def linear_probe_hits(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    generator: np.random.Generator,
) -> ProbeHits:
    """Fit on some images and test on others, as in `linear_probe`.

    Args:
        train_features: (N, d), raw or unit.
        train_labels: (N,) whole numbers.
        test_features: (T, d), raw or unit.
        test_labels: (T,) whole numbers, the same classes.
        generator: Draws the part of the training images that C is chosen on.

    Raises:
        ValueError: If shapes do not fit, or a row is zero or not finite.
    """
    train, test = _units(train_features, train_labels, test_features, test_labels)
    classes, test_classes = train_labels.cpu().long().numpy(), test_labels.cpu().long().numpy()
    fit, validation = stratified_halves(classes, generator)
    chosen = STRENGTHS[len(STRENGTHS) // 2]
    if len(validation) and len(np.unique(classes[fit])) > 1:
        hits = _hits(train[fit], classes[fit], train[validation], classes[validation], STRENGTHS)
        chosen = STRENGTHS[int(np.argmax(hits.mean(axis=1)))]
    correct = _hits(train, classes, test, test_classes, (chosen,))[0]
    return ProbeHits(torch.from_numpy(correct), chosen)


@measured
def few_shot_hits(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: int,
    draws: int,
    seed: int,
) -> Tensor:
    """The same with `shots` images a class, drawn several times.

    Dimensions are scaled by all training images, whose classes are not needed for that; C is
    `FEW_SHOT_STRENGTH`. A class with fewer images gives all it has.

    Args:
        train_features: (N, d), raw or unit: what is drawn from.
        train_labels: (N,) whole numbers.
        test_features: (T, d), raw or unit.
        test_labels: (T,) whole numbers, the same classes.
        shots: Images a class.
        draws: How often.
        seed: Of the draws; fewer shots are a part of more.

    Returns:
        (draws, T) bool, whether each test image is classified right.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, or a number is below 1.
    """
    if shots < 1 or draws < 1:
        raise ValueError(f"{shots} shots and {draws} draws; both must be at least 1")
    train, test = _units(train_features, train_labels, test_features, test_labels)
    classes, test_classes = train_labels.cpu().long().numpy(), test_labels.cpu().long().numpy()
    train, test = _scaled(train, test)
    found = []
    for draw in range(draws):
        order = np.random.default_rng([seed, draw]).permutation(len(classes))
        chosen = np.concatenate(
            [order[classes[order] == label][:shots] for label in np.unique(classes)]
        )
        found.append(
            _fit_hits(train[chosen], classes[chosen], test, test_classes, (FEW_SHOT_STRENGTH,))[0]
        )
    return torch.from_numpy(np.stack(found))


def stratified_halves(
    classes: Integers, generator: np.random.Generator
) -> tuple[Integers, Integers]:
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


def _units(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> tuple[Floats, Floats]:
    _check_labels(train_features, train_labels)
    _check_labels(test_features, test_labels)
    if len(train_labels.unique()) < 2:
        raise ValueError("a linear probe needs two classes or more to train on")
    train = unit_rows("training features", train_features).cpu().double().numpy()
    return train, unit_rows("test features", test_features).cpu().double().numpy()


def _check_labels(features: Tensor, labels: Tensor) -> None:
    count = len(features)
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels must be ({count},) whole numbers, one an image; "
            f"got {tuple(labels.shape)} of {labels.dtype}"
        )


def _hits(
    train: Floats,
    classes: Integers,
    test: Floats,
    test_classes: Integers,
    strengths: Sequence[float],
) -> NDArray[np.bool_]:
    """As `_fit_hits`, with every dimension scaled by the training images."""
    train_rows, test_rows = _scaled(train, test)
    return _fit_hits(train_rows, classes, test_rows, test_classes, strengths)


def _scaled(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Every dimension to mean 0 and deviation 1 by the training images."""
    scaler = StandardScaler().fit(train)
    return np.asarray(scaler.transform(train)), np.asarray(scaler.transform(test))


def _fit_hits(
    train: Floats,
    classes: Integers,
    test: Floats,
    test_classes: Integers,
    strengths: Sequence[float],
) -> NDArray[np.bool_]:
    """(strengths, T) which test images are right after a fit with each C, weak fits first."""
    classifier = LogisticRegression(max_iter=500, warm_start=True)
    found = []
    for strength in strengths:
        classifier.set_params(C=strength)
        with warnings.catch_warnings():
            # the last digits of the weights do not change which class is nearest
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train, classes)
        found.append(classifier.predict(test) == test_classes)
    return np.stack(found)
