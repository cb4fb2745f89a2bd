"""What a folder holds: an open_clip, Transformers or sentence-transformers model, or a run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clip_refine.errors import ModelError

Kind = Literal["open_clip", "transformers", "sentence-transformers"]
OPEN_CLIP_CONFIG = "open_clip_config.json"
PROVENANCE = "provenance.json"
"""What models saved by this package have beside their weights."""
_TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that a model can be loaded from.

    Attributes:
        kind: In whose format.
        path: The folder itself, for a run its model's.
        remark: What was recognised, as a part of a sentence.
    """

    kind: Kind
    path: Path
    remark: str


def recognise_folder(folder: Path) -> ModelFolder:
    """Tell the kind of a model's or a run's folder by the files in it.

    Raises:
        ModelError: It holds no model that can be loaded.
    """
    if is_run(folder):
        model = folder / "model"
        if not model.is_dir():
            raise ModelError(f"{folder}: a run without its model/. Give a model's folder.")
        found = _recognise(model)
        return ModelFolder(found.kind, found.path, f"a run, whose model is {found.remark}")
    return _recognise(folder)


def how_to_load(folder: Path) -> str:
    """Which library loads a saved model, and how: the end of a sentence, or nothing.

    >>> how_to_load(Path("nowhere"))
    ''
    """
    try:
        found = recognise_folder(folder)
    except ModelError:
        return ""
    match found.kind:
        case "open_clip":
            return f", which open_clip loads as local-dir:{folder}"
        case "transformers":
            return ", which transformers loads with AutoModel.from_pretrained"
        case "sentence-transformers":
            return ", which sentence-transformers loads with SentenceTransformer"


def is_run(folder: Path) -> bool:
    """Whether `clip-refine refine` wrote this folder."""
    return (folder / "scores.json").is_file() and (folder / "config.yaml").is_file()


def _recognise(folder: Path) -> ModelFolder:
    # a run that saved open_clip's files, too, trained and measured the other ones
    comes_with_both = (folder / PROVENANCE).is_file() and any(
        (folder / name).is_file() for name in ("modules.json", "config.json")
    )
    if (folder / OPEN_CLIP_CONFIG).is_file() and not comes_with_both:
        return ModelFolder("open_clip", folder, "an open_clip model")
    if (folder / "modules.json").is_file():
        return ModelFolder("sentence-transformers", folder, "a sentence-transformers model")
    if (folder / "config.json").is_file():
        if not any((folder / name).is_file() for name in _TRANSFORMERS_WEIGHTS):
            raise ModelError(
                f"{folder}: config.json without weights beside it. Transformers keeps them in "
                "model.safetensors (or pytorch_model.bin)."
            )
        kind = read_json(folder / "config.json").get("model_type", "of no named type")
        return ModelFolder("transformers", folder, f"a Transformers model ({kind})")
    if (folder / "model.safetensors").is_file():
        raise ModelError(
            f"{folder}: weights of a class of your own, with nothing that says how to build it. "
            "Pass --model.factory MODULE:FUNCTION, whose function builds the model and loads them."
        )
    raise ModelError(
        f"{folder}: holds no model. Allowed: an open_clip folder ({OPEN_CLIP_CONFIG}), a "
        "Transformers folder (config.json and model.safetensors), a sentence-transformers folder "
        "(modules.json), or a folder that `clip-refine refine` wrote."
    )


def read_json(path: Path) -> Any:
    """A JSON file of a model's folder.

    Raises:
        ModelError: It is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: is not readable JSON ({error}). Copy the model again."
        ) from error
