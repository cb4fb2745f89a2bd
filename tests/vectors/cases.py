"""Drawn features with a gap between the modalities, and every peer fitted on such."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_refine.vectors.transforms import (
    Chain,
    DistributionNormalisation,
    Fold,
    MeanCentring,
    ModalityShift,
    NearestNeighbourNormalisation,
    Peer,
    ReAlign,
    Standardisation,
)

DIM = 6
Fit = Callable[[Tensor, Tensor], Peer]

FITS: dict[str, Fit] = {
    "mean-centring": MeanCentring.fit,
    "distribution-normalisation": DistributionNormalisation.fit,
    "modality-shift": partial(ModalityShift.fit, strength=0.7),
    "fold": partial(Fold.fit, share=0.8),
    "standardise": Standardisation.fit,
    "realign": ReAlign.fit,
    "nnn": partial(NearestNeighbourNormalisation.fit, neighbours=3, alpha=0.6),
    "mean-centring+nnn": partial(
        Chain.fit,
        steps=[
            MeanCentring.fit,
            partial(NearestNeighbourNormalisation.fit, neighbours=3, alpha=0.6),
        ],
    ),
}


def drawn(
    seed: int, images: int, texts: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Raw features of several lengths, the modalities apart in the first two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, DIM, generator=generator, dtype=torch.float64)
    text = torch.randn(texts, DIM, generator=generator, dtype=torch.float64)
    image[:, 0] += 2
    text[:, 1] += 2
    return image.to(dtype), text.to(dtype)


def unit(features: Tensor) -> Tensor:
    return normalize(features, dim=1)


def rotation(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q


def image_bias(peer: Peer, image: Tensor) -> Tensor:
    """NNN's of each image, by the column that its transform appends."""
    return -peer.transform_image(image)[:, -2]


def text_bias(peer: Peer, text: Tensor) -> Tensor:
    """NNN's of each text."""
    return -peer.transform_text(text)[:, -1]
