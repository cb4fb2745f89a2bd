"""What losses share: full precision, checked shapes, the rows of a batch that are one's own.

Of a loss over all combinations of a batch a process computes the rows of its own pairs, each
against all columns, so that its matrices are (b, B). The parts of all rows add up to the loss.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit

P = ParamSpec("P")
Scalar = float | Tensor
"""A number, or a tensor of no dimensions where it is learned (a model's logit scale)."""
ALL = slice(None)
"""The rows of a process that is the only one."""
_TIE = 16  # roundings, below which two of the teacher's similarities count as equal


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


def both_ways(
    image: Tensor, text: Tensor, rows: slice, scale: Scalar = 1.0
) -> tuple[Tensor, Tensor]:
    """(b, B) similarities, of `rows` of the images with all texts and of texts with all images."""
    if len(image[rows]) == len(image):
        similarity = scale * (image @ text.T)
        return similarity, similarity.T
    return scale * (image[rows] @ text.T), scale * (text[rows] @ image.T)


def partners(logits: Tensor, caption_ids: Tensor | None, rows: slice = ALL) -> Tensor:
    """Which texts are an image's own: (b, B) as the logits of `rows`, 1 or 0.

    Those with its caption's number in `caption_ids`, (B,); without numbers that of its pair.

    >>> partners(torch.zeros(3, 3), torch.tensor([7, 4, 7])).tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    >>> partners(torch.zeros(1, 3), None, slice(1, 2)).tolist()
    [[0.0, 1.0, 0.0]]
    """
    if caption_ids is None:
        own = torch.zeros_like(logits)
        own.diagonal(rows.start or 0).fill_(1)
        return own
    if caption_ids.shape != logits.shape[1:]:
        raise ValueError(
            f"caption_ids must be one number a pair, ({logits.shape[1]},); "
            f"got {tuple(caption_ids.shape)}"
        )
    return (caption_ids[rows, None] == caption_ids).to(logits)


def partner_shares(logits: Tensor, caption_ids: Tensor | None, rows: slice = ALL) -> Tensor:
    """`partners` with rows that sum to 1: the same share for every text that is an image's own."""
    own = partners(logits, caption_ids, rows)
    return own / own.sum(dim=1, keepdim=True)


def unit_pairs(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides scaled to norm 1, in one dtype."""
    image, text = widened(image_features, text_features)
    return to_unit(image, dim=1), to_unit(text, dim=1)


def known_similarity(teacher_unit: tuple[Tensor, Tensor]) -> Tensor:
    """(B,) what is above it the teacher holds nearer than the pair: by more than rounding.

    Else rounding would decide about two pairs that have one caption.
    """
    known = (teacher_unit[0] * teacher_unit[1]).sum(dim=1)
    return known + _TIE * torch.finfo(known.dtype).eps


def false_negatives(
    teacher_unit: tuple[Tensor, Tensor], own: Tensor, rows: slice = ALL
) -> tuple[Tensor, ...]:
    """What a query (row) has among its negatives that the teacher holds nearer than its partner.

    (b, B) bool for images as queries, and for texts; never one of the query's `own`, which are
    above 0 there. Source: Solatorio, "GISTEmbed", 2024, arXiv 2402.16829, whose guide is our
    teacher.

    >>> images, texts = torch.tensor([[0.3, 0.5], [0.1, 0.2]]), torch.eye(2)
    >>> false_negatives((images, texts), torch.eye(2))[0].tolist()
    [[False, True], [False, False]]
    """
    known = known_similarity(teacher_unit)[rows, None]
    return tuple((side > known) & (own == 0) for side in both_ways(*teacher_unit, rows))


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


def check_teacher_pairs(
    image_features: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> None:
    """Refuse those of another batch; their dimension may differ, only similarities count."""
    check_pairs(teacher_image, teacher_text, owner="teacher ")
    if len(teacher_image) != len(image_features):
        raise ValueError(
            f"student and teacher must see the same batch, got {len(image_features)} "
            f"and {len(teacher_image)} pairs"
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
    check_teacher_pairs(image_features, teacher_image_features, teacher_text_features)
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
