"""Finding the caption of an image and the image of a caption: ranks, and recall from them."""

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
    """Share of queries whose best partner is among the first k.

    Raises:
        ValueError: If `k` is below 1.

    Example:
        >>> recall_at(torch.tensor([0, 4, 5, 9]), 5)
        0.5
    """
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

    Example:
        >>> pairs = torch.eye(3)
        >>> retrieval_ranks(pairs, pairs.flip(0)).image_to_text.tolist()
        [1, 0, 2]
        >>> image, text, owners = torch.eye(2), torch.eye(2)[[0, 1, 1]], torch.tensor([0, 0, 1])
        >>> retrieval_ranks(image, text, owners, every=True).image_to_text.tolist()
        [[0, 1], [1, -1]]
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
