"""Choosing by held-out training pairs, so that the evaluation set stays unseen."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from torch import Tensor, nn

from clip_refine.console import Bar
from clip_refine.data import ImageCaptions
from clip_refine.evaluation.embed import EmbeddedPairs, Embedder, embed_pairs
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.models.interpolate import interpolate_weights

LINE = tuple(step / 10 for step in range(11))
"""The points that are tried between a model and its refinement."""


def selection_score(pairs: EmbeddedPairs) -> float:
    """What is chosen by: the mean of R@1, R@5 and R@10 in both directions, 0-1."""
    found = retrieval(pairs.image_features, pairs.text_features, pairs.text_to_image)
    return fmean(found.values())


def scores_along_line(
    embedder: Embedder, model: nn.Module, base: Mapping[str, Tensor], pairs: ImageCaptions
) -> dict[float, float]:
    """Selection scores between a model's weights before and after training (WiSE-FT).

    Args:
        embedder: Feeds `model`.
        model: The refined model; its weights are the same again afterwards.
        base: State dict of the model before.
        pairs: Held-out training pairs.

    Returns:
        Weight of the refined model, from 0 to 1 in tenths → `selection_score`.
    """
    refined = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    silent = replace(embedder, visible=False)
    bar = Bar("Interpolating", len(LINE), visible=embedder.visible)
    scores = {}
    for weight in bar.over(LINE):
        model.load_state_dict(interpolate_weights(base, refined, weight))
        scores[weight] = selection_score(embed_pairs(silent, pairs))
    model.load_state_dict(refined)
    return scores
