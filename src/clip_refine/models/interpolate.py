"""A point on the line between two models' weights.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022, arXiv
2109.01903.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from clip_refine.errors import ModelError


def interpolate_weights(
    base: Mapping[str, Tensor], refined: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """(1 − weight)·base + weight·refined, computed in float32 at least.

    Args:
        base: State dict of the model before.
        refined: State dict of the same architecture after.
        weight: 0 gives `base`, 1 gives `refined`, both exactly.

    Returns:
        A new state dict; tensors that are not floating point (counters) are those of `refined`.

    Raises:
        ModelError: Names or shapes differ.
        ValueError: `weight` is outside 0-1.

    Example:
        >>> base, refined = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 2.0])}
        >>> interpolate_weights(base, refined, 0.25)["w"].tolist()
        [1.0, 2.0]
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be from 0 to 1, got {weight}")
    shapes = [{name: tensor.shape for name, tensor in side.items()} for side in (base, refined)]
    if shapes[0] != shapes[1]:
        names = [name for name in {**base, **refined} if shapes[0].get(name) != shapes[1].get(name)]
        raise ModelError(
            f"the two models are not of one architecture: {len(names)} weights differ in name or "
            f"shape, the first is {names[0]}."
        )
    mixed = {}
    for name, after in refined.items():
        before = base[name].to(after.device)
        if not after.is_floating_point() or weight == 1:
            mixed[name] = after.clone()
        elif weight == 0:
            mixed[name] = before.clone()
        else:
            wide = torch.promote_types(after.dtype, torch.float32)
            mixed[name] = torch.lerp(before.to(wide), after.to(wide), weight).to(after.dtype)
    return mixed
