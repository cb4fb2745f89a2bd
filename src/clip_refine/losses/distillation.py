"""Staying near the teacher: in its features (an anchor) or in its similarities.

Both are mean squared errors, in the sense of Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015, section 2.1 (matching logits) and Romero et al., "FitNets", ICLR 2015, equation 3
(matching features). They are rivals of HyCD's softened targets.
"""

from torch import Tensor
from torch.nn.functional import mse_loss

from clip_refine.losses.tensors import (
    ALL,
    Scalar,
    check_pairs,
    check_positive,
    check_same_shape,
    outside_autocast,
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
