"""Two linear layers as a dual encoder of stored vectors."""

import math

import torch
from torch import Tensor, nn

from clip_refine.vectors.maps import RefinedMaps


class VectorStudent(nn.Module):
    """A `DualEncoder` whose pixels and tokens are vectors: W = start + change in each modality.

    Only the change is a parameter, so that weight decay pulls W toward its start and not toward
    zero. Of rank r it is a product of two factors, the second one zero at first.

    Attributes:
        image_start: (d, d), where the image map starts.
        text_start: (d, d), where the text map starts.
    """

    image_start: Tensor
    text_start: Tensor
    scale: Tensor

    def __init__(
        self,
        image_start: Tensor,
        text_start: Tensor,
        *,
        logit_scale: float,
        rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("image_start", image_start.float())
        self.register_buffer("text_start", text_start.float())
        self.register_buffer("scale", torch.tensor(float(logit_scale)))
        self.image_change = _change(image_start.shape[0], rank, generator)
        self.text_change = _change(text_start.shape[0], rank, generator)

    @staticmethod
    def preprocess(image: Tensor) -> Tensor:
        """Vectors are what they are."""
        return image

    @staticmethod
    def tokenizer(texts: list[Tensor]) -> Tensor:
        """Vectors are what they are."""
        return torch.stack(texts)

    @property
    def logit_scale(self) -> Tensor:
        """0-d factor on cosines, the stored vectors' model's."""
        return self.scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, d) vectors → (B, d)."""
        return pixels @ self.image_start.T + _apply(self.image_change, pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, d) vectors → (B, d)."""
        return tokens @ self.text_start.T + _apply(self.text_change, tokens)

    @torch.no_grad()
    def maps(self, images: int, texts: int, *, logit_scale: float) -> RefinedMaps:
        """What was learnt, on so many images and texts, with the factor on cosines that fits."""
        eye = torch.eye(self.image_start.shape[1], device=self.scale.device)
        image, text = self.encode_image(eye).T, self.encode_text(eye).T
        sides = image.contiguous().cpu(), text.contiguous().cpu()
        return RefinedMaps(sides[0], sides[1], images, texts, logit_scale=logit_scale)


def _change(dim: int, rank: int | None, generator: torch.Generator | None) -> nn.ParameterList:
    if rank is None:
        return nn.ParameterList([torch.zeros(dim, dim)])
    down = torch.randn(rank, dim, generator=generator) / math.sqrt(dim)
    return nn.ParameterList([down, torch.zeros(dim, rank)])


def _apply(factors: nn.ParameterList, rows: Tensor) -> Tensor:
    for factor in factors:
        rows = rows @ factor.T
    return rows
