"""Similarities in chunks, who belongs to whom, ranks."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Similarity matrices too large to hold, a few rows at a time.
#
# 100,000 × 100,000 similarities are 40 GB; 128 rows of them are 50 MB. Every metric that needs all
# of them walks over such blocks of whole rows.
#
# The last bits of a matrix product depend on where in it a number stands, so that two copies of one
# caption need not score the same. Scores nearer than that rounding count as equal everywhere, and
# equals are ranked by index: results then depend neither on the block size nor on the machine.


P = ParamSpec("P")
R = TypeVar("R")

CHUNK_SIZE = 128  # queries a block: 50 MB of float32 similarities to 100,000 items
ROWS_AT_ONCE = 2048  # widened to float64 at a time where no similarities are needed
COLUMNS_AT_ONCE = 8192  # of a block looked at together where looking makes wider copies


def tie_width(dtype: torch.dtype) -> float:
    """Difference below which two cosines computed in `dtype` count as equal, 16 roundings."""
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
    """(N, d) rows scaled to norm 1, in float32, or in float64 if they are given so."""
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
    """(Q, d) and (M, d) by `unit_rows`, in one dtype and on the device of the first."""
    query_unit = unit_rows(f"{names[0]} features", query_features)
    item_unit = unit_rows(f"{names[1]} features", item_features)
    if query_unit.shape[1] != item_unit.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} features must have one dimension, "
            f"got {query_unit.shape[1]} and {item_unit.shape[1]}"
        )
    dtype = torch.promote_types(query_unit.dtype, item_unit.dtype)
    return query_unit.to(dtype), item_unit.to(query_unit.device, dtype)


def compared_sides(
    query_features: Tensor,
    item_features: Tensor,
    *,
    normalize: bool,
    names: tuple[str, str] = ("image", "text"),
) -> tuple[Tensor, Tensor, float]:
    """As `unit_sides`, lengths kept unless `normalize`, and the difference that is a tie."""
    query_unit, item_unit = unit_sides(query_features, item_features, names=names)
    tie = tie_width(query_unit.dtype)
    if normalize:
        return query_unit, item_unit, tie
    queries, items = query_features.to(query_unit), item_features.to(item_unit)
    # rounding of dot products grows with the lengths
    longest = [torch.linalg.vector_norm(side, dim=1).max().item() for side in (queries, items)]
    return queries, items, tie * longest[0] * longest[1]


def check_chunk_size(chunk_size: int) -> None:
    """Refuse a block of no rows."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def row_blocks(count: int, chunk_size: int) -> Iterator[slice]:
    """Slices of at most `chunk_size` rows that cover `count` rows in order.

    >>> [(rows.start, rows.stop) for rows in row_blocks(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    check_chunk_size(chunk_size)
    for start in range(0, count, chunk_size):
        yield slice(start, min(start + chunk_size, count))


def best_rank(similarity: Tensor, partners: Tensor, *, tie: float) -> Tensor:
    """(Q,) 0-based, how many items stand before the best-placed of a query's own; equals by index.

    `similarity` (Q, M), higher is nearer; `partners` (Q, P) item indices, −1 where a query has
    fewer than P, at least one a row; scores that differ by no more than `tie` are equal.
    """
    own = similarity.gather(1, partners.clamp(min=0)).masked_fill_(partners < 0, -torch.inf)
    best_score = own.amax(dim=1, keepdim=True)
    item_count = similarity.shape[1]
    is_best = (own >= best_score - tie) & (partners >= 0)
    best_item = partners.masked_fill(~is_best, item_count).amin(dim=1)
    rank = _count(similarity > best_score + tie)
    # an own item is always among the equals; whoever has others, and few have, compares positions
    tied = (_count(similarity >= best_score - tie) - rank > 1).nonzero()[:, 0]
    for start in range(0, item_count if len(tied) else 0, COLUMNS_AT_ONCE):
        columns, best = similarity[tied, start : start + COLUMNS_AT_ONCE], best_score[tied]
        equal = (columns >= best - tie) & (columns <= best + tie)
        position = torch.arange(start, start + columns.shape[1], device=columns.device)
        rank[tied] += _count(equal & (position < best_item[tied, None]))
    return rank


def _count(truth: Tensor) -> Tensor:
    """True values of each row; a sum of int64 would widen each of them to eight bytes."""
    return truth.sum(dim=1, dtype=torch.int32).long()


def column_counts(truth: Tensor) -> Tensor:
    """True values of each column, of as many rows at a time as a byte counts."""
    parts = [rows.sum(dim=0, dtype=torch.uint8) for rows in truth.view(torch.uint8).split(255)]
    return torch.stack(parts).sum(dim=0)


# --------------------------------------------------------------------------------------------------
# Which caption belongs to which image.


def checked_owners(text_to_image: Tensor | None, image_count: int, text_count: int) -> Tensor:
    """The image of each caption, (M,) int64 on the CPU; from None, caption i describes image i."""
    if text_to_image is None:
        if image_count != text_count:
            raise ValueError(
                f"{image_count} images and {text_count} captions do not pair up by row; "
                "pass text_to_image"
            )
        return torch.arange(image_count)
    owners = text_to_image.detach().cpu()
    if owners.shape != (text_count,) or owners.is_floating_point() or owners.is_complex():
        raise ValueError(
            f"text_to_image must be ({text_count},) whole numbers, one a caption; "
            f"got {tuple(owners.shape)} of {owners.dtype}"
        )
    owners = owners.long()
    if owners.min() < 0 or owners.max() >= image_count:
        raise ValueError(
            f"text_to_image must be from 0 to {image_count - 1}, "
            f"got {int(owners.min())} to {int(owners.max())}"
        )
    captions_per_image = owners.bincount(minlength=image_count)
    if not captions_per_image.all():
        image = int((captions_per_image == 0).nonzero()[0])
        raise ValueError(f"image {image} has no caption in text_to_image")
    return owners


class Captions:
    """The captions of each image, looked up by rows of images or of captions."""

    def __init__(self, owners: Tensor, image_count: int) -> None:
        """Sort them once."""
        self._owners = owners
        self._by_image = owners.argsort(stable=True)
        self._counts = owners.bincount(minlength=image_count)
        self._starts = self._counts.cumsum(0) - self._counts

    def of_images(self, images: Tensor | slice) -> Tensor:
        """(rows, P) indices of each image's captions, rising, padded with −1.

        >>> Captions(torch.tensor([1, 0, 1]), 2).of_images(slice(0, 2)).tolist()
        [[1, -1], [0, 2]]
        """
        counts = self._counts[images]
        column = torch.arange(int(counts.max()), device=counts.device)
        position = self._starts[images][:, None] + column
        captions = self._by_image[position.clamp(max=len(self._by_image) - 1)]
        return captions.masked_fill(column >= counts[:, None], -1)

    def beside(self, rows: slice) -> Tensor:
        """(rows, P − 1) indices of the other captions of each caption's image, padded with −1.

        >>> Captions(torch.tensor([1, 0, 1]), 2).beside(slice(0, 3)).tolist()
        [[2], [-1], [0]]
        """
        together = self.of_images(self._owners[rows])
        itself = torch.arange(rows.start, rows.stop, device=together.device)[:, None]
        others = together.masked_fill(together == itself, -1)
        return others.sort(dim=1, descending=True).values[:, :-1]


# --------------------------------------------------------------------------------------------------
# Ranks of every partner of a query, and what follows from them: median rank, AP, NDCG.


def partner_ranks(similarity: Tensor, partners: Tensor, *, tie: float) -> Tensor:
    """(Q, P) how many items stand before each of a query's own, −1 where fewer, as `best_rank`."""
    columns = [best_rank(similarity, own.clamp(min=0)[:, None], tie=tie) for own in partners.T]
    return torch.stack(columns, dim=1).masked_fill_(partners < 0, -1)


