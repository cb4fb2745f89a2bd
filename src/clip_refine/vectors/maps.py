"""One linear map a modality: what a model's output layer can hold, trained or computed."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from clip_refine.vectors.transforms import Fold, Modality, Peer, check_rows, dot_products, unit_rows

# --------------------------------------------------------------------------------------------------
# Two matrices, and what follows from their having no bias.


@dataclass(frozen=True, eq=False)
class LinearMaps(Peer):
    """image′ = normalise(W_image x), text′ = normalise(W_text y), without bias.

    Since unit(W·k·z) = unit(W·z), maps learnt on unit vectors do the same to raw ones, and W behind
    a linear output layer P is the layer W·P: `clip-refine vectors fold` writes that.
    """

    image_map: Tensor  # (d′, d)
    text_map: Tensor  # (d′, d)
    image_count: int  # images fitted on
    text_count: int  # texts fitted on

    kind: ClassVar[str] = "linear-maps"

    def __post_init__(self) -> None:
        for name in ("image_map", "text_map"):
            check_rows(name, getattr(self, name))
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name} is not finite (NaN or infinity)")
        if self.image_map.shape != self.text_map.shape:
            raise ValueError(
                f"image_map and text_map must have one shape, got {tuple(self.image_map.shape)} "
                f"and {tuple(self.text_map.shape)}"
            )
        for name in ("image_count", "text_count"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {count!r}")

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """Not from features alone: `clip-refine vectors refine` learns maps."""
        raise NotImplementedError(f"{cls.kind} are not fitted on features alone")

    @classmethod
    def of(cls, fold: Fold) -> "LinearMaps":
        """The two matrices of a fold."""
        return LinearMaps(fold.matrix("image"), fold.matrix("text"), *fold.fitted_on)

    @property
    def dim(self) -> int:
        """Dimension of the features that go in."""
        return self.image_map.shape[1]

    @property
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on; none where weights were enough."""
        return self.image_count, self.text_count

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d′) unit."""
        unit = unit_rows(f"{modality} features", features, dim=self.dim)
        chosen = self.image_map if modality == "image" else self.text_map
        return unit_rows(f"mapped {modality} features", dot_products(unit, chosen.to(unit)))


@dataclass(frozen=True, eq=False)
class RefinedMaps(LinearMaps):
    """Maps that `clip-refine vectors refine` learnt, with the factor on cosines that fits them."""

    logit_scale: float = 100.0

    kind: ClassVar[str] = "refined-maps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale must be above 0 and finite, got {self.logit_scale}")


# --------------------------------------------------------------------------------------------------
# IsoCLIP: directions in which the two projections do not agree are dropped, from the weights alone.


@dataclass(frozen=True, eq=False)
class IsoClip(LinearMaps):
    """image′ = normalise(P_i U_k U_kᵀ h), for image→image and text→text search.

    P_i (d, d_i) and P_t (d, d_t) are the model's projections, h what goes into them, and
    Ψ = P_iᵀ P_t = U Σ Vᵀ is what a cosine between image and text sees; U_k (texts: V_k) are its
    singular directions without the first and the last few, which belong to one modality. A stored
    vector x = P_i h has P_i⁺ x in the place of h, so that the map is P_i U_k U_kᵀ P_i⁺, (d, d).
    Source: Magistri et al., "IsoCLIP", CVPR 2026, arXiv 2603.19862.
    """

    kind: ClassVar[str] = "isoclip"

    @classmethod
    def from_projections(
        cls, image_projection: Tensor, text_projection: Tensor, *, top: int, bottom: int
    ) -> Self:
        """Compute the maps in float64 from P_i (d, d_i) and P_t (d, d_t), less directions of Ψ."""
        check_rows("image_projection", image_projection)
        check_rows("text_projection", text_projection)
        if len(image_projection) != len(text_projection):
            raise ValueError(
                "both projections must end in one dimension, got "
                f"{len(image_projection)} and {len(text_projection)}"
            )
        image, text = image_projection.double(), text_projection.double()
        left, _, right = torch.linalg.svd(image.T @ text, full_matrices=False)
        rank = min(*image.shape, *text.shape)  # what is behind that is rounding
        if not (top >= 0 and bottom >= 0 and top + bottom < rank):
            raise ValueError(f"top {top} and bottom {bottom} must leave some of {rank} directions")
        kept = slice(top, rank - bottom)
        maps = [
            projection @ directions @ directions.T @ torch.linalg.pinv(projection)
            for projection, directions in ((image, left[:, kept]), (text, right[kept].T))
        ]
        return cls(maps[0], maps[1], 0, 0)


# --------------------------------------------------------------------------------------------------
# Procrustes: a new model's vectors in an old index's space.


@dataclass(frozen=True, eq=False)
class Procrustes(LinearMaps):
    """new′ = normalise(R x), R = argmin ‖X_new Rᵀ − X_old‖ over orthogonal R, on unit rows.

    X_oldᵀ X_new = U Σ Vᵀ gives R = U Vᵀ, one for both modalities, since a rotation of the shared
    space leaves the new model's own similarities as they are; of unequal dimensions it has
    orthonormal rows or columns. Row i of both is one item, encoded by both models. Source:
    Schönemann, Psychometrika 1966; for indexes "Drift-Adapter", arXiv 2509.23471.
    """

    kind: ClassVar[str] = "procrustes"

    @classmethod
    def align(cls, old_features: Tensor, new_features: Tensor) -> Self:
        """Fit R on (N, d_old) and (N, d_new), row by row, in float64."""
        old = unit_rows("old features", old_features.double())
        new = unit_rows("new features", new_features.double())
        if len(old) != len(new):
            raise ValueError(
                f"old and new features must be of the same items, got {len(old)} and {len(new)} "
                "rows"
            )
        left, _, right = torch.linalg.svd(old.T @ new, full_matrices=False)
        return cls(left @ right, left @ right, len(old), len(old))


MAPS: dict[str, type[LinearMaps]] = {
    one.kind: one for one in (LinearMaps, RefinedMaps, IsoClip, Procrustes)
}
"""What is loaded like a peer but not fitted on features by name."""


# --------------------------------------------------------------------------------------------------
# Two linear layers as a dual encoder of stored vectors.


class VectorStudent(nn.Module):
    """A `DualEncoder` whose pixels and tokens are vectors: W = start + change in each modality.

    Only the change is a parameter, so that weight decay pulls W toward its start, (d, d), and not
    toward zero. Of rank r it is a product of two factors, the second one zero at first.
    """

    image_start: Tensor
    text_start: Tensor
    scale: Tensor

    def __init__(
        self,
        image_start: Tensor,
        text_start: Tensor,
        *,
        logit_scale: float,
        rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("image_start", image_start.float())
        self.register_buffer("text_start", text_start.float())
        self.register_buffer("scale", torch.tensor(float(logit_scale)))
        self.image_change = _change(image_start.shape[0], rank, generator)
        self.text_change = _change(text_start.shape[0], rank, generator)

    @staticmethod
    def preprocess(image: Tensor) -> Tensor:
        """Vectors are what they are."""
        return image

    @staticmethod
    def tokenizer(texts: list[Tensor]) -> Tensor:
        """Vectors are what they are."""
        return torch.stack(texts)

    @property
    def logit_scale(self) -> Tensor:
        """0-d factor on cosines, the stored vectors' model's."""
        return self.scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, d) vectors → (B, d)."""
        return pixels @ self.image_start.T + _apply(self.image_change, pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, d) vectors → (B, d)."""
        return tokens @ self.text_start.T + _apply(self.text_change, tokens)

    @torch.no_grad()
    def maps(
        self, images: int, texts: int, share: float = 1.0, *, logit_scale: float
    ) -> RefinedMaps:
        """What was learnt, on so many images and texts, with the factor on cosines that fits.

        `share` of the change, where that is to be a part of it: the line from the start (WiSE-FT).
        """
        eye = torch.eye(self.image_start.shape[1], device=self.scale.device)
        image, text = (
            start + share * _apply(change, eye).T
            for start, change in (
                (self.image_start, self.image_change),
                (self.text_start, self.text_change),
            )
        )
        sides = image.contiguous().cpu(), text.contiguous().cpu()
        return RefinedMaps(sides[0], sides[1], images, texts, logit_scale=logit_scale)


def _change(dim: int, rank: int | None, generator: torch.Generator | None) -> nn.ParameterList:
    if rank is None:
        return nn.ParameterList([torch.zeros(dim, dim)])
    down = torch.randn(rank, dim, generator=generator) / math.sqrt(dim)
    return nn.ParameterList([down, torch.zeros(dim, rank)])


def _apply(factors: nn.ParameterList, rows: Tensor) -> Tensor:
    for factor in factors:
        rows = rows @ factor.T
    return rows
