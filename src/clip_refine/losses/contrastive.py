"""The losses that CLIP and SigLIP are pre-trained with, and harder ones: the usual baselines.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021, arXiv 2103.00020, figure 3 (softmax); Zhai et al., "Sigmoid Loss for Language Image
Pre-Training", ICCV 2023, arXiv 2303.15343, section 3.2 (sigmoid). Wrong captions among the
softmax's candidates: Yuksekgonul et al., "When and Why Vision-Language Models Behave like
Bags-of-Words", ICLR 2023, arXiv 2210.01936, section 4 (NegCLIP). m²-mix, hard negatives from the
arc between an image and its text: Oh et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning",
NeurIPS 2023, arXiv 2203.03897, the section on it, a baseline of the CLIP-Refine paper.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pad
from torch.nn.functional import normalize as to_unit

from clip_refine.losses.tensors import (
    ALL,
    Scalar,
    both_ways,
    check_pairs,
    check_positive,
    check_teacher_pairs,
    false_negatives,
    known_similarity,
    outside_autocast,
    partner_shares,
    partners,
    unit_pairs,
    widened,
    without,
)


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
        rows: The queries whose part of the loss this is; parts add up (`losses/tensors.py`).

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
        rows: The images whose part of the loss this is; parts add up (`losses/tensors.py`).

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
        rows: The queries whose part of the loss this is; parts add up (`losses/tensors.py`).

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
