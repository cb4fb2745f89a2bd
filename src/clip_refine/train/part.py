"""The part of a model that is trained, for as long as it is trained."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from clip_refine.errors import ModelError
from clip_refine.train.adapters import Adapters
from clip_refine.train.parameters import Choice, chosen_parameters, tower_blocks

_SCALES = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class TrainedPart:
    """What is trained.

    Attributes:
        trained: Numbers that change.
        total: Numbers that the model has, without adapters.
        what: The choice in words.
    """

    trained: int
    total: int
    what: str

    def __str__(self) -> str:
        share = 100 * self.trained / self.total
        percent = f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
        return (
            f"Trained are {self.trained:,} of {self.total:,} parameters ({percent}): {self.what}."
        )


@contextmanager
def trained_part(
    model: nn.Module,
    choice: Choice,
    *,
    blocks: int = 2,
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    gradient_checkpointing: bool = False,
) -> Iterator[TrainedPart]:
    """Freeze what is not trained within the block; after it the model is a plain one again.

    Parameters that are frozen already, such as the logit scale, stay so; a logit scale that is
    trained is trained beside any choice. Adapters are merged when the block ends.

    Args:
        model: A dual encoder in evaluation mode, of which the teacher is a copy by now.
        choice: What is trained.
        blocks: For `last-blocks`, how many of each tower.
        lora_rank: For `lora`, the adapters' inner dimension.
        lora_alpha: For `lora`: adapters are multiplied by alpha / rank.
        gradient_checkpointing: Whether activations are computed again for the gradient.

    Raises:
        ModelError: The model has no such part, or cannot recompute its activations.
    """
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    scales = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in _SCALES]
    trained_scales = [parameter for parameter in scales if parameter.requires_grad]
    with ExitStack() as undo:
        undo.callback(_restore, model, before)
        what = _freeze(model, choice, blocks=blocks)
        if choice == "lora":
            adapters = Adapters(model, rank=lora_rank, alpha=lora_alpha)
            undo.callback(adapters.merge)
            what = f"LoRA of rank {lora_rank} beside {adapters.layers} layers, merged at the end"
        for parameter in trained_scales:
            parameter.requires_grad_(True)
        if gradient_checkpointing:
            undo.enter_context(recomputed_activations(model))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not trained:
            raise ModelError(f"train.parameters {choice}: nothing of it is left to train.")
        yield TrainedPart(trained, total, what)


def _freeze(model: nn.Module, choice: Choice, *, blocks: int) -> str:
    chosen = {id(parameter) for parameter in chosen_parameters(model, choice, blocks=blocks)}
    for parameter in model.parameters():
        if id(parameter) not in chosen:
            parameter.requires_grad_(False)
    match choice:
        case "last-blocks":
            return f"the last {blocks} blocks of each tower and what follows them"
        case "projections":
            return "the projections that both towers end in"
        case _:
            return choice.replace("-", " ")


def _restore(model: nn.Module, before: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[int]:
    """Keep no activations inside blocks within the `with`: they are computed again (checkpointing).

    The same for every architecture, whether or not it has a switch of its own: Transformers' works
    only in training mode, which would bring dropout along, and OpenAI's ResNets have none.

    Yields:
        How many blocks do so.

    Raises:
        ModelError: The model has no blocks.
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
