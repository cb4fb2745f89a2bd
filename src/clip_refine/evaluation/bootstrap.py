"""How much a number would move with other images of the same kind: the bootstrap."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import measured

_COUNTS_AT_ONCE = 2**24  # resampled weights held at a time, 128 MB


@measured
def resampled_means(values: Tensor, *, resamples: int, seed: int) -> Tensor:
    """The mean over items that are drawn anew with replacement, many times.

    Two calls with one seed and one number of items draw the same items, so that results of two
    models on the same images can be compared pair by pair: the difference of their resampled means
    is the resampled mean of their differences. Source: Efron, "Bootstrap methods: another look at
    the jackknife", Annals of Statistics 1979.

    Args:
        values: (N,) or (N, d), one row an item.
        resamples: How often.
        seed: Of the items drawn.

    Returns:
        (resamples,) or (resamples, d), float64 on the CPU.

    Raises:
        ValueError: If there are no items or no resamples.

    Example:
        >>> resampled_means(torch.full((5,), 0.25), resamples=2, seed=0).tolist()
        [0.25, 0.25]
    """
    if len(values) < 1 or resamples < 1:
        raise ValueError(f"{len(values)} items and {resamples} resamples; both must be at least 1")
    values = values.detach().cpu().double()
    blocks = _counts(len(values), resamples, seed)
    return torch.cat([counts @ values for counts in blocks]) / len(values)


def interval(differences: Tensor, *, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled differences, lower and upper end.

    Args:
        differences: (R,) one a resample.
        level: Share of them inside.

    Example:
        >>> interval(torch.linspace(0, 1, 101, dtype=torch.float64), level=0.9)
        (0.05, 0.95)
    """
    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(differences.double(), ends).tolist()
    return low, high


def _counts(count: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each item was drawn, (rows, N) float64, some resamples at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _COUNTS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = torch.randint(count, (size, count), generator=generator)
        counts = torch.zeros(size, count, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
