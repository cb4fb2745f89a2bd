"""Settings → how far the refined weights go from where they came from (WiSE-FT)."""

from typing import Any

from torch import nn

from clip_refine.config import RefineConfig
from clip_refine.console import console
from clip_refine.data import ImageCaptions, Stream, hold_out
from clip_refine.errors import ConfigError
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.selection import scores_along_line
from clip_refine.models import Teacher
from clip_refine.models.interpolate import interpolate_weights

SELECTION_FRACTION = 0.1
"""Share of the training images (at least 100) that `auto` chooses on instead of training on it."""


def set_aside(
    config: RefineConfig, pairs: ImageCaptions | Stream
) -> tuple[ImageCaptions | Stream, ImageCaptions | None]:
    """What is trained on, and the pairs that the interpolation weight is chosen on, if it is.

    Raises:
        ConfigError: The pairs are a stream, of which no part can be held out.
        DataError: There are too few pairs for that.
    """
    if config.interpolate != "auto":
        return pairs, None
    if isinstance(pairs, Stream):
        raise ConfigError(
            "interpolate auto holds a part of the training pairs out, which a stream does not "
            "allow. Give a number, as in --interpolate 0.8, or leave --data.streaming out."
        )
    return hold_out(pairs, fraction=SELECTION_FRACTION, seed=config.seed)


def interpolate_student(
    config: RefineConfig,
    student: nn.Module,
    teacher: Teacher,
    embedder: Embedder,
    selection: ImageCaptions | None,
) -> dict[str, Any] | None:
    """Move the student's weights toward its teacher's, as far as the settings say.

    Of equally good weights the lowest is taken, which is nearest to the teacher.

    Returns:
        For the record: the weight of the refined model, and the selection scores of those tried.
        None where the settings ask for nothing.
    """
    if config.interpolate is None:
        return None
    base, refined = teacher.state_dict(), student.state_dict()
    if selection is None:
        weight, tried = float(config.interpolate), {}
    else:
        tried = scores_along_line(embedder, student, base, selection)
        weight = max(tried, key=lambda weight: (tried[weight], -weight))
        if embedder.visible:
            console.print(
                f"Interpolation: {weight:g} of the way from the model to its refinement, chosen on "
                f"{len(selection):,} held-out training images (mean recall {tried[0.0]:.3f} at 0, "
                f"{tried[weight]:.3f} at {weight:g}, {tried[1.0]:.3f} at 1)."
            )
    student.load_state_dict(interpolate_weights(base, refined, weight))
    return {"weight": weight, "tried": {f"{at:g}": score for at, score in tried.items()}}
