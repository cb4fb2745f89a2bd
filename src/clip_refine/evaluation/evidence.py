"""Features before and after → everything that the report shows beyond the scores."""

import base64
import io
from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from clip_refine.console import Bar
from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.classes import task_changes
from clip_refine.evaluation.examples import caption_ranking, image_ranking
from clip_refine.evaluation.paired import Measured
from clip_refine.evaluation.pictures import cosine_histograms, joint_plane, spectra
from clip_refine.evidence import Clouds, Evidence, Pair

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
    """What `report.json` holds.

    Args:
        before: The model as it came.
        after: The refined one, on the same items.
        held_out: The pairs that both were measured on.
        tasks: The zero-shot tasks, in the order in which they were embedded.
        seed: Of the pairs that are drawn.
        visible: Whether progress is shown.

    Raises:
        DataError: An image cannot be read.
    """
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
