"""What a refined model lost against the one it came from, beside its averages.

A mean may stand still while answers change places. Measured on sets that were not refined on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from scipy.stats import binomtest
from torch import Tensor

from clip_refine.data import LabelledImages
from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, means
from clip_refine.evaluation.classify import confusion_pairs, zero_shot_predictions
from clip_refine.evaluation.scores import Answers, Measured, Outcome, TaskFeatures
from clip_refine.evaluation.similarity import measured
from clip_refine.results import ClassChange, ConfusionChange, TaskChange

LEVEL = 0.95  # that all intervals of a task's classes hold the truth at once


class ClassLoss(NamedTuple):
    """One class before and after."""

    label: int
    images: int
    before: float  # recall, 0–1
    after: float
    low: float  # of after less before; all classes' intervals together hold at `LEVEL`
    high: float


def churn(
    before: Mapping[str, Answers], after: Mapping[str, Answers], bootstrap: Bootstrap
) -> dict[str, Resampled]:
    """Share of queries whose top answer changed, 0–1; 0 for the same model, lower is calmer.

    Of each kind of query by its name: `churn` where there is one, else `KIND_churn`. Source: Milani
    Fard et al., "Launch and Iterate: Reducing Prediction Churn", NeurIPS 2016.
    """
    numbers: dict[str, Resampled] = {}
    for kind, was in before.items():
        changed = {f"{kind}_churn".lstrip("_"): was.first != after[kind].first}
        images = len(was.first) if was.owners is None else int(was.owners.max()) + 1
        numbers |= bootstrap.numbers(images, means(changed, was.owners))
    return numbers


@measured
def class_losses(before: Tensor, after: Tensor, labels: Tensor) -> list[ClassLoss]:
    """Every class's recall before and after, with intervals that hold for all classes at once.

    `before` and `after` say of each image whether a model is right. The interval rests on images
    that only one of them gets right: of m such images a share p speaks for the second model, with
    an exact binomial interval (Clopper and Pearson, Biometrika 1934) at 1 − (1 − `LEVEL`)/C for C
    classes (Bonferroni); the change is m/n (2p − 1), given m. It lies beside zero only where
    McNemar's exact test says so at that level. Not resampled: a thousand resamples have no tail of
    0.05/C.

    Ten images, all of them lost; and ten of which none changed:

    >>> import torch
    >>> was = torch.ones(20).bool()
    >>> now = torch.tensor([False] * 10 + [True] * 10)
    >>> lost, kept = class_losses(was, now, torch.arange(2).repeat_interleave(10))
    >>> round(lost.low, 3), round(lost.high, 3), kept.low, kept.high
    (-1.0, -0.29, 0.0, 0.0)
    """
    found = []
    classes = labels.unique().tolist()
    for label in classes:
        was, now = (side[labels == label] for side in (before, after))
        images, changed, won = len(was), int((was != now).sum()), int((now & ~was).sum())
        low = high = 0.0
        if changed:
            level = 1 - (1 - LEVEL) / len(classes)
            share = binomtest(won, changed).proportion_ci(confidence_level=level)
            low, high = (float(changed / images * (2 * end - 1)) for end in (share.low, share.high))
        before_share, after_share = (side.double().mean().item() for side in (was, now))
        found.append(ClassLoss(label, images, before_share, after_share, low, high))
    return found


def against(first: Outcome, own: Outcome, bootstrap: Bootstrap) -> Outcome:
    """One task's outcome with what changed since the first model: churn, and of classes the lost.

    `classes_lost` counts those whose interval of `class_losses` lies below zero; all are in the
    details. A task without answers at the top stays as it is.
    """
    numbers = churn(first.answers, own.answers, bootstrap)
    details: dict[str, list[dict[str, str | float]]] = {}
    labelled = own.answers.get("")
    if labelled is not None and labelled.truth is not None:
        truth = labelled.truth
        was, now = (side.answers[""].first == truth for side in (first, own))
        losses = class_losses(was, now, truth)
        names = [row["class"] for row in own.details["per_class"]]
        numbers["classes_lost"] = Resampled(float(sum(loss.high < 0 for loss in losses)))
        details["class_losses"] = [
            {"class": names[loss.label], **loss._asdict()} for loss in losses
        ]
    return replace(own, numbers={**own.numbers, **numbers}, details={**own.details, **details})


CONFUSIONS = 15
"""Pairs of classes that are shown, those confused most often before or after."""


def task_changes(
    before: Measured, after: Measured, tasks: Sequence[LabelledImages]
) -> tuple[TaskChange, ...]:
    """Every class as `class_losses` has it, and the most frequent confusions, before and after."""
    sides = zip(before.features.tasks, after.features.tasks, tasks, strict=True)
    return tuple(_task_change(was, now, tuple(task.class_names)) for was, now, task in sides)


def _task_change(before: TaskFeatures, after: TaskFeatures, names: tuple[str, ...]) -> TaskChange:
    hits, confusions, labels = [], [], before.labels
    for task in (before, after):
        predicted = zero_shot_predictions(task.image_features, task.class_features).predicted
        hits.append(predicted == labels)
        found = confusion_pairs(predicted, labels, len(names), limit=None)
        confusions.append({(pair.label, pair.predicted): pair.images for pair in found})
    images = labels.bincount(minlength=len(names)).tolist()
    first, second = confusions
    most = sorted({**first, **second}, key=lambda at: -max(first.get(at, 0), second.get(at, 0)))
    return TaskChange(
        name=before.name,
        classes=tuple(
            ClassChange(name=names[label], images=count, before=was, after=now, low=low, high=high)
            for label, count, was, now, low, high in class_losses(hits[0], hits[1], labels)
        ),
        confusions=tuple(
            ConfusionChange(
                label=names[pair[0]],
                predicted=names[pair[1]],
                images=images[pair[0]],
                before=first.get(pair, 0),
                after=second.get(pair, 0),
            )
            for pair in most[:CONFUSIONS]
        ),
    )
