"""Text as a Transformers model takes it: length, padding and attention mask found by trying."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_refine.errors import ModelError
from clip_refine.models.text_length import MULTIPLE

_PROBES = ["a", "a photo of a dog on a beach.", "two words"]
_UNLIMITED = 100_000  # tokenizers without a limit of their own say 1e30
_SAME = 1e-5  # features may differ by so much of the largest one: kernels round differently


@dataclass(frozen=True)
class Padding:
    """How to tell padding from text by the ids alone, so that one tensor is all a text needs.

    Attributes:
        token: The padding id.
        side: Where it stands.
        ends_text: Whether a text's own last id is the same one, as in CLIP.
    """

    token: int
    side: str
    ends_text: bool

    def mask(self, tokens: Tensor) -> Tensor:
        """(B, L) ids → (B, L) int64, 1 at text and 0 at padding.

        >>> Padding(9, "right", ends_text=True).mask(torch.tensor([[1, 5, 9, 9, 9]])).tolist()
        [[1, 1, 1, 0, 0]]
        """
        ids = tokens.flip(1) if self.side == "right" else tokens
        run = (ids == self.token).long().cumprod(dim=1)  # the unbroken run at the padded end
        padded = run.sum(dim=1, keepdim=True) - int(self.ends_text)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.side == "right":
            return (positions < tokens.shape[1] - padded).long()
        return (positions >= padded).long()


@dataclass(frozen=True)
class TransformersTokenizer:
    """Texts → (B, L') ids, padded as the model was trained.

    Attributes:
        tokenizer: Transformers' own.
        length: The context length L.
        padding: How padding is told from text.
        cut: Whether L' is that of the longest text, rounded up to a multiple of 8, or always L.
    """

    tokenizer: Any
    length: int
    padding: Padding | None
    cut: bool = False

    def __call__(self, texts: list[str]) -> Tensor:
        """B texts → (B, L') int64 ids, L' at most L."""
        encoded = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        tokens: Tensor = encoded["input_ids"]
        if not self.cut:
            return tokens
        longest = int(encoded["attention_mask"].sum(dim=1).max())
        return tokens[:, : -(-longest // MULTIPLE) * MULTIPLE]


@dataclass(frozen=True)
class TextInput:
    """What the text tower gets.

    Attributes:
        tokenizer: Texts → ids.
        masked: Whether it needs the attention mask: not where padding stands behind all it sees,
            nor where the model was trained to look at padding (SigLIP).
    """

    tokenizer: TransformersTokenizer
    masked: bool

    def arguments(self, tokens: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of `get_text_features`."""
        if not self.masked or self.tokenizer.padding is None:
            return {"input_ids": tokens}
        return {"input_ids": tokens, "attention_mask": self.tokenizer.padding.mask(tokens)}


@torch.no_grad()
def detect_text_input(model: Any, tokenizer: Any, features: Any) -> TextInput:
    """Find length, mask and cut that give the features which the full input gives.

    The full input is what Transformers' users pass: texts padded to the context length, with the
    attention mask where the tokenizer counts it among the model's inputs.

    Args:
        model: A Transformers dual encoder in evaluation mode.
        tokenizer: Its tokenizer.
        features: Keyword arguments of `get_text_features` → (B, d) raw features.

    Raises:
        ModelError: The mask that the model needs cannot be told from the ids.
    """
    full = TransformersTokenizer(tokenizer, _context_length(model, tokenizer), None)
    tokens = full(_PROBES).to(model.device)
    _check_vocabulary(model, tokenizer, largest=int(tokens.max()))
    if "attention_mask" not in tokenizer.model_input_names:
        return _cut_where_exact(TextInput(full, masked=False), tokens, features)
    mask = _true_mask(full, tokens)
    expected = features(input_ids=tokens, attention_mask=mask)
    needs_mask = not _same(features(input_ids=tokens), expected)
    padding = _detect_padding(tokenizer, tokens, mask)
    if needs_mask and padding is None:
        raise ModelError(
            f"{type(tokenizer).__name__}: padding cannot be told from text by its ids, and the "
            "text tower needs to know. Wrap the model in a DualEncoder of your own."
        )
    known = TransformersTokenizer(tokenizer, full.length, padding)
    return _cut_where_exact(TextInput(known, masked=needs_mask), tokens, features)


def _cut_where_exact(text_input: TextInput, tokens: Tensor, features: Any) -> TextInput:
    whole = text_input.tokenizer
    if whole.tokenizer.padding_side != "right":
        return text_input
    cutting = TransformersTokenizer(whole.tokenizer, whole.length, whole.padding, cut=True)
    expected = features(**text_input.arguments(tokens))
    for rows in (slice(None), slice(0, 1)):  # together and the shortest alone, cut the most
        short = cutting(_PROBES[rows]).to(tokens.device)
        if not _same(features(**text_input.arguments(short)), expected[rows]):
            return text_input
    return TextInput(cutting, text_input.masked)


def _true_mask(full: TransformersTokenizer, tokens: Tensor) -> Tensor:
    encoded = full.tokenizer(
        _PROBES,
        padding="max_length",
        truncation=True,
        max_length=full.length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return encoded["attention_mask"].to(tokens.device)


def _detect_padding(tokenizer: Any, tokens: Tensor, mask: Tensor) -> Padding | None:
    for ends_text in (False, True):
        padding = Padding(tokenizer.pad_token_id, tokenizer.padding_side, ends_text)
        if torch.equal(padding.mask(tokens), mask):
            return padding
    return None


def _check_vocabulary(model: Any, tokenizer: Any, *, largest: int) -> None:
    """Whether tokenizer and tower belong together: an empty one is made where files are missing."""
    expected = getattr(getattr(model.config, "text_config", model.config), "vocab_size", None)
    known = len(tokenizer)
    if expected and (largest >= expected or known < expected // 2):
        raise ModelError(
            f"{type(model).__name__}: its tokenizer knows {known} tokens, its text tower "
            f"{expected}. Are the tokenizer's files, such as tokenizer.json, beside config.json?"
        )


def _context_length(model: Any, tokenizer: Any) -> int:
    """The shorter of what the tokenizer and what the tower's positions allow."""
    text_config = getattr(model.config, "text_config", model.config)
    lengths = [
        getattr(text_config, "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    known = [length for length in lengths if length and length < _UNLIMITED]
    if not known:
        raise ModelError(
            f"{type(model).__name__}: neither its config nor its tokenizer says how long a text "
            "may be. Set model_max_length in tokenizer_config.json."
        )
    return min(known)


def _same(some: Tensor, others: Tensor) -> bool:
    return bool((some - others).abs().max() <= _SAME * others.abs().max())
