"""What changed within the classes of a zero-shot task."""

from collections.abc import Sequence

from clip_refine.data import LabelledImages
from clip_refine.evaluation.confusion import (
    confusion_pairs,
    per_class_recall,
    zero_shot_predictions,
)
from clip_refine.evaluation.paired import Measured
from clip_refine.evidence import ClassChange, ConfusionChange, TaskChange

CONFUSIONS = 15
"""Pairs of classes that are shown, those confused most often before or after."""


def task_changes(
    before: Measured, after: Measured, tasks: Sequence[LabelledImages]
) -> tuple[TaskChange, ...]:
    """Recall of every class and the most frequent confusions, before and after.

    Args:
        before: The model as it came.
        after: The refined one, on the same items.
        tasks: In the order in which they were embedded.
    """
    return tuple(
        _task_change(before, after, number, tuple(task.class_names))
        for number, task in enumerate(tasks)
    )


def _task_change(
    before: Measured, after: Measured, number: int, names: tuple[str, ...]
) -> TaskChange:
    recalls, confusions = [], []
    labels = before.features.tasks[number].labels
    for side in (before, after):
        task = side.features.tasks[number]
        predicted = zero_shot_predictions(task.image_features, task.class_features).predicted
        recalls.append(per_class_recall(predicted, labels, len(names)))
        found = confusion_pairs(predicted, labels, len(names), limit=None)
        confusions.append({(pair.label, pair.predicted): pair.images for pair in found})
    images = labels.bincount(minlength=len(names)).tolist()
    was, now = confusions
    most = sorted({**was, **now}, key=lambda pair: -max(was.get(pair, 0), now.get(pair, 0)))
    return TaskChange(
        name=before.features.tasks[number].name,
        classes=tuple(
            ClassChange(
                name=name,
                images=images[index],
                before=float(recalls[0][index]),
                after=float(recalls[1][index]),
            )
            for index, name in enumerate(names)
            if images[index]
        ),
        confusions=tuple(
            ConfusionChange(
                label=names[pair[0]],
                predicted=names[pair[1]],
                images=images[pair[0]],
                before=was.get(pair, 0),
                after=now.get(pair, 0),
            )
            for pair in most[:CONFUSIONS]
        ),
    )
