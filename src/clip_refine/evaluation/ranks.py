"""Ranks of every partner of a query, and what follows from them: median rank, AP, NDCG."""

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import best_partner


def partner_ranks(similarity: Tensor, partners: Tensor, *, tie: float) -> Tensor:
    """Where each of a query's own items stands, equals standing in the order of their index.

    Args:
        similarity: (Q, M), higher is nearer; any sign.
        partners: (Q, P) item indices, −1 where a query has fewer than P.
        tie: Scores that differ by no more than this are equal.

    Returns:
        (Q, P) int64, how many items stand before the partner; −1 where there is none.

    Example:
        >>> similarity = torch.tensor([[0.9, 0.5, 0.7]])
        >>> partner_ranks(similarity, torch.tensor([[1, 0, -1]]), tie=0).tolist()
        [[2, 0, -1]]
    """
    columns = [
        best_partner(similarity, partner.clamp(min=0)[:, None], tie=tie).rank
        for partner in partners.T
    ]
    return torch.stack(columns, dim=1).masked_fill_(partners < 0, -1)


def average_precision(ranks: Tensor) -> Tensor:
    """Mean over a query's own items of the precision at their rank; higher is better.

    AP = 1/R Σ_j j / r_j, with r_1 < … < r_R the 1-based ranks of its R items. Source: Manning,
    Raghavan and Schütze, "Introduction to Information Retrieval", 2008, section 8.4.

    Args:
        ranks: (Q, P) 0-based, −1 where a query has fewer than P items; at least one a row.

    Returns:
        (Q,) float64, 0–1; its mean over queries is mAP.

    Example:
        Own items first and fourth of the list: (1/1 + 2/4) / 2.

        >>> average_precision(torch.tensor([[3, 0, -1]])).tolist()
        [0.75]
    """
    in_order, found = _in_order(ranks)
    position = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precision = (position / (in_order + 1).double()).masked_fill(~found, 0)
    return precision.sum(dim=1) / found.sum(dim=1)


def ndcg(ranks: Tensor, *, k: int = 10) -> Tensor:
    """Normalised discounted cumulative gain at k, every own item worth the same.

    DCG / ideal DCG with DCG = Σ 1 / log2(r + 1) over own items with 1-based rank r ≤ k. The ideal
    puts all own items of the whole index first, not only those that were found. Source: Järvelin
    and Kekäläinen, ACM TOIS 2002, with binary gains.

    Args:
        ranks: (Q, P) 0-based, −1 where a query has fewer than P items; at least one a row.
        k: The depth.

    Returns:
        (Q,) float64, 0–1; higher is better.

    Raises:
        ValueError: If `k` is below 1.

    Example:
        One of two own items is third, the other is not found: (1/2) / (1 + 1/log2 3).

        >>> [round(value, 3) for value in ndcg(torch.tensor([[2, 50]])).tolist()]
        [0.307]
    """
    if k < 1:
        raise ValueError(f"NDCG is taken at k of at least 1, got {k}")
    in_order, found = _in_order(ranks)
    place = torch.arange(ranks.shape[1], device=ranks.device).expand_as(ranks)
    gain = _gain(in_order, found & (in_order < k))
    return gain / _gain(place, found & (place < k))


def median_rank(ranks: Tensor) -> float:
    """Median over queries of the 1-based rank; the mean of the middle two where they are even.

    Args:
        ranks: (Q,) 0-based.

    Example:
        >>> median_rank(torch.tensor([0, 9, 2, 3]))
        3.5
    """
    in_order = ranks.double().sort().values
    middle = in_order[(len(ranks) - 1) // 2] + in_order[len(ranks) // 2]
    return middle.item() / 2 + 1


def _in_order(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks rising with the missing ones last, and which are there."""
    last = torch.iinfo(ranks.dtype).max
    in_order = ranks.masked_fill(ranks < 0, last).sort(dim=1).values
    found = in_order < last
    return in_order.masked_fill(~found, 0), found


def _gain(ranks: Tensor, counted: Tensor) -> Tensor:
    return (1 / (ranks + 2).double().log2()).masked_fill(~counted, 0).sum(dim=1)
