"""What a model must offer to be refined."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor, nn

from clip_refine.errors import ModelError


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


def check_dual_encoder(model: Any) -> Any:
    """Return `model` if it can be refined.

    Raises:
        ModelError: It is no module, or lacks something of the protocol; what, is said.
    """
    members = ("encode_image", "encode_text", "preprocess", "tokenizer", "logit_scale")
    lacking = [name for name in members if not hasattr(model, name)]
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{kind} cannot be refined: it is no torch.nn.Module. It must be one, with "
            f"{', '.join(members[:-1])} and {members[-1]}."
        )
    if lacking:
        raise ModelError(
            f"{kind} cannot be refined: it has no {', no '.join(lacking)}. A dual encoder has "
            f"{', '.join(members[:-1])} and {members[-1]}."
        )
    for name in members[:-1]:
        if not callable(getattr(model, name)):
            raise ModelError(f"{kind} cannot be refined: its {name} cannot be called.")
    if not isinstance(model.logit_scale, Tensor) or model.logit_scale.ndim:
        raise ModelError(
            f"{kind} cannot be refined: its logit_scale must be a 0-d tensor, the factor on "
            "cosines (the exponential of what CLIP stores)."
        )
    return model
