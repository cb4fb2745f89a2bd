"""Models in open_clip's files: its own, and Transformers' CLIP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from clip_refine.models import OpenClipEncoder, TransformersEncoder
from clip_refine.models.encoder import files_of
from clip_refine.saving.exchange import clip_to_open_clip, preprocessing_to_open_clip
from clip_refine.support.errors import ModelError

_PROBES = ["a photo of a dog on a beach.", "Two Words!", "it's 12:30 at the caf\u00e9"]


def write_open_clip(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what open_clip's `local-dir:` loads; the file names are none of Transformers'."""
    match files_of(model).format:
        case "open_clip":
            model.save(folder, metadata=header)
        case "transformers":
            _write_converted(model, folder, header)
        case _:
            raise ModelError(f"open_clip builds no {type(model).__name__}. Export it --to onnx.")


def _write_converted(encoder: TransformersEncoder, folder: Path, header: Mapping[str, str]) -> None:
    kind = encoder.model.config.model_type
    if kind != "clip":
        raise ModelError(f"open_clip builds no {kind} model that these weights would fit.")
    converted = clip_to_open_clip(encoder.model.config.to_dict(), encoder.model.state_dict())
    preprocessing = preprocessing_to_open_clip(encoder.processor.image_processor.to_dict())
    text = converted.config["text_cfg"]
    tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
    _check_tokenizer(encoder.processor.tokenizer, tokenizer)
    clip = open_clip.CLIP(**converted.config)
    clip.load_state_dict(converted.state)
    open_clip.set_model_preprocess_cfg(clip, preprocessing)
    wrapped = OpenClipEncoder(clip, None, tokenizer, converted.config)
    wrapped.save(folder, metadata=header)


def _check_tokenizer(theirs: object, ours: open_clip.SimpleTokenizer) -> None:
    """Whether open_clip's own tokenizer, which its folder then names, gives the same ids."""
    for text in _PROBES:
        ids = theirs(text)["input_ids"]  # type: ignore[operator]
        if ids != [ours.sot_token_id, *ours.encode(text), ours.eot_token_id]:
            raise ModelError("its tokenizer is not open_clip's.")
