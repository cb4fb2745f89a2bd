"""One table of names that reads both ways: which tensors of two libraries hold the same weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clip_refine.errors import ModelError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Converted:
    """A model in the terms of the other library.

    Attributes:
        config: Its settings: open_clip's `model_cfg`, or what Transformers calls `config.json`.
        state: Its weights by the other library's names.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Link:
    """The same weights under the names of both libraries.

    Attributes:
        open_clip: One name, or several whose tensors together are the other side's, in this order.
        transformers: The same for Transformers.
        shape: How open_clip's tensor differs: `transposed`, `batched` (a leading 1 more), `scalar`
            (0-d where Transformers' has one element), or not at all.
        shares: Relative lengths of open_clip's tensors where they are several; equal ones if empty.
    """

    open_clip: tuple[str, ...]
    transformers: tuple[str, ...]
    shape: Literal["same", "transposed", "batched", "scalar"] = "same"
    shares: tuple[int, ...] = ()


def link(open_clip: str, transformers: str, shape: Any = "same") -> Link:
    """One tensor on either side."""
    return Link((open_clip,), (transformers,), shape)


def layer_links(open_clip: str, transformers: str, *, bias: bool = True) -> list[Link]:
    """The weight, and the bias, of a layer that both libraries have."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [link(f"{open_clip}.{kind}", f"{transformers}.{kind}") for kind in kinds]


def attention_links(open_clip_stem: str, transformers_layer: str) -> list[Link]:
    """Query, key and value: one matrix in open_clip and timm, three in Transformers."""
    return [
        Link(
            (f"{open_clip_stem}{kind}",),
            tuple(f"{transformers_layer}.{part}_proj.{kind}" for part in "qkv"),
        )
        for kind in ("weight", "bias")
    ]


def to_transformers(links: Iterable[Link], state: State) -> dict[str, Tensor]:
    """Weights by Transformers' names; those that are not split share memory with `state`.

    Raises:
        ModelError: A weight is missing, or left over.
    """
    links = list(links)
    _check_names(state, {name for each in links for name in each.open_clip})
    converted = {}
    for each in links:
        whole = _joined([state[name] for name in each.open_clip])
        if each.shape == "transposed":
            whole = whole.T
        elif each.shape == "batched":
            whole = whole.squeeze(0)
        elif each.shape == "scalar":
            whole = whole.reshape(1)
        count = len(each.transformers)
        parts = whole.chunk(count) if count > 1 else (whole,)
        converted |= dict(zip(each.transformers, parts, strict=True))
    return converted


def to_open_clip(links: Iterable[Link], state: State) -> dict[str, Tensor]:
    """Weights by open_clip's names; those that are not joined share memory with `state`.

    Raises:
        ModelError: A weight is missing, or left over.
    """
    links = list(links)
    _check_names(state, {name for each in links for name in each.transformers})
    converted = {}
    for each in links:
        whole = _joined([state[name] for name in each.transformers])
        if each.shape == "transposed":
            whole = whole.T
        elif each.shape == "batched":
            whole = whole.unsqueeze(0)
        elif each.shape == "scalar":
            whole = whole.reshape(())
        shares = each.shares or (1,) * len(each.open_clip)
        unit = len(whole) // sum(shares) if len(shares) > 1 else 0
        parts = whole.split([unit * share for share in shares]) if unit else (whole,)
        converted |= dict(zip(each.open_clip, parts, strict=True))
    return converted


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_names(state: State, expected: set[str]) -> None:
    missing, left_over = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or left_over:
        raise ModelError(
            f"the weights do not fit their settings: {len(missing)} are missing"
            + (f" (the first is {missing[0]})" if missing else "")
            + f", {len(left_over)} are left over"
            + (f" (the first is {left_over[0]})" if left_over else "")
            + "."
        )
