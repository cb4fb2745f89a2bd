"""What a model must offer to be refined."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from PIL import Image
from torch import Tensor


@runtime_checkable
class DualEncoder(Protocol):
    """A `torch.nn.Module` with an image tower and a text tower that end in one space.

    Attributes:
        preprocess: PIL image → (3, H, W), the model's own inference preprocessing.
        tokenizer: B texts → (B, L) token ids.
        logit_scale: 0-d tensor, the factor on cosines in the model's softmax (about 100 for
            CLIP): the exponential of the parameter that CLIP models store.
    """

    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]

    @property
    def logit_scale(self) -> Tensor: ...  # noqa: D102

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw features, not normalised."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw features, not normalised."""
        ...
