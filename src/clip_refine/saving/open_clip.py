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
    config, state = clip_to_open_clip(encoder.model.config.to_dict(), encoder.model.state_dict())
    preprocessing = preprocessing_to_open_clip(encoder.processor.image_processor.to_dict())
    ours = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    for text in _PROBES:  # the folder will name open_clip's own tokenizer
        ids = encoder.processor.tokenizer(text)["input_ids"]
        if ids != [ours.sot_token_id, *ours.encode(text), ours.eot_token_id]:
            raise ModelError("its tokenizer is not open_clip's.")
    clip = open_clip.CLIP(**config)
    clip.load_state_dict(state)
    open_clip.set_model_preprocess_cfg(clip, preprocessing)
    OpenClipEncoder(clip, None, ours, config).save(folder, metadata=header)
