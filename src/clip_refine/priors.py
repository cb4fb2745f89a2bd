"""Where RaFA's references come from: distributions, sampled from an explicit generator.

One call draws one reference a pair, and RaFA uses it for both sides; a recipe with independent
references calls twice. Numbers are drawn in float32 on the generator's own device and moved then,
so a generator on the CPU gives the same references whatever the training device and precision.

Source: Yamaguchi et al., CVPR 2025, arXiv 2504.12717, the section on random feature alignment and
the ablation of priors.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Prior(Protocol):
    """Anything that draws reference vectors."""

    def sample(
        self,
        count: int,
        dim: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw `count` independent reference vectors.

        Args:
            count: How many, usually the pairs of a batch.
            dim: Their dimension, that of the features.
            generator: The only source of randomness; it moves on with every call.
            device: Where the vectors go.
            dtype: What they are given in.

        Returns:
            (count, dim), in the units of raw features.
        """
        ...


class _Drawn:
    """What the priors here share: numbers are drawn where the generator is, and then moved."""

    def sample(
        self,
        count: int,
        dim: int,
        *,
        generator: torch.Generator,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """See `Prior.sample`; a ValueError where the prior is of another dimension."""
        return self._draw(count, dim, generator).to(device, dtype)

    def _draw(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class StandardNormal(_Drawn):
    """N(0, βI), the paper's prior: β = 1 by default, varied from 0 to 100 in its ablation.

    Attributes:
        scale: β, the *variance* of each coordinate; the standard deviation is √β and the expected
            squared norm β·d. With 0 every reference is the origin.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> StandardNormal(scale=0.0).sample(1, 3, generator=generator, device="cpu").tolist()
        [[0.0, 0.0, 0.0]]
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale is a variance, finite and at least 0; got {self.scale}")

    def _draw(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        noise = _standard_normal(count, dim, generator)
        return math.sqrt(self.scale) * noise


@dataclass(frozen=True)
class Uniform(_Drawn):
    """Every coordinate uniform in [low, high); by default variance 1, as the standard normal's.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> drawn = Uniform(low=2.0, high=3.0).sample(4, 3, generator=generator, device="cpu")
        >>> bool(((drawn >= 2) & (drawn < 3)).all())
        True
    """

    low: float = -math.sqrt(3)
    high: float = math.sqrt(3)

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low must be below high, both finite; got {self.low}, {self.high}")

    def _draw(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        share = torch.rand(count, dim, generator=generator, device=generator.device)
        return self.low + (self.high - self.low) * share


@dataclass(frozen=True, eq=False)
class Gaussian(_Drawn):
    """Independent coordinates with given moments, for example those of pre-trained features.

    Attributes:
        mean: (d,), raw feature units.
        std: (d,), at least 0, raw feature units.

    Example:
        >>> prior = Gaussian(mean=torch.tensor([1.0, 2.0]), std=torch.zeros(2))
        >>> prior.sample(1, 2, generator=torch.Generator(), device="cpu").tolist()
        [[1.0, 2.0]]
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            raise ValueError(f"mean and std must both be (dim,), got {shapes}")
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std >= 0).all()):
            raise ValueError("mean and std must be finite, and std at least 0")

    def _draw(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        _check_dim(self.mean, dim)
        noise = _standard_normal(count, dim, generator)
        return self.mean.to(noise) + self.std.to(noise) * noise


@dataclass(frozen=True, eq=False)
class Fixed(_Drawn):
    """One and the same vector for every pair; draws nothing from the generator.

    Attributes:
        vector: (d,), raw feature units.

    Example:
        >>> prior = Fixed(vector=torch.tensor([1.0, 2.0]))
        >>> prior.sample(2, 2, generator=torch.Generator(), device="cpu").tolist()
        [[1.0, 2.0], [1.0, 2.0]]
    """

    vector: Tensor

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or not self.vector.isfinite().all():
            raise ValueError(f"vector must be (dim,) and finite, got {tuple(self.vector.shape)}")

    def _draw(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        _check_dim(self.vector, dim)
        return self.vector.repeat(count, 1)


@dataclass(frozen=True)
class NormMatched(_Drawn):
    """N(0, s²I) with s such that the expected norm of a reference is `norm`.

    s = norm / (√2 · Γ((d + 1)/2) / Γ(d/2)), by the mean of the chi distribution. The prior for a
    model whose features are not of the size that the paper's N(0, I) was chosen for: give it the
    teacher's mean raw norm.

    Attributes:
        norm: E‖z‖, at least 0.

    Example:
        The mean of |N(0, 1)| is √(2/π), so in one dimension s = √(π/2).

        >>> round(NormMatched(norm=1.0).standard_deviation(1), 4)
        1.2533
    """

    norm: float

    def __post_init__(self) -> None:
        if not 0 <= self.norm < math.inf:
            raise ValueError(f"norm must be finite and at least 0, got {self.norm}")

    def standard_deviation(self, dim: int) -> float:
        """S, the standard deviation of each of `dim` coordinates."""
        # by logarithms, as Γ(d/2) overflows above d = 342
        log_ratio = math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)
        return self.norm / (math.sqrt(2) * math.exp(log_ratio))

    def _draw(self, count: int, dim: int, generator: torch.Generator) -> Tensor:
        noise = _standard_normal(count, dim, generator)
        return self.standard_deviation(dim) * noise


def _standard_normal(count: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, dim, generator=generator, device=generator.device)


def _check_dim(vector: Tensor, dim: int) -> None:
    if len(vector) != dim:
        raise ValueError(f"this prior has dimension {len(vector)}, the features have {dim}")
