"""Which part of a model is trained: all, a tower, projections, last blocks, adapters."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_refine.config import TrainConfig
from clip_refine.models.encoder import quick_on_cpu
from clip_refine.models.weights import Heads, find_head, output_layer, used_parameters
from clip_refine.support.errors import ModelError, first_line

_BLOCK_LISTS = re.compile(r"(res)?blocks?|layers?\d*")


class Towers:
    """Both towers as functions of any sample, to see what their features depend on."""

    def __init__(self, model: Any) -> None:
        self.model = model
        device = next(model.parameters()).device
        images = [Image.new("RGB", (64, 64), colour) for colour in ("white", "navy")]
        pixels = torch.stack([model.preprocess(image) for image in images]).to(device)
        tokens = model.tokenizer(["a photo of a cat", "two"]).to(device)
        self.encoders: dict[str, Callable[[], Tensor]] = {
            "image": lambda: model.encode_image(pixels),
            "text": lambda: model.encode_text(tokens),
        }

    def used(self, tower: str) -> list[nn.Parameter]:
        """The parameters that a tower's features depend on."""
        return used_parameters(self.model, self.encoders[tower])

    def called(self, tower: str) -> list[nn.Module]:
        """The modules that run for a tower, in the order in which they begin."""
        begun: list[nn.Module] = []
        with ExitStack() as hooks, torch.no_grad():
            for module in self.model.modules():
                handle = module.register_forward_pre_hook(lambda m, _: begun.append(m))
                hooks.callback(handle.remove)
            self.encoders[tower]()
        return list(dict.fromkeys(begun))


def _chosen(model: nn.Module, config: TrainConfig) -> tuple[list[nn.Parameter], str]:
    """The parameters of a choice and the choice in words; for `lora` none of the model's own."""
    match config.parameters:
        case "image-tower":
            return Towers(model).used("image"), "image tower"
        case "text-tower":
            return Towers(model).used("text"), "text tower"
        case "projections":
            found: list[nn.Parameter] = []
            for tower, encode in Towers(model).encoders.items():
                try:
                    found += output_layer(model, encode, tower)
                except ModelError as error:
                    raise ModelError(
                        f"train.parameters projections: the {tower} tower does not end in a "
                        "projection. Train its last-blocks instead."
                    ) from error
            return found, "the projections that both towers end in"
        case "last-blocks":
            towers, count = Towers(model), config.blocks
            last = [p for tower in towers.encoders for p in _last_blocks(towers, tower, count)]
            return last, f"the last {count} blocks of each tower and what follows them"
        case "lora":
            return [], "lora"
        case _:
            return list(model.parameters()), "all"


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


def learning_rates(model: nn.Module, config: TrainConfig) -> dict[int, float]:
    """The learning rate of each parameter that has one of its own, by `id`.

    A block n blocks before the end of its tower has decay^(n + 1) of the tower's rate, what comes
    before the first block once more, what follows the last block all of it (BEiT, arXiv
    2106.08254).

    Raises:
        ModelError: Both towers have a parameter, or the towers have no blocks, where that matters.
    """
    own = {"image": config.image_learning_rate, "text": config.text_learning_rate}
    if config.layer_decay == 1 and not any(own.values()):
        return {}
    towers, rates = Towers(model), dict[int, float]()
    for tower, rate in own.items():
        shares = _depth_shares(towers, tower, config.layer_decay)
        for parameter, share in shares.items():
            if rates.setdefault(parameter, found := share * (rate or config.rate)) != found:
                raise ModelError(
                    "train.image_learning_rate: both towers share weights, which cannot have two "
                    "learning rates. Give one, and leave --train.layer-decay out."
                )
    return rates


