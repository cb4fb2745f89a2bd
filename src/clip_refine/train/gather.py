"""Features of all processes in one batch, so that the loss sees every pair of the step."""

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_gather

from clip_refine.losses import PairFeatures


def gather_features(features: PairFeatures, *, processes: int) -> PairFeatures:
    """Concatenate the rows of all processes in rank order, with gradients.

    Every process then computes the loss of the whole batch. Gradients flow back to the process
    that made a row, summed over processes; data-parallel training averages them, so that the
    result is the gradient of one process with the whole batch.

    Args:
        features: (B / processes, d) each.
        processes: 1 returns `features` as they are.
    """
    if processes == 1:
        return features
    return PairFeatures(_gather(features.image_features), _gather(features.text_features))


def _gather(rows: Tensor) -> Tensor:
    if rows.requires_grad:
        return torch.cat(all_gather(rows.contiguous()))
    gathered = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
