"""Mean-centring: each modality is moved so that its centroid is the origin."""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from clip_refine.posthoc._tensors import unit_rows
from clip_refine.posthoc.centroids import CentroidPeer, centroids


@dataclass(frozen=True, eq=False)
class MeanCentring(CentroidPeer):
    """image′ = normalise(image − μ_image), text′ = normalise(text − μ_text), on unit features.

    Closes the centroid gap up to the renormalisation and up to how well the means of the fitted
    pairs stand for those of others. Source: "Closing the Modality Gap for Mixed Modality Search"
    (GR-CLIP), arXiv 2507.19054.

    Attributes:
        image_mean: (d,), mean of unit image features.
        text_mean: (d,), mean of unit text features.
        image_count: Images fitted on.
        text_count: Texts fitted on.

    Example:
        Images (1, 0) and (0, 1) have the mean (½, ½), so (1, 0) becomes (½, −½) / √½.

        >>> import torch
        >>> peer = MeanCentring.fit(torch.eye(2), torch.eye(2))
        >>> peer.transform_image(torch.tensor([[2.0, 0.0]]))
        tensor([[ 0.7071, -0.7071]])
    """

    kind: ClassVar[str] = "mean-centring"

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

    def transform_image(self, image_features: Tensor) -> Tensor:
        """(N, d) raw or unit → (N, d) unit.

        Raises:
            ValueError: If the shape is another, or a row is not finite, zero or at the mean.
        """
        unit = self._image_unit(image_features)
        return unit_rows("image features less their mean", unit - self.image_mean.to(unit))

    def transform_text(self, text_features: Tensor) -> Tensor:
        """(M, d) raw or unit → (M, d) unit.

        Raises:
            ValueError: If the shape is another, or a row is not finite, zero or at the mean.
        """
        unit = self._text_unit(text_features)
        return unit_rows("text features less their mean", unit - self.text_mean.to(unit))
