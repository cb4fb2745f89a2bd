"""What an evaluation suite finds, as plain data: JSON in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from clip_refine.errors import DataError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Score(_Record):
    """A number and how much it would move with other images of the same kind.

    Attributes:
        value: On the images that there are.
        low: 2.5 % quantile of bootstrap resamples of the images; None where it is not resampled.
        high: 97.5 % quantile.
        higher_is_better: None where neither is.
    """

    value: float
    low: float | None
    high: float | None
    higher_is_better: bool | None


class Measured(_Record):
    """One task with one model.

    Attributes:
        task: The task's name in the suite.
        kind: What was measured.
        model: The model's label.
        protocol: How, in a sentence.
        source: Where the images are from.
        note: What the suite says about them.
        counts: How many images, captions, classes, prompts, ... there were.
        prompts: Which prompt set; None where there are none.
        templates: The prompts, with `{}` for the class name.
        class_names: Which list of class names; None where there are none.
        model_fingerprint: Of weights, architecture, preprocessing and tokenizer.
        data_fingerprint: Of every image with its captions or class, of class names and prompts.
        scores: Name → number with interval.
        details: What stands behind the numbers: per class, confusions, histograms, draws.
    """

    task: str
    kind: str
    model: str
    protocol: str
    source: str
    note: str | None
    counts: Mapping[str, int]
    prompts: str | None
    templates: tuple[str, ...]
    class_names: str | None
    model_fingerprint: str
    data_fingerprint: str
    scores: Mapping[str, Score]
    details: Mapping[str, Any]


class Difference(_Record):
    """One score of two models on the same images.

    Attributes:
        task: The task's name.
        score: The score's name.
        model: Whose score.
        against: Less whose: the first model's.
        mean: The difference.
        low: 2.5 % quantile, both models resampled with the same images; None where not resampled.
        high: 97.5 % quantile.
        higher_is_better: As in `Score`.
    """

    task: str
    score: str
    model: str
    against: str
    mean: float
    low: float | None
    high: float | None
    higher_is_better: bool | None


class EvaluatedModel(_Record):
    """A model of the comparison.

    Attributes:
        label: What tables call it.
        name: As given or as a run's settings have it.
        pretrained: Tag or file of weights.
        fingerprint: Of weights, architecture, preprocessing and tokenizer.
    """

    label: str
    name: str
    pretrained: str | None
    fingerprint: str


class SuiteScores(_Record):
    """What `clip-refine evaluate --suite` writes.

    Attributes:
        suite: The suite's name.
        models: In the order in which they were given; differences are taken from the first.
        measured: Every task with every model.
        differences: Every score of every other model less the first model's.
        missing: Source → what was not there; its tasks were left out.
        resamples: Of the bootstrap.
        seed: Of bootstrap, splits and draws.
        seconds: Wall-clock seconds.
        environment: Versions, device, command.
    """

    suite: str
    models: tuple[EvaluatedModel, ...]
    measured: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    missing: Mapping[str, str]
    resamples: int
    seed: int
    seconds: float
    environment: Mapping[str, Any]


def read_suite_scores(path: Path) -> SuiteScores:
    """Read what `evaluate --suite --out` wrote.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return SuiteScores.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(
            f"{path}: holds no scores of a suite ({error.error_count()} errors)."
        ) from error
