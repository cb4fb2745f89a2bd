"""Work on every image of a source, in worker processes where there are many."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from clip_refine.console import Bar

FEW = 256
"""Images for which no worker processes are started."""
_CHUNK = 16
Item = TypeVar("Item")


def in_parallel(
    items: Dataset[Item], count: int, title: str, *, workers: int, visible: bool
) -> Iterator[Item]:
    """All items in order, with a progress bar.

    Args:
        items: Indexed from 0; must not raise, since a worker process would bury the message.
        count: How many there are.
        title: Of the bar.
        workers: Processes.
        visible: Whether to show the bar.
    """
    loader: DataLoader[Any] = DataLoader(
        items,
        sampler=range(count),
        batch_size=_CHUNK,
        collate_fn=list,
        num_workers=workers if count >= FEW else 0,
    )
    each = (item for chunk in loader for item in chunk)
    yield from Bar(title, count, visible=visible, transient=True).over(each)
