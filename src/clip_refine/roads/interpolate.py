"""Weights on the line between a model and its refinement (WiSE-FT, arXiv 2109.01903)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clip_refine import __version__
from clip_refine.config import RefineConfig
from clip_refine.data import ImageCaptions, Stream, hold_out
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.scores import scores_along_line
from clip_refine.models.encoder import OWN, files_of
from clip_refine.models.text_length import PROBES, same_features
from clip_refine.models.weights import interpolate_weights
from clip_refine.results import Provenance
from clip_refine.roads import build
from clip_refine.saving import base_model, read_provenance, save_model
from clip_refine.support.console import console
from clip_refine.support.errors import ConfigError, ModelError
from clip_refine.support.folder import check_free, complete_folder

# --------------------------------------------------------------------------------------------------
# Settings → how far the refined weights go from where they came from (WiSE-FT).


SELECTION_FRACTION = 0.1
"""Share of the training images (at least 100) that `auto` chooses on instead of training on it."""


def set_aside(
    config: RefineConfig, pairs: ImageCaptions | Stream
) -> tuple[ImageCaptions | Stream, ImageCaptions | None]:
    """What is trained on, and the pairs that the interpolation weight is chosen on, if it is."""
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
    base: Mapping[str, Tensor],
    embedder: Embedder,
    selection: ImageCaptions | None,
) -> dict[str, Any] | None:
    """Move the student's weights toward those it started from, as far as the settings say.

    Of equally good weights the lowest is taken, which is nearest to the start.
    """
    if config.interpolate is None:
        return None
    refined = student.state_dict()
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


# --------------------------------------------------------------------------------------------------
# Two checkpoints → one on the line between them.


def interpolate(
    base: str, refined: str, *, weight: float, out: Path, overwrite: bool = False
) -> None:
    """Write (1 − weight)·base + weight·refined in the format of `refined`.

    Weights between a model and its refinement often keep most of what was gained and lose less of
    what was there (WiSE-FT, arXiv 2109.01903).
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight: must be from 0 to 1, got {weight}.")
    check_free(out, overwrite=overwrite)
    before, after = _load(base), _load(refined)
    weights = interpolate_weights(before.state_dict(), after.state_dict(), weight)
    _check_one_function(before, after, base, refined)
    after.load_state_dict(weights)
    with complete_folder(out, overwrite=overwrite) as folder:
        save_model(after, folder, _provenance(base, refined, weight))


@torch.no_grad()
def _check_one_function(before: Any, after: Any, base: str, refined: str) -> None:
    """Refuse models whose weights mean different things; leaves the first's in both."""
    image = Image.linear_gradient("L").resize((320, 240)).convert("RGB")
    differ = f"{base} and {refined} cannot be mixed: they"
    pixels, others = before.preprocess(image), after.preprocess(image)
    if pixels.shape != others.shape or not torch.allclose(pixels, others, atol=1e-4):
        raise ModelError(
            f"{differ} prepare images differently ({files_of(before).preprocessing()} and "
            f"{files_of(after).preprocessing()}), so no weights between them fit either way."
        )
    tokens, other_tokens = (
        files_of(each).full_length_tokenizer(PROBES) for each in (before, after)
    )
    if not torch.equal(tokens, other_tokens):
        raise ModelError(f"{differ} have different tokenizers.")
    after.load_state_dict(before.state_dict())
    for features, same in (
        (before.encode_image(pixels[None]), after.encode_image(pixels[None])),
        (before.encode_text(tokens), after.encode_text(tokens)),
    ):
        if not same_features(features, same):
            raise ModelError(
                f"{differ} compute other features from the same weights. Usually one has GELU and "
                "the other QuickGELU: load both with the activation that they were trained with."
            )


def _provenance(base: str, refined: str, weight: float) -> Provenance:
    """Of the line's start as far as it goes, and of the data that its end was refined on."""
    start, end = (
        base_model(named.name, named.pretrained)
        for named in map(build.named_model, (base, refined))
    )
    folder = _folder(refined)
    known = read_provenance(folder) if folder else None
    return Provenance(
        version=__version__,
        made="interpolated",
        base=start,
        recipe=f"{weight:g} of the way from {start.name} to {end.name}",
        train=known.train if known else None,
    )


def _folder(name: str) -> Path | None:
    return next((path for path in (Path(name) / "model", Path(name)) if path.is_dir()), None)


def _load(name: str) -> Any:
    model: Any = build.build_model(build.named_model(str(_folder(name) or name)))
    if files_of(model).format == OWN:
        raise ModelError(f"{name}: is no open_clip or Transformers model, which this verb needs.")
    return model
