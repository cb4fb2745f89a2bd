"""open_clip's models in Transformers' format, with their tokenizer."""

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from clip_refine.models import OpenClipEncoder
from clip_refine.models.encoder import files_of, save_weights
from clip_refine.models.transformers import SentenceFolder
from clip_refine.saving.exchange import (
    CLIP_VOCABULARY_SIZE,
    Converted,
    clip_to_transformers,
    is_siglip,
    preprocessing_to_transformers,
    siglip_to_transformers,
    write_clip_tokenizer,
)
from clip_refine.support.errors import ModelError

# --------------------------------------------------------------------------------------------------
# open_clip's tokenizers of other models than CLIP.


def write_cleaning_tokenizer(encoder: OpenClipEncoder, folder: Path) -> None:
    """Write a Transformers tokenizer of an open_clip model, with open_clip's cleaning inside.

    open_clip lower-cases and strips punctuation before it asks the tokenizer (`canonicalize`, as
    SigLIP was trained); here the tokenizer does so itself. ftfy and HTML entities stay outside.
    """
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    ours: Any = encoder.full_length_tokenizer
    inner: Any = getattr(ours, "tokenizer", None)
    if not hasattr(inner, "backend_tokenizer") or ours.strip_sep_token or ours.tokenizer_mode:
        raise ModelError("its tokenizer is used in a way that Transformers does not know.")
    settings = encoder.model_config["text_cfg"].get("tokenizer_kwargs") or {}
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    steps = _cleaning(settings.get("clean", "whitespace"))
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    special = {
        name: getattr(inner, name)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if getattr(inner, name) is not None
    }
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=ours.context_length,
        model_input_names=["input_ids"],  # SigLIP looks at its padding
        padding_side=inner.padding_side,
        **special,
    ).save_pretrained(folder)


def _cleaning(kind: str) -> list[Any]:
    """open_clip's cleaning functions as steps of a tokenizer."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if kind == "canonicalize":
        punctuation = "[" + re.escape(string.punctuation.replace("_", "")) + "]"
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(punctuation), "")]
    if kind in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


# --------------------------------------------------------------------------------------------------
# A model in the files that Transformers and sentence-transformers load.


def write_transformers(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` load."""
    folder.mkdir(parents=True, exist_ok=True)
    match files_of(model).format:
        case "transformers":
            plain = model.sentence_folder
            model.sentence_folder = None
            model.save(folder, metadata=header)
            model.sentence_folder = plain
        case "open_clip" if is_siglip(model.model_config):
            trunk = model.clip.visual.trunk
            converted = siglip_to_transformers(model.model_config, _state(model), trunk)
            _write(converted, model, folder, header, processor="Siglip")
            write_cleaning_tokenizer(model, folder)
        case "open_clip":
            _write_clip(model, folder, header)
        case _:
            raise ModelError(
                f"a {type(model).__name__} has no like in Transformers. Export it --to onnx."
            )


def write_sentence_transformers(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what `SentenceTransformer(folder)` and Transformers load; features are raw."""
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
    config, state = converted
    preprocessing = preprocessing_to_transformers(
        open_clip.get_model_preprocess_cfg(encoder.clip), processor=processor
    )
    for name, content in (("config", config), ("preprocessor_config", preprocessing)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    save_weights(state, folder / "model.safetensors", {"format": "pt", **header})
