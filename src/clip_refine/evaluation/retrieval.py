"""Finding captions by images, images by captions, and what is alike within one modality."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    Captions,
    best_rank,
    check_chunk_size,
    checked_owners,
    compared_sides,
    measured,
    partner_ranks,
    row_blocks,
    tie_width,
    unit_rows,
)


class RetrievalRanks(NamedTuple):
    """0-based rank of each query's best-placed partner; 0 is a hit at the top."""

    image_to_text: Tensor  # (N,) int64, for every image as query: its best caption among all
    text_to_image: Tensor  # (M,) int64, for every caption as query: its image among all


@measured
def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Recall in both directions: the share of queries with one of their own in the top k.

    The protocol: all captions of an image count as its partners, the whole set is the index, and
    of equally similar items (nearer than rounding, 2e-6 in float32) the lower index stands first.
    Higher is better.

    Args:
        image_features: (N, d), raw or unit.
        text_features: (M, d), raw or unit.
        text_to_image: (M,), the image that each caption describes; None where caption i describes
            image i. Every image must have a caption.
        ks: The depths, each at least 1.
        normalize: Whether similarity is the cosine; if not, the dot product of features as given,
            for transforms whose lengths mean something.
        chunk_size: Queries compared at once; bounds the memory, not the result.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k` for each k, in 0–1.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, or an image has no caption.

    Example:
        Both images look like caption 0 most.

        >>> image = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> retrieval(image, text, ks=[1])
        {'image_to_text_recall@1': 0.5, 'text_to_image_recall@1': 1.0}
    """
    found = retrieval_ranks(
        image_features, text_features, text_to_image, normalize=normalize, chunk_size=chunk_size
    )
    scores = {f"image_to_text_recall@{k}": recall_at(found.image_to_text, k) for k in ks}
    return scores | {f"text_to_image_recall@{k}": recall_at(found.text_to_image, k) for k in ks}


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries whose best partner is among the first k."""
    if k < 1:
        raise ValueError(f"recall is taken at k of at least 1, got {k}")
    return (ranks < k).double().mean().item()


@measured
def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    every: bool = False,
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> RetrievalRanks:
    """Where every query's best partner stands, exactly, by counting what stands before it.

    With `every`, for mAP and slower: where all of them stand, `image_to_text` (N, P) padded with −1
    and `text_to_image` (M, 1). Other arguments and errors as in `retrieval`.
    """
    check_chunk_size(chunk_size)
    image_side, text_side, tie = compared_sides(image_features, text_features, normalize=normalize)
    owners = checked_owners(text_to_image, len(image_side), len(text_side)).to(image_side.device)
    captions = Captions(owners, len(image_side))
    ranks_of = partner_ranks if every else best_rank
    image_to_text = [
        ranks_of(image_side[rows] @ text_side.T, captions.of_images(rows), tie=tie)
        for rows in row_blocks(len(image_side), chunk_size)
    ]
    if every:  # a block is as wide as its images have captions
        widest = max(block.shape[1] for block in image_to_text)
        image_to_text = [
            pad(block, (0, widest - block.shape[1]), value=-1) for block in image_to_text
        ]
    text_to_image_ranks = [
        ranks_of(text_side[rows] @ image_side.T, owners[rows, None], tie=tie)
        for rows in row_blocks(len(text_side), chunk_size)
    ]
    return RetrievalRanks(torch.cat(image_to_text), torch.cat(text_to_image_ranks))


# --------------------------------------------------------------------------------------------------
# One index for everything, whatever it is made of.


class Found(NamedTuple):
    """What every query finds, on the CPU."""

    ranks: Tensor  # (Q, P) int64, how many stand before each relevant item, −1 where fewer than P
    first: Tensor  # (Q,) int64, the item at the top


@measured
def search(
    query_unit: Tensor,
    item_unit: Tensor,
    relevant: Tensor,
    *,
    hidden: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Found:
    """Where every query's `relevant` items (Q, P; −1 where fewer) stand among all, and what is top.

    Of equally near items (nearer than rounding) the lower index stands first. `hidden` (Q,) is an
    item that a query does not search, such as itself.
    """
    tie = tie_width(query_unit.dtype)
    relevant = relevant.to(query_unit.device)
    blocks = []
    for rows in row_blocks(len(query_unit), chunk_size):
        similarity = query_unit[rows] @ item_unit.T
        if hidden is not None:
            similarity.scatter_(1, hidden[rows, None].to(similarity.device), -torch.inf)
        is_best = similarity >= similarity.amax(dim=1, keepdim=True) - tie
        first = is_best.to(torch.uint8).argmax(dim=1)  # the first of equals
        blocks.append((partner_ranks(similarity, relevant[rows], tie=tie), first))
    return Found(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


def best_of(ranks: Tensor) -> Tensor:
    """(Q,) the rank of the best-placed relevant item, from (Q, P) ranks as in `Found`."""
    return ranks.masked_fill(ranks < 0, torch.iinfo(ranks.dtype).max).amin(dim=1)


# --------------------------------------------------------------------------------------------------
# Within one modality: images by an image of their class, captions by a caption of their image.


class Within(NamedTuple):
    """What every row that has others of its group finds among all other rows."""

    queries: Tensor  # (Q,) int64, those rows
    average_precision: Tensor  # (Q,) float64, 0–1, higher is better
    neighbours: Tensor  # (N, k) int64, of all rows, those that have none of their group, too


@measured
def search_within(
    features: Tensor, groups: Tensor, *, k: int = 10, chunk_size: int = CHUNK_SIZE
) -> Within:
    """Every row as a query for the others of its group, the whole set without itself as the index.

    Cosines are compared as multiples of the width below which they tie everywhere else; of equals
    the lower index stands first.
    """
    unit = unit_rows("features", features)
    if groups.shape != (len(unit),) or groups.is_floating_point():
        raise ValueError(
            f"groups must be ({len(unit)},) whole numbers, one a row; "
            f"got {tuple(groups.shape)} of {groups.dtype}"
        )
    groups = groups.to(unit.device).long()
    sizes = groups.unique(return_inverse=True, return_counts=True)
    others = sizes[2][sizes[1]] - 1
    if not others.any():
        raise ValueError("no two rows are of one group, so there is nothing to find")
    tie = tie_width(unit.dtype)
    position = torch.arange(1, len(unit), device=unit.device)
    precisions, neighbours = [], []
    for rows in row_blocks(len(unit), chunk_size):
        similarity = (unit[rows] @ unit.T / tie).round_()
        similarity.diagonal(offset=rows.start).fill_(-torch.inf)
        order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :-1]
        own = groups[order] == groups[rows, None]
        precision = (own.cumsum(dim=1) / position.double()).masked_fill_(~own, 0).sum(dim=1)
        precisions.append(precision / others[rows])
        neighbours.append(order[:, :k].clone())
    queries = others.nonzero()[:, 0]
    return Within(queries.cpu(), torch.cat(precisions)[queries].cpu(), torch.cat(neighbours).cpu())


def group_hits(found: Within, groups: Tensor, k: int) -> Tensor:
    """(Q,) bool, whether one of a query's group is among its k nearest; its mean is R@k."""
    groups = groups.cpu()
    near = groups[found.neighbours[found.queries, :k]]
    return (near == groups[found.queries, None]).any(dim=1)


def votes(found: Within, groups: Tensor) -> Tensor:
    """(N,) bool, whether the most frequent group of a row's neighbours is its own: k-NN accuracy.

    Of equally frequent groups the lowest counts, as in scikit-learn's KNeighborsClassifier.
    """
    groups = groups.cpu()
    return groups[found.neighbours].mode(dim=1).values == groups
