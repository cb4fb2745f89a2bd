"""Searching images and captions in one index with a text, and whether images stand a chance."""

from typing import NamedTuple

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import (
    CHUNK_SIZE,
    measured,
    row_blocks,
    tie_width,
    unit_sides,
)
from clip_refine.evaluation.owners import Captions, checked_owners
from clip_refine.evaluation.ranks import median_rank, ndcg, partner_ranks


class MixedSearch(NamedTuple):
    """What every caption finds as a query, (M,) each."""

    ndcg: Tensor
    """float64, NDCG at the depth asked for."""
    text_first: Tensor
    """bool, whether the top hit is a caption."""
    image_rank: Tensor
    """int64, how many items stand before the right image; 0 is the top."""


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
    tie = tie_width(image_unit.dtype)
    index = torch.cat([image_unit, text_unit])
    captions = Captions(owners, count)
    blocks = []
    for rows in row_blocks(len(text_unit), chunk_size):
        similarity = text_unit[rows] @ index.T
        similarity.diagonal(offset=count + rows.start).fill_(-torch.inf)
        others = captions.beside(rows)
        relevant = torch.cat([owners[rows, None], others + count * (others >= 0)], dim=1)
        ranks = partner_ranks(similarity, relevant, tie=tie)
        nearest_image = similarity[:, :count].amax(dim=1)
        nearest_text = similarity[:, count:].amax(dim=1)
        blocks.append(
            (ndcg(ranks, k=k), nearest_text > nearest_image + tie, ranks[:, 0].contiguous())
        )
    return MixedSearch(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))