def average_precision(ranks: Tensor) -> Tensor:
    """(Q,) mean over a query's own items of the precision at their rank, 0–1, higher is better.

    AP = 1/R Σ_j j / r_j, with r_1 < … < r_R the 1-based ranks of its R items; its mean over queries
    is mAP. Source: Manning, Raghavan and Schütze, "Introduction to Information Retrieval", 2008,
    section 8.4. `ranks` are (Q, P) 0-based, −1 where there are fewer; at least one a row.
    """
    in_order, found = _in_order(ranks)
    position = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precision = (position / (in_order + 1).double()).masked_fill(~found, 0)
    return precision.sum(dim=1) / found.sum(dim=1)


def ndcg(ranks: Tensor, *, k: int = 10) -> Tensor:
    """(Q,) normalised discounted cumulative gain at k, 0–1, higher is better.

    DCG / ideal DCG with DCG = Σ 1 / log2(r + 1) over own items with 1-based rank r ≤ k. The ideal
    puts all own items of the whole index first, not only those that were found. Source: Järvelin
    and Kekäläinen, ACM TOIS 2002, with binary gains. `ranks` as in `average_precision`.
    """
    if k < 1:
        raise ValueError(f"NDCG is taken at k of at least 1, got {k}")
    in_order, found = _in_order(ranks)
    place = torch.arange(ranks.shape[1], device=ranks.device).expand_as(ranks)
    gains = [
        (1 / (rank + 2).double().log2()).masked_fill(~(found & (rank < k)), 0).sum(dim=1)
        for rank in (in_order, place)
    ]
    return gains[0] / gains[1]


def median_rank(ranks: Tensor) -> float:
    """Median over queries of the 1-based rank, from (Q,) 0-based; of an even number the mid two."""
    return float(np.median(ranks.cpu().numpy())) + 1


def _in_order(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks rising with the missing ones last, and which are there."""
    last = torch.iinfo(ranks.dtype).max
    in_order = ranks.masked_fill(ranks < 0, last).sort(dim=1).values
    found = in_order < last
    return in_order.masked_fill(~found, 0), found
