"""What comes out, as plain data: JSON in and out."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from clip_refine.errors import DataError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def write(self, path: Path) -> None:
        """Save as indented JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Scores(_Record):
    """The numbers of one model on held-out data.

    Attributes:
        geometry: Names of docs/method.md, on each image with its first caption.
        retrieval: `image_to_text_recall@k` and `text_to_image_recall@k`, shares from 0 to 1.
        zero_shot: Task name → `top1`, `top5`, `mean_per_class_recall`, shares from 0 to 1.
        pairs: Held-out images.
        captions: Their captions.
    """

    geometry: Mapping[str, float]
    retrieval: Mapping[str, float]
    zero_shot: Mapping[str, Mapping[str, float]]
    pairs: int
    captions: int


class Interval(_Record):
    """A difference from the untouched model and its 95 % bootstrap interval over images.

    Attributes:
        mean: Mean over seeds less the untouched model's value.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
    """

    mean: float
    low: float
    high: float


class RunScores(_Record):
    """`scores.json` of a refinement.

    Attributes:
        before: The model as it came.
        after: The refined model.
        difference: Score's path, as in `retrieval.image_to_text_recall@1` → after less before; only
            scores that are means over items have one.
        recipe: What was minimised and how.
        seconds: Wall-clock seconds of each part of the run.
    """

    before: Scores
    after: Scores
    difference: Mapping[str, Interval] = {}
    recipe: Mapping[str, Any]
    seconds: Mapping[str, float]


def read_run_scores(path: Path) -> RunScores:
    """Read a `scores.json`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return RunScores.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(
            f"{path}: is no scores.json of a run ({error.error_count()} errors)."
        ) from error


def read_comparison(path: Path) -> "Comparison":
    """Read a `comparison.json`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(f"{path}: is no comparison.json ({error.error_count()} errors).") from error


class Spread(_Record):
    """A number over the runs of a recipe.

    Attributes:
        mean: Over its seeds.
        deviation: Sample standard deviation over its seeds, None for a single run.
    """

    mean: float
    deviation: float | None


class ComparisonRow(_Record):
    """One run of one recipe: a line of `comparison.csv`.

    Attributes:
        recipe: `pre-trained`, a recipe, a peer, or a combination such as `hycd+mean-centring`.
        seed: Of the order, the captions drawn and the references; results that depend on none
            stand once, with the first seed.
        learning_rate: None where nothing was trained.
        steps: Training steps.
        pairs: Training images.
        geometry: As in `Scores`.
        retrieval: As in `Scores`.
        zero_shot: As in `Scores`.
        linear_probe: Task name → accuracy, 0-1.
        selection: Mean recall on the selection pairs, which chose the learning rate; None for
            peers, which are fitted on those.
        seconds: Of training, or of fitting and applying a peer, or both.
        peak_memory: GB, of the process or the GPU, while it ran.
    """

    recipe: str
    seed: int
    learning_rate: float | None
    steps: int
    pairs: int
    geometry: Mapping[str, float]
    retrieval: Mapping[str, float]
    zero_shot: Mapping[str, Mapping[str, float]]
    linear_probe: Mapping[str, float]
    selection: float | None
    seconds: float
    peak_memory: float

    @property
    def headline(self) -> dict[str, float]:
        """The columns of the table: the gap, recalls, and means over tasks where there are any."""
        both = {
            k: fmean(
                self.retrieval[f"{way}_recall@{k}"] for way in ("image_to_text", "text_to_image")
            )
            for k in (1, 10)
        }
        numbers = {
            "gap": self.geometry["centroid_distance"],
            "image_to_text_recall@1": self.retrieval["image_to_text_recall@1"],
            "text_to_image_recall@1": self.retrieval["text_to_image_recall@1"],
            "mean_recall@1": both[1],
            "mean_recall@10": both[10],
        }
        if self.zero_shot:
            numbers["zero_shot_top1"] = fmean(task["top1"] for task in self.zero_shot.values())
        if self.linear_probe:
            numbers["linear_probe"] = fmean(self.linear_probe.values())
        return numbers


class RecipeSummary(_Record):
    """All runs of one recipe together: a line of the table.

    Attributes:
        recipe: As in the rows.
        runs: How many rows.
        learning_rate: As in the rows.
        scores: The headline numbers first, then every number of the rows by its path, as in
            `zero_shot.cifar10.top1`.
        seconds: As in the rows.
        peak_memory: As in the rows.
        difference: Headline name → difference from the untouched model; empty for that itself.
        pareto_best: No other recipe is as good in all of gap, mean R@1, zero-shot and linear probe
            and better in one.
    """

    recipe: str
    runs: int
    learning_rate: float | None
    scores: Mapping[str, Spread]
    seconds: Spread
    peak_memory: Spread
    difference: Mapping[str, Interval]
    pareto_best: bool


class LearningRateChoice(_Record):
    """How a recipe came by its learning rate.

    Attributes:
        recipe: Which.
        chosen: The best of those tried, the lower one of equals.
        tried: Learning rate → mean recall on the selection pairs; None where training failed.
        at_edge: Whether the best one is the lowest or highest of several: a wider grid might win.
    """

    recipe: str
    chosen: float
    tried: Mapping[str, float | None]
    at_edge: bool


class Comparison(_Record):
    """`comparison.json`.

    Attributes:
        rows: Every run.
        summary: Every recipe over its seeds, in the order of the rows.
        learning_rates: For every trained recipe.
    """

    rows: tuple[ComparisonRow, ...]
    summary: tuple[RecipeSummary, ...]
    learning_rates: tuple[LearningRateChoice, ...]
