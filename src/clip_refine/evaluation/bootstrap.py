"""How much a number would move with other images of the same kind: the bootstrap."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clip_refine.evaluation.similarity import measured

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

    Example:
        >>> resampled_means(torch.full((5,), 0.25), resamples=2, seed=0).tolist()
        [0.25, 0.25]
    """
    if len(values) < 1 or resamples < 1:
        raise ValueError(f"{len(values)} items and {resamples} resamples; both must be at least 1")
    values = values.detach().cpu().double()
    blocks = resampled_counts(len(values), resamples=resamples, seed=seed)
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


def resampled_counts(count: int, *, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each item was drawn, (rows, N) float64, some resamples at a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _COUNTS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = torch.randint(count, (size, count), generator=generator)
        counts = torch.zeros(size, count, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def resampled_ratios(
    values: Tensor, owners: Tensor, image_count: int, *, resamples: int, seed: int
) -> Tensor:
    """Means over queries with the images drawn anew: an image brings all its queries along.

    Args:
        values: (Q, m), m numbers of each query.
        owners: (Q,) the image of each query.
        image_count: N.
        resamples: How often.
        seed: Of the images drawn.

    Example:
        >>> values, owners = torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1])
        >>> resampled_ratios(values, owners, 2, resamples=2, seed=0).tolist()
        [[1.0], [1.0]]
    """
    values, owners = values.detach().cpu().double(), owners.cpu()
    columns = torch.zeros(image_count, values.shape[1] + 1, dtype=torch.float64)
    counted = torch.cat([values, torch.ones(len(values), 1, dtype=torch.float64)], dim=1)
    columns.index_add_(0, owners, counted)
    sums = resampled_means(columns, resamples=resamples, seed=seed)
    return sums[:, :-1] / sums[:, -1:]


def resampled_sums(
    values: Tensor, owners: Tensor, groups: Tensor, image_count: int, *, resamples: int, seed: int
) -> Iterator[Tensor]:
    """Sums over queries within groups with the images drawn anew, some resamples at a time.

    Args:
        values: (Q,) a number of each query.
        owners: (Q,) the image of each query.
        groups: (Q,) the group of each query, from 0.
        image_count: N.
        resamples: How often.
        seed: Of the images drawn.
    """
    group_count = int(groups.max()) + 1
    places = torch.stack([groups.cpu(), owners.cpu()])
    sums = torch.sparse_coo_tensor(
        places, values.detach().cpu().double(), (group_count, image_count), check_invariants=True
    ).coalesce()
    for counts in resampled_counts(image_count, resamples=resamples, seed=seed):
        yield torch.sparse.mm(sums, counts.T).T


def resampled_medians(
    values: Tensor, owners: Tensor, image_count: int, *, resamples: int, seed: int
) -> Tensor:
    """Medians over queries with the images drawn anew; of an even number the middle two's mean.

    Arguments as in `resampled_ratios`, `values` (Q,).
    """
    distinct, groups = values.detach().cpu().double().unique(return_inverse=True)
    ones = torch.ones(len(groups))
    medians = []
    for counts in resampled_sums(ones, owners, groups, image_count, resamples=resamples, seed=seed):
        reached = counts.cumsum(1).contiguous()
        total = reached[:, -1:]
        # the 0-based places of the middle two, as counts that must be passed to be there
        middle = torch.cat([((total - 1) / 2).floor(), (total / 2).floor()], dim=1) + 0.5
        medians.append(distinct[torch.searchsorted(reached, middle)].mean(dim=1))
    return torch.cat(medians)
