"""LoRA: small trained matrices beside the frozen weights, added to them at the end.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv
2106.09685, as PEFT implements it.
"""

import re
from typing import Any

from torch import nn

from clip_refine.errors import ModelError
from clip_refine.train.parameters import Towers

INSTALL = "pip install 'clip-refine[peft]'"
_NAME = "refinement"


class Adapters:
    """Adapters beside every linear layer and attention that the towers call.

    Attributes:
        layers: How many layers have one.
    """

    def __init__(self, model: nn.Module, *, rank: int, alpha: float) -> None:
        """Put them in place; the features stay what they are, since one factor starts at zero.

        Args:
            model: A dual encoder; everything in it but the adapters is frozen.
            rank: Inner dimension of an adapter.
            alpha: What it adds is multiplied by alpha / rank.

        Raises:
            ModelError: PEFT is not installed, or the towers call no such layer.
        """
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise ModelError(
                f"train.parameters lora: needs PEFT. Install it with {INSTALL}."
            ) from error
        names = _called_layers(model)
        if not names:
            raise ModelError(
                f"train.parameters lora: the towers of {type(model).__name__} call no linear layer "
                "and no attention. Choose other --train.parameters."
            )
        self.layers = len(names)
        exactly = "|".join(re.escape(name) for name in names)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=f"(?:{exactly})")  # pyright: ignore[reportArgumentType]
        self._tuner: Any = LoraModel(model, config, _NAME)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' own parameters."""
        named = self._tuner.model.named_parameters()
        return [parameter for name, parameter in named if "lora_" in name]

    def merge(self) -> None:
        """Add the adapters to the weights they stand beside, and take them out."""
        self._tuner.merge_and_unload()


def _called_layers(model: nn.Module) -> list[str]:
    """Names of the layers to adapt.

    A layer whose weight is used without calling it, as in open_clip's attention pooling and within
    PyTorch's attention, would have an adapter that nothing asks for.
    """
    towers = Towers.of(model)
    kinds = (nn.Linear, nn.MultiheadAttention)
    called = {id(m) for tower in towers.encoders for m in towers.called(tower, kinds)}
    return [name for name, module in model.named_modules() if id(module) in called]
