"""Forgetting nothing the teacher knew: HyCD, and what it is compared with.

HyCD, hybrid contrastive-distillation, matches pairs, too: Yamaguchi et al., CVPR 2025, arXiv
2504.12717, the section on it. Its rivals stay near the teacher's features (an anchor) or its
similarities; both are mean squared errors, in the sense of Hinton et al., "Distilling the Knowledge
in a Neural Network", 2015, section 2.1 (matching logits) and Romero et al., "FitNets", ICLR 2015,
equation 3 (matching features).
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from clip_refine.losses.tensors import (
    ALL,
    Scalar,
    both_ways,
    check_pairs,
    check_positive,
    check_same_shape,
    outside_autocast,
    partner_shares,
    student_and_teacher,
    widened,
)


@outside_autocast
def feature_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    *,
    shift: Tensor | None = None,
) -> Tensor:
    """Squared distance of each tower's features to the teacher's own, the two towers added.

    L = 1/(B·d) Σ_i (‖image_i − teacher_image_i − shift‖² + ‖text_i − teacher_text_i + shift‖²).

    With a shift along the line from the image to the text centroid the teacher's two clouds come
    closer without changing shape: half the distance lets their centroids meet.

    Args:
        image_features: (B, d), raw, the student's.
        text_features: (B, d), raw, the student's.
        teacher_image_features: (B, d), raw; no gradient flows into it.
        teacher_text_features: (B, d), raw; no gradient flows into it.
        shift: (d,), what the teacher's image features are moved by, and its text features
            against; None for nothing.

    Returns:
        A scalar ≥ 0 in squared feature units, 0 where nothing has moved.

    Raises:
        ValueError: If the four shapes are not one (B, d), or the shift's is not (d,).

    Example:
        Image moved by (1, 1), text by nothing, d = 2: 2/2 + 0/2.

        >>> import torch
        >>> origin = torch.zeros(1, 2)
        >>> feature_distillation_loss(origin + 1, origin, origin, origin).item()
        1.0
    """
    check_pairs(image_features, text_features)
    check_same_shape("teacher image features", teacher_image_features, image_features)
    check_same_shape("teacher text features", teacher_text_features, image_features)
    image, text, teacher_image, teacher_text = widened(
        image_features,
        text_features,
        teacher_image_features.detach(),
        teacher_text_features.detach(),
    )
    if shift is not None:
        if shift.shape != image.shape[1:]:
            raise ValueError(f"shift is {tuple(shift.shape)}, expected {tuple(image.shape[1:])}")
        shift = shift.to(image)
        teacher_image, teacher_text = teacher_image + shift, teacher_text - shift
    return mse_loss(image, teacher_image) + mse_loss(text, teacher_text)


@outside_autocast
def logit_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    *,
    temperature: Scalar = 1.0,
    normalize: bool = False,
    rows: slice = ALL,
) -> Tensor:
    """Squared difference of the student's and the teacher's similarities, over all B² of them.

    L = 1/B² Σ_ij (image_i · text_j − teacher_image_i · teacher_text_j)² / temperature².

    Args:
        image_features: (B, d), raw, the student's.
        text_features: (B, d), raw, the student's.
        teacher_image_features: (B, d′), raw; no gradient flows into it.
        teacher_text_features: (B, d′), raw; no gradient flows into it.
        temperature: Divides both similarities; a number or a 0-d tensor.
        normalize: Whether features are scaled to norm 1 first.
        rows: The images whose part of the loss this is; parts add up (`losses/tensors.py`).

    Returns:
        A scalar ≥ 0 in squared logits, 0 where no similarity has moved.

    Raises:
        ValueError: If shapes do not fit or `temperature` is not positive.

    Example:
        One pair whose similarity went from 1 to 3: (3 − 1)².

        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> logit_distillation_loss(3 * one, one, one, one).item()
        4.0
    """
    image, text, teacher_image, teacher_text = student_and_teacher(
        image_features,
        text_features,
        teacher_image_features,
        teacher_text_features,
        normalize=normalize,
    )
    check_positive("temperature", temperature)
    found = image[rows] @ text.T / temperature
    known = teacher_image[rows] @ teacher_text.T / temperature
    return mse_loss(found, known) * (len(found) / len(image))


# --------------------------------------------------------------------------------------------------
# HyCD


def hybrid_targets(
    teacher_logits: Tensor,
    *,
    alpha: float,
    caption_ids: Tensor | None = None,
    rows: slice = ALL,
) -> Tensor:
    """The rows that the student is to reproduce: part the true pairs, part the teacher's.

    q̂_ij = α·t_ij + (1 − α)·softmax_j(teacher_logits_ij), where t_ij = 1[i = j], or 1/n_i for all
    n_i pairs that have the caption of pair i.

    Args:
        teacher_logits: (b, B), a row for each query of `rows`, a column for each candidate.
        alpha: Share of the true pairs, 0–1.
        caption_ids: (B,), equal where captions are; None where pair i has only partner i.
        rows: Which of the B pairs are the queries.

    Returns:
        (b, B) probabilities, rows sum to 1.

    Example:
        >>> hybrid_targets(torch.zeros(2, 2), alpha=0.5).tolist()
        [[0.75, 0.25], [0.25, 0.75]]
    """
    own = partner_shares(teacher_logits, caption_ids, rows)
    return alpha * own + (1 - alpha) * teacher_logits.softmax(dim=1)


@outside_autocast
def hycd_loss(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    *,
    alpha: float = 0.5,
    temperature: Scalar = 1.0,
    teacher_temperature: Scalar | None = None,
    normalize: bool = False,
    caption_ids: Tensor | None = None,
    rows: slice = ALL,
) -> Tensor:
    """Divergence of the student's matching probabilities from hybrid targets, both directions.

    With p the student's row softmax of similarity / temperature, q the teacher's, and
    q̂_ij = α·1[i = j] + (1 − α)·q_ij (or as `hybrid_targets` has it for shared captions):

    L = ½ (KL(q̂ ‖ p) image→text + KL(q̂ ‖ p) text→image),

    each KL summed over columns and averaged over rows. α = 1 is the contrastive loss, α = 0
    distillation of the teacher alone. The gradient in the student's logits is (p − q̂) / (2B) in
    each direction. There is no factor temperature².

    Similarities are raw dot products by default: features of OpenAI's ViT-B/32 have norms near
    10.5, which acts as a logit scale near 110 on cosines. For a model with other norms pass
    `normalize=True` and `temperature = 1 / logit_scale`.

    Args:
        image_features: (B, d), raw, the student's.
        text_features: (B, d), raw, the student's; row i is the partner of image i.
        teacher_image_features: (B, d′), raw; no gradient flows into it.
        teacher_text_features: (B, d′), raw; no gradient flows into it.
        alpha: Share of the one-hot part of the targets, 0–1.
        temperature: Divides student's and teacher's similarities; a number or a 0-d tensor. A
            learned one gets gradient through the student only.
        teacher_temperature: Divides the teacher's instead, where its cosines spread otherwise.
        normalize: Whether features are scaled to norm 1 first.
        caption_ids: (B,), equal where captions are, which then all are partners; None: pair i has
            only partner i.
        rows: The queries whose part of the loss this is; parts add up (`losses/tensors.py`).

    Returns:
        A scalar ≥ 0 in nats, lower is better.

    Raises:
        ValueError: If shapes do not fit, `alpha` is outside 0–1 or `temperature` not positive.

    Example:
        Student that cannot tell the two pairs apart, p = (½, ½), with α = 1: ln 2.

        >>> same = torch.ones(2, 3)
        >>> round(hycd_loss(same, same, same, same, alpha=1.0).item(), 4)
        0.6931
    """
    image, text, teacher_image, teacher_text = student_and_teacher(
        image_features,
        text_features,
        teacher_image_features,
        teacher_text_features,
        normalize=normalize,
    )
    check_positive("temperature", temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    check_positive("teacher_temperature", teacher_temperature)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")

    with torch.no_grad():
        targets = [
            hybrid_targets(logits, alpha=alpha, caption_ids=caption_ids, rows=rows)
            for logits in both_ways(teacher_image, teacher_text, rows, 1 / teacher_temperature)
        ]
    logits = both_ways(image, text, rows, 1 / temperature)
    directions = [_divergence(*both) for both in zip(targets, logits, strict=True)]
    return (directions[0] + directions[1]) / (2 * len(image))


def _divergence(targets: Tensor, logits: Tensor) -> Tensor:
    """KL(targets ‖ softmax(logits)), summed over rows and columns."""
    # xlogy, because a target that underflows to 0 contributes 0 and not NaN
    return (torch.xlogy(targets, targets) - targets * logits.log_softmax(dim=1)).sum()
