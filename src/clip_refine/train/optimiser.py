"""AdamW and its learning rate."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def make_optimiser(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    decay: Literal["all", "matrices"],
    device: torch.device,
) -> AdamW:
    """AdamW over the parameters that require gradients, fused where PyTorch has a fused kernel.

    Args:
        named_parameters: The model's parameters with their names.
        learning_rate: Of every parameter.
        weight_decay: Decoupled decay.
        decay: `all` decays every parameter; `matrices` spares biases, norm weights and the logit
            scale, which have fewer than two dimensions.
        device: Where the parameters are.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    decayed = [p for p in trained if decay == "all" or p.ndim >= 2]
    spared = [p for p in trained if decay == "matrices" and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        fused=device.type in ("cuda", "cpu"),
    )


def make_schedule(
    optimiser: AdamW, *, schedule: Literal["constant", "cosine"], warmup_steps: int, steps: int
) -> LambdaLR:
    """The learning rate of each of `steps` steps as a share of the optimiser's own."""
    return LambdaLR(optimiser, lambda step: rate_share(step, schedule, warmup_steps, steps))


def rate_share(
    step: int, schedule: Literal["constant", "cosine"], warmup_steps: int, steps: int
) -> float:
    """Share of the full learning rate at a step counted from 0.

    >>> [rate_share(step, "constant", 4, 10) for step in (0, 3, 9)]
    [0.25, 1.0, 1.0]
    >>> [round(rate_share(step, "cosine", 0, 10), 3) for step in (0, 5)]
    [1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
