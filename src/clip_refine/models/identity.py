"""Which model it is: its weights, architecture and tokenizer as bytes."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_PROBE_TEXTS = ["a photo of a cat.", "Two people, one umbrella: rain at 5 o'clock!"]


def identity(model: Any, precision: str, device: torch.device | str = "cpu") -> Iterator[bytes]:
    """Everything that features follow from besides the pixels; equal for equal models.

    What a tokenizer is called is not enough, since two functions may have one name: what it makes
    of a sample counts, too. The same goes for the features of a model that is no module, whose
    weights nobody sees.

    Args:
        model: A dual encoder.
        precision: What it runs at, as in `fp32`.
        device: Where it takes its inputs.
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
