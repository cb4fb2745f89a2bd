"""What property tests draw from, and how: the same examples every time, nothing written to disk."""

from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

repeatable = settings(deadline=None, max_examples=20, derandomize=True, database=None)

seeds = st.integers(0, 2**31)


def normals(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed only."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def rotation(dim: int, *, seed: int) -> Tensor:
    """An orthogonal (dim, dim) matrix in float64."""
    return torch.linalg.qr(normals(dim, dim, seed=seed)).Q


def shuffled(count: int, *, seed: int) -> Tensor:
    """A permutation of `count` rows."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient of a scalar function at a point."""
    point = at.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(point), point)
    return slope
