"""The frozen copy that the student is held to."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """A deep copy of a dual encoder that never changes.

    No module on purpose: a parent's `train()`, `requires_grad_()` or `parameters()` does not reach
    it, so it cannot be switched to training and no optimiser finds it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._encoder: Any = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw features without a graph."""
        return self._encoder.encode_image(pixels)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw features without a graph."""
        return self._encoder.encode_text(tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen weights, to compare with."""
        return self._encoder.state_dict()
