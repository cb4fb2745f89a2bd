"""What every peer does to features first: check them, widen them, scale them to norm 1."""

import torch
from torch import Tensor


def unit_rows(name: str, features: Tensor, *, dim: int | None = None) -> Tensor:
    """Rows scaled to norm 1, in float32, or in float64 if they are given so.

    Args:
        name: What to call the features in a message.
        features: (N, d), raw or unit.
        dim: What d has to be.

    Raises:
        ValueError: If `features` is no matrix, empty or of another dimension, or a row is not
            finite or zero.

    Example:
        >>> unit_rows("image features", torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"{name} must be (rows, dim) of floating point, both at least 1; "
            f"got {tuple(features.shape)} of {features.dtype}"
        )
    if dim is not None and features.shape[1] != dim:
        raise ValueError(f"{name} must have dimension {dim}, got {features.shape[1]}")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    if not norms.isfinite().all():
        row = int((~norms.isfinite()).nonzero()[0, 0])
        raise ValueError(f"{name}: row {row} is not finite (NaN or infinity)")
    if not norms.all():
        row = int((norms == 0).nonzero()[0, 0])
        raise ValueError(f"{name}: row {row} is zero, so it has no direction")
    return features / norms


def mean_row(unit: Tensor) -> Tensor:
    """Centroid of the rows, (d,), summed in float64 and given in the rows' dtype.

    Example:
        >>> mean_row(torch.eye(2)).tolist()
        [0.5, 0.5]
    """
    unit_or_copy = unit.cpu() if unit.device.type == "mps" else unit  # no float64 there
    return unit_or_copy.mean(dim=0, dtype=torch.float64).to(unit)


def dot_products(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` with autocast off, which would round it to eight bits.

    Example:
        >>> dot_products(torch.eye(2), torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0], [2.0]]
    """
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return rows.to(dtype) @ columns.to(rows.device, dtype).T
