"""A model's name → the model."""

from pathlib import Path

import open_clip

from clip_refine.config import ModelConfig
from clip_refine.console import remark
from clip_refine.errors import ModelError
from clip_refine.models import (
    DualEncoder,
    call_factory,
    load_open_clip,
    load_transformers,
    load_weights_file,
)
from clip_refine.models.folders import is_run, recognise_folder
from clip_refine.toy import model_directory


def build_model(config: ModelConfig) -> DualEncoder:
    """The model to start from, float32, in evaluation mode.

    Raises:
        ModelError: It cannot be found or loaded.
    """
    kind, identifier = model_source(config.name)
    if kind not in ("open_clip", "local-dir", "toy") and config.pretrained:
        raise ModelError(
            f"model.pretrained {config.pretrained!r} does not go with {config.name!r}, which "
            "names its own weights. Leave --model.pretrained out."
        )
    match kind:
        case "factory":
            return call_factory(identifier)
        case "toy":
            return load_open_clip(f"local-dir:{model_directory()}", config.pretrained)
        case "transformers":
            folder = Path(identifier)
            return load_transformers(str(folder / "model") if is_run(folder) else identifier)
        case "folder":
            return _load_folder(Path(identifier))
        case "file":
            model, recognised = load_weights_file(Path(identifier))
            remark(f"{identifier}: {recognised}.")
            return model
        case _:
            return load_open_clip(config.name, config.pretrained)


def model_source(name: str) -> tuple[str, str]:
    """What kind of thing `model.name` names, and the folder or name in it.

    >>> model_source("transformers:openai/clip-vit-base-patch32")
    ('transformers', 'openai/clip-vit-base-patch32')
    >>> model_source("ViT-B-32")
    ('open_clip', 'ViT-B-32')
    """
    if name == "toy":
        return "toy", name
    for schema in ("transformers", "local-dir", "factory"):
        if name.startswith(f"{schema}:"):
            return schema, name.removeprefix(f"{schema}:")
    is_architecture = name.replace("/", "-") in open_clip.list_models()
    if Path(name).exists() and not is_architecture:
        return "folder" if Path(name).is_dir() else "file", name
    return "open_clip", name


def _load_folder(folder: Path) -> DualEncoder:
    """The model in a folder of any kind, with a line that says which it is."""
    found = recognise_folder(folder)
    remark(f"{folder}: {found.remark}.")
    if found.kind == "open_clip":
        return load_open_clip(f"local-dir:{found.path}")
    return load_transformers(str(found.path))
