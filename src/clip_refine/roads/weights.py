"""`interpolate` and `fold`: a model made of the weights of others, without training."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clip_refine import __version__
from clip_refine.config import DataConfig, RefineConfig, named_model, override, with_recipe
from clip_refine.data import Stream
from clip_refine.data.sources import open_training
from clip_refine.models import OpenClipEncoder
from clip_refine.models.encoder import PROBES, files_of, same_features
from clip_refine.models.weights import interpolate_weights, set_logit_scale
from clip_refine.results import Provenance
from clip_refine.roads import build
from clip_refine.roads.refine import Folded, fold_student, measure_features
from clip_refine.saving import base_model, read_provenance, save_model
from clip_refine.saving.folder import data_facts
from clip_refine.support.errors import ConfigError, ModelError
from clip_refine.support.folder import check_free, complete_folder

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
        base_model(named.name, named.pretrained) for named in map(named_model, (base, refined))
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
    place = Path(named_model(name).place)
    return next((path for path in (place / "model", place) if path.is_dir()), None)


def _load(name: str) -> Any:
    named = named_model(name)
    return build.build_model(named if named.factory else named_model(str(_folder(name) or name)))


# --------------------------------------------------------------------------------------------------
# A model with the means of its features folded out of its output layers.


def fold(
    model: str,
    data: DataConfig,
    *,
    out: Path,
    share: float = 1.0,
    share_text: float | None = None,
    seed: int = 42,
    overwrite: bool = False,
) -> Folded:
    """Write a model whose features are centred by its weights, and return what that did.

    The start of the recipe `centred`: nearly all of the gap is closed, nothing is trained. The
    means are those of the pairs of `data.train`, `share` of each is taken off (docs/method.md).
    """
    for name, of_mean in (("share", share), ("share_text", share_text)):
        if of_mean is not None and not 0 <= of_mean <= 1:
            raise ConfigError(f"{name} {of_mean:g}: must be 0 to 1, a part of the mean feature.")
    check_free(out, overwrite=overwrite)
    if not data.sources:
        raise ConfigError("data.train is missing. Give captioned images: --data.train captions.csv")
    config = override(
        with_recipe(RefineConfig(data=data, model=named_model(model), seed=seed), "centred"),
        loss={"fold": share, "fold_text": share_text},
    )
    encoder = _load(model)
    pairs = open_training(data)
    if isinstance(encoder, OpenClipEncoder):
        encoder.add_projection()
    accelerator = build.build_accelerator(config.train.device)
    reader = build.build_reader(data, encoder, [pairs])
    embedder = build.build_embedder(encoder, accelerator, config.evaluation, None, reader)
    folded = fold_student(config, encoder, measure_features(config, embedder, pairs), pairs)
    set_logit_scale(encoder, folded.logit_scale)
    made = Provenance(
        version=__version__,
        made="folded",
        base=base_model(config.model.name, config.model.pretrained),
        recipe=f"{share:g} of the images' and "
        f"{share if share_text is None else share_text:g} of the captions' mean feature folded "
        f"out, logit scale {folded.logit_scale:.4g}",
        train=None if isinstance(pairs, Stream) else data_facts(pairs),
    )
    with complete_folder(out, overwrite=overwrite) as folder:
        save_model(encoder, folder, made)
    return folded
