"""What a task of a suite finds with one model, before it becomes a record."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import resampled_ratios

_LOWER_IS_BETTER = (
    *("expected_calibration_error", "median_rank", "median_image_rank", "text_first_share"),
    *("centroid_distance", "centroid_squared_over_dim", "alignment"),
    *("residual_alignment", "uniformity_log", "uniformity_mean", "relative_modality_gap"),
    *("linear_separability", "hubness_skewness"),
)
_NEITHER = ("threshold", "wrong_pair_mean", "wrong_pair_deviation", "true_pair_deviation")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Numbers of one task with one model.

    Attributes:
        protocol: How they were taken, in a sentence.
        counts: How many images, captions, classes, ... there were.
        scores: Name → number.
        resampled: Name → (resamples,) the number with the images drawn anew, the same draws for
            every model; not for all scores.
        details: What stands behind the numbers, as plain data.
    """

    protocol: str
    counts: Mapping[str, int]
    scores: Mapping[str, float]
    resampled: Mapping[str, Tensor]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are taken.

    Attributes:
        resamples: How often the images are drawn anew.
        seed: Of splits and few-shot draws, and with `source` of the images drawn.
        source: What the images are from: other sources, other draws, the same for all models.
    """

    resamples: int
    seed: int
    source: str = ""

    @property
    def draws(self) -> dict[str, int]:
        """`resamples` and `seed` for the functions of `bootstrap`."""
        stream = zlib.crc32(self.source.encode())
        return {"resamples": self.resamples, "seed": (self.seed + stream) % 2**63}

    def of_images(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resampled means of numbers that each image has, (N,) each."""
        count = len(next(iter(columns.values())))
        return self.of_queries(columns, torch.arange(count), count)

    def of_queries(
        self, columns: Mapping[str, Tensor], owners: Tensor, image_count: int
    ) -> dict[str, Tensor]:
        """Resampled means of numbers that each query has, (Q,) each; `owners` are their images."""
        values = torch.stack([column.cpu().double() for column in columns.values()], dim=1)
        drawn = resampled_ratios(values, owners, image_count, **self.draws)
        return dict(zip(columns, drawn.T, strict=True))


def means(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each."""
    return {name: column.double().mean().item() for name, column in columns.items()}


def higher_is_better(score: str) -> bool | None:
    """The direction of a score by its name, whatever task it is of.

    >>> higher_is_better("top1"), higher_is_better("text_to_image_median_rank")
    (True, False)
    """
    if score in _NEITHER or score.startswith("deviation"):
        return None
    return not score.endswith(_LOWER_IS_BETTER)


def mean_of(outcomes: Mapping[str, Outcome], score: str) -> Outcome:
    """One score of several tasks on average, each task's images drawn for themselves.

    Args:
        outcomes: Task → what was found.
        score: The score's name.
    """
    every = list(outcomes.values())
    drawn = torch.stack([outcome.resampled[score] for outcome in every])
    return Outcome(
        protocol=f"mean over {', '.join(outcomes)}",
        counts={"tasks": len(every), "images": sum(o.counts["images"] for o in every)},
        scores={score: sum(outcome.scores[score] for outcome in every) / len(every)},
        resampled={score: drawn.mean(dim=0)},
    )
