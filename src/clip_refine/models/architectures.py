"""Which open_clip architecture a set of weights belongs to, by names and shapes."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import open_clip
import torch

from clip_refine.errors import ModelError
from clip_refine.models.checkpoint_file import CheckpointFile

Shapes = Mapping[str, tuple[int, ...]]
_FREE = ("logit_scale", "logit_bias")  # 0-d or (1,), and a bias that is missing is made
_IGNORED = ("position_ids",)


def infer_architecture(checkpoint: CheckpointFile) -> str:
    """The name of the only architecture of open_clip with these weights.

    Raises:
        ModelError: There is none, or several that differ in what shapes do not show.
    """
    found = fitting_architectures(checkpoint.shapes)
    named = re.search(r"model_(.+?)-lr_", checkpoint.run_name)
    if named and named.group(1) in found:
        return named.group(1)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(
            f"{checkpoint.path}: no architecture of open_clip that can be built here has these "
            f"{len(checkpoint.shapes)} weights. Say which it is: --model.name ARCHITECTURE "
            f"--model.pretrained {checkpoint.path}"
        )
    quick = any(name.endswith("-quickgelu") for name in found)
    raise ModelError(
        f"{checkpoint.path}: its weights fit {' and '.join(found)}, which differ in "
        + ("activation (OpenAI's, MetaCLIP's and DFN's are quickgelu)" if quick else "settings")
        + f". Say which it is: --model.name {found[0]} --model.pretrained {checkpoint.path}"
    )


def fitting_architectures(shapes: Shapes) -> list[str]:
    """All architectures of open_clip whose weights have these names and shapes."""
    expected = _comparable(shapes)
    names = [
        name
        for name in open_clip.list_models()
        if _may_fit(open_clip.get_model_config(name) or {}, shapes)
    ]
    return [name for name in names if _comparable(_shapes_of(name)) == expected]


def openai_config(shapes: Shapes) -> dict[str, Any] | None:
    """open_clip's `model_cfg` for weights named as OpenAI's, None for other names.

    The numbers of layers, widths and sizes all show in the shapes; heads are 64 wide everywhere.
    """
    try:
        text_width = shapes["ln_final.weight"][0]
        return {
            "embed_dim": shapes["text_projection"][1],
            "quick_gelu": True,
            "vision_cfg": _vision_transformer(shapes)
            if "visual.proj" in shapes
            else _resnet(shapes),
            "text_cfg": {
                "context_length": shapes["positional_embedding"][0],
                "vocab_size": shapes["token_embedding.weight"][0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": _count(shapes, r"transformer\.resblocks\.(\d+)\."),
            },
        }
    except (KeyError, IndexError):
        return None


def _vision_transformer(shapes: Shapes) -> dict[str, Any]:
    width, _, _, patch_size = shapes["visual.conv1.weight"]
    grid = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    return {
        "image_size": patch_size * grid,
        "layers": _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
        "width": width,
        "patch_size": patch_size,
    }


def _resnet(shapes: Shapes) -> dict[str, Any]:
    grid = round((shapes["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
    return {
        "image_size": grid * 32,
        "layers": [_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "width": shapes["visual.layer1.0.conv1.weight"][0],
        "patch_size": None,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match.group(1) for name in shapes if (match := re.match(pattern, name))})


def _may_fit(config: dict[str, Any], shapes: Shapes) -> bool:
    """What the settings say without building the model, which takes a moment for each."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    own_tower = any(name.startswith("text.") for name in shapes)
    if "hf_model_name" in text:
        return own_tower and "text.token_embedding.weight" not in shapes
    prefix = "text." if own_tower else ""
    vocabulary = shapes.get(f"{prefix}token_embedding.weight")
    expected = (text.get("vocab_size", 49408), text.get("width", 512))
    timm = "timm_model_name" in vision
    return (
        own_tower == bool(config.get("custom_text"))
        and vocabulary == expected
        and _count(shapes, rf"{prefix}transformer\.resblocks\.(\d+)\.") == text.get("layers", 12)
        and timm == any(name.startswith("visual.trunk.") for name in shapes)
        and ("multimodal_cfg" in config) == any(name.startswith("text_decoder.") for name in shapes)
    )


def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an architecture, built without memory for its weights."""
    with quiet_open_clip():
        try:
            with torch.device("meta"):
                model = open_clip.create_model(name, pretrained_text=False, device="meta")
        except (OSError, ImportError, RuntimeError, ValueError):  # needs the Hub or a package
            return {}
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _comparable(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, shape in shapes.items()
        if name not in _FREE and not name.endswith(_IGNORED)
    }


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Without what open_clip and the Hub client log: a `ModelError` says it once."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
