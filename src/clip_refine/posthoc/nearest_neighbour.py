"""Nearest-neighbour normalisation, NNN: an item that everybody is near to loses that head start."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from clip_refine.posthoc._tensors import dot_products, unit_rows
from clip_refine.posthoc.peer import Peer

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
    Scores themselves are NNN's up to that constant; for these add `image_bias` to the rows of
    `similarity` (images are queries) or `text_bias` to its columns (texts are).

    Attributes:
        image_references: (N, d), unit image features, the queries that texts are corrected by.
        text_references: (M, d), unit text features, the queries that images are corrected by.
        neighbours: k; all references where there are fewer.
        alpha: α.

    Example:
        The text (0.6, 0.8) is at 0.6 and 0.8 from the reference images, so with k = 2 and α = ½ its
        bias is 0.35.

        >>> peer = NearestNeighbourNormalisation.fit(
        ...     torch.eye(2), torch.eye(2), neighbours=2, alpha=0.5
        ... )
        >>> peer.transform_text(torch.tensor([[0.6, 0.8]]))
        tensor([[ 0.6000,  0.8000,  1.0000, -0.3500]])
    """

    image_references: Tensor
    text_references: Tensor
    neighbours: int
    alpha: float

    kind: ClassVar[str] = "nnn"

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
    def fit(
        cls,
        image_features: Tensor,
        text_features: Tensor,
        *,
        neighbours: int = 128,
        alpha: float = 0.75,
    ) -> Self:
        """Keep the features as references; a saved peer is as large as they are.

        Args:
            image_features: (N, d), raw or unit.
            text_features: (M, d), raw or unit; no pairs are needed, so M may differ.
            neighbours: k, references an item's bias is the mean of.
            alpha: α, the share of that mean to take off; 0 leaves the cosine.

        Raises:
            ValueError: If shapes do not fit, a row is not finite or zero, or a number is out of
                range.
        """
        image_unit = unit_rows("image features", image_features)
        text_unit = unit_rows("text features", text_features, dim=image_unit.shape[1])
        return cls(image_unit, text_unit, neighbours, float(alpha))

    @property
    def dim(self) -> int:
        """Dimension of the features that go in."""
        return self.image_references.shape[1]

    @property
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""
        return len(self.image_references), len(self.text_references)

    @property
    def returns_unit(self) -> bool:
        """False: the score columns add to the length."""
        return False

    @property
    def score_columns(self) -> int:
        """The two last columns are biases and ones."""
        return 2

    def image_bias(self, image_features: Tensor) -> Tensor:
        """What text queries at large give to each image: (N, d) raw or unit → (N,).

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """
        return self._bias(
            unit_rows("image features", image_features, dim=self.dim), self.text_references
        )

    def text_bias(self, text_features: Tensor) -> Tensor:
        """What image queries at large give to each text: (M, d) raw or unit → (M,).

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """
        return self._bias(
            unit_rows("text features", text_features, dim=self.dim), self.image_references
        )

    def transform_image(self, image_features: Tensor) -> Tensor:
        """(N, d) raw or unit → (N, d + 2): (unit features, −bias, 1).

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """
        unit = unit_rows("image features", image_features, dim=self.dim)
        bias = self._bias(unit, self.text_references)[:, None]
        return torch.cat([unit, -bias, torch.ones_like(bias)], dim=1)

    def transform_text(self, text_features: Tensor) -> Tensor:
        """(M, d) raw or unit → (M, d + 2): (unit features, 1, −bias).

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """
        unit = unit_rows("text features", text_features, dim=self.dim)
        bias = self._bias(unit, self.image_references)[:, None]
        return torch.cat([unit, torch.ones_like(bias), -bias], dim=1)

    def _bias(self, unit: Tensor, references: Tensor) -> Tensor:
        references = references.to(unit)
        k = min(self.neighbours, len(references))
        nearest = [
            dot_products(rows, references).topk(k, dim=1).values.mean(dim=1)
            for rows in unit.split(ROWS_AT_ONCE)
        ]
        return self.alpha * torch.cat(nearest)
