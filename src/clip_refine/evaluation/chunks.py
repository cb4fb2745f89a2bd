"""Similarity matrices too large to hold, a few rows at a time.

100,000 × 100,000 similarities are 40 GB; 128 rows of them are 50 MB. Every metric that needs all
of them walks over such blocks of whole rows.

The last bits of a matrix product depend on where in it a number stands, so that two copies of one
caption need not score the same. Scores nearer than that rounding count as equal everywhere, and
equals are ranked by index: results then depend neither on the block size nor on the machine.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

CHUNK_SIZE = 128
"""Queries a block: 50 MB of float32 similarities to 100,000 items."""

ROWS_AT_ONCE = 2048
"""Feature rows widened to float64 at a time where no similarities are needed."""


COLUMNS_AT_ONCE = 8192
"""Items of a block that are looked at together where looking makes wider copies."""


def tie_width(dtype: torch.dtype) -> float:
    """Difference below which two cosines computed in `dtype` count as equal, 16 roundings.

    Example:
        >>> tie_width(torch.float32)
        1.9073486328125e-06
    """
    return 16 * torch.finfo(dtype).eps


def measured(metric: Callable[P, R]) -> Callable[P, R]:
    """Run `metric` without gradients and without autocast, on whatever device its tensors are."""

    @wraps(metric)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = {a.device.type for a in [*args, *kwargs.values()] if isinstance(a, Tensor)}
        device_type = devices.pop() if len(devices) == 1 else "cpu"
        with torch.no_grad(), torch.autocast(device_type=device_type, enabled=False):
            return metric(*args, **kwargs)

    return plainly


def unit_rows(name: str, features: Tensor) -> Tensor:
    """Rows scaled to norm 1, in float32, or in float64 if they are given so.

    Args:
        name: What to call the features in a message.
        features: (N, d), raw or unit.

    Returns:
        (N, d), rows of norm 1.

    Raises:
        ValueError: If `features` is no matrix or empty, or a row is not finite or zero.

    Example:
        >>> unit_rows("image features", torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"{name} must be (rows, dim), both at least 1; got {tuple(features.shape)}"
        )
    # no float64 on Apple's GPUs, and the sums below are taken in it
    features = features.cpu() if features.device.type == "mps" else features
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    # the largest entry first, since squares of raw features may overflow or vanish; found
    # without abs(), which would copy them all
    largest = torch.maximum(features.amax(dim=1), -features.amin(dim=1))
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).nonzero()[0])
        raise ValueError(f"{name}: row {row} is not finite (NaN or infinity)")
    if not largest.all():
        row = int((largest == 0).nonzero()[0])
        raise ValueError(f"{name}: row {row} is zero, so it has no direction")
    unit = features / largest[:, None]
    return unit.div_(torch.linalg.vector_norm(unit, dim=1, keepdim=True))


def unit_sides(
    query_features: Tensor, item_features: Tensor, *, names: tuple[str, str] = ("image", "text")
) -> tuple[Tensor, Tensor]:
    """Both matrices by `unit_rows`, in one dtype and on the device of the first.

    Args:
        query_features: (Q, d), raw or unit.
        item_features: (M, d), raw or unit.
        names: What to call the two in a message.

    Returns:
        (Q, d) and (M, d), rows of norm 1.

    Raises:
        ValueError: As `unit_rows`, and if the dimensions differ.
    """
    query_unit = unit_rows(f"{names[0]} features", query_features)
    item_unit = unit_rows(f"{names[1]} features", item_features)
    if query_unit.shape[1] != item_unit.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} features must have one dimension, "
            f"got {query_unit.shape[1]} and {item_unit.shape[1]}"
        )
    dtype = torch.promote_types(query_unit.dtype, item_unit.dtype)
    return query_unit.to(dtype), item_unit.to(query_unit.device, dtype)


def longest_row(features: Tensor) -> float:
    """The largest norm of a row, by which rounding of dot products grows.

    Example:
        >>> longest_row(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        5.0
    """
    return torch.linalg.vector_norm(features, dim=1).max().item()


def check_chunk_size(chunk_size: int) -> None:
    """Refuse a block of no rows.

    Raises:
        ValueError: If `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def row_blocks(count: int, chunk_size: int) -> Iterator[slice]:
    """Slices of at most `chunk_size` rows that cover `count` rows in order.

    Example:
        >>> [(rows.start, rows.stop) for rows in row_blocks(5, 2)]
        [(0, 2), (2, 4), (4, 5)]
    """
    check_chunk_size(chunk_size)
    for start in range(0, count, chunk_size):
        yield slice(start, min(start + chunk_size, count))


class BestPartner(NamedTuple):
    """Where each query found its own: one entry a query."""

    rank: Tensor
    """(Q,) int64, how many items stand before the best-placed partner; 0 is the top."""
    item: Tensor
    """(Q,) int64, which item that partner is."""


def best_partner(similarity: Tensor, partners: Tensor, *, tie: float) -> BestPartner:
    """The best-placed of each query's own items, equals standing in the order of their index.

    Args:
        similarity: (Q, M), higher is nearer; any sign.
        partners: (Q, P) item indices, −1 where a query has fewer than P; at least one a row.
        tie: Scores that differ by no more than this are equal.

    Example:
        Item 1 is the partner; items 0 and 1 tie, so item 0 stands before it.

        >>> best_partner(torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([[1]]), tie=0).rank.tolist()
        [1]
    """
    own = similarity.gather(1, partners.clamp(min=0)).masked_fill_(partners < 0, -torch.inf)
    best_score = own.amax(dim=1, keepdim=True)
    item_count = similarity.shape[1]
    is_best = (own >= best_score - tie) & (partners >= 0)
    best_item = partners.masked_fill(~is_best, item_count).amin(dim=1)
    rank = torch.zeros_like(best_item)
    # a few columns at a time: counting truth values widens each of them to eight bytes
    for start in range(0, item_count, COLUMNS_AT_ONCE):
        columns = similarity[:, start : start + COLUMNS_AT_ONCE]
        is_above = columns > best_score + tie
        rank += is_above.sum(dim=1)
        # ties are rare, so positions are compared only where there is one
        query, column = ((columns >= best_score - tie) & ~is_above).nonzero(as_tuple=True)
        stands_before = start + column < best_item[query]
        rank.index_add_(0, query, stands_before.to(rank.dtype))
    return BestPartner(rank=rank, item=best_item)
