"""A zero-shot task as the page shows it."""

from collections.abc import Sequence
from dataclasses import dataclass

from clip_refine.evidence import ClassChange, TaskChange
from clip_refine.report.score_lines import signed

SHOWN = 8
"""Classes at most on each side; all are in the table."""


@dataclass(frozen=True)
class TaskView:
    """A task with its classes sorted.

    Attributes:
        name: The task.
        classes: All.
        gained: Those that gained most, first the most.
        lost: Those that lost most, first the most.
        rows: All classes as cells of a table, by change.
        confusions: As cells of a table.
    """

    name: str
    classes: Sequence[ClassChange]
    gained: Sequence[ClassChange]
    lost: Sequence[ClassChange]
    rows: Sequence[Sequence[str]]
    confusions: Sequence[Sequence[str]]


def task_view(task: TaskChange) -> TaskView:
    """Sort the classes by what they gained."""
    by_gain = sorted(task.classes, key=lambda found: found.before - found.after)
    return TaskView(
        name=task.name,
        classes=task.classes,
        gained=[found for found in by_gain if found.after > found.before][:SHOWN],
        lost=[found for found in reversed(by_gain) if found.after < found.before][:SHOWN],
        rows=[
            (
                found.name,
                str(found.images),
                f"{found.before:.3f}",
                f"{found.after:.3f}",
                signed(found.after - found.before),
            )
            for found in by_gain
        ],
        confusions=[
            (pair.label, pair.predicted, str(pair.images), str(pair.before), str(pair.after))
            for pair in task.confusions
        ],
    )
