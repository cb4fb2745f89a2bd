"""Images → classes or texts to choose from: zero-shot, confusions, compositions, probes."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from clip_refine.evaluation.retrieval import recall_at
from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    best_rank,
    compared_sides,
    measured,
    row_blocks,
    tie_width,
    unit_rows,
    unit_sides,
)

# --------------------------------------------------------------------------------------------------
# Classifying images by the captions of the classes, without an example of any.


@measured
def class_vectors(prompt_features: Tensor) -> Tensor:
    """One unit vector a class from the features of its prompts.

    w_c = normalise(1/T Σ_t normalise(prompt_ct)), as in Radford et al., ICML 2021,
    arXiv 2103.00020, section 3.1.4 (ensembling over embedding space).

    Args:
        prompt_features: (C, T, d), raw or unit: C classes in T templates.

    Returns:
        (C, d), rows of norm 1.

    Raises:
        ValueError: If the shape is another, a prompt is zero or not finite, or the prompts of a
            class cancel.

    Example:
        >>> class_vectors(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]]))
        tensor([[0.7071, 0.7071]])
    """
    if prompt_features.ndim != 3:
        raise ValueError(
            f"prompt features must be (classes, templates, dim), got {tuple(prompt_features.shape)}"
        )
    class_count, template_count, dim = prompt_features.shape
    prompts = unit_rows("prompt features", prompt_features.reshape(-1, dim))
    means = prompts.reshape(class_count, template_count, dim).mean(dim=1)
    return unit_rows("mean of a class's prompts", means)


@measured
def zero_shot_scores(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """How often the true class is the nearest, or among the nearest five.

    Of equally similar classes (nearer than rounding) the lower index stands first. Higher is
    better.

    Args:
        image_features: (N, d), raw or unit.
        class_features: (C, d), raw or unit, for example from `class_vectors`.
        labels: (N,) whole numbers, the true class of each image.
        normalize: Whether similarity is the cosine; if not, the dot product of features as given,
            for transforms whose lengths mean something.
        chunk_size: Images compared at once; bounds the memory, not the result.

    Returns:
        `top1`; `top5`, with fewer than five classes necessarily 1; `mean_per_class_recall`, top1
        within each class that has images, averaged over those classes. All in 0–1.

    Raises:
        ValueError: If shapes do not fit, a label names no class, or a row is zero or not finite.

    Example:
        Class 0: one of two images right; class 1: its one image right.

        >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> scores = zero_shot_scores(image, torch.eye(2), torch.tensor([0, 0, 1]))
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'top1': 0.667, 'top5': 1.0, 'mean_per_class_recall': 0.75}
    """
    ranks = zero_shot_ranks(
        image_features, class_features, labels, normalize=normalize, chunk_size=chunk_size
    )
    found = _recall_by_class(ranks == 0, labels, len(class_features))
    return {
        "top1": recall_at(ranks, 1),
        "top5": recall_at(ranks, 5),
        "mean_per_class_recall": found.nanmean().item(),
    }


@measured
def zero_shot_ranks(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """(N,) 0-based rank of each image's true class among all classes; 0 is a hit."""
    images, classes, tie = compared_sides(
        image_features, class_features, normalize=normalize, names=("image", "class")
    )
    _check_labels(images, labels)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"labels must be from 0 to {len(classes) - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    labels = labels.to(images.device).long()
    return torch.cat(
        [
            best_rank(images[rows] @ classes.T, labels[rows, None], tie=tie)
            for rows in row_blocks(len(images), chunk_size)
        ]
    )


def _check_labels(features: Tensor, labels: Tensor) -> None:
    count = len(features)
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels must be ({count},) whole numbers, one an image; "
            f"got {tuple(labels.shape)} of {labels.dtype}"
        )


# --------------------------------------------------------------------------------------------------
# What a zero-shot classifier takes for what, and how far its confidence can be trusted.


CALIBRATION_BINS = 15  # of confidence, as in Guo et al.


class Predictions(NamedTuple):
    """What a classifier says of each image."""

    predicted: Tensor  # (N,) int64, the most similar class; the lower index of equals
    confidence: Tensor  # (N,) float64, its softmax probability


class Confusion(NamedTuple):
    """Images of one class that were taken for another."""

    label: int  # the true class
    predicted: int  # what they were taken for
    images: int  # how many
    share: float  # of all images of the true class, 0–1


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
    images, classes, tie = compared_sides(
        image_features, class_features, normalize=normalize, names=("image", "class")
    )
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
    return _recall_by_class(predicted == labels.to(predicted.device), labels, class_count)


def _recall_by_class(hits: Tensor, labels: Tensor, class_count: int) -> Tensor:
    """(C,) the share of each class's images that are hit, NaN for a class without images."""
    labels = labels.to(hits.device).long()
    found = labels.bincount(weights=hits.double(), minlength=class_count)
    return found / labels.bincount(minlength=class_count)


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
    matrix = confusion_matrix(labels.cpu(), predicted.cpu(), labels=range(class_count))
    sizes = matrix.sum(axis=1)
    np.fill_diagonal(matrix, 0)
    pairs = np.argwhere(matrix)
    times = matrix[tuple(pairs.T)]
    order = np.argsort(-times, kind="stable")[:limit]
    return [
        Confusion(label, taken_for, count, count / int(sizes[label]))
        for (label, taken_for), count in zip(
            pairs[order].tolist(), times[order].tolist(), strict=True
        )
    ]


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


# --------------------------------------------------------------------------------------------------
# Whether a model hears the order of words: an image against texts of nearly the same words.
#
# Sources: SugarCrepe (Hsieh et al., NeurIPS 2023, arXiv 2306.14610), SugarCrepe++ (Dumpala et al.,
# NeurIPS 2024, arXiv 2406.11171), Winoground (Thrush et al., CVPR 2022, arXiv 2204.03162).


