"""Losses that match images and texts: by the pairs, by what the teacher knew, and by both (HyCD).

Of a loss over all combinations of a batch a process computes the rows of its own pairs, each
against all columns, so that its matrices are (b, B). The parts of all rows add up to the loss.

Contrastive losses are those that CLIP and SigLIP are pre-trained with, and harder ones: Radford et
al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv
2103.00020, figure 3 (softmax); Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV
2023, arXiv 2303.15343, section 3.2 (sigmoid). Wrong captions among the softmax's candidates:
Yuksekgonul et al., "When and Why Vision-Language Models Behave like Bags-of-Words", ICLR 2023,
arXiv 2210.01936, section 4 (NegCLIP). m²-mix, hard negatives from the arc between an image and its
text: Oh et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning", NeurIPS 2023, arXiv
2203.03897, the section on it, a baseline of the CLIP-Refine paper.

HyCD, hybrid contrastive-distillation, forgets nothing the teacher knew and matches pairs, too:
Yamaguchi et al., CVPR 2025, arXiv 2504.12717, the section on it. Its rivals stay near the teacher's
features (an anchor) or its similarities; both are mean squared errors, in the sense of Hinton et
al., "Distilling the Knowledge in a Neural Network", 2015, section 2.1 (matching logits) and Romero
et al., "FitNets", ICLR 2015, equation 3 (matching features).
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, mse_loss, pad
from torch.nn.functional import normalize as to_unit

# --------------------------------------------------------------------------------------------------
# What losses share: full precision, checked shapes, the rows of a batch that are one's own.


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


# --------------------------------------------------------------------------------------------------
# Contrastive: a pair's partner picked out of the batch.


@outside_autocast
def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Scalar,
    normalize: bool = True,
    caption_ids: Tensor | None = None,
    teacher_unit: tuple[Tensor, Tensor] | None = None,
    wrong_text_features: Tensor | None = None,
    rows: slice = ALL,
) -> Tensor:
    """Cross-entropy of picking a pair's partner out of the batch, both directions.

    With s_ij = logit_scale · image_i · text_j:

    L = −1/(2B) Σ_i (log softmax_j(s_ij)[j=i] + log softmax_j(s_ji)[j=i]);

    where captions are shared, the mean over all j with the caption of i takes the place of j = i.
    With a teacher, a softmax leaves out what the teacher holds nearer to its query than the query's
    own partner; with wrong texts, that of an image goes over these, too.

    Args:
        image_features: (B, d), raw.
        text_features: (B, d), raw; row i is the partner of image i.
        logit_scale: The multiplier itself, 1/τ, not its logarithm: 100 is τ = 0.01. A number or a
            0-d tensor, which may be learned.
        normalize: Whether features are scaled to norm 1 first, as CLIP does.
        caption_ids: (B,), equal where captions are, which then all are partners; None: pair i has
            only partner i.
        teacher_unit: (B, d′) image and text features of the teacher, of norm 1; None: all
            negatives count.
        wrong_text_features: (N, d), raw, of captions that no image of the batch has.
        rows: The queries whose part of the loss this is; parts add up.

    Returns:
        A scalar ≥ 0 in nats, lower is better; log B for a model that cannot tell pairs apart.

    Raises:
        ValueError: If shapes do not fit or `logit_scale` is not positive.

    Example:
        Two pairs at cosine 1, strangers at 0, scale 1: log(1 + 1/e).

        >>> import torch
        >>> pairs = torch.eye(2)
        >>> round(contrastive_loss(pairs, pairs, logit_scale=1.0).item(), 4)
        0.3133
    """
    image, text = _checked(image_features, text_features, logit_scale, normalize=normalize)
    to_texts, to_images = both_ways(image, text, rows, logit_scale)
    own = of_images = partner_shares(to_texts, caption_ids, rows)
    if teacher_unit is not None:
        check_teacher_pairs(image, *teacher_unit)
        ignored = false_negatives(teacher_unit, own, rows)
        to_texts, to_images = without(ignored[0], to_texts), without(ignored[1], to_images)
    if wrong_text_features is not None:
        _, wrong = widened(image, wrong_text_features)
        wrong = to_unit(wrong, dim=1) if normalize else wrong
        to_texts = torch.cat([to_texts, logit_scale * (image[rows] @ wrong.T)], dim=1)
        of_images = pad(own, (0, len(wrong)))
    forth = cross_entropy(to_texts, of_images, reduction="sum")
    return (forth + cross_entropy(to_images, own, reduction="sum")) / (2 * len(image))


@outside_autocast
def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    normalize: bool = True,
    caption_ids: Tensor | None = None,
    teacher_unit: tuple[Tensor, Tensor] | None = None,
    rows: slice = ALL,
) -> Tensor:
    """Every image-text combination judged on its own: a pair or not (SigLIP).

    With z_ij = 1 for pairs (on the diagonal, and where captions are equal) and −1 elsewhere:

    L = −1/B Σ_ij log σ(z_ij (logit_scale · image_i · text_j + logit_bias)).

    Args:
        image_features: (B, d), raw.
        text_features: (B, d), raw; row i is the partner of image i.
        logit_scale: The multiplier itself, not its logarithm.
        logit_bias: Added to every logit; SigLIP starts at −10.
        normalize: Whether features are scaled to norm 1 first, as SigLIP does.
        caption_ids: (B,), equal where captions are; None: pair i has only partner i.
        teacher_unit: (B, d′) image and text features of the teacher, of norm 1: combinations that
            it holds nearer than the own pair of the image, or of the text, are left out.
        rows: The images whose part of the loss this is; parts add up.

    Returns:
        A scalar ≥ 0 in nats per pair, lower is better.

    Raises:
        ValueError: If shapes do not fit or `logit_scale` is not positive.

    Example:
        One pair at cosine 1, scale 1, bias 0: log(1 + 1/e).

        >>> import torch
        >>> pair = torch.tensor([[1.0, 0.0]])
        >>> loss = sigmoid_contrastive_loss(pair, pair, logit_scale=1.0, logit_bias=0.0)
        >>> round(loss.item(), 4)
        0.3133
    """
    image, text = _checked(image_features, text_features, logit_scale, normalize=normalize)
    logits = logit_scale * (image[rows] @ text.T) + logit_bias
    own = partners(logits, caption_ids, rows)
    costs = -logsigmoid((2 * own - 1) * logits)
    if teacher_unit is not None:
        check_teacher_pairs(image, *teacher_unit)
        known = known_similarity(teacher_unit)
        nearer = teacher_unit[0][rows] @ teacher_unit[1].T > known[rows, None].minimum(known)
        costs = costs.masked_fill(nearer & (own == 0), 0)
    return costs.sum() / len(image)


def _checked(
    image_features: Tensor, text_features: Tensor, logit_scale: Scalar, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    check_pairs(image_features, text_features)
    check_positive("logit_scale", logit_scale)
    image, text = (unit_pairs if normalize else widened)(image_features, text_features)
    return image, text


# --------------------------------------------------------------------------------------------------
# m²-mix


def geodesic_mix(image_unit: Tensor, text_unit: Tensor, mix: Tensor) -> Tensor:
    """Points on the great-circle arc between each image and its text.

    With θ_i the angle between image_i and text_i:

    m_i = (sin(λ_i θ_i)·image_i + sin((1 − λ_i) θ_i)·text_i) / sin θ_i.

    Where the arc has no direction, at sin θ < 1e-3 (nearly parallel, or nearly opposite), the
    straight line λ·image + (1 − λ)·text, scaled back to norm 1, takes its place; for nearly
    parallel vectors the two differ by less than 1e-9.

    Args:
        image_unit: (B, d), rows of norm 1.
        text_unit: (B, d), rows of norm 1.
        mix: λ, share of the image in 0–1; 0-d for one share, or (B,) for one a pair. 1 gives the
            image, 0 the text.

    Returns:
        (B, d), rows of norm 1.

    Example:
        Half-way between the axes lies the diagonal.

        >>> axes = torch.eye(2)
        >>> geodesic_mix(axes[:1], axes[1:], torch.tensor(0.5))
        tensor([[0.7071, 0.7071]])
    """
    share = mix.to(image_unit.dtype).reshape(-1, 1)
    cosine = (image_unit * text_unit).sum(dim=1, keepdim=True)
    # |image − text·cos| = sin θ, exact where 1 − cos² has lost its digits
    sine = (image_unit - cosine * text_unit).norm(dim=1, keepdim=True)
    has_arc = sine > 1e-3
    # both branches of `where` get a gradient, so the unused one must be finite as well
    safe_sine = torch.where(has_arc, sine, torch.ones_like(sine))
    safe_cosine = torch.where(has_arc, cosine, torch.zeros_like(cosine))
    angle = torch.atan2(safe_sine, safe_cosine)
    on_arc = (
        torch.sin(share * angle) * image_unit + torch.sin((1 - share) * angle) * text_unit
    ) / safe_sine
    on_line = to_unit(share * image_unit + (1 - share) * text_unit, dim=1)
    return torch.where(has_arc, on_arc, on_line)


@outside_autocast
def m2_mix_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Scalar,
    mix: Tensor,
    caption_ids: Tensor | None = None,
    teacher_unit: tuple[Tensor, Tensor] | None = None,
    rows: slice = ALL,
) -> Tensor:
    """Contrastive loss whose negatives are mixtures of the other pairs' image and text.

    With x, y the unit features, m_j = `geodesic_mix(x_j, y_j, λ)` and s = logit_scale, the image's
    direction is

    C(x, y) = −1/B Σ_i log [ e^{s x_i·y_i} / (e^{s x_i·y_i} + Σ_{j≠i} e^{s x_i·m_j}) ],

    and L = ½ (C(x, y) + C(y, x)) with the same mixtures. The positives stay unmixed and the
    mixtures *replace* the original negatives; as a mixture lies between the cones it is nearer to
    the query than another pair's partner, so harder. Gradient flows through the mixtures. Oh et
    al. use this beside the plain contrastive loss, with λ from Beta(½, ½)-like distributions; add
    `contrastive_loss` for that.

    Args:
        image_features: (B, d), raw; scaled to norm 1 inside.
        text_features: (B, d), raw; scaled to norm 1 inside.
        logit_scale: The multiplier 1/τ, a number or a 0-d tensor.
        mix: λ, the image's share in 0–1, drawn by the caller: 0-d, or (B,) for one a pair. No
            gradient flows into it.
        caption_ids: (B,), equal where captions are; mixtures with such pairs are no negatives.
        teacher_unit: (B, d′) image and text features of the teacher, of norm 1; nor are mixtures
            with pairs whose text it holds nearer to the image than the image's own, and alike of
            texts.
        rows: The queries whose part of the loss this is; parts add up.

    Returns:
        A scalar ≥ 0 in nats, lower is better.

    Raises:
        ValueError: If shapes do not fit or `logit_scale` is not positive.

    Example:
        Pairs at cosine 1, so that mixtures are the originals: the contrastive loss, log(1 + 1/e).

        >>> pairs = torch.eye(2)
        >>> loss = m2_mix_loss(pairs, pairs, logit_scale=1.0, mix=torch.tensor(0.3))
        >>> round(loss.item(), 4)
        0.3133
    """
    check_pairs(image_features, text_features)
    check_positive("logit_scale", logit_scale)
    if mix.shape not in (torch.Size([]), image_features.shape[:1]):
        raise ValueError(
            f"mix must be one number or one a pair, (), or ({len(image_features)},); "
            f"got {tuple(mix.shape)}"
        )
    image, text, mix = widened(image_features, text_features, mix.detach())
    image_unit, text_unit = unit_pairs(image, text)
    mixed_unit = geodesic_mix(image_unit, text_unit, mix)
    positives = logit_scale * (image_unit * text_unit).sum(dim=1)[rows]
    first = rows.start or 0
    targets = torch.arange(first, first + len(positives), device=positives.device)
    logits = [logit_scale * query[rows] @ mixed_unit.T for query in (image_unit, text_unit)]
    own = partners(logits[0], caption_ids, rows)
    ignored = [own > 0, own > 0]  # in the place of their own mixture stand the positives
    if teacher_unit is not None:
        check_teacher_pairs(image, *teacher_unit)
        ignored = [(own > 0) | nearer for nearer in false_negatives(teacher_unit, own, rows)]
    logits = [without(*both) for both in zip(ignored, logits, strict=True)]
    directions = [
        cross_entropy(torch.diagonal_scatter(side, positives, first), targets, reduction="sum")
        for side in logits
    ]
    return (directions[0] + directions[1]) / (2 * len(image))


# --------------------------------------------------------------------------------------------------
# Distillation: what the teacher has, feature by feature or similarity by similarity.


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
        rows: The images whose part of the loss this is; parts add up.

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
        rows: The queries whose part of the loss this is; parts add up.

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
