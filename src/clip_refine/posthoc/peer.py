"""What every training-free peer is: two feature transforms and nothing else."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from clip_refine.posthoc._tensors import dot_products


class Peer(ABC):
    """Something fitted on held-out training pairs that changes features of a finished model.

    Convention, the same for all: features go in raw or unit, are scaled to norm 1 first, and the
    new score of an image and a text is the *dot product* of their transformed features, as they
    come out. So `evaluation.retrieval(..., normalize=False)` on transformed features ranks by any
    peer. Arithmetic is in float32, in float64 where features are; a peer is never changed by use.

    Attributes:
        kind: The name in files and on the command line.
    """

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """`kind`, or the kinds of a chain joined by `+`."""
        return self.kind

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension of the features that go in."""

    @property
    @abstractmethod
    def fitted_on(self) -> tuple[int, int]:
        """How many images and how many texts it was fitted on."""

    @property
    def returns_unit(self) -> bool:
        """Whether transformed rows have norm 1, so that the dot product is the cosine."""
        return True

    @property
    def score_columns(self) -> int:
        """Columns appended behind the `dim` first ones that carry scores, no place in the space.

        Geometry is measured without them: `transform_image(...)[:, :peer.dim]`.
        """
        return 0

    @abstractmethod
    def transform_image(self, image_features: Tensor) -> Tensor:
        """(N, d) raw or unit → (N, d + score_columns).

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """

    @abstractmethod
    def transform_text(self, text_features: Tensor) -> Tensor:
        """(M, d) raw or unit → (M, d + score_columns).

        Raises:
            ValueError: If the shape is another, or a row is not finite or zero.
        """

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(N, M) scores of every image with every text, higher is nearer.

        Args:
            image_features: (N, d), raw or unit.
            text_features: (M, d), raw or unit.

        Raises:
            ValueError: As the transforms.
        """
        return dot_products(
            self.transform_image(image_features), self.transform_text(text_features)
        )
