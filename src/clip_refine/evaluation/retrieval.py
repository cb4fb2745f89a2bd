"""Finding captions by images, images by captions, what is alike within a modality, all at once.

Mixed-modality search as in Li et al., "Closing the Modality Gap for Mixed Modality Search",
arXiv 2507.19054 (MixBench): a document is an image, a text or both, a query is of either kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, means
from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    ROWS_AT_ONCE,
    Captions,
    best_rank,
    check_chunk_size,
    checked_owners,
    column_counts,
    compared_sides,
    measured,
    median_rank,
    ndcg,
    partner_ranks,
    row_blocks,
    tie_width,
    unit_rows,
    unit_sides,
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
    normalize: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> RetrievalRanks:
    """Where every query's best partner stands, exactly; arguments and errors as in `retrieval`."""
    check_chunk_size(chunk_size)
    image_side, text_side, tie = compared_sides(image_features, text_features, normalize=normalize)
    owners = checked_owners(text_to_image, len(image_side), len(text_side)).to(image_side.device)
    captions = Captions(owners, len(image_side))
    image_to_text = []
    # one product serves both directions: captions count the images before theirs block by block
    own = torch.cat(
        [
            (text_side[rows] * image_side[owners[rows]]).sum(dim=1)
            for rows in row_blocks(len(text_side), ROWS_AT_ONCE)
        ]
    )
    before, near = torch.zeros(2, len(own), dtype=torch.int64, device=own.device)
    for rows in row_blocks(len(image_side), chunk_size):
        similarity = image_side[rows] @ text_side.T
        image_to_text.append(best_rank(similarity, captions.of_images(rows), tie=tie))
        before += column_counts(similarity > own + tie)
        near += column_counts(similarity >= own - tie)
    # whose image has an equal, and few have, compares positions, too
    for tied in (near - before > 1).nonzero()[:, 0].split(chunk_size):
        similarity = text_side[tied] @ image_side.T
        before[tied] = best_rank(similarity, owners[tied, None], tie=tie)
    return RetrievalRanks(torch.cat(image_to_text), before)


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


# --------------------------------------------------------------------------------------------------
# Searching images and captions in one index with a text, and whether images stand a chance.


class MixedSearch(NamedTuple):
    """What every caption finds as a query, (M,) each."""

    ndcg: Tensor  # float64, NDCG at the depth asked for
    text_first: Tensor  # bool, whether the top hit is a caption
    image_rank: Tensor  # int64, how many items stand before the right image; 0 is the top


