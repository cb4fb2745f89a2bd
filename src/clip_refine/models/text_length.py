"""Cutting text to the longest caption of a batch, where that does not change the features.

A causal tower that is pooled at the end-of-text token never looks beyond that token, so the
padding behind the longest caption of a batch can be left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tokenizer = Callable[[list[str]], Tensor]
MULTIPLE = 8
_PROBES = ["a", "a photo of a dog on a beach.", "two words"]
_TOWER_PARTS = (
    "attn_mask",
    "token_embedding",
    "positional_embedding",
    "transformer",
    "ln_final",
    "text_projection",
)


@dataclass(frozen=True)
class TextCut:
    """How a text tower finds the end of a text, which is all it needs of one."""

    pool_type: str  # `argmax` (end-of-text has the highest id) or `eos`
    eos_id: int | None  # the end-of-text id for `eos`

    def end_positions(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B,) where each text's end-of-text token stands."""
        if self.pool_type == "eos":
            return (tokens == self.eos_id).int().argmax(dim=-1)
        return tokens.argmax(dim=-1)

    def cut(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, L'), L' the longest text rounded up to a multiple of 8."""
        longest = int(self.end_positions(tokens).max()) + 1
        return tokens[:, : -(-longest // MULTIPLE) * MULTIPLE]

    def encode(self, tower: Any, tokens: Tensor) -> Tensor:
        """(B, L') → (B, d) raw features, with positions and attention mask sliced to L'."""
        length = tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        hidden = tower.token_embedding(tokens).to(dtype)
        hidden = hidden + tower.positional_embedding[:length].to(dtype)
        hidden = tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length])
        rows = torch.arange(len(tokens), device=tokens.device)
        pooled = tower.ln_final(hidden)[rows, self.end_positions(tokens)]
        projection = tower.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


@dataclass(frozen=True)
class CuttingTokenizer:
    """A tokenizer whose rows end with the longest text of the call."""

    tokenizer: Tokenizer
    text_cut: TextCut

    def __call__(self, texts: list[str]) -> Tensor:
        """B texts → (B, L')."""
        return self.text_cut.cut(self.tokenizer(texts))


def detect_text_cut(model: nn.Module, tokenizer: Tokenizer) -> TextCut | None:
    """How to cut a model's text, or None where that would change its features.

    The tower's structure must be causal with end-of-text pooling and nothing appended, and the
    model must give the same features for a few texts both ways.
    """
    tower = text_tower(model)
    # a CLIP model keeps its text tower's parts itself, under names of their own for these two
    prefix = "text_" if tower is model else ""
    pool_type = getattr(tower, f"{prefix}pool_type", None)
    if pool_type not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
        return None
    if not all(hasattr(tower, part) for part in _TOWER_PARTS):
        return None
    mask = tower.attn_mask
    if mask is None or not torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)):
        return None
    text_cut = TextCut(pool_type, getattr(tower, f"{prefix}eos_id", None))
    return text_cut if _same_features(model, text_cut, tokenizer) else None


def text_tower(model: nn.Module) -> Any:
    """The module that holds the text tower's embeddings, transformer and projection."""
    return getattr(model, "text", model)


@torch.no_grad()
def _same_features(model: Any, text_cut: TextCut, tokenizer: Tokenizer) -> bool:
    tower = text_tower(model)
    tokens = tokenizer(_PROBES).to(tower.positional_embedding.device)
    full = model.encode_text(tokens, normalize=False)
    short = text_cut.encode(tower, text_cut.cut(tokens))
    # rounding may differ between kernels for different lengths; anything more is another function
    return bool((full - short).abs().max() <= 1e-5 * full.abs().max())