def _depth_shares(towers: Towers, tower: str, decay: float) -> dict[int, float]:
    """Of each parameter of a tower by `id`: what its depth leaves of the learning rate."""
    every = {id(parameter): 1.0 for parameter in towers.used(tower)}
    if decay == 1:
        return every
    known = {id(block) for block in tower_blocks(towers.model)}
    blocks = [module for module in towers.called(tower) if id(module) in known]
    if not blocks:
        raise ModelError(f"train.layer_decay: the {tower} tower has no blocks. Leave it out.")
    shares = {parameter: decay ** (len(blocks) + 1) for parameter in every}
    for count in range(len(blocks), 0, -1):  # what the end depends on, from ever later on
        share = decay**count
        inside = {id(parameter) for parameter in blocks[-count].parameters()}
        behind = decay ** (count - 1)
        for parameter in map(id, _last_blocks(towers, tower, count)):
            shares[parameter] = share if parameter in inside else behind
    return shares


def _detach(_: nn.Module, arguments: Any, named: Any) -> Any:
    """A hook that cuts a block off from what comes before it."""

    def cut(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(cut(value) for value in arguments), {k: cut(v) for k, v in named.items()}


# --------------------------------------------------------------------------------------------------
# LoRA: small trained matrices beside the frozen weights, added to them at the end.
#
# Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv
# 2106.09685, as PEFT implements it.


INSTALL = "pip install 'clip-refine[peft]'"
_NAME = "refinement"
# which attention applies itself, PyTorch's and those that keep its names, as open_clip 4's
_OWN = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Adapters:
    """Adapters beside every linear layer and attention that the towers call, `layers` of them."""

    def __init__(self, model: nn.Module, *, rank: int, alpha: float) -> None:
        """Put them in place; the features stay what they are, since one factor starts at zero."""
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise ModelError(
                f"train.parameters lora: needs PEFT. Install it with {INSTALL}."
            ) from error
        # A layer whose weight is used without calling it, as in open_clip's attention pooling and
        # within PyTorch's attention, would have an adapter that nothing asks for.
        towers = Towers(model)
        called = {id(m) for tower in towers.encoders for m in towers.called(tower)}
        layers, weights = list[str](), list[str]()
        for name, module in model.named_modules():
            own = [w for w in _OWN if isinstance(getattr(module, w, None), nn.Parameter)]
            whole = isinstance(module, nn.MultiheadAttention) and "in_proj_weight" in own
            if id(module) in called and (whole or isinstance(module, nn.Linear)):
                layers.append(name)
            elif id(module) in called:
                weights += [f"{name}.{weight}" for weight in own]
        if not layers + weights:
            raise ModelError(
                f"train.parameters lora: the towers of {type(model).__name__} call no linear layer "
                "and no attention. Choose other --train.parameters."
            )
        self.layers = len(layers) + len(weights)
        exactly = "|".join(re.escape(name) for name in layers)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            target_modules=f"(?:{exactly})" if layers else [],
            target_parameters=weights or None,
        )
        self._tuner: Any = LoraModel(model, config, _NAME)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' own parameters."""
        named = self._tuner.model.named_parameters()
        return [parameter for name, parameter in named if "lora_" in name]

    def merge(self) -> None:
        """Add the adapters to the weights they stand beside, and take them out."""
        for _ in range(2):  # the first leaves layers within attention that has an adapter itself
            self._tuner.merge_and_unload()


Frozen = tuple[bool, bool]
"""Of images and of texts: whether their tower stays as it is."""


def frozen_towers(model: nn.Module, config: TrainConfig) -> Frozen:
    """Whether nothing of a tower is trained, drawn or counted; asked only where one is chosen."""
    if _moves(config) or config.parameters not in ("image-tower", "text-tower"):
        return False, False
    towers = Towers(model)
    image, text = (not any(p.requires_grad for p in towers.used(t)) for t in towers.encoders)
    return image, text


def heads_on_frozen(model: nn.Module, config: TrainConfig) -> Heads | None:
    """The projections where only they are trained; None, too, where one is no linear layer."""
    if _moves(config) or config.parameters != "projections":
        return None
    towers = Towers(model).encoders
    image, text = towers["image"], towers["text"]
    try:
        sides = ("image", image, text), ("text", text, image)
        image, text = (find_head(output_layer(model, e, t, other=o), e) for t, e, o in sides)
    except ModelError:  # which is said where training begins
        return None
    return image and text and (image, text)