@measured
def mixed_search(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    k: int = 10,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """How well a text finds what belongs to it among images and captions together.

    The protocol: every caption is a query once; the index holds all images and all captions but
    the query itself; its image and the other captions of that image are relevant. Of equally near
    items (nearer than rounding) images stand before captions, then the lower index first.

    Args:
        image_features: (N, d), raw or unit.
        text_features: (M, d), raw or unit, at least two.
        text_to_image: (M,), the image that each caption describes; None where caption i describes
            image i.
        k: Depth of NDCG.
        chunk_size: Queries compared at once; bounds the memory, not the result.

    Returns:
        `ndcg@k`, the ideal over all relevant items, 0–1, higher is better; `text_first_share`, the
        share of queries whose top hit is a caption, 0–1; `median_image_rank`, 1-based rank of the
        right image, lower is better.

    Raises:
        ValueError: If shapes do not fit, a row is zero or not finite, or an image has no caption.

    Example:
        Captions are alike, images lie elsewhere: each query finds the other caption first, then its
        image.

        >>> image, text = torch.eye(3)[:2], torch.tensor([[0.1, 0, 1], [0, 0.1, 1]])
        >>> found = mixed_search(image, text)
        >>> {name: round(value, 4) for name, value in found.items()}
        {'ndcg@10': 0.6309, 'text_first_share': 1.0, 'median_image_rank': 2.0}
    """
    found = mixed_search_queries(
        image_features, text_features, text_to_image, k=k, chunk_size=chunk_size
    )
    return {
        f"ndcg@{k}": found.ndcg.mean().item(),
        "text_first_share": found.text_first.double().mean().item(),
        "median_image_rank": median_rank(found.image_rank),
    }


@measured
def mixed_search_queries(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor | None = None,
    *,
    k: int = 10,
    chunk_size: int = CHUNK_SIZE,
) -> MixedSearch:
    """The same for every query; arguments and errors as in `mixed_search`."""
    image_unit, text_unit = unit_sides(image_features, text_features)
    count = len(image_unit)
    if len(text_unit) < 2:
        raise ValueError("one caption alone has no mixed index; pass two captions or more")
    owners = checked_owners(text_to_image, count, len(text_unit)).to(image_unit.device)
    others = Captions(owners, count).beside(slice(0, len(text_unit)))
    found = search(
        text_unit,
        torch.cat([image_unit, text_unit]),
        torch.cat([owners[:, None], others + count * (others >= 0)], dim=1),
        hidden=count + torch.arange(len(text_unit)),
        chunk_size=chunk_size,
    )
    return MixedSearch(ndcg(found.ranks, k=k), found.first >= count, found.ranks[:, 0].contiguous())


# --------------------------------------------------------------------------------------------------
# Documents that are an image, a text or both; queries of either kind.


KINDS = ("image", "text", "both")
"""What a document or query may be; its number is its place here."""

DEPTHS = (1, 10)
"""Of recall."""


class MixedDocuments(NamedTuple):
    """One document an image, and as queries all images and captions that are in none."""

    kinds: Tensor  # (N,) int64, what document i is, of image i; a place in `KINDS`
    text_queries: Tensor  # (Q,) int64, rising, positions of captions
    image_queries: Tensor  # (P,) int64, rising, positions of images


@measured
def joined(
    image_features: Tensor, text_features: Tensor, *, image_weight: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Unit vectors of what is an image, a text or both (the other row NaN), and places in `KINDS`.

    Both is normalise(w · image + (1 − w) · text) of the unit vectors with w = `image_weight`; a row
    with one side is that side, whatever the weight. Source: arXiv 2507.19054, section 3.
    """
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight must be from 0 to 1, got {image_weight}")
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "image and text features must both be (rows, dim), NaN where a side is missing; "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    has = torch.stack([~side.isnan().all(dim=1) for side in (image_features, text_features)])
    if not has.any(dim=0).all():
        row = int((~has.any(dim=0)).nonzero()[0])
        raise ValueError(f"row {row} has neither an image nor a text")
    weights = torch.stack([has[0] * image_weight, has[1] * (1 - image_weight)])
    weights = torch.where(has.all(dim=0), weights, has.to(weights.dtype))
    # a side that is missing has weight 0, so any direction will do
    sides = [
        side.masked_fill(~there[:, None], 1.0)
        for side, there in zip((image_features, text_features), has, strict=True)
    ]
    image_unit, text_unit = unit_sides(*sides)
    weights = weights.to(image_unit)[:, :, None]
    mixed = unit_rows(
        "weighted mean of image and text", weights[0] * image_unit + weights[1] * text_unit
    )
    return mixed, has[1].long() + (has[0] & has[1]).long()


def draw_documents(
    text_to_image: Tensor, image_count: int, *, mixing: Sequence[float], seed: int
) -> MixedDocuments:
    """Make of every image one document: its image, first caption, or both, in parts of `mixing`.

    What is not in a document is a query: the image of a text, and all captions but the first of a
    text or both, all of an image. So a set with one caption an image has queries, too.
    """
    shares = torch.tensor(mixing, dtype=torch.float64)
    if len(shares) != len(KINDS) or (shares < 0).any() or not shares.sum() > 0:
        raise ValueError(
            f"mixing must be three shares, of {', '.join(KINDS)}, none below 0; got {mixing}"
        )
    ends = (shares.cumsum(0) / shares.sum() * image_count).round().long()
    order = torch.randperm(image_count, generator=torch.Generator().manual_seed(seed))
    kinds = torch.empty(image_count, dtype=torch.int64)
    kinds[order] = torch.bucketize(torch.arange(image_count), ends, right=True)
    owners = text_to_image.cpu()
    is_first = torch.ones(len(owners), dtype=torch.bool)
    is_first[1:] = owners[1:] != owners[:-1]
    is_query = ~is_first | (kinds[owners] == KINDS.index("image"))
    image_queries = (kinds == KINDS.index("text")).nonzero()[:, 0]
    if not (is_query.any() or len(image_queries)):
        raise ValueError(
            "every image and caption is in a document, so nothing is left to search with; let "
            "mixing have documents of one kind"
        )
    return MixedDocuments(kinds, is_query.nonzero()[:, 0], image_queries)


def document_numbers(
    found: Found,
    query_kinds: Tensor,
    document_kinds: Tensor,
    owners: Tensor,
    bootstrap: Bootstrap,
) -> dict[str, Resampled]:
    """NDCG@10 and recall of every kind of query, and whether texts push images away, all in 0–1.

    `ndcg@10` over all queries; `image_query_ndcg@10`, `image_query_recall@1`, `@10`, and so for
    `text` and `both`, of kinds that there are; `text_first_share`, the share of text queries
    whose top hit is a document that is a text alone. `owners` (Q,) are drawn with their queries.
    """
    best = best_of(found.ranks)
    columns = {"ndcg@10": ndcg(found.ranks, k=10)}
    columns |= {f"recall@{k}": (best < k).double() for k in DEPTHS}
    text_first = (document_kinds[found.first] == KINDS.index("text")).double()
    # a query counts for its own kind only, so a resample may hold none of a kind: its mean is of
    # the owners that have some
    numbers: dict[str, Resampled] = {}
    for kind, name in [(None, ""), *enumerate(f"{kind}_query_" for kind in KINDS)]:
        chosen = (
            torch.ones_like(query_kinds, dtype=torch.bool) if kind is None else query_kinds == kind
        )
        if not chosen.any():
            continue
        shown = {"ndcg@10": columns["ndcg@10"]} if kind is None else columns
        of_kind = {f"{name}{column}": values[chosen] for column, values in shown.items()}
        if kind == KINDS.index("text"):
            of_kind["text_first_share"] = text_first[chosen]
        drawn, own = owners[chosen].unique(return_inverse=True)
        numbers |= bootstrap.numbers(len(drawn), means(of_kind, own))
    return numbers
