"""What comes out, as plain data: JSON in and out."""

from collections.abc import Mapping
from pathlib import Path
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


class RunScores(_Record):
    """`scores.json` of a refinement.

    Attributes:
        before: The model as it came.
        after: The refined model.
        recipe: What was minimised and how.
        seconds: Wall-clock seconds of each part of the run.
    """

    before: Scores
    after: Scores
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
