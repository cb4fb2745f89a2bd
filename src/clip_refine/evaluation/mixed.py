"""One index for images, captions and documents that are both: who finds what, and who stands first.

Mixed-modality search as in Li et al., "Closing the Modality Gap for Mixed Modality Search",
arXiv 2507.19054 (MixBench): a document is an image, a text or both, a query is of either kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, means
from clip_refine.evaluation.retrieval import Found, best_of, search
from clip_refine.evaluation.similarity import (
    CHUNK_SIZE,
    Captions,
    checked_owners,
    measured,
    median_rank,
    ndcg,
    unit_rows,
    unit_sides,
)

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
