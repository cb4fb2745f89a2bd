"""The road out: load → write → load back as its users would → compare → keep or refuse."""

from pathlib import Path
from typing import Any

from clip_refine import __version__, build
from clip_refine.config import ModelConfig
from clip_refine.errors import ClipRefineError, ConfigError, ModelError
from clip_refine.exporting.check import ExportCheck, compare_features, sample_pairs
from clip_refine.exporting.loaded import load_back
from clip_refine.models import OpenClipEncoder, TransformersEncoder
from clip_refine.provenance import Provenance
from clip_refine.results import RunScores, read_run_scores
from clip_refine.run_folder import check_free, complete_folder
from clip_refine.saving import (
    base_model,
    read_provenance,
    write_card,
    write_onnx,
    write_open_clip,
    write_sentence_transformers,
    write_transformers,
)

FORMATS = ("open_clip", "transformers", "sentence-transformers", "onnx")
_TOLERANCE = {"onnx": 1e-4}
_ANY_TOLERANCE = 1e-5


def export(source: str, *, to: str, out: Path, overwrite: bool = False) -> ExportCheck:
    """Write a model in another library's format, if it gives the same features there.

    The written folder is loaded back with that library and compared on 16 images and captions: of
    the run's held-out pairs where they can be read, else drawn ones.

    Args:
        source: A run's folder, a model's folder, or a name as for `model.name`.
        to: One of `FORMATS`.
        out: Folder to write.
        overwrite: Replace `out` where it holds an earlier result.

    Returns:
        By how much the features differ.

    Raises:
        ConfigError: There is no such format.
        ModelError: The model cannot be loaded, has no like in that library, or gives other
            features there. Nothing is left at `out` then.
        OutputError: `out` exists.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: there is no such format. Allowed: {', '.join(FORMATS)}.")
    check_free(out, overwrite=overwrite)
    run = _run_of(Path(source))
    model = _load(source, run, to)
    provenance, scores = _origin(source, run)
    pairs = sample_pairs(run)
    with complete_folder(out, overwrite=overwrite) as folder:
        _write(model, folder, to, provenance.header())
        write_card(folder, provenance, scores)
        check = compare_features(
            model, load_back(folder, to, model), pairs, tolerance=_TOLERANCE.get(to, _ANY_TOLERANCE)
        )
        if not check.passed:
            raise ModelError(
                f"the exported model gives other features than {source}: {check}. Nothing was "
                "kept. Please report this with the model's name."
            )
    return check


def _run_of(source: Path) -> Path | None:
    """The run that a folder is, or is the model of."""
    for folder in (source, source.parent if source.name == "model" else source):
        if (folder / "scores.json").is_file() and (folder / "config.yaml").is_file():
            return folder
    return None


def _load(source: str, run: Path | None, to: str) -> Any:
    """The model, in its Transformers files where these are wanted and there."""
    folder = (run / "model" if run else Path(source)).absolute()
    if to in ("transformers", "sentence-transformers") and (
        (folder / "config.json").is_file() or (folder / "modules.json").is_file()
    ):
        return build.build_model(ModelConfig(name=f"transformers:{folder}"))
    return build.build_model(ModelConfig(name=str(run or source)))


def _origin(source: str, run: Path | None) -> tuple[Provenance, RunScores | None]:
    """Where the model comes from, and the scores of the run that made it."""
    if run:
        try:
            scores = read_run_scores(run / "scores.json")
            return Provenance.model_validate(scores.recipe["provenance"]), scores
        except (ClipRefineError, KeyError, ValueError):
            pass  # of another version: then the weights say what they say
    folder = run / "model" if run else Path(source.removeprefix("local-dir:"))
    found = read_provenance(folder) if folder.is_dir() else None
    if found:
        return found, None
    return Provenance(version=__version__, made="converted", base=base_model(source)), None


def _write(model: Any, folder: Path, to: str, header: dict[str, str]) -> None:
    match to:
        case "open_clip" if isinstance(model, OpenClipEncoder):
            model.save(folder, metadata=header)
        case "open_clip" if isinstance(model, TransformersEncoder):
            write_open_clip(model, folder, header)
        case "open_clip":
            raise ModelError(f"open_clip builds no {type(model).__name__}. Export it --to onnx.")
        case "transformers":
            write_transformers(model, folder, header)
        case "sentence-transformers":
            write_sentence_transformers(model, folder, header)
        case _:
            write_onnx(model, folder, header)
