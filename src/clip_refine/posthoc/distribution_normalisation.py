"""Distribution normalisation, DN: the dot product with half of each centroid taken off."""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from clip_refine.posthoc.centroids import CentroidPeer, centroids


@dataclass(frozen=True, eq=False)
class DistributionNormalisation(CentroidPeer):
    """image′ = image − μ_image/2, text′ = text − μ_text/2 on unit features, *not* renormalised.

    The score is (x − μ_image/2)·(y − μ_text/2). For a query x that is x·y less a bias y·μ_image/2
    of each gallery text (and a constant), so lengths carry meaning: a cosine of these features is
    another method and ranks differently. Source: "Test-Time Distribution Normalization for
    Contrastively Learned Visual-language Models", NeurIPS 2023, arXiv 2302.11084.

    Attributes:
        image_mean: (d,), mean of unit image features.
        text_mean: (d,), mean of unit text features.
        image_count: Images fitted on.
        text_count: Texts fitted on.

    Example:
        Both means are (½, ½), so (1, 0) becomes (¾, −¼) on either side: 9/16 + 1/16 with itself.

        >>> import torch
        >>> peer = DistributionNormalisation.fit(torch.eye(2), torch.eye(2))
        >>> peer.transform_image(torch.tensor([[2.0, 0.0]])).tolist()
        [[0.75, -0.25]]
        >>> peer.similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        0.625
    """

    kind: ClassVar[str] = "distribution-normalisation"

    @classmethod
    def fit(cls, image_features: Tensor, text_features: Tensor) -> Self:
        """Take the means.

        Args:
            image_features: (N, d), raw or unit.
            text_features: (M, d), raw or unit; no pairs are needed, so M may differ.

        Raises:
            ValueError: If shapes do not fit, or a row is not finite or zero.
        """
        return cls(*centroids(image_features, text_features))

    @property
    def returns_unit(self) -> bool:
        """False: lengths are part of the score."""
        return False

    def transform_image(self, image_features: Tensor) -> Tensor:
        """(N, d) raw or unit → (N, d), lengths from ½ to 3/2.

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """
        unit = self._image_unit(image_features)
        return unit - self.image_mean.to(unit) / 2

    def transform_text(self, text_features: Tensor) -> Tensor:
        """(M, d) raw or unit → (M, d), lengths from ½ to 3/2.

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """
        unit = self._text_unit(text_features)
        return unit - self.text_mean.to(unit) / 2
