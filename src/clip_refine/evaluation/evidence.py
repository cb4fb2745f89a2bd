"""What a report shows beyond the scores."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.geometry import variances
from clip_refine.evaluation.scores import Measured, task_changes
from clip_refine.evaluation.similarity import (
    measured,
    tie_width,
    unit_rows,
)
from clip_refine.evaluation.tasks import Separation, separation
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import (
    CaptionQuery,
    Clouds,
    Evidence,
    Histograms,
    ImageQuery,
    Pair,
    Point,
    Ranking,
    Spectra,
)
from clip_refine.support.console import Bar

# --------------------------------------------------------------------------------------------------
# What the report's charts are drawn from: a joint plane, histograms, spectra.


FITTED_PAIRS = 5000
"""Pairs at most that the plane is fitted on."""

COMPARED_IMAGES = 5000
"""Images at most whose cosines with all captions of one another are counted."""

FALSE_POSITIVES = 0.01
"""Share of wrong pairs that the threshold may let through."""

BINS = 60
_FINE_BINS = 4096


@measured
def joint_plane(
    before: Measured, after: Measured, drawn: Tensor, *, seed: int
) -> tuple[list[Tensor], Point, int]:
    """Both models' unit features of some pairs in one plane."""
    sides = [before.image_unit, before.text_unit, after.image_unit, after.text_unit]
    generator = torch.Generator().manual_seed(seed)
    fitted = torch.randperm(len(sides[0]), generator=generator)[:FITTED_PAIRS]
    pca = PCA(2, random_state=seed)
    pca.fit(torch.cat([side[fitted].cpu().double() for side in sides]).numpy())
    points = [torch.from_numpy(pca.transform(side[drawn].cpu().double().numpy())) for side in sides]
    first, second = pca.explained_variance_ratio_.tolist()
    return points, (first, second), len(fitted)


