"""What every loss does before its formula: leave autocast, widen the numbers, check the shapes."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit

P = ParamSpec("P")
Scalar = float | Tensor
"""A number, or a tensor of no dimensions where it is learned (a model's logit scale)."""


def outside_autocast(
    loss: Callable[Concatenate[Tensor, P], Tensor],
) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Run `loss` with autocast off on the device of its first argument.

    Inside autocast a matrix product of float32 features comes back in bfloat16, and eight bits of
    mantissa turn a similarity of 110 into a multiple of one half.
    """

    @wraps(loss)
    def in_full_precision(image_features: Tensor, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast(device_type=image_features.device.type, enabled=False):
            return loss(image_features, *args, **kwargs)

    return in_full_precision


def widened(*features: Tensor) -> tuple[Tensor, ...]:
    """All tensors in one dtype: float64 if one of them is, float32 otherwise."""
    dtype = torch.float32
    for tensor in features:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in features)


def partners(logits: Tensor, caption_ids: Tensor | None) -> Tensor:
    """Which texts are an image's own: (B, B) of the logits' dtype, 1 or 0.

    Those with its caption's number in `caption_ids`, (B,); without numbers the diagonal.
    """
    if caption_ids is None:
        return torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    if caption_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"caption_ids must be one number a pair, ({len(logits)},); "
            f"got {tuple(caption_ids.shape)}"
        )
    return (caption_ids[:, None] == caption_ids).to(logits)


def partner_shares(logits: Tensor, caption_ids: Tensor | None) -> Tensor:
    """`partners` with rows that sum to 1: the same share for every text that is an image's own."""
    own = partners(logits, caption_ids)
    return own / own.sum(dim=1, keepdim=True)


@outside_autocast
def cosines(image_features: Tensor, text_features: Tensor) -> Tensor:
    """(B, B) cosines of every image (row) with every text (column)."""
    image, text = widened(image_features, text_features)
    return to_unit(image, dim=1) @ to_unit(text, dim=1).T


def false_negatives(teacher_similarity: Tensor, own: Tensor) -> Tensor:
    """What a query (row) has among its negatives that the teacher holds nearer than its partner.

    (B, B) bool; never one of the query's `own`, which are above 0 there. Source: Solatorio,
    "GISTEmbed", 2024, arXiv 2402.16829, whose guide is our teacher.

    >>> false_negatives(torch.tensor([[0.3, 0.5], [0.1, 0.2]]), torch.eye(2)).tolist()
    [[False, True], [False, False]]
    """
    if teacher_similarity.shape != own.shape:
        raise ValueError(
            f"teacher_similarity must be {tuple(own.shape)}, got {tuple(teacher_similarity.shape)}"
        )
    return (teacher_similarity > teacher_similarity.diagonal()[:, None]) & (own == 0)


def without(ignored: Tensor, logits: Tensor) -> Tensor:
    """Logits that a softmax gives no share where `ignored` is true."""
    # not −∞, which times a target of 0 is NaN
    return logits.masked_fill(ignored, torch.finfo(logits.dtype).min)


def check_pairs(image_features: Tensor, text_features: Tensor, *, owner: str = "") -> None:
    """Refuse features that are not two (B, d), at least (1, 1); `owner` stands before names."""
    image_shape, text_shape = tuple(image_features.shape), tuple(text_features.shape)
    if len(image_shape) != 2 or image_shape != text_shape or 0 in image_shape:
        raise ValueError(
            f"{owner}image and text features must both be (batch, dim), one row a pair; "
            f"got {image_shape} and {text_shape}"
        )


def check_same_shape(name: str, tensor: Tensor, image_features: Tensor) -> None:
    """Refuse a `tensor` whose shape is not that of the image features."""
    if tensor.shape != image_features.shape:
        raise ValueError(
            f"{name} must have the features' shape {tuple(image_features.shape)}, "
            f"got {tuple(tensor.shape)}"
        )


def student_and_teacher(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    *,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """All four checked and in one dtype, of norm 1 if asked for, the teacher's without gradient."""
    check_pairs(image_features, text_features)
    # the teacher's dimension may differ: only its similarities are looked at
    check_pairs(teacher_image_features, teacher_text_features, owner="teacher ")
    if len(teacher_image_features) != len(image_features):
        raise ValueError(
            f"student and teacher must see the same batch, got {len(image_features)} "
            f"and {len(teacher_image_features)} pairs"
        )
    teacher = teacher_image_features.detach(), teacher_text_features.detach()
    features = widened(image_features, text_features, *teacher)
    return tuple(to_unit(side, dim=1) for side in features) if normalize else features


def check_positive(name: str, value: Scalar) -> None:
    """Refuse a number that is not above zero; tensors pass, reading one would stall a GPU."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    elif not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
