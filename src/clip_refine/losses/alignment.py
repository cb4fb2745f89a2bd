"""Losses of how the two clouds lie: RaFA, and what it is compared with.

RaFA, random feature alignment, draws both sides of a pair to one random reference: Yamaguchi et
al., "Post-pre-training for Modality Alignment in Vision-Language Foundation Models", CVPR 2025,
arXiv 2504.12717, the section on it. Others draw pairs together and spread them evenly: Wang and
Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere", ICML 2020, arXiv 2005.10242, section 4 with exponent 2; alignment is a baseline of the
CLIP-Refine paper (HyCD + L_align), which closes the gap and loses accuracy. Grassucci et al.,
"Closing the Modality Gap Aligns Group-Wise Semantics" (ModGap), ICLR 2026, arXiv 2601.18525
(centroids of pairs). Sun and Saenko, "Deep CORAL", 2016, arXiv 1607.01719, equation 1, and Chen et
al., "e5-omni", arXiv 2601.03666, who match modalities so (covariances).
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit

from clip_refine.losses.matching import (
    ALL,
    check_pairs,
    check_same_shape,
    outside_autocast,
    partners,
    unit_pairs,
    widened,
    without,
)


@outside_autocast
def alignment_loss(
    image_features: Tensor, text_features: Tensor, *, normalize: bool = False
) -> Tensor:
    """Mean squared distance between image and text: L = 1/B Σ_i ‖image_i − text_i‖².

    On unit features this is the metric `alignment`, 2 − 2·cosine.

    Args:
        image_features: (B, d), raw.
        text_features: (B, d), raw; row i is the partner of image i.
        normalize: Whether features are scaled to norm 1 first.

    Returns:
        A scalar ≥ 0 (at most 4 when normalised), in squared feature units, lower is nearer.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> alignment_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).item()
        25.0
    """
    check_pairs(image_features, text_features)
    image, text = (unit_pairs if normalize else widened)(image_features, text_features)
    return (image - text).square().sum(dim=1).mean()


@outside_autocast
def centroid_uniformity_loss(
    image_features: Tensor, text_features: Tensor, *, rows: slice = ALL
) -> Tensor:
    """How far the middles of the pairs are from an even spread over the sphere.

    With x, y the unit features and c_i = (x_i + y_i) / ‖x_i + y_i‖:

    L = log of the mean over i < j of exp(−2 ‖c_i − c_j‖²).

    ModGap adds it, and the alignment of unit features, to a contrastive loss: pairs collapse into
    their middles, which this keeps apart.

    Args:
        image_features: (B, d), raw; scaled to norm 1 inside.
        text_features: (B, d), raw; row i is the partner of image i.
        rows: The pairs whose part of the loss this is; parts add up (`losses/matching.py`).

    Returns:
        A scalar from −8 to 0, lower is more even; 0 where all middles, or the only one, are one.

    Raises:
        ValueError: If the shapes differ.

    Example:
        Middles at a right angle, squared distance 2:

        >>> import torch
        >>> pairs = torch.eye(2)
        >>> centroid_uniformity_loss(pairs, 3 * pairs).item()
        -4.0
    """
    check_pairs(image_features, text_features)
    image, text = unit_pairs(image_features, text_features)
    middles = to_unit(image + text, dim=1)
    count, size = len(middles), len(middles[rows])
    if count == 1:
        return 0 * middles.sum()

    def log_sum(rows: slice) -> Tensor:  # of i < j and i > j
        # ‖c_i − c_j‖² = 2 − 2 c_i·c_j; the gradient of pdist takes (B − 1)·B·d numbers on a GPU
        exponents = 4 * (middles[rows] @ middles.T) - 4
        itself = partners(exponents, None, rows) > 0
        return torch.logsumexp(without(itself, exponents).flatten(), dim=0)

    own, pairs = log_sum(rows), math.log(count * (count - 1))
    if size == count:
        return own - pairs
    # the logarithm of a sum has no parts; its gradient has, and those of its value are even
    with torch.no_grad():
        sums = [log_sum(slice(at, at + size)) for at in range(0, count, size)]
        whole = torch.logsumexp(torch.stack(sums), dim=0)
    part = (own - whole).exp()
    return (whole - pairs) * (size / count) + part - part.detach()


@outside_autocast
def covariance_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Squared difference of the two modalities' covariances: L = ‖C_image − C_text‖_F².

    C = 1/B Σ_i (x_i − μ)(x_i − μ)ᵀ of unit features; without CORAL's factor 1/(4d²), which makes it
    vanish at norm 1, and without the whitening that e5-omni puts before it. Which text belongs to
    which image does not matter, nor where the means are: the clouds become alike in shape.

    Args:
        image_features: (B, d), raw; scaled to norm 1 inside.
        text_features: (B, d), raw.

    Returns:
        A scalar ≥ 0, at most 2, lower is more alike.

    Raises:
        ValueError: If the shapes differ.

    Example:
        Images have variances of ¼ and a covariance of −¼, texts none: four entries of 1/16.

        >>> import torch
        >>> covariance_loss(torch.eye(2), torch.ones(2, 2)).item()
        0.25
    """
    check_pairs(image_features, text_features)
    sides = unit_pairs(image_features, text_features)
    of_image, of_text = (
        torch.cov(side.T, correction=0).reshape(side.shape[1], -1) for side in sides
    )
    return (of_image - of_text).square().sum()


