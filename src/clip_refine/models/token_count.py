"""How many tokens a text has before it is cut to the context length."""

from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clip_refine.models.text_length import CuttingTokenizer
from clip_refine.models.transformers_text import TransformersTokenizer


def context_length(tokenizer: Any) -> int | None:
    """Tokens that the model reads; None where the tokenizer is none of those known here."""
    tokenizer = _whole(tokenizer)
    if isinstance(tokenizer, TransformersTokenizer):
        return tokenizer.length
    if isinstance(tokenizer, SimpleTokenizer | HFTokenizer):
        return tokenizer.context_length
    return None


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int] | None:
    """Tokens of each text with start and end; None where the tokenizer does not tell.

    >>> import open_clip
    >>> token_counts(open_clip.get_tokenizer("ViT-B-32"), ["a red circle"])
    [5]
    """
    tokenizer = _whole(tokenizer)
    if isinstance(tokenizer, SimpleTokenizer):
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    if isinstance(tokenizer, HFTokenizer):
        texts = [tokenizer.clean_fn(text) for text in texts]
    elif not isinstance(tokenizer, TransformersTokenizer):
        return None
    encoded = tokenizer.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def _whole(tokenizer: Any) -> Any:
    return tokenizer.tokenizer if isinstance(tokenizer, CuttingTokenizer) else tokenizer
