"""The frozen copy that the student is held to."""

import copy

import torch
from torch import Tensor, nn

from clip_refine.models.dual_encoder import DualEncoder


class Teacher(nn.Module):
    """A deep copy of a dual encoder that never changes.

    It is in evaluation mode, has no gradients, and `train()` leaves it as it is, so that a parent
    module's `train()` cannot wake it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model).requires_grad_(False)
        self.encoder.eval()
        self.training = False

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in evaluation mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "Teacher":
        """Does nothing: a teacher has no gradients."""
        return self

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw features without a graph."""
        return _encoder(self).encode_image(pixels)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw features without a graph."""
        return _encoder(self).encode_text(tokens)


def _encoder(teacher: Teacher) -> DualEncoder:
    return teacher.encoder  # pyright: ignore[reportReturnType]