def _moves(config: TrainConfig) -> bool:
    """Whether what is not trained gives other features each time."""
    return config.dropout == "on" or config.normalization_statistics == "updated"


# --------------------------------------------------------------------------------------------------
# The part of a model that is trained, for as long as it is trained.


_SCALES = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class TrainedPart:
    """What is trained."""

    trained: int  # numbers that change
    total: int  # numbers that the model has, without adapters
    what: str  # the choice in words

    def __str__(self) -> str:
        share = 100 * self.trained / self.total
        percent = f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
        return (
            f"Trained are {self.trained:,} of {self.total:,} parameters ({percent}): {self.what}."
        )


@contextmanager
def trained_part(model: nn.Module, config: TrainConfig) -> Iterator[TrainedPart]:
    """Freeze what is not trained within the block; after it the model is a plain one again.

    Parameters that are frozen already, such as the logit scale, stay so; a logit scale that is
    trained is trained beside any choice. Adapters are merged when the block ends.

    Args:
        model: A dual encoder in evaluation mode, of which the teacher is a copy by now.
        config: `parameters` and what belongs to it, and `gradient_checkpointing`.

    Raises:
        ModelError: The model has no such part, or cannot recompute its activations.
    """
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    scales = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in _SCALES]
    trained_scales = [parameter for parameter in scales if parameter.requires_grad]

    def restore() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])

    with ExitStack() as undo:
        undo.callback(restore)
        chosen, what = _chosen(model, config)
        kept = {id(parameter) for parameter in chosen}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
        if config.parameters == "lora":
            adapters = Adapters(model, rank=config.lora_rank, alpha=config.lora_alpha)
            undo.callback(adapters.merge)
            rank = config.lora_rank
            what = f"LoRA of rank {rank} beside {adapters.layers} layers, merged at the end"
        for parameter in trained_scales:
            parameter.requires_grad_(True)
        undo.callback(quick_on_cpu(model))
        if config.gradient_checkpointing:
            undo.enter_context(recomputed_activations(model))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not trained:
            raise ModelError(
                f"train.parameters {config.parameters}: nothing of it is left to train."
            )
        yield TrainedPart(trained, total, what)


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[int]:
    """Keep no activations inside blocks within the `with`: they are computed again (checkpointing).

    The same for every architecture, whether or not it has a switch of its own: Transformers' works
    only in training mode, which would bring dropout along, and OpenAI's ResNets have none.
    """
    blocks: list[Any] = list(tower_blocks(model))
    if not blocks:
        raise ModelError(
            f"train.gradient_checkpointing: {type(model).__name__} has no list of blocks (named "
            "blocks, layers or resblocks), whose activations could be computed again."
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            del block.forward  # what stood there before is the class's own


@contextmanager
def compiled_blocks(*models: nn.Module) -> Iterator[None]:
    """The image towers' blocks by `torch.compile` within the `with`; weights keep their names.

    Not the text towers': captions of every other length would be compiled anew.
    """
    blocks: list[nn.Module] = []
    for model in models:
        called = set(map(id, Towers(model).called("image")))
        found = [block for block in tower_blocks(model) if id(block) in called]
        if not found:
            raise ModelError(
                f"train.compile: the image tower of {type(model).__name__} has no list of blocks "
                "(named blocks, layers or resblocks) that could be compiled. Leave it out."
            )
        blocks += found
    try:
        torch.compile(torch.exp)(torch.ones(8, device=next(blocks[0].parameters()).device))
    except Exception as error:
        raise ModelError(
            f"train.compile: does not work here ({first_line(error)}). It takes a C++ "
            "compiler (g++, or what CXX names), beside a GPU Triton, too. Leave it out."
        ) from error
    try:
        for block in blocks:
            block.compile()
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
