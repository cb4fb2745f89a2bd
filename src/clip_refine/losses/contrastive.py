"""The losses that CLIP and SigLIP are pre-trained with, the baselines of every comparison.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021, arXiv 2103.00020, figure 3 (softmax); Zhai et al., "Sigmoid Loss for Language Image
Pre-Training", ICCV 2023, arXiv 2303.15343, section 3.2 (sigmoid). Wrong captions among the
softmax's candidates: Yuksekgonul et al., "When and Why Vision-Language Models Behave like
Bags-of-Words", ICLR 2023, arXiv 2210.01936, section 4 (NegCLIP).
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
