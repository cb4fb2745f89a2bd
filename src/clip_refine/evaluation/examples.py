"""Queries whose rank changed most, better and worse alike, with what was found instead."""

import torch
from torch import Tensor

from clip_refine.data import ImageCaptions
from clip_refine.evaluation.chunks import measured, tie_width, unit_rows
from clip_refine.evaluation.embed import EmbeddedPairs
from clip_refine.evaluation.paired import Measured
from clip_refine.evidence import CaptionQuery, ImageQuery, Ranking

EXAMPLES = 6
"""Queries of each kind that are shown: so many improved, and as many that got worse."""


@measured
def image_ranking(
    before: Measured, after: Measured, held_out: ImageCaptions
) -> Ranking[ImageQuery]:
    """Images as queries: how many improved and worsened, and those that did most."""
    ranks = before.ranks.image_to_text, after.ranks.image_to_text
    captions = [text for texts in held_out.captions for text in texts]
    owners = after.features.pairs.text_to_image

    def example(index: int) -> ImageQuery:
        own = (owners == index).nonzero()[:, 0]
        firsts, scores = [], torch.empty(0)
        for side in (before, after):
            pairs = side.features.pairs
            scores = _scores(pairs.image_features[index], pairs.text_features)
            firsts.append(captions[_first(scores)])
        return ImageQuery(
            image=index,
            caption=captions[int(own[_first(scores[own])])],
            rank_before=int(ranks[0][index]) + 1,
            rank_after=int(ranks[1][index]) + 1,
            first_before=firsts[0],
            first_after=firsts[1],
        )

    improved, worsened = most_changed(*ranks)
    return Ranking[ImageQuery](
        **_counts(*ranks),
        most_improved=tuple(example(index) for index in improved),
        most_worsened=tuple(example(index) for index in worsened),
    )


@measured
def caption_ranking(
    before: Measured, after: Measured, held_out: ImageCaptions
) -> Ranking[CaptionQuery]:
    """Captions as queries: how many improved and worsened, and those that did most."""
    ranks = before.ranks.text_to_image, after.ranks.text_to_image
    captions = [text for texts in held_out.captions for text in texts]
    owners = after.features.pairs.text_to_image

    def first(pairs: EmbeddedPairs, index: int) -> int:
        return _first(_scores(pairs.text_features[index], pairs.image_features))

    def example(index: int) -> CaptionQuery:
        return CaptionQuery(
            caption=captions[index],
            image=int(owners[index]),
            rank_before=int(ranks[0][index]) + 1,
            rank_after=int(ranks[1][index]) + 1,
            first_before=first(before.features.pairs, index),
            first_after=first(after.features.pairs, index),
        )

    improved, worsened = most_changed(*ranks)
    return Ranking[CaptionQuery](
        **_counts(*ranks),
        most_improved=tuple(example(index) for index in improved),
        most_worsened=tuple(example(index) for index in worsened),
    )


def most_changed(before: Tensor, after: Tensor) -> tuple[list[int], list[int]]:
    """Queries whose rank improved most and worsened most, by the ratio of the ranks.

    From 10th to 1st is more than from 500th to 400th. Only those that really changed.

    Args:
        before: (Q,) 0-based ranks.
        after: (Q,) the same of the other model.

    Example:
        >>> most_changed(torch.tensor([9, 499, 0, 3]), torch.tensor([0, 399, 4, 3]))
        ([0, 1], [2])
    """
    gain = (before + 1).double().log() - (after + 1).double().log()
    order = (-gain).argsort(stable=True)
    improved = [index for index in order.tolist() if gain[index] > 0]
    worsened = [index for index in order.flip(0).tolist() if gain[index] < 0]
    return improved[:EXAMPLES], worsened[:EXAMPLES]


def _counts(before: Tensor, after: Tensor) -> dict[str, int]:
    return {
        "queries": len(before),
        "improved": int((after < before).sum()),
        "worsened": int((after > before).sum()),
    }


def _scores(query: Tensor, items: Tensor) -> Tensor:
    return unit_rows("items", items) @ unit_rows("query", query[None])[0]


def _first(scores: Tensor) -> int:
    """The highest; the first of equals, as ranks count them."""
    is_best = scores >= scores.max() - tie_width(scores.dtype)
    return int(is_best.nonzero()[0])
