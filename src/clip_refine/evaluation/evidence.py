"""What a report shows beyond the scores."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from clip_refine.data import ImageCaptions
from clip_refine.evaluation.geometry import variances
from clip_refine.evaluation.scores import Measured
from clip_refine.evaluation.separation import (
    FEWEST,
    Separation,
    fit_probability,
    measure_cutoffs,
    separation,
)
from clip_refine.evaluation.similarity import measured, tie_width, unit_rows
from clip_refine.models.embed import EmbeddedPairs
from clip_refine.results import (
    Clouds,
    Evidence,
    Histograms,
    Pair,
    Point,
    Ranking,
    Spectra,
    TaskChange,
)
from clip_refine.support.console import Bar

# --------------------------------------------------------------------------------------------------
# What the report's charts are drawn from: a joint plane, histograms, spectra.


FITTED_PAIRS = 5000  # at most that the plane is fitted on
COMPARED_IMAGES = 5000  # at most whose cosines with all captions of one another are counted
FALSE_POSITIVES = 0.01  # share of wrong pairs that the threshold may let through
BINS = 60  # at most that are shown
_FINE_BINS = 4096  # that are counted in, from −1 to 1


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


def fits(
    before: Measured, after: Measured, *, seed: int, nonsense: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """Both models' probability that a pair fits, and what the first one's thresholds do after."""
    sides = [
        (found.image_features, found.text_features, found.text_to_image)
        for found in (before.features.pairs, after.features.pairs)
    ]
    if len(sides[0][0]) < FEWEST:
        return {}
    texts = nonsense or (None, None)
    was, now = (
        fit_probability(*side, seed=seed, nonsense_features=own)
        for side, own in zip(sides, texts, strict=True)
    )
    kept = measure_cutoffs(was.cutoffs, *sides[1], seed=seed, nonsense_features=texts[1])
    return {"fits": (was, now), "kept": kept}


@measured
def spectra(before: Measured, after: Measured) -> Spectra:
    """Singular values of the centred unit features over the root of their number."""

    def values(unit: Tensor) -> tuple[float, ...]:
        return tuple(float(f"{value:.4g}") for value in variances(unit).flip(0).sqrt().tolist())

    return Spectra(
        image_before=values(before.image_unit),
        text_before=values(before.text_unit),
        image_after=values(after.image_unit),
        text_after=values(after.text_unit),
    )


# --------------------------------------------------------------------------------------------------
# Queries whose rank changed most, better and worse alike, with what was found instead.


EXAMPLES = 6  # queries of each kind: so many improved, and as many that got worse


@measured
def image_ranking(before: Measured, after: Measured, held_out: ImageCaptions) -> Ranking[str]:
    """Images as queries: how many improved and worsened, and those that did most."""
    captions = [text for texts in held_out.captions for text in texts]
    owners = after.features.pairs.text_to_image

    def first(pairs: EmbeddedPairs, image: int, texts: Tensor) -> str:
        return captions[
            int(texts[_nearest(pairs.image_features[image], pairs.text_features[texts])])
        ]

    def example(image: int) -> dict[str, Any]:
        own, every = (owners == image).nonzero()[:, 0], torch.arange(len(owners))
        return {
            "image": image,
            "caption": first(after.features.pairs, image, own),
            "first_before": first(before.features.pairs, image, every),
            "first_after": first(after.features.pairs, image, every),
        }

    ranks = before.ranks.image_to_text, after.ranks.image_to_text
    return Ranking[str].model_validate(_ranking(*ranks, example))


@measured
def caption_ranking(before: Measured, after: Measured, held_out: ImageCaptions) -> Ranking[int]:
    """Captions as queries: how many improved and worsened, and those that did most."""
    captions = [text for texts in held_out.captions for text in texts]
    owners = after.features.pairs.text_to_image

    def first(pairs: EmbeddedPairs, caption: int) -> int:
        return _nearest(pairs.text_features[caption], pairs.image_features)

    def example(caption: int) -> dict[str, Any]:
        return {
            "image": int(owners[caption]),
            "caption": captions[caption],
            "first_before": first(before.features.pairs, caption),
            "first_after": first(after.features.pairs, caption),
        }

    ranks = before.ranks.text_to_image, after.ranks.text_to_image
    return Ranking[int].model_validate(_ranking(*ranks, example))


def most_changed(before: Tensor, after: Tensor) -> tuple[list[int], list[int]]:
    """Queries whose rank improved most and worsened most, by the ratio of the ranks.

    From 10th to 1st is more than from 500th to 400th. Only those that really changed.

    >>> most_changed(torch.tensor([9, 499, 0, 3]), torch.tensor([0, 399, 4, 3]))
    ([0, 1], [2])
    """
    gain = (before + 1).double().log() - (after + 1).double().log()
    order = (-gain).argsort(stable=True)
    improved = [index for index in order.tolist() if gain[index] > 0]
    worsened = [index for index in order.flip(0).tolist() if gain[index] < 0]
    return improved[:EXAMPLES], worsened[:EXAMPLES]


def _ranking(
    before: Tensor, after: Tensor, example: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """The fields of a `Ranking`; `example` gives those of a `Query` but for its ranks."""
    improved, worsened = (
        tuple(
            {
                **example(index),
                "rank_before": int(before[index]) + 1,
                "rank_after": int(after[index]) + 1,
            }
            for index in indices
        )
        for indices in most_changed(before, after)
    )
    return {
        "queries": len(before),
        "improved": int((after < before).sum()),
        "worsened": int((after > before).sum()),
        "most_improved": improved,
        "most_worsened": worsened,
    }


def _nearest(query: Tensor, items: Tensor) -> int:
    """Which item is the nearest; the first of equals, as ranks count them."""
    scores = unit_rows("items", items) @ unit_rows("query", query[None])[0]
    is_best = scores >= scores.max() - tie_width(scores.dtype)
    return int(is_best.nonzero()[0])


DRAWN_PAIRS = 300  # at most in the clouds, each with a thumbnail


def gather_evidence(
    before: Measured,
    after: Measured,
    held_out: ImageCaptions,
    tasks: Sequence[TaskChange],
    *,
    seed: int,
    pictures: bool = True,
    nonsense: tuple[Tensor, Tensor] | None = None,
) -> Evidence:
    """What `report.json` holds; stored vectors have no `pictures`.

    `nonsense` are both models' features (Q, d) of texts that describe no image.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(held_out), generator=generator)[:DRAWN_PAIRS].sort().values
    planes, explained, fitted_on = joint_plane(before, after, drawn, seed=seed)
    points = [tuple((round(x, 4), round(y, 4)) for x, y in side.tolist()) for side in planes]
    pairs = tuple(
        Pair(
            image=index,
            name=held_out.image_name(index),
            caption=held_out.captions[index][0],
            cosine_before=round(float(before.cosines[index]), 4),
            cosine_after=round(float(after.cosines[index]), 4),
            rank_before=int(before.ranks.image_to_text[index]) + 1,
            rank_after=int(after.ranks.image_to_text[index]) + 1,
        )
        for index in map(int, drawn)
    )
    images = image_ranking(before, after, held_out)
    captions = caption_ranking(before, after, held_out)
    shown = {pair.image for pair in pairs}
    shown |= {query.image for query in (*images.most_improved, *images.most_worsened)}
    for query in (*captions.most_improved, *captions.most_worsened):
        shown |= {query.image, query.first_before, query.first_after}
    shown = sorted(shown) if pictures else []
    bar = Bar("Making thumbnails", len(shown), transient=True)
    return Evidence(
        source=held_out.name,
        clouds=Clouds(
            pairs=pairs,
            image_before=points[0],
            text_before=points[1],
            image_after=points[2],
            text_after=points[3],
            explained=explained,
            fitted_on=fitted_on,
        ),
        histograms=cosine_histograms(before, after, seed=seed),
        spectra=spectra(before, after),
        images=images,
        captions=captions,
        tasks=tuple(tasks),
        **fits(before, after, seed=seed, nonsense=nonsense),
        thumbnails={index: thumbnail(held_out.load_image(index)) for index in bar.over(shown)},
    )


def thumbnail(image: Image.Image, side: int = 96, quality: int = 72) -> str:
    """A small JPEG of an image, base64; `side` is that of the longer one, in pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return base64.b64encode(file.getvalue()).decode("ascii")
