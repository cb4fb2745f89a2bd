"""A model in the files that Transformers and sentence-transformers load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import save_file
from torch import Tensor

from clip_refine.errors import ModelError
from clip_refine.exchange import (
    Converted,
    clip_to_transformers,
    is_siglip,
    siglip_to_transformers,
)
from clip_refine.exchange.bpe import CLIP_VOCABULARY_SIZE, write_clip_tokenizer
from clip_refine.exchange.pixels import preprocessing_to_transformers
from clip_refine.models import OpenClipEncoder, TransformersEncoder
from clip_refine.models.sentence_folder import SentenceFolder
from clip_refine.saving.tokenizer_json import add_tokenizer_json, write_cleaning_tokenizer

WEIGHTS_FILE = "model.safetensors"


def write_transformers(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` load.

    Args:
        model: A Transformers model, or an open_clip one with a like in Transformers.
        folder: Created where missing.
        header: Texts for the safetensors header.

    Raises:
        ModelError: Transformers has no such architecture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    match model:
        case TransformersEncoder():
            plain = model.sentence_folder
            model.sentence_folder = None
            model.save(folder, metadata=header)
            model.sentence_folder = plain
        case OpenClipEncoder() if is_siglip(model.model_config):
            _write_siglip(model, folder, header)
        case OpenClipEncoder():
            _write_clip(model, folder, header)
        case _:
            raise ModelError(
                f"a {type(model).__name__} has no like in Transformers. Export it --to onnx."
            )


def write_sentence_transformers(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what `SentenceTransformer(folder)` loads; Transformers loads the same folder.

    Its features are raw, as the model's own; `encode(..., normalize_embeddings=True)` makes them
    unit ones.

    Raises:
        ModelError: Transformers has no such architecture.
    """
    write_transformers(model, folder, header)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    SentenceFolder.beside_transformers(pad_to_context=kind != "clip").write(folder)


def _write_clip(encoder: OpenClipEncoder, folder: Path, header: Mapping[str, str]) -> None:
    tokenizer = encoder.full_length_tokenizer
    standard = (
        isinstance(tokenizer, open_clip.SimpleTokenizer)
        and tokenizer.vocab_size == CLIP_VOCABULARY_SIZE
    )
    eos_id = tokenizer.eot_token_id if standard else -1  # other obstacles are named first
    converted = clip_to_transformers(encoder.model_config, _state(encoder), eos_id=eos_id)
    if not standard:
        raise ModelError("its tokenizer is not CLIP's own, which CLIPProcessor uses.")
    _write(converted, encoder, folder, header, processor="CLIP")
    write_clip_tokenizer(folder, context_length=encoder.model_config["text_cfg"]["context_length"])
    add_tokenizer_json(folder)


def _write_siglip(encoder: OpenClipEncoder, folder: Path, header: Mapping[str, str]) -> None:
    converted = siglip_to_transformers(
        encoder.model_config, _state(encoder), encoder.clip.visual.trunk
    )
    _write(converted, encoder, folder, header, processor="Siglip")
    write_cleaning_tokenizer(encoder, folder)


def _state(encoder: OpenClipEncoder) -> dict[str, Tensor]:
    state = encoder.clip.state_dict()
    return {name: tensor.detach().float().cpu() for name, tensor in state.items()}


def _write(
    converted: Converted,
    encoder: OpenClipEncoder,
    folder: Path,
    header: Mapping[str, str],
    *,
    processor: str,
) -> None:
    preprocessing = preprocessing_to_transformers(
        open_clip.get_model_preprocess_cfg(encoder.clip), processor=processor
    )
    for name, content in (("config", converted.config), ("preprocessor_config", preprocessing)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    weights = {name: tensor.contiguous().clone() for name, tensor in converted.state.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", **header})
    # safetensors lets only the owner read its files
    (folder / WEIGHTS_FILE).chmod((folder / "config.json").stat().st_mode)
