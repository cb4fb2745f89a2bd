"""Tasks on images with classes: zero-shot classification and probes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import resampled_sums
from clip_refine.evaluation.confusion import (
    CALIBRATION_BINS,
    calibration_bins,
    confusion_pairs,
    expected_calibration_error,
    per_class_recall,
    zero_shot_predictions,
)
from clip_refine.evaluation.outcome import Bootstrap, Outcome, means
from clip_refine.evaluation.probe import few_shot_hits, linear_probe_hits, probe_halves
from clip_refine.evaluation.zero_shot import zero_shot_ranks

HALVES = "half of the images of each class train, the other half tests"
TRAIN_SOURCE = "trained on a source of its own"


def zero_shot_task(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    class_names: Sequence[str],
    logit_scale: float,
    bootstrap: Bootstrap,
) -> Outcome:
    """Top-1, top-5, mean per-class recall and calibration, with every class and confusion.

    Args:
        image_features: (N, d), raw or unit.
        class_features: (C, d), from `class_vectors`.
        labels: (N,) the class of each image.
        class_names: C, for the details.
        logit_scale: The model's, for its confidence.
        bootstrap: For the intervals.
    """
    ranks = zero_shot_ranks(image_features, class_features, labels)
    found = zero_shot_predictions(image_features, class_features, logit_scale=logit_scale)
    correct = found.predicted == labels
    recall = per_class_recall(found.predicted, labels, len(class_features))
    columns = {"top1": ranks == 0, "top5": ranks < 5}
    sizes = labels.bincount(minlength=len(class_features))
    scores = means(columns) | {
        "mean_per_class_recall": recall.nanmean().item(),
        "expected_calibration_error": expected_calibration_error(found.confidence, correct),
    }
    resampled = bootstrap.of_images(columns) | {
        "mean_per_class_recall": _resampled_recalls(correct, labels, bootstrap),
        "expected_calibration_error": _resampled_calibration(found.confidence, correct, bootstrap),
    }
    classes = zip(class_names, sizes.tolist(), recall.tolist(), strict=True)
    confusions = confusion_pairs(found.predicted, labels, len(class_features))
    return Outcome(
        protocol="every image once; the class with the nearest mean prompt",
        counts={"images": len(labels), "classes": len(class_features)},
        scores=scores,
        resampled=resampled,
        details={
            "per_class": [
                {"class": name, "images": size, "recall": value if size else None}
                for name, size, value in classes
            ],
            "confusions": [
                {
                    "class": class_names[pair.label],
                    "taken_for": class_names[pair.predicted],
                    "images": pair.images,
                    "share": pair.share,
                }
                for pair in confusions
            ],
            "logit_scale": logit_scale,
            "calibration_bins": CALIBRATION_BINS,
        },
    )


def linear_probe_task(
    image_features: Tensor,
    labels: Tensor,
    training: tuple[Tensor, Tensor] | None,
    *,
    bootstrap: Bootstrap,
) -> Outcome:
    """Accuracy of a logistic regression on the images that it was not fitted on.

    Args:
        image_features: (N, d), raw or unit.
        labels: (N,) the class of each image.
        training: Features and classes to fit on; None to fit on half of the above.
        bootstrap: For the interval; its seed is that of the splits, too.
    """
    generator = np.random.default_rng(bootstrap.seed)
    train, test, how = _split(image_features, labels, training, generator)
    hits = linear_probe_hits(*train, *test, generator)
    columns = {"accuracy": hits.correct}
    return Outcome(
        protocol=f"logistic regression, {how}; C chosen on half of the training images",
        counts=_counts(train, test),
        scores=means(columns),
        resampled=bootstrap.of_images(columns),
        details={"C": hits.strength},
    )


def few_shot_task(
    image_features: Tensor,
    labels: Tensor,
    training: tuple[Tensor, Tensor] | None,
    *,
    shots: Sequence[int],
    draws: int,
    bootstrap: Bootstrap,
) -> Outcome:
    """Mean accuracy over draws of few training images a class; arguments as `linear_probe_task`.

    Returns:
        `accuracy@K-shot` and `deviation_over_draws@K-shot` for each number of shots. The interval
        is over test images, with the draws as they are.
    """
    generator = np.random.default_rng(bootstrap.seed)
    train, test, how = _split(image_features, labels, training, generator)
    columns, scores, by_draw = {}, {}, {}
    for count in shots:
        hits = few_shot_hits(*train, *test, shots=count, draws=draws, seed=bootstrap.seed)
        name = f"accuracy@{count}-shot"
        columns[name] = hits.double().mean(dim=0)
        of_draws = hits.double().mean(dim=1)
        by_draw[name] = of_draws.tolist()
        scores |= means({name: columns[name]})
        scores[f"deviation_over_draws@{count}-shot"] = of_draws.std().item()
    fewest = int(train[1].unique(return_counts=True)[1].min())
    return Outcome(
        protocol=f"logistic regression on K images a class, mean of {draws} draws; {how}",
        counts=_counts(train, test) | {"draws": draws, "fewest_training_images_a_class": fewest},
        scores=scores,
        resampled=bootstrap.of_images(columns),
        details={"by_draw": by_draw},
    )


Split = tuple[Tensor, Tensor]


def _split(
    features: Tensor, labels: Tensor, training: Split | None, generator: np.random.Generator
) -> tuple[Split, Split, str]:
    if training is not None:
        return training, (features, labels), TRAIN_SOURCE
    train, test = probe_halves(features, labels, generator)
    return (features[train], labels[train]), (features[test], labels[test]), HALVES


def _counts(train: Split, test: Split) -> dict[str, int]:
    return {
        "images": len(test[1]),
        "training_images": len(train[1]),
        "classes": len(train[1].unique()),
    }


def _resampled_recalls(correct: Tensor, labels: Tensor, bootstrap: Bootstrap) -> Tensor:
    """Mean recall over the classes that have images in a resample."""
    hits, sizes = (
        resampled_sums(
            values,
            torch.arange(len(labels)),
            labels,
            len(labels),
            **bootstrap.draws,
        )
        for values in (correct, torch.ones(len(labels)))
    )
    return torch.cat([(hit / size).nanmean(dim=1) for hit, size in zip(hits, sizes, strict=True)])


def _resampled_calibration(confidence: Tensor, correct: Tensor, bootstrap: Bootstrap) -> Tensor:
    surplus = resampled_sums(
        correct.double() - confidence,
        torch.arange(len(correct)),
        calibration_bins(confidence),
        len(correct),
        **bootstrap.draws,
    )
    return torch.cat([block.abs().sum(dim=1) for block in surplus]) / len(correct)
