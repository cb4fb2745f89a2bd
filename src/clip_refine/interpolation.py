"""Two checkpoints → one on the line between them."""

from pathlib import Path

from clip_refine import __version__, build
from clip_refine.config import ModelConfig
from clip_refine.errors import ConfigError, ModelError
from clip_refine.models import OpenClipEncoder, TransformersEncoder
from clip_refine.models.interpolate import interpolate_weights
from clip_refine.provenance import Provenance
from clip_refine.run_folder import check_free, complete_folder
from clip_refine.saving import base_model, read_provenance, save_model


def interpolate(
    base: str, refined: str, *, weight: float, out: Path, overwrite: bool = False
) -> None:
    """Write (1 − weight)·base + weight·refined in the format of `refined`.

    Weights between a model and its refinement often keep most of what was gained and lose less of
    what was there (WiSE-FT, arXiv 2109.01903).

    Args:
        base: A run's folder, a model's folder, or a name as for `model.name`.
        refined: The same, of the same architecture; its preprocessing and tokenizer are kept.
        weight: From 0, which gives `base`, to 1, which gives `refined`.
        out: Folder to write.
        overwrite: Replace `out` where it holds an earlier result.

    Raises:
        ConfigError: `weight` is outside 0-1.
        ModelError: A model cannot be loaded, or they differ in architecture.
        OutputError: `out` exists.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight: must be from 0 to 1, got {weight}.")
    check_free(out, overwrite=overwrite)
    before, after = _load(base), _load(refined)
    after.load_state_dict(interpolate_weights(before.state_dict(), after.state_dict(), weight))
    with complete_folder(out, overwrite=overwrite) as folder:
        save_model(after, folder, _provenance(base, refined, weight))


def _provenance(base: str, refined: str, weight: float) -> Provenance:
    """Of the line's start as far as it goes, and of the data that its end was refined on."""
    start, end = base_model(base), base_model(refined)
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


def _load(name: str) -> OpenClipEncoder | TransformersEncoder:
    model = build.build_model(ModelConfig(name=str(_folder(name) or name)))
    if not isinstance(model, OpenClipEncoder | TransformersEncoder):
        raise ModelError(f"{name}: is no open_clip or Transformers model, which this verb needs.")
    return model
