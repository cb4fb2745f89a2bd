"""Tokenizers in the one-file form, which libraries outside Python read, too."""

import re
import string
from pathlib import Path
from typing import Any

from clip_refine.errors import ModelError
from clip_refine.models import OpenClipEncoder


def add_tokenizer_json(folder: Path) -> None:
    """Write tokenizer.json from a CLIP tokenizer's other files, where Transformers is installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_cleaning_tokenizer(encoder: OpenClipEncoder, folder: Path) -> None:
    """Write a Transformers tokenizer of an open_clip model, with open_clip's cleaning inside.

    open_clip lower-cases and strips punctuation before it asks the tokenizer (`canonicalize`, as
    SigLIP was trained); here the tokenizer does so itself. ftfy and HTML entities stay outside.

    Raises:
        ModelError: The tokenizer is none of Transformers', or is used in another way.
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
