"""open_clip models by name, tag, path or folder."""

import difflib
import json
import pickle
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from open_clip.factory import parse_model_name

from clip_refine.errors import ModelError
from clip_refine.models.architectures import (
    fitting_architectures,
    infer_architecture,
    openai_config,
    quiet_open_clip,
)
from clip_refine.models.checkpoint_file import CheckpointFile, open_checkpoint
from clip_refine.models.open_clip_encoder import CONFIG_FILE, WEIGHTS_FILE, OpenClipEncoder


def load_open_clip(name: str, pretrained: str | None = None) -> OpenClipEncoder:
    """Load an open_clip model in evaluation mode with float32 weights.

    Args:
        name: An architecture (`ViT-B-32`), `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        pretrained: For an architecture: a tag, or a path to a .pt or .safetensors file. None takes
            the tag `openai` where the architecture has it.

    Raises:
        ModelError: Unknown architecture or tag (near ones are named), missing file or folder,
            weights that do not fit, or a download that failed.
    """
    try:
        schema, identifier = parse_model_name(name)
    except ValueError as error:
        raise ModelError(f"model.name {name!r}: {error}") from error
    if schema is None:
        pretrained = _resolve_pretrained(name, pretrained)
    elif pretrained:
        raise ModelError(
            f"model.pretrained {pretrained!r} does not go with {name!r}, which names its own "
            "weights. Leave --model.pretrained out."
        )
    elif schema == "local-dir" and not (Path(identifier) / CONFIG_FILE).is_file():
        raise ModelError(f"{identifier}: no {CONFIG_FILE} there. Give an open_clip model's folder.")
    path = Path(pretrained or "")
    if schema or not path.is_file():
        return _create(name, pretrained)
    with open_checkpoint(path) as checkpoint:
        return _create(name, str(checkpoint.readable), checkpoint)


def load_weights_file(path: Path) -> tuple[OpenClipEncoder, str]:
    """Load a file of weights whose names and shapes tell the architecture.

    Args:
        path: OpenAI's TorchScript archive, a checkpoint of open_clip's trainer, or a state dict as
            .pt or .safetensors.

    Returns:
        The model, and what was recognised, as a part of a sentence.

    Raises:
        ModelError: The file is damaged, or its architecture cannot be told.
    """
    with open_checkpoint(path) as checkpoint:
        config = openai_config(checkpoint.shapes) if checkpoint.is_openai else None
        if config is None:
            architecture = infer_architecture(checkpoint)
            model = _create(architecture, str(checkpoint.readable), checkpoint)
            return model, f"weights of {architecture}"
        with TemporaryDirectory() as folder:
            settings = {"model_cfg": config, "preprocess_cfg": {}}
            (Path(folder) / CONFIG_FILE).write_text(json.dumps(settings), encoding="utf-8")
            shutil.copyfile(checkpoint.readable, Path(folder) / WEIGHTS_FILE)
            model = _create(f"local-dir:{folder}", None, checkpoint)
        vision = config["vision_cfg"]
        return model, (
            f"OpenAI's weights, with QuickGELU: {vision['layers']} layers for images of "
            f"{vision['image_size']} pixels, {config['embed_dim']} dimensions"
        )


def _create(
    name: str, pretrained: str | None, checkpoint: CheckpointFile | None = None
) -> OpenClipEncoder:
    """What open_clip makes, with its errors in our words."""
    shown = str(checkpoint.path) if checkpoint else pretrained
    try:
        return _build(name, pretrained, from_file=checkpoint is not None)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{shown or name}: could not be loaded: it holds more than weights, and other "
            "objects are not unpickled because they can run code. Save it as .safetensors, or save "
            "its state_dict only."
        ) from error
    except ImportError as error:
        raise ModelError(
            f"{name}: needs a package that is not installed ({error}). Install it with pip."
        ) from error
    except StopIteration as error:
        raise ModelError(f"{shown or name}: holds no weights. Give a state dict.") from error
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(_why_not_loaded(name, shown, checkpoint, error)) from error


def _build(name: str, pretrained: str | None, *, from_file: bool) -> OpenClipEncoder:
    schema = parse_model_name(name)[0]
    architecture = name if schema else name.replace("/", "-")
    # A tag's weights were trained with their own activation; open_clip only warns where it differs.
    tag_config = {} if schema else open_clip.get_pretrained_cfg(architecture, pretrained or "")
    quick_gelu = bool(tag_config.get("quick_gelu", False))
    by_path = from_file and schema is None
    with quiet_open_clip():
        clip, _, preprocess = open_clip.create_model_and_transforms(
            architecture,
            pretrained=pretrained,
            precision="fp32",
            force_quick_gelu=quick_gelu,
            require_pretrained=True,
            weights_only=True,
            **(_usual_preprocess(architecture) if by_path else {}),
        )
        tokenizer = open_clip.get_tokenizer(architecture)
    model_config = open_clip.get_model_config(architecture) or {}
    if quick_gelu:
        model_config["quick_gelu"] = True
    return OpenClipEncoder(clip, preprocess, tokenizer, model_config)


def _usual_preprocess(architecture: str) -> dict[str, Any]:
    """What all published weights of an architecture agree on, since a file does not say it."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    settings = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    names = ("mean", "std", "interpolation", "resize_mode")
    found = {name: [tag.get(name) for tag in settings] for name in names}
    return {
        f"image_{name}": values[0]
        for name, values in found.items()
        if values and values[0] is not None and all(value == values[0] for value in values)
    }


def _resolve_pretrained(name: str, pretrained: str | None) -> str:
    """The tag or path to load for an architecture."""
    architecture = name.replace("/", "-")
    architectures = open_clip.list_models()
    if architecture not in architectures:
        near = difflib.get_close_matches(architecture, architectures, n=3, cutoff=0.5)
        raise ModelError(
            f"model.name {name!r}: no such open_clip architecture."
            + (f" Did you mean {', '.join(near)}?" if near else "")
            + " There is no folder or file of this name either. A model of the Hub is written "
            "hf-hub:ORG/NAME (open_clip) or transformers:ORG/NAME."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        if "openai" in tags:
            return "openai"
        raise ModelError(
            f"model.pretrained: say which weights of {name} to load: a tag "
            f"({', '.join(tags) or 'it has none'}) or a path to a .pt or .safetensors file."
        )
    if open_clip.is_pretrained_cfg(architecture, pretrained) or Path(pretrained).is_file():
        return pretrained
    near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.4)
    raise ModelError(
        f"model.pretrained {pretrained!r}: neither a file nor a tag of {name}."
        + (f" Did you mean {', '.join(near)}?" if near else f" Tags: {', '.join(tags) or 'none'}.")
    )


def _why_not_loaded(
    name: str, shown: str | None, checkpoint: CheckpointFile | None, error: Exception
) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = f"{name} ({shown})" if shown else name
    if checkpoint:
        fitting = fitting_architectures(checkpoint.shapes)
        belong = f"They are weights of {' or '.join(fitting)}." if fitting else ""
        return f"{what}: could not be loaded: {reason} {belong or 'Do they belong to this model?'}"
    if not name.startswith("local-dir:"):
        return (
            f"{what}: could not be loaded: {reason} If there is no network here, download the "
            "weights elsewhere and give their path with --model.pretrained or local-dir:FOLDER."
        )
    return f"{what}: could not be loaded: {reason} Do the weights belong to this architecture?"