def cosine_histograms(before: Measured, after: Measured, *, seed: int) -> Histograms:
    """Cosines of true and wrong pairs in common bins, and how well one threshold parts them."""
    found = [_separation(side, seed) for side in (before, after)]
    kinds = [kind for side in found for kind in (side.true_pairs, side.wrong_pairs)]
    together = torch.stack([kind.histogram for kind in kinds]).double()
    filled = together.sum(dim=0).nonzero()[:, 0]
    first, last = int(filled[0]), int(filled[-1]) + 1
    width = -(-(last - first) // BINS)
    count = -(-(last - first) // width)
    padded = torch.zeros(len(kinds), count * width, dtype=torch.float64)
    padded[:, : last - first] = together[:, first:last]
    shares = padded.view(len(kinds), count, width).sum(dim=2)
    shares /= shares.sum(dim=1, keepdim=True)
    edges = [(first + width * number) * 2 / _FINE_BINS - 1 for number in range(count + 1)]
    rows = [tuple(float(f"{share:.4g}") for share in row) for row in shares.tolist()]
    return Histograms(
        edges=tuple(round(edge, 6) for edge in edges),
        true_before=rows[0],
        wrong_before=rows[1],
        true_after=rows[2],
        wrong_after=rows[3],
        auc=(found[0].auc, found[1].auc),
        threshold=(found[0].threshold, found[1].threshold),
        recall=(found[0].recall, found[1].recall),
    )


def _separation(side: Measured, seed: int) -> Separation:
    pairs = side.features.pairs
    count = len(pairs.image_features)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = order[:COMPARED_IMAGES].sort().values
    captions = torch.isin(pairs.text_to_image, chosen)
    owners = torch.searchsorted(chosen, pairs.text_to_image[captions])
    images, texts = pairs.image_features[chosen], pairs.text_features[captions]
    return separation(images, texts, owners, false_positive_rate=FALSE_POSITIVES, bins=_FINE_BINS)


@measured
def spectra(before: Measured, after: Measured) -> Spectra:
    """Singular values of the centred unit features over the root of their number."""
    return Spectra(
        image_before=_singular_values(before.image_unit),
        text_before=_singular_values(before.text_unit),
        image_after=_singular_values(after.image_unit),
        text_after=_singular_values(after.text_unit),
    )


def _singular_values(unit: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in variances(unit).flip(0).sqrt().tolist())


# --------------------------------------------------------------------------------------------------
# Queries whose rank changed most, better and worse alike, with what was found instead.


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

    return Ranking[ImageQuery].model_validate(_ranking(*ranks, example))


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

    return Ranking[CaptionQuery].model_validate(_ranking(*ranks, example))


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


def _ranking(
    before: Tensor, after: Tensor, example: Callable[[int], ImageQuery | CaptionQuery]
) -> dict[str, Any]:
    """The fields of a `Ranking`."""
    improved, worsened = most_changed(before, after)
    return {
        "queries": len(before),
        "improved": int((after < before).sum()),
        "worsened": int((after > before).sum()),
        "most_improved": tuple(example(index) for index in improved),
        "most_worsened": tuple(example(index) for index in worsened),
    }


def _scores(query: Tensor, items: Tensor) -> Tensor:
    return unit_rows("items", items) @ unit_rows("query", query[None])[0]


def _first(scores: Tensor) -> int:
    """The highest; the first of equals, as ranks count them."""
    is_best = scores >= scores.max() - tie_width(scores.dtype)
    return int(is_best.nonzero()[0])


# --------------------------------------------------------------------------------------------------
# Features before and after → everything that the report shows beyond the scores.


DRAWN_PAIRS = 300
"""Pairs at most in the clouds, each with a thumbnail."""

THUMBNAIL = 96
"""Pixels of the longer side."""


def gather_evidence(
    before: Measured,
    after: Measured,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    *,
    seed: int,
    visible: bool = True,
) -> Evidence:
    """What `report.json` holds."""
    clouds = _clouds(before, after, held_out, seed)
    images = image_ranking(before, after, held_out)
    captions = caption_ranking(before, after, held_out)
    shown = {pair.image for pair in clouds.pairs}
    shown |= {query.image for query in (*images.most_improved, *images.most_worsened)}
    for query in (*captions.most_improved, *captions.most_worsened):
        shown |= {query.image, query.first_before, query.first_after}
    return Evidence(
        source=held_out.name,
        clouds=clouds,
        histograms=cosine_histograms(before, after, seed=seed),
        spectra=spectra(before, after),
        images=images,
        captions=captions,
        tasks=task_changes(before, after, tasks),
        thumbnails=_thumbnails(held_out, sorted(shown), visible=visible),
    )


def _clouds(before: Measured, after: Measured, held_out: ImageCaptions, seed: int) -> Clouds:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(held_out), generator=generator)[:DRAWN_PAIRS].sort().values
    points, explained, fitted_on = joint_plane(before, after, drawn, seed=seed)
    image_before, text_before, image_after, text_after = (_rounded(side) for side in points)
    return Clouds(
        pairs=tuple(_pair(before, after, held_out, index) for index in drawn.tolist()),
        image_before=image_before,
        text_before=text_before,
        image_after=image_after,
        text_after=text_after,
        explained=explained,
        fitted_on=fitted_on,
    )


def _rounded(points: Tensor) -> tuple[tuple[float, float], ...]:
    return tuple((round(across, 4), round(up, 4)) for across, up in points.tolist())


def _pair(before: Measured, after: Measured, held_out: ImageCaptions, index: int) -> Pair:
    return Pair(
        image=index,
        name=held_out.image_name(index),
        caption=held_out.captions[index][0],
        cosine_before=round(float(before.cosines[index]), 4),
        cosine_after=round(float(after.cosines[index]), 4),
        rank_before=int(before.ranks.image_to_text[index]) + 1,
        rank_after=int(after.ranks.image_to_text[index]) + 1,
    )


def _thumbnails(
    held_out: ImageCaptions, indices: Iterable[int], *, visible: bool
) -> dict[int, str]:
    indices = list(indices)
    bar = Bar("Making thumbnails", len(indices), visible=visible, transient=True)
    return {index: thumbnail(held_out.load_image(index)) for index in bar.over(indices)}


def thumbnail(image: Image.Image) -> str:
    """A small JPEG of an image, base64."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=72)
    return base64.b64encode(file.getvalue()).decode("ascii")
