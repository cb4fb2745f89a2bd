"""Two linear layers as a dual encoder of stored vectors, and what centred refinement tells them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_refine.losses import Objective, PairFeatures
from clip_refine.vectors.maps import RefinedMaps


class VectorStudent(nn.Module):
    """A `DualEncoder` whose pixels and tokens are vectors: W = start + change in each modality.

    Only the change is a parameter, so that weight decay pulls W toward its start and not toward
    zero. Of rank r it is a product of two factors, the second one zero at first.

    Attributes:
        image_start: (d, d), where the image map starts.
        text_start: (d, d), where the text map starts.
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
    def maps(self, images: int, texts: int, *, logit_scale: float) -> RefinedMaps:
        """What was learnt, on so many images and texts, with the factor on cosines that fits."""
        eye = torch.eye(self.image_start.shape[1], device=self.scale.device)
        image, text = self.encode_image(eye).T, self.encode_text(eye).T
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


# --------------------------------------------------------------------------------------------------
# The scale of the student's cosines, which spread more widely once the means are out.


@dataclass(frozen=True)
class ScaledObjective(Objective):
    """An objective whose teacher terms see unit features, the student's at a scale of its own.

    The teacher's similarities are the model's logit scale times a cosine, the student's
    `student_scale` times one; RaFA and all other terms see raw features as ever.
    """

    student_scale: float

    def _teacher_terms(
        self,
        student: PairFeatures,
        teacher: PairFeatures,
        logit_scale: Tensor,
        centroid_gap: Tensor | None,
    ) -> dict[str, Tensor]:
        """With the factor on one side, since a similarity is a product."""
        image, text = (normalize(side, dim=1) for side in student)
        student = PairFeatures(image * (self.student_scale / logit_scale.detach()), text)
        teacher = PairFeatures(*(normalize(side, dim=1) for side in teacher))
        return super()._teacher_terms(student, teacher, logit_scale, centroid_gap)


def fit_logit_scale(
    student: PairFeatures, teacher: PairFeatures, *, teacher_scale: float, tolerance: float = 0.01
) -> float:
    """The s at which softmax(s·cosine) of the student is nearest to the teacher's at its scale.

    Nearest in cross-entropy to the teacher's rows, mean of both directions, by golden-section
    search in log s, where it has one minimum (it is convex in s).

    Args:
        student: (N, d) each, raw or unit; a few hundred pairs.
        teacher: (N, d′) each, of the same pairs.
        teacher_scale: The teacher's factor on cosines.
        tolerance: Of s, relative.

    Example:
        A student like its teacher needs the teacher's scale.

        >>> same = PairFeatures(torch.eye(4) + 0.1, torch.eye(4))
        >>> round(fit_logit_scale(same, same, teacher_scale=10.0))
        10
    """
    cosine, target = (
        normalize(image.double(), dim=1) @ normalize(text.double(), dim=1).T
        for image, text in (student, teacher)
    )
    rows, columns = ((teacher_scale * part).softmax(dim=1) for part in (target, target.T))

    def cross_entropy(log_scale: float) -> float:
        logits = math.exp(log_scale) * cosine
        found = (rows * logits.log_softmax(1)).sum(1) + (columns * logits.T.log_softmax(1)).sum(1)
        return -float(found.mean())

    low, high = math.log(teacher_scale / 100), math.log(teacher_scale * 100)
    return math.exp(golden_section(cross_entropy, low, high, tolerance))


def golden_section(
    function: Callable[[float], float], low: float, high: float, tolerance: float
) -> float:
    """Where a function with one minimum between two points has it, to `tolerance`.

    >>> round(golden_section(lambda x: (x - 0.3) ** 2, 0, 1, 1e-4), 3)
    0.3
    """
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = function(right)
    return (low + high) / 2
