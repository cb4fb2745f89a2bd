"""Features of all processes in one batch, so that the loss sees every pair of the step."""

from typing import Any

import torch
from torch import Tensor

from clip_refine.losses import PairFeatures


def gather_features(features: PairFeatures, accelerator: Any) -> PairFeatures:
    """Concatenate the rows of all processes in rank order.

    Every process then computes the loss of the whole batch, with gradients for its own rows only.
    Data-parallel training averages the weights' gradients over P processes, so each process's rows
    carry P times their gradient: the average is then the gradient of one process with the whole
    batch, for the towers and for a trained logit scale alike.

    Args:
        features: (B / P, d) each.
        accelerator: Accelerate's; with one process `features` come back as they are.
    """
    if accelerator.num_processes == 1:
        return features
    return PairFeatures(*(_gather(rows, accelerator) for rows in features))


def _gather(own: Tensor, accelerator: Any) -> Tensor:
    rows: Tensor = accelerator.gather(own.detach())
    start = accelerator.process_index * len(own)
    # adds exactly 0 to the value and P - 1 times the gradient
    own = own + (accelerator.num_processes - 1) * (own - own.detach())
    return torch.cat([rows[:start], own, rows[start + len(own) :]])
