"""What three of the peers are fitted to: where each modality's centroid lies."""

from dataclasses import dataclass

from torch import Tensor

from clip_refine.posthoc._tensors import mean_row, unit_rows
from clip_refine.posthoc.peer import Peer


@dataclass(frozen=True, eq=False)
class CentroidPeer(Peer):
    """A peer that knows the centroids of unit features, and how many rows they were taken over.

    Attributes:
        image_mean: (d,), mean of unit image features.
        text_mean: (d,), mean of unit text features.
        image_count: Images fitted on.
        text_count: Texts fitted on.
    """

    image_mean: Tensor
    text_mean: Tensor
    image_count: int
    text_count: int

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

    @property
    def dim(self) -> int:
        """Dimension of the features that go in."""
        return len(self.image_mean)

    @property
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""
        return self.image_count, self.text_count

    def _image_unit(self, image_features: Tensor) -> Tensor:
        return unit_rows("image features", image_features, dim=self.dim)

    def _text_unit(self, text_features: Tensor) -> Tensor:
        return unit_rows("text features", text_features, dim=self.dim)


def centroids(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """The four attributes of a `CentroidPeer`.

    Args:
        image_features: (N, d), raw or unit.
        text_features: (M, d), raw or unit; no pairs are needed, so M may differ.

    Raises:
        ValueError: If shapes do not fit, or a row is not finite or zero.

    Example:
        >>> import torch
        >>> image_mean, text_mean, *counts = centroids(torch.eye(2), 5 * torch.eye(2)[:1])
        >>> image_mean.tolist(), text_mean.tolist(), counts
        ([0.5, 0.5], [1.0, 0.0], [2, 1])
    """
    image_unit = unit_rows("image features", image_features)
    text_unit = unit_rows("text features", text_features, dim=image_unit.shape[1])
    return mean_row(image_unit), mean_row(text_unit), len(image_unit), len(text_unit)
