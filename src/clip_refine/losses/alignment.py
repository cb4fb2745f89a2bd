"""L_align: draw the two sides of a pair straight together.

Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
Uniformity on the Hypersphere", ICML 2020, arXiv 2005.10242, section 4 with exponent 2. A baseline
of the CLIP-Refine paper (HyCD + L_align), which closes the gap and loses accuracy.
"""

from torch import Tensor
from torch.nn.functional import normalize as to_unit

from clip_refine.losses.tensors import check_pairs, outside_autocast, widened


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
    image, text = widened(image_features, text_features)
    if normalize:
        image, text = to_unit(image, dim=1), to_unit(text, dim=1)
    return (image - text).square().sum(dim=1).mean()