@measured
def compositions(
    image_features: Tensor, text_features: Tensor, *, paired: bool = False
) -> dict[str, Tensor]:
    """Which comparisons are right; what ties counts as wrong, chance is ½ for two texts.

    Of (N·T, d) texts every image has T, its own first, the wrong one last; T is 2, or 3 where a
    text and its paraphrase are both its own. Not paired, (N,) bool: `composition_accuracy`, all own
    texts nearer to the image than the wrong one; with T = 3 also `text_only_accuracy`, the own
    texts nearer to each other than either is to the wrong one. `paired`, where images 2i and 2i + 1
    are described by each other's wrong text, (N/2,), Winoground's: `text_score`, both images nearer
    to their own text, `image_score`, both texts nearer to their own image, `group_score`, both.
    """
    image, text = unit_sides(image_features, text_features)
    count, texts = len(image), len(text) // len(image)
    if (
        len(text) != count * texts
        or texts not in ((2,) if paired else (2, 3))
        or (paired and count % 2)
    ):
        raise ValueError(
            "compositions are images with two texts each, own and wrong, or three, own, own and "
            f"wrong; paired ones an even number with two. Got {count} images and {len(text)} texts"
        )
    tie = tie_width(image.dtype)
    text = text.view(count, texts, -1)
    own, wrong = text[:, :-1], text[:, -1]
    scores = (own @ image[:, :, None])[:, :, 0]
    right = (scores > (wrong * image).sum(dim=1, keepdim=True) + tie).all(dim=1)
    if paired:
        elsewhere = (own[:, 0] * image.view(-1, 2, image.shape[1]).flip(1).flatten(0, 1)).sum(dim=1)
        found = (scores[:, 0] > elsewhere + tie).view(-1, 2).all(dim=1)
        both = right.view(-1, 2).all(dim=1)
        return {"text_score": both, "image_score": found, "group_score": both & found}
    hits = {"composition_accuracy": right}
    if texts == 3:
        together = (own[:, 0] * own[:, 1]).sum(dim=1, keepdim=True)
        apart = (own @ wrong[:, :, None])[:, :, 0]
        hits["text_only_accuracy"] = (together > apart + tie).all(dim=1)
    return hits


# --------------------------------------------------------------------------------------------------
# What a linear classifier can still read from frozen image features.


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C in scikit-learn, that the probe chooses from
FEW_SHOT_STRENGTH = 1e-2  # with few images a class, where none can be spared to choose it on

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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
    return probe_hits(image_features, labels, seed=seed).double().mean().item()


def probe_hits(image_features: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """(T,) which test images `linear_probe` is right about; the halves depend on `labels` alone."""
    generator = np.random.default_rng(seed)
    train, test = probe_halves(image_features, labels, generator)
    unit = unit_rows("image features", image_features)
    correct, _ = linear_probe_hits(unit[train], labels[train], unit[test], labels[test], generator)
    return correct


def can_halve(labels: Tensor) -> bool:
    """Whether some images can train a probe and others test it: two classes, one with two images.

    >>> can_halve(torch.tensor([0, 1, 2])), can_halve(torch.tensor([0, 1, 1]))
    (False, True)
    """
    sizes = labels.unique(return_counts=True)[1]
    return len(sizes) > 1 and int(sizes.max()) > 1


def probe_halves(
    image_features: Tensor, labels: Tensor, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Positions of the images that train and of those that test, half of each class."""
    _check_labels(image_features, labels)
    sizes = labels.unique(return_counts=True)[1]
    if not can_halve(labels):
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
) -> tuple[Tensor, float]:
    """(T,) which test images are right after a fit as in `linear_probe`, and the C chosen."""
    train, classes, test, test_classes = _probed(
        train_features, train_labels, test_features, test_labels
    )
    fit, validation = stratified_halves(classes, generator)
    chosen = STRENGTHS[len(STRENGTHS) // 2]
    if len(validation) and len(np.unique(classes[fit])) > 1:
        rows = _scaled(train[fit], train[validation])
        hits = _fit_hits(rows[0], classes[fit], rows[1], classes[validation], STRENGTHS)
        chosen = STRENGTHS[int(np.argmax(hits.mean(axis=1)))]
    train, test = _scaled(train, test)
    correct = _fit_hits(train, classes, test, test_classes, (chosen,))[0]
    return torch.from_numpy(correct), chosen


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
    """(draws, T) the same with `shots` images a class, drawn several times by `seed`.

    Dimensions are scaled by all training images, whose classes are not needed for that; C is
    `FEW_SHOT_STRENGTH`. A class with fewer images gives all it has; fewer shots are a part of more.
    """
    if shots < 1 or draws < 1:
        raise ValueError(f"{shots} shots and {draws} draws; both must be at least 1")
    train, classes, test, test_classes = _probed(
        train_features, train_labels, test_features, test_labels
    )
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
    """Two sorted lists of positions, half of each class in either, the odd one in the first."""
    is_first = np.zeros(len(classes), dtype=bool)
    for label in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == label))
        is_first[members[: (len(members) + 1) // 2]] = True
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)


def _probed(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> tuple[Floats, Integers, Floats, Integers]:
    """Unit features and classes to train on and to test on, as scikit-learn takes them."""
    _check_labels(train_features, train_labels)
    _check_labels(test_features, test_labels)
    if len(train_labels.unique()) < 2:
        raise ValueError("a linear probe needs two classes or more to train on")
    train = unit_rows("training features", train_features).cpu().double().numpy()
    test = unit_rows("test features", test_features).cpu().double().numpy()
    return train, train_labels.cpu().long().numpy(), test, test_labels.cpu().long().numpy()


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