# --------------------------------------------------------------------------------------------------
# RaFA


RafaReduction = Literal["mean", "sum"]


@outside_autocast
def rafa_loss(
    image_features: Tensor,
    text_features: Tensor,
    references: Tensor,
    *,
    text_references: Tensor | None = None,
    reduction: RafaReduction = "mean",
) -> Tensor:
    """Squared distance of both sides of each pair to the pair's own reference.

    With references r_i drawn from a prior outside (`clip_refine.priors`), for B pairs in d
    dimensions:

    - `"mean"`: 1/(B·d) Σ_i (‖image_i − r_i‖² + ‖text_i − r_i‖²), the scale to which the paper's
      reported hyper-parameters belong;
    - `"sum"`: 1/(2B) Σ_i (‖image_i − r_i‖² + ‖text_i − r_i‖²), as the paper prints it, which is
      d/2 times the former.

    In expectation over the references, `"mean"` pulls a feature with the gradient
    2 (feature − E r) / (B·d): toward the prior's mean, and both sides of a pair with one noise.
    On unit features the pull vanishes in expectation, so the features go in raw.

    Args:
        image_features: (B, d), raw.
        text_features: (B, d), raw; row i is the partner of image i.
        references: (B, d); row i serves both sides of pair i. No gradient flows into it.
        text_references: (B, d), references of the texts alone, for the paper's ablation with
            independent ones; None, the method, where both sides share theirs.
        reduction: `"mean"` or `"sum"`, see above.

    Returns:
        A scalar ≥ 0, lower is better aligned, in squared feature units.

    Raises:
        ValueError: If the shapes differ or `reduction` is neither.

    Example:
        Image at distance² 2 from the reference, text at 0, d = 2: 2/2 + 0/2.

        >>> import torch
        >>> image, text = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0]])
        >>> rafa_loss(image, text, torch.zeros(1, 2)).item()
        1.0
        >>> rafa_loss(image, text, torch.zeros(1, 2), reduction="sum").item()
        1.0
    """
    check_pairs(image_features, text_features)
    check_same_shape("references", references, image_features)
    text_references = references if text_references is None else text_references
    check_same_shape("text_references", text_references, text_features)
    image_features, text_features, references, text_references = widened(
        image_features, text_features, references.detach(), text_references.detach()
    )
    squared = (image_features - references).square() + (text_features - text_references).square()
    if reduction == "mean":
        return squared.mean()
    if reduction == "sum":
        return squared.sum(dim=1).mean() / 2
    raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
