"""Which parameters are trained: all, a tower, what is last in each, or adapters beside them."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from clip_refine.errors import ModelError
from clip_refine.models.feature_scale import output_layer, used_parameters

Choice = Literal["all", "image-tower", "text-tower", "projections", "last-blocks", "lora"]
_BLOCK_LISTS = re.compile(r"(res)?blocks?|layers?\d*")
_TEXTS = ["a photo of a cat", "two"]


@dataclass(frozen=True)
class Towers:
    """Both towers as functions of a sample, to see what their features depend on.

    Attributes:
        model: The dual encoder.
        encoders: By tower, its features of a few items.
    """

    model: nn.Module
    encoders: dict[str, Callable[[], Tensor]]

    @classmethod
    def of(cls, model: Any) -> "Towers":
        """With a plain image and short texts, since any will do."""
        device = next(model.parameters()).device
        images = [Image.new("RGB", (64, 64), colour) for colour in ("white", "navy")]
        pixels = torch.stack([model.preprocess(image) for image in images]).to(device)
        tokens = model.tokenizer(_TEXTS).to(device)
        return cls(
            model,
            {
                "image": lambda: model.encode_image(pixels),
                "text": lambda: model.encode_text(tokens),
            },
        )

    def used(self, tower: str) -> list[nn.Parameter]:
        """The parameters that a tower's features depend on."""
        return used_parameters(self.model, self.encoders[tower])

    def called(self, tower: str, kinds: tuple[type, ...] | None = None) -> list[nn.Module]:
        """The modules that run for a tower, in the order in which they begin."""
        begun: list[nn.Module] = []
        with ExitStack() as hooks, torch.no_grad():
            for module in self.model.modules():
                if kinds is None or isinstance(module, kinds):
                    handle = module.register_forward_pre_hook(lambda m, _: begun.append(m))
                    hooks.callback(handle.remove)
            self.encoders[tower]()
        return list(dict.fromkeys(begun))


def chosen_parameters(model: nn.Module, choice: Choice, *, blocks: int) -> list[nn.Parameter]:
    """The parameters of a choice; for `lora` none of the model's own.

    Args:
        model: A dual encoder in evaluation mode.
        choice: Which.
        blocks: How many blocks of each tower `last-blocks` takes; what follows them comes along.

    Raises:
        ModelError: A tower has no projection, no blocks, or fewer than that.
    """
    match choice:
        case "all":
            return list(model.parameters())
        case "image-tower":
            return Towers.of(model).used("image")
        case "text-tower":
            return Towers.of(model).used("text")
        case "projections":
            encoders = Towers.of(model).encoders
            return [
                p for tower, encode in encoders.items() for p in _projection(model, encode, tower)
            ]
        case "last-blocks":
            towers = Towers.of(model)
            return [p for tower in towers.encoders for p in _last_blocks(towers, tower, blocks)]
        case "lora":
            return []


def _projection(model: nn.Module, encode: Callable[[], Tensor], tower: str) -> list[nn.Parameter]:
    try:
        return output_layer(model, encode, tower)
    except ModelError as error:
        raise ModelError(
            f"train.parameters projections: the {tower} tower does not end in a projection. Train "
            "its last-blocks instead."
        ) from error


def _last_blocks(towers: Towers, tower: str, count: int) -> list[nn.Parameter]:
    """What a tower's features depend on when the input of a block counts as given."""
    known = {id(block) for block in tower_blocks(towers.model)}
    found = [module for module in towers.called(tower) if id(module) in known]
    if len(found) < count:
        raise ModelError(
            f"train.blocks {count}: the {tower} tower has {len(found) or 'no'} blocks. "
            + ("Use fewer." if found else "Choose other --train.parameters.")
        )
    handle = found[-count].register_forward_pre_hook(_detach, with_kwargs=True)
    try:
        return towers.used(tower)
    finally:
        handle.remove()


def tower_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all towers: members of the innermost lists named like lists of blocks."""
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and _BLOCK_LISTS.fullmatch(name.rpartition(".")[2])
    ]
    for blocks in lists:
        inner = {id(module) for module in blocks.modules()} - {id(blocks)}
        if not any(id(other) in inner for other in lists):
            yield from blocks.children()


def _detach(module: nn.Module, arguments: Any, named: Any) -> Any:
    """A hook that cuts a block off from what comes before it."""
    del module

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(cut(value) for value in arguments), {k: cut(v) for k, v in named.items()}
