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
    Scalar,
    check_pairs,
    check_positive,
    false_negatives,
    outside_autocast,
    partner_shares,
    partners,
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
    teacher_similarity: Tensor | None = None,
    wrong_text_features: Tensor | None = None,
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
        teacher_similarity: (B, B), the teacher's of images (rows) with texts; None: all negatives
            count.
        wrong_text_features: (N, d), raw, of captions that no image of the batch has.

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
    logits = logit_scale * (image @ text.T)
    own = of_images = partner_shares(logits, caption_ids)
    to_texts, to_images = logits, logits.T
    if teacher_similarity is not None:
        to_texts = without(false_negatives(teacher_similarity, own), to_texts)
        to_images = without(false_negatives(teacher_similarity.T, own), to_images)
    if wrong_text_features is not None:
        _, wrong = widened(image, wrong_text_features)
        wrong = to_unit(wrong, dim=1) if normalize else wrong
        to_texts = torch.cat([to_texts, logit_scale * (image @ wrong.T)], dim=1)
        of_images = pad(own, (0, len(wrong)))
    return (cross_entropy(to_texts, of_images) + cross_entropy(to_images, own)) / 2


@outside_autocast
def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    normalize: bool = True,
    caption_ids: Tensor | None = None,
    teacher_similarity: Tensor | None = None,
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
        teacher_similarity: (B, B), the teacher's of images (rows) with texts: combinations that it
            holds nearer than the own pair of the image, or of the text, are left out.

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
    logits = logit_scale * (image @ text.T) + logit_bias
    own = partners(logits, caption_ids)
    costs = -logsigmoid((2 * own - 1) * logits)
    if teacher_similarity is not None:
        of_images = false_negatives(teacher_similarity, own)
        costs = costs.masked_fill(of_images | false_negatives(teacher_similarity.T, own).T, 0)
    return costs.sum() / len(logits)


def _checked(
    image_features: Tensor, text_features: Tensor, logit_scale: Scalar, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    check_pairs(image_features, text_features)
    check_positive("logit_scale", logit_scale)
    image, text = widened(image_features, text_features)
    if normalize:
        return to_unit(image, dim=1), to_unit(text, dim=1)
    return image, text
