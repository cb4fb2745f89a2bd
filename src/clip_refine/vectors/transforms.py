"""Transforms of stored features: training-free peers, and linear maps, computed or trained."""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from clip_refine.config import PosthocConfig
from clip_refine.models.weights import fold_matrix
from clip_refine.support.errors import ConfigError

# --------------------------------------------------------------------------------------------------
# What every peer does to features first: check them, widen them, scale them to norm 1.


def check_rows(name: str, features: Tensor) -> None:
    """Refuse what is no matrix of numbers; `name` is what the message calls it."""
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"{name} must be (rows, dim) of floating point, both at least 1; "
            f"got {tuple(features.shape)} of {features.dtype}"
        )


def unit_rows(name: str, features: Tensor, *, dim: int | None = None) -> Tensor:
    """Rows scaled to norm 1, in float32, or in float64 if they are given so; d must be `dim`."""
    check_rows(name, features)
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


def unit_sides(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """(N, d) and (M, d) by `unit_rows`."""
    image_unit = unit_rows("image features", image_features)
    return image_unit, unit_rows("text features", text_features, dim=image_unit.shape[1])


def mean_row(unit: Tensor) -> Tensor:
    """Centroid of the rows, (d,), summed in float64 and given in the rows' dtype."""
    unit_or_copy = unit.cpu() if unit.device.type == "mps" else unit  # no float64 there
    return unit_or_copy.mean(dim=0, dtype=torch.float64).to(unit)


def dot_products(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` with autocast off, which would round it to eight bits."""
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return rows.to(dtype) @ columns.to(rows.device, dtype).T


# --------------------------------------------------------------------------------------------------
# What every training-free peer is: two feature transforms and nothing else.


Modality = Literal["image", "text"]
DEFAULTS = PosthocConfig()


@dataclass(frozen=True, eq=False)
class Peer(ABC):
    """Something fitted on held-out training pairs that changes features of a finished model.

    Convention, the same for all: features go in raw or unit, are scaled to norm 1 first, and the
    new score of an image and a text is the *dot product* of their transformed features, as they
    come out. So `evaluation.retrieval(..., normalize=False)` on transformed features ranks by any
    peer. Arithmetic is in float32, in float64 where features are; a peer is never changed by use.

    A peer is made from what was fitted (tensors) and from settings of the same names as in
    `PosthocConfig`; files keep both by these names.
    """

    kind: ClassVar[str]  # the name in files and on the command line
    must_be_last: ClassVar[bool] = False  # of a chain, since lengths that come out carry meaning

    @classmethod
    @abstractmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """On (N, d) and (M, d), raw or unit; no pairs are needed, so M may differ."""

    @abstractmethod
    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d + score_columns)."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension of the features that go in."""

    @property
    @abstractmethod
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""

    @property
    def name(self) -> str:
        """`kind`, or the kinds of a chain joined by `+`."""
        return self.kind

    @property
    def returns_unit(self) -> bool:
        """Whether transformed rows have norm 1, so that the dot product is the cosine."""
        return not self.must_be_last

    @property
    def score_columns(self) -> int:
        """Columns behind the first `dim` that carry scores; geometry is measured without."""
        return 0

    def transform_image(self, image_features: Tensor) -> Tensor:
        """(N, d) raw or unit → (N, d + score_columns)."""
        return self.transform(image_features, "image")

    def transform_text(self, text_features: Tensor) -> Tensor:
        """(M, d) raw or unit → (M, d + score_columns)."""
        return self.transform(text_features, "text")

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(N, M) scores of every image with every text, higher is nearer."""
        moved = self.transform_image(image_features), self.transform_text(text_features)
        return dot_products(*moved)


# --------------------------------------------------------------------------------------------------
# What most of the peers are fitted to: where each modality's centroid lies.


@dataclass(frozen=True, eq=False)
class CentroidPeer(Peer):
    """A peer that knows the centroids of unit features, and how many rows they were taken over."""

    image_mean: Tensor  # (d,), mean of unit image features
    text_mean: Tensor  # (d,), mean of unit text features
    image_count: int  # images fitted on
    text_count: int  # texts fitted on

    def __post_init__(self) -> None:
        image_shape, text_shape = tuple(self.image_mean.shape), tuple(self.text_mean.shape)
        if len(image_shape) != 1 or image_shape != text_shape or 0 in image_shape:
            raise ValueError(
                f"image_mean and text_mean must both be (dim,), got {image_shape} and {text_shape}"
            )
        for name in ("image_mean", "text_mean"):
            # the mean of unit vectors is in the unit ball; a hair for rounding
            norm = getattr(self, name).double().norm().item()
            if not norm < 1 + 1e-6:
                raise ValueError(f"{name} must be a mean of unit features, got norm {norm}")
        for name in ("image_count", "text_count"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """Take the means."""
        image, text = unit_sides(image_features, text_features)
        return cls(mean_row(image), mean_row(text), len(image), len(text), **settings)

    @property
    def dim(self) -> int:
        """Dimension of the features that go in."""
        return len(self.image_mean)

    @property
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""
        return self.image_count, self.text_count

    def _unit_and_means(
        self, features: Tensor, modality: Modality
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features, the mean of their own modality and that of the other one."""
        unit = unit_rows(f"{modality} features", features, dim=self.dim)
        image_mean, text_mean = self.image_mean.to(unit), self.text_mean.to(unit)
        own, other = (image_mean, text_mean) if modality == "image" else (text_mean, image_mean)
        return unit, own, other


# --------------------------------------------------------------------------------------------------
# Distribution normalisation, DN: the dot product with half of each centroid taken off.


@dataclass(frozen=True, eq=False)
class DistributionNormalisation(CentroidPeer):
    """image′ = image − μ_image/2, text′ = text − μ_text/2 on unit features, *not* renormalised.

    The score is (x − μ_image/2)·(y − μ_text/2). For a query x that is x·y less a bias y·μ_image/2
    of each gallery text (and a constant), so lengths carry meaning: a cosine of these features is
    another method and ranks differently. Source: "Test-Time Distribution Normalization for
    Contrastively Learned Visual-language Models", NeurIPS 2023, arXiv 2302.11084.
    """

    kind: ClassVar[str] = "distribution-normalisation"
    must_be_last: ClassVar[bool] = True  # lengths are from ½ to 3/2

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d), as the formula says."""
        unit, own, _ = self._unit_and_means(features, modality)
        return unit - own / 2


# --------------------------------------------------------------------------------------------------
# Mean-centring: each modality is moved so that its centroid is the origin.


@dataclass(frozen=True, eq=False)
class MeanCentring(CentroidPeer):
    """image′ = normalise(image − μ_image), text′ = normalise(text − μ_text), on unit features.

    Closes the centroid gap up to the renormalisation and up to how well the means of the fitted
    pairs stand for those of others. Source: "Closing the Modality Gap for Mixed Modality Search"
    (GR-CLIP), arXiv 2507.19054.
    """

    kind: ClassVar[str] = "mean-centring"

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d), as the formula says."""
        unit, own, _ = self._unit_and_means(features, modality)
        return unit_rows(f"{modality} features less their mean", unit - own)


# --------------------------------------------------------------------------------------------------
# The fold: the mean taken out by a linear map, which a model's output layer can hold.


@dataclass(frozen=True, eq=False)
class Fold(CentroidPeer):
    """image′ = normalise(W x), W = I − s·m mᵀ/‖m‖², m = μ_image; texts alike with m = μ_text.

    Mean-centring without a bias (`models.weights.fold_matrix` says why): fitted on unit vectors it
    folds into the layer that made the raw ones (`LinearMaps.of`); at s = 1 it is the projection
    with W·m = 0 and W² = W. Means are float64. Source: docs/vectors.md.
    """

    share: float = DEFAULTS.share  # s

    kind: ClassVar[str] = "fold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {self.share}")
        for name in ("image_mean", "text_mean"):
            if not getattr(self, name).any():
                raise ValueError(f"{name} is zero, so there is no direction to fold out")

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """Take the means, in float64 whatever the features are."""
        check_rows("image features", image_features)
        check_rows("text features", text_features)
        return super().fit(image_features.double(), text_features.double(), **settings)

    def matrix(self, modality: Modality) -> Tensor:
        """W, (d, d) float64."""
        mean = (self.image_mean if modality == "image" else self.text_mean).double()
        return fold_matrix(mean, self.share)

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d), as the formula says."""
        unit, own, _ = self._unit_and_means(features, modality)
        along = dot_products(unit, own[None]) / dot_products(own[None], own[None])
        return unit_rows(f"folded {modality} features", unit - self.share * along * own)


# --------------------------------------------------------------------------------------------------
# Standardisation: each modality to mean 0 and deviation 1 in every dimension.


@dataclass(frozen=True, eq=False)
class Standardisation(CentroidPeer):
    """image′ = normalise((image − μ_image) / σ_image) on unit features, σ in every dimension.

    σ is the deviation with N in the denominator; a dimension in which the fitted features do not
    vary is only centred. Source: An et al., "I0T: Embedding Standardization Method Towards Zero
    Modality Gap", ACL 2025, arXiv 2412.14384, its post-hoc form.
    """

    image_deviation: Tensor  # (d,), of unit image features, above 0
    text_deviation: Tensor  # (d,), of unit text features, above 0

    kind: ClassVar[str] = "standardise"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_deviation", "text_deviation"):
            deviation = getattr(self, name)
            if deviation.shape != self.image_mean.shape or not (deviation > 0).all():
                raise ValueError(f"{name} must be (dim,) numbers above 0")

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """Take means and deviations."""
        sides = unit_sides(image_features, text_features)
        means = [mean_row(side) for side in sides]
        deviations = [
            mean_row((side - mean).square()).sqrt() for side, mean in zip(sides, means, strict=True)
        ]
        deviations = [torch.where(one > 0, one, torch.ones_like(one)) for one in deviations]
        counts = len(sides[0]), len(sides[1])
        return cls(means[0], means[1], *counts, deviations[0], deviations[1], **settings)

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d), as the formula says."""
        unit, own, _ = self._unit_and_means(features, modality)
        deviation = self.image_deviation if modality == "image" else self.text_deviation
        moved = (unit - own) / deviation.to(unit)
        return unit_rows(f"standardised {modality} features", moved)


# --------------------------------------------------------------------------------------------------
# ReAlign: texts get the mean and the total variance of the images.


@dataclass(frozen=True, eq=False)
class ReAlign(CentroidPeer):
    """text′ = normalise(u − μ_u + μ_image), u = normalise(μ_image + s (text − μ_text)), unit texts.

    s = √(tr Σ_image / tr Σ_text) matches the traces of the covariances; scaling to norm 1 moves the
    mean once more, so that μ_u, of the fitted texts, is matched again. Images stay as they are.
    Source: Yu et al., "Modality Gap-Driven Subspace Alignment Training Paradigm For Multimodal
    Large Language Models", arXiv 2602.07026, its anchor, trace and centroid alignment.

    Like modality shift it leaves what all features have in common, and items near that become hubs.
    """

    scale: Tensor  # 0-d, s
    moved_mean: Tensor  # (d,), μ_u

    kind: ClassVar[str] = "realign"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale.shape != () or not 0 < self.scale < math.inf:
            raise ValueError("scale must be one finite number above 0")
        if self.moved_mean.shape != self.image_mean.shape:
            raise ValueError("moved_mean must be (dim,)")

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """Take means and traces, then the mean of the texts as they are moved."""
        image, text = unit_sides(image_features, text_features)
        means = mean_row(image), mean_row(text)
        traces = [
            mean_row((side - mean).square()).sum()
            for side, mean in zip((image, text), means, strict=True)
        ]
        if min(traces) < 1e-9:
            raise ValueError("all image features, or all text features, are one: none vary")
        scale = (traces[0] / traces[1]).sqrt()
        moved_mean = mean_row(_onto(text, *means, scale))
        return cls(*means, len(image), len(text), scale, moved_mean, **settings)

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d), as the formula says."""
        unit, own, image_mean = self._unit_and_means(features, modality)
        if modality == "image":
            return unit
        moved = _onto(unit, image_mean, own, self.scale.to(unit)) - self.moved_mean.to(unit)
        return unit_rows("realigned text features", moved + image_mean)


def _onto(text_unit: Tensor, image_mean: Tensor, text_mean: Tensor, scale: Tensor) -> Tensor:
    return unit_rows("moved text features", image_mean + scale * (text_unit - text_mean))


# --------------------------------------------------------------------------------------------------
# Modality shift: both modalities walk toward each other along the line between centroids.


@dataclass(frozen=True, eq=False)
class ModalityShift(CentroidPeer):
    """image′ = normalise(image − λ·Δ/2), text′ = normalise(text + λ·Δ/2), Δ = μ_image − μ_text.

    On unit features. λ = 1 closes the centroid gap but for the renormalisation, λ = 0 changes
    nothing, λ below 0 widens the gap. Source: Liang et al., "Mind the Gap", NeurIPS 2022,
    arXiv 2203.02053, the section on shifting embeddings along the gap.

    Unlike mean-centring it leaves what the centroids have in common, and items near that become
    hubs: on CLIP's features of 500 COCO pairs λ = 1 takes the gap away and R@1 falls from .552 to
    .358 for images and from .506 to .366 for texts; with `nnn` after it they are .566 and .536.
    """

    strength: float = DEFAULTS.strength  # λ

    kind: ClassVar[str] = "modality-shift"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}")

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d), as the formula says."""
        unit, own, other = self._unit_and_means(features, modality)
        half_step = (own - other) * (self.strength / 2)
        return unit_rows(f"shifted {modality} features", unit - half_step)


# --------------------------------------------------------------------------------------------------
# Nearest-neighbour normalisation, NNN: an item that everybody is near to loses that head start.


ROWS_AT_ONCE = 256
"""Items compared with the references at a time: 120 MB of float32 for 118,000 references."""


@dataclass(frozen=True, eq=False)
class NearestNeighbourNormalisation(Peer):
    """score(query, item) = query·item − bias(item), bias = α · mean of the item's top-k references.

    On unit features. The bias of a text is α times its mean similarity to the k reference *images*
    nearest to it, that of an image the same over reference *texts*: what an item gets from queries
    of the other modality at large. Source: "Nearest Neighbor Normalization Improves Multimodal
    Retrieval", EMNLP 2024, arXiv 2410.24114.

    Convention: each direction has a bias of its own, yet one pair of transforms serves both. Two
    columns are appended, image′ = (x, −image_bias, 1) and text′ = (y, 1, −text_bias), so that
    image′·text′ = x·y − image_bias(x) − text_bias(y). Within the results of one query its own bias
    is a constant: ranks, recall and softmax over the gallery are exactly NNN's in both directions.
    Scores themselves are NNN's up to that constant; for these add each query's own bias to what
    `similarity` gives it.
    """

    image_references: Tensor  # (N, d), unit image features, the queries that texts are corrected by
    text_references: Tensor  # (M, d), unit text features, the queries that images are corrected by
    neighbours: int = DEFAULTS.neighbours  # k; all references where there are fewer
    alpha: float = DEFAULTS.alpha  # α, the share of the mean that is taken off; 0 leaves the cosine

    kind: ClassVar[str] = "nnn"
    must_be_last: ClassVar[bool] = True  # the score columns add to the length

    def __post_init__(self) -> None:
        dim = None
        for name in ("image_references", "text_references"):
            references = getattr(self, name)
            unit = unit_rows(name, references, dim=dim)
            dim = unit.shape[1]
            if not torch.allclose(references.to(unit), unit, rtol=0, atol=1e-5):
                raise ValueError(f"{name} must be rows of norm 1")
        if not isinstance(self.neighbours, int) or self.neighbours < 1:
            raise ValueError(
                f"neighbours must be a whole number of at least 1, got {self.neighbours!r}"
            )
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be at least 0 and finite, got {self.alpha}")

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor, **settings: Any) -> Self:
        """Keep the features as references; a saved peer is as large as they are."""
        return cls(*unit_sides(image_features, text_features), **settings)

    @property
    def dim(self) -> int:
        """Dimension of the features that go in."""
        return self.image_references.shape[1]

    @property
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""
        return len(self.image_references), len(self.text_references)

    @property
    def score_columns(self) -> int:
        """The two last columns are biases and ones."""
        return 2

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d + 2): (unit features, −bias, 1), of texts (…, 1, −bias)."""
        unit = unit_rows(f"{modality} features", features, dim=self.dim)
        of_other = self.text_references if modality == "image" else self.image_references
        references = of_other.to(unit)
        k = min(self.neighbours, len(references))
        nearest = [
            dot_products(rows, references).topk(k, dim=1).values.mean(dim=1)
            for rows in unit.split(ROWS_AT_ONCE)
        ]
        bias = self.alpha * torch.cat(nearest)[:, None]
        columns = (-bias, torch.ones_like(bias))
        return torch.cat([unit, *(columns if modality == "image" else columns[::-1])], dim=1)


# --------------------------------------------------------------------------------------------------
# Several peers one after the other.


Fit = Callable[[Tensor, Tensor], Peer]
"""(image features, text features) → a peer: `MeanCentring.fit`, or a `partial` of another."""


@dataclass(frozen=True, eq=False)
class Chain(Peer):
    """Each step transforms what the steps before it made, and was fitted on such features.

    A peer scales what it gets to norm 1, so one whose lengths carry meaning (`returns_unit` is
    False) can only stand at the end.
    """

    steps: tuple[Peer, ...]  # at least one, in order

    kind: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a chain needs at least one step")
        for step in self.steps[:-1]:
            _check_can_be_followed(step)
        dims = sorted({step.dim for step in self.steps})
        if len(dims) > 1:
            raise ValueError(f"the steps of a chain must have one dimension, got {dims}")

    @classmethod
    def fit(  # pyright: ignore[reportIncompatibleMethodOverride]: a chain has no other settings
        cls, image_features: Tensor, text_features: Tensor, *, steps: Sequence[Fit]
    ) -> Self:
        """Fit each step on what the steps before it make of the features."""
        fitted: list[Peer] = []
        for number, fit in enumerate(steps, 1):
            fitted.append(fit(image_features, text_features))
            if number < len(steps):
                _check_can_be_followed(fitted[-1])
                image_features = fitted[-1].transform_image(image_features)
                text_features = fitted[-1].transform_text(text_features)
        return cls(tuple(fitted))

    @property
    def name(self) -> str:
        """The kinds of the steps joined by `+`."""
        return "+".join(step.name for step in self.steps)

    @property
    def dim(self) -> int:
        """Dimension of the features that go in."""
        return self.steps[0].dim

    @property
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""
        return self.steps[0].fitted_on

    @property
    def returns_unit(self) -> bool:
        """As the last step."""
        return self.steps[-1].returns_unit

    @property
    def score_columns(self) -> int:
        """As the last step."""
        return self.steps[-1].score_columns

    def transform(self, features: Tensor, modality: Modality) -> Tensor:
        """(N, d) raw or unit → (N, d + score_columns), through every step."""
        for step in self.steps:
            features = step.transform(features, modality)
        return features


def _check_can_be_followed(step: Peer) -> None:
    if not step.returns_unit:
        raise ValueError(
            f"{step.name} must be the last step of a chain: the lengths of its features carry "
            "meaning, and a step after it would scale them to 1"
        )


# --------------------------------------------------------------------------------------------------
# Names → peers: the one place that knows all of them. Their names and settings for the command
# line, which needs no torch, stand in `config/runs.py`.


PEERS: dict[str, type[Peer]] = {
    peer.kind: peer
    for peer in (
        MeanCentring,
        DistributionNormalisation,
        NearestNeighbourNormalisation,
        ModalityShift,
        Fold,
        Standardisation,
        ReAlign,
    )
}
"""Every peer that is fitted on features and is no chain, by its name."""


def fit_peer(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    settings: PosthocConfig = DEFAULTS,
) -> Peer:
    """Fit a peer by name, or a chain joined by `+` as applied, on held-out training pairs."""
    check_name(name)
    steps: list[Fit] = []
    for kind in name.split("+"):
        steps.append(partial(PEERS[kind].fit, **settings.model_dump(include=settings_of(kind))))
    if len(steps) == 1:
        return steps[0](image_features, text_features)
    return Chain.fit(image_features, text_features, steps=steps)


def settings_of(name: str) -> set[str]:
    """What of `PosthocConfig` a peer or a chain looks at, among other things it is made from."""
    return {field.name for kind in name.split("+") for field in fields(PEERS[kind])}


def check_name(name: str) -> None:
    """Refuse a name that `fit_peer` would refuse, before features are read."""
    kinds = name.split("+")
    for kind in kinds:
        if kind not in PEERS:
            near = difflib.get_close_matches(kind, PEERS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{kind!r}: there is no such peer.{hint} There are {', '.join(PEERS)}, "
                "alone or joined by +."
            )
    if any(PEERS[kind].must_be_last for kind in kinds[:-1]):
        last = [kind for kind, peer in reversed(PEERS.items()) if peer.must_be_last]
        raise ConfigError(
            f"{name}: {' and '.join(last)} give features whose lengths carry "
            "meaning, so either can only be the last of a chain. Put it there."
        )


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
