"""The shape of the shared space in twelve numbers; no single one predicts retrieval.

`gap` holds what lies between the modalities, `spread` how they fill the sphere; both are named
here too, so that a caller needs one import.
"""

import math

from torch import Tensor

from clip_refine.evaluation.chunks import CHUNK_SIZE, check_chunk_size, measured, unit_sides
from clip_refine.evaluation.gap import (
    alignment,
    centroid_distance,
    centroid_squared_over_dim,
    linear_separability,
    mean_cosine_of_strangers,
    relative_modality_gap,
    residual_alignment,
    true_pair_cosine,
)
from clip_refine.evaluation.spread import (
    effective_rank,
    hubness_skewness,
    text_first_share,
    uniformity_mean,
)

__all__ = [
    "alignment",
    "centroid_distance",
    "centroid_squared_over_dim",
    "effective_rank",
    "geometry",
    "hubness_skewness",
    "linear_separability",
    "mean_cosine_of_strangers",
    "relative_modality_gap",
    "residual_alignment",
    "text_first_share",
    "true_pair_cosine",
    "uniformity_mean",
]


@measured
def geometry(
    image_features: Tensor,
    text_features: Tensor,
    *,
    k: int = 10,
    chunk_size: int = CHUNK_SIZE,
    seed: int = 0,
) -> dict[str, float]:
    """All geometry metrics of METHOD §3 on pairs of features.

    Features are scaled to norm 1 first. Similarities are computed in float32, or in float64 if
    the features are; sums are in float64. 100,000 pairs of dimension 512 fit in 2 GB.

    Args:
        image_features: (N, d), raw or unit.
        text_features: (N, d), raw or unit; row i is the partner of image i.
        k: Neighbours a query for `hubness_skewness`.
        chunk_size: Rows compared at once; bounds the memory, not the result.
        seed: Of the split of `linear_separability`.

    Returns:
        `centroid_distance`, `centroid_squared_over_dim`, `true_pair_cosine`, `alignment`,
        `residual_alignment`, `uniformity_log`, `uniformity_mean`, `relative_modality_gap`,
        `text_first_share`, `linear_separability`, `hubness_skewness`, `effective_rank`; each
        defined and with its unit and direction at the function of its name.

    Raises:
        ValueError: If shapes differ, there are not more than k pairs, or a row is zero or not
            finite.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> image, text = torch.randn(2, 20, 4, generator=generator)
        >>> round(geometry(image, image + 0.01 * text)["true_pair_cosine"], 3)
        1.0
    """
    _check_pairs(image_features, text_features, k)
    check_chunk_size(chunk_size)
    image_unit, text_unit = unit_sides(image_features, text_features)
    sides = (image_unit, text_unit)
    uniformity = uniformity_mean(*sides, chunk_size=chunk_size)
    return {
        "centroid_distance": centroid_distance(*sides),
        "centroid_squared_over_dim": centroid_squared_over_dim(*sides),
        "true_pair_cosine": true_pair_cosine(*sides),
        "alignment": alignment(*sides),
        "residual_alignment": residual_alignment(*sides),
        "uniformity_log": math.log(uniformity),
        "uniformity_mean": uniformity,
        "relative_modality_gap": relative_modality_gap(*sides),
        "text_first_share": text_first_share(*sides, chunk_size=chunk_size),
        "linear_separability": linear_separability(*sides, seed=seed),
        "hubness_skewness": hubness_skewness(*sides, k=k, chunk_size=chunk_size),
        "effective_rank": effective_rank(*sides),
    }


def _check_pairs(image_features: Tensor, text_features: Tensor, k: int) -> None:
    image_shape, text_shape = tuple(image_features.shape), tuple(text_features.shape)
    if len(image_shape) != 2 or image_shape != text_shape:
        raise ValueError(
            "image and text features must both be (pairs, dim), one row a pair; "
            f"got {image_shape} and {text_shape}"
        )
    if not 1 <= k < image_shape[0]:
        raise ValueError(
            f"geometry with k = {k} neighbours needs k of at least 1 and more than k pairs, "
            f"got {image_shape[0]}. Pass more pairs or a smaller k"
        )
