"""Several peers one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from clip_refine.posthoc.peer import Peer

Fit = Callable[[Tensor, Tensor], Peer]
"""(image features, text features) → a peer: `MeanCentring.fit`, or a `partial` of another."""


@dataclass(frozen=True, eq=False)
class Chain(Peer):
    """Each step transforms what the steps before it made, and was fitted on such features.

    A peer scales what it gets to norm 1, so one whose lengths carry meaning (`returns_unit` is
    False) can only stand at the end.

    Attributes:
        steps: At least one, in order.

    Example:
        Mean-centring takes the means away, so there is nothing left to shift.

        >>> import torch
        >>> from clip_refine.posthoc import MeanCentring, ModalityShift
        >>> image, text = torch.eye(2), -torch.eye(2)
        >>> chain = Chain.fit(image, text, steps=[MeanCentring.fit, ModalityShift.fit])
        >>> chain.name, chain.transform_image(image)[0]
        ('mean-centring+modality-shift', tensor([ 0.7071, -0.7071]))
    """

    steps: tuple[Peer, ...]

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
    def fit(cls, image_features: Tensor, text_features: Tensor, *, steps: Sequence[Fit]) -> Self:
        """Fit each step on what the steps before it make of the features.

        Args:
            image_features: (N, d), raw or unit.
            text_features: (M, d), raw or unit.
            steps: The `fit` of each peer, for example
                `[MeanCentring.fit, partial(NearestNeighbourNormalisation.fit, alpha=0.5)]`.

        Raises:
            ValueError: As the steps, and if there is none or a step is not at its place.
        """
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
        """How many images and how many texts the first step was fitted on."""
        return self.steps[0].fitted_on

    @property
    def returns_unit(self) -> bool:
        """As the last step."""
        return self.steps[-1].returns_unit

    @property
    def score_columns(self) -> int:
        """As the last step."""
        return self.steps[-1].score_columns

    def transform_image(self, image_features: Tensor) -> Tensor:
        """(N, d) raw or unit → (N, d + score_columns), through every step.

        Raises:
            ValueError: As the steps.
        """
        for step in self.steps:
            image_features = step.transform_image(image_features)
        return image_features

    def transform_text(self, text_features: Tensor) -> Tensor:
        """(M, d) raw or unit → (M, d + score_columns), through every step.

        Raises:
            ValueError: As the steps.
        """
        for step in self.steps:
            text_features = step.transform_text(text_features)
        return text_features


def _check_can_be_followed(step: Peer) -> None:
    if not step.returns_unit:
        raise ValueError(
            f"{step.name} must be the last step of a chain: the lengths of its features carry "
            "meaning, and a step after it would scale them to 1"
        )
