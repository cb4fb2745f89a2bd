"""Models to folders, in the format of each library, with a card and where they come from."""

from clip_refine.saving.exchange import write_sentence_transformers, write_transformers
from clip_refine.saving.folder import (
    base_model,
    read_provenance,
    refinement,
    save_model,
    saved_size,
    write_card,
    write_open_clip,
)
from clip_refine.saving.onnx import write_onnx

__all__ = [
    "base_model",
    "read_provenance",
    "refinement",
    "save_model",
    "saved_size",
    "write_card",
    "write_onnx",
    "write_open_clip",
    "write_sentence_transformers",
    "write_transformers",
]
