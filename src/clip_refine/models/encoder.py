"""What every model here can do, a frozen copy of one, and how two are told apart."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from clip_refine.errors import ModelError

# --------------------------------------------------------------------------------------------------
# What a model must offer to be refined.


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


# --------------------------------------------------------------------------------------------------
# The frozen copy that the student is held to.


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

    def follow(self, batches: Iterable[Any], plan: Any) -> Iterable[Any]:
        """The batches of an epoch, as they are: this teacher sees what the student sees."""
        del plan
        return batches

    def state_dict(self) -> dict[str, Tensor]:
        """The frozen weights, to compare with."""
        return self._encoder.state_dict()


# --------------------------------------------------------------------------------------------------
# Which model it is: its weights, architecture and tokenizer as bytes.


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PROBE_TEXTS = ["a photo of a cat.", "Two people, one umbrella: rain at 5 o'clock!"]


def identity(model: Any, precision: str, device: torch.device | str = "cpu") -> Iterator[bytes]:
    """Everything that features follow from besides the pixels; equal for equal models.

    What a tokenizer is called is not enough, since two functions may have one name: what it makes
    of a sample counts, too. The same goes for the features of a model that is no module, whose
    weights nobody sees.
    """
    yield precision.encode()
    yield _ADDRESS.sub("", repr(model)).encode()
    tokens = model.tokenizer(_PROBE_TEXTS)
    yield _bytes(tokens)
    if isinstance(model, nn.Module):
        yield from _weights(model)
    else:
        yield from _probe_features(model, tokens, device)


def _weights(model: nn.Module) -> Iterator[bytes]:
    for name, tensor in sorted(model.state_dict().items()):  # adapters leave another order behind
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield _bytes(tensor)


@torch.no_grad()
def _probe_features(model: Any, tokens: Tensor, device: torch.device | str) -> Iterator[bytes]:
    image = Image.linear_gradient("L").convert("RGB")
    yield _bytes(model.encode_image(model.preprocess(image)[None].to(device)))
    yield _bytes(model.encode_text(tokens.to(device)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
