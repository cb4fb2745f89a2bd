"""RaFA, random feature alignment: both sides of a pair are drawn to one random reference.

Source: Yamaguchi et al., "Post-pre-training for Modality Alignment in Vision-Language Foundation
Models", CVPR 2025, arXiv 2504.12717, the section on random feature alignment.
"""

from typing import Literal

from torch import Tensor

from clip_refine.losses.tensors import check_pairs, check_same_shape, outside_autocast, widened

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
