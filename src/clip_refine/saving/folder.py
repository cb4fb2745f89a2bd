"""A model's folder: weights, their header, the card."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from safetensors.torch import save_file

from clip_refine.console import console
from clip_refine.errors import ModelError
from clip_refine.models import TransformersEncoder
from clip_refine.models.folders import PROVENANCE
from clip_refine.provenance import Provenance
from clip_refine.report import model_card as card
from clip_refine.results import RunScores
from clip_refine.saving.facts import CARD
from clip_refine.saving.open_clip_files import write_open_clip

_FILES_OF_FORMATS = {  # the main one of a folder that several libraries load comes first
    "modules.json": card.SENTENCE_TRANSFORMERS,
    "config.json": card.TRANSFORMERS,
    "open_clip_config.json": card.OPEN_CLIP,
    "onnx_config.json": card.ONNX,
}


def save_model(model: Any, folder: Path, provenance: Provenance) -> None:
    """Write a model in its own format, with a card; in open_clip's as well where it converts.

    Args:
        model: A dual encoder and module; one without `save` is written as bare weights.
        folder: Created where missing.
        provenance: For the weights' header and the card.
    """
    header = provenance.header()
    if hasattr(model, "save"):
        model.save(folder, metadata=header)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
            for name, tensor in model.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors", metadata=header)
    if isinstance(model, TransformersEncoder):
        try:
            write_open_clip(model, folder, header)
        except ModelError as error:
            console.print(f"Not saved in open_clip's format, too: {escape(str(error))}")
    write_card(folder, provenance)


def write_card(folder: Path, provenance: Provenance, scores: RunScores | None = None) -> None:
    """Write the model card for whatever formats the folder holds, and its facts as JSON.

    Args:
        folder: A saved model's.
        provenance: Where the model comes from.
        scores: Of the refinement, for the table before → after.
    """
    formats = [name for file, name in _FILES_OF_FORMATS.items() if (folder / file).is_file()]
    text = card.model_card(provenance, formats or [card.WEIGHTS], scores)
    (folder / CARD).write_text(text, encoding="utf-8")
    facts = provenance.model_dump_json(indent=2) + "\n"
    (folder / PROVENANCE).write_text(facts, encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """What was written beside a saved model; None where there is nothing of this version."""
    try:
        return Provenance.model_validate_json((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
