"""How long texts are: their tokens counted, and cut to a batch's longest where that is exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clip_refine.support.console import remark

# texts of several lengths that ways of encoding are compared on
PROBES = ["a", "a photo of a dog on a beach.", "two words"]
_MULTIPLE = 8  # matrix kernels are fastest at such lengths
_SAME = 1e-5  # of the largest feature: kernels round differently at other lengths


@runtime_checkable
class CountingTokenizer(Protocol):
    """A tokenizer that also tells how many tokens a text has before it is cut."""

    @property
    def context_length(self) -> int | None:
        """Tokens that the model reads; None where that is not known."""
        ...

    def lengths(self, tokens: Tensor) -> Tensor | None:
        """(B,) tokens of each text that features depend on; None where those are all."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text with start and end; None where they cannot be counted."""
        ...

    def are_special(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text holds one of the tokenizer's own marks, such as `<|endoftext|>`."""
        ...


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with start and end, by a tokenizer of Transformers."""
    encoded = tokenizer(list(texts), truncation=False, padding=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def hold_any(texts: Sequence[str], marks: Sequence[str]) -> list[bool]:
    """Whether each text holds one of the marks.

    >>> hold_any(["a dog", "a dog<|endoftext|> on a beach"], ["<|endoftext|>"])
    [False, True]
    """
    return [any(mark in text for mark in marks) for text in texts]


def cut_columns(tokens: Tensor, longest: int) -> Tensor:
    """(..., L) → (..., L'), L' the longest text rounded up to a multiple of 8."""
    return tokens[..., : -(-longest // _MULTIPLE) * _MULTIPLE]


def same_features(some: Tensor, others: Tensor) -> bool:
    """Whether two (B, d) features differ by no more than kernels' rounding."""
    return bool((some - others).abs().max() <= _SAME * others.abs().max())


# --------------------------------------------------------------------------------------------------
# open_clip's text towers. A causal one that is pooled at the end-of-text token never looks behind
# it, so the padding behind a batch's longest text can go. What is left goes through open_clip's own
# code, with position table and attention mask as long as the text. Whether that is the same
# function is not read off the architecture but tried.


@dataclass(frozen=True)
class TextCut:
    """Where the padding of open_clip's tokens begins."""

    padding: int  # the id behind a text's end
    kept: int  # padding that is left: 1 where it is the end-of-text token, else 0

    def lengths(self, tokens: Tensor) -> Tensor:
        """Of (B, L) tokens, with what is kept behind each."""
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        last = ((tokens != self.padding) * places).amax(dim=1)
        return (last + self.kept).clamp(1, tokens.shape[1])

    def cut(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, L')."""
        return cut_columns(tokens, int(self.lengths(tokens).max()))


class _TextFeatures(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, normalize=False)  # CoCa would, unasked


def text_tower(clip: nn.Module) -> Any:
    """The module that holds the text tower's embeddings, transformer and projection."""
    return getattr(clip, "text", clip)


def encode_cut(clip: Any, tokens: Tensor) -> Tensor:
    """(B, L') → (B, d) raw features of an open_clip model whose texts may be cut."""
    tower, length = text_tower(clip), tokens.shape[1]
    features = _TextFeatures(clip)
    if length == len(tower.positional_embedding):
        return features(tokens)
    prefix = "clip" if tower is clip else "clip.text"
    sliced = {
        f"{prefix}.positional_embedding": tower.positional_embedding[:length],
        f"{prefix}.attn_mask": tower.attn_mask[:length, :length],
    }
    return functional_call(features, sliced, (tokens,), tie_weights=False)


@torch.no_grad()
def detect_text_cut(clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> TextCut | None:
    """How to cut a model's texts, or None where that would change their features."""
    tower = text_tower(clip)
    if any(getattr(tower, name, None) is None for name in ("positional_embedding", "attn_mask")):
        return None  # it sees its padding, or is another library's
    tokens = tokenizer(PROBES).to(tower.positional_embedding.device)
    expected = _TextFeatures(clip)(tokens)
    for kept in (0, 1):
        cut = TextCut(int(tokens[0, -1]), kept)
        try:
            # each alone, at exactly its length: rounded up, some padding would be left
            found = [
                encode_cut(clip, row[None, :length])
                for row, length in zip(tokens, cut.lengths(tokens).tolist(), strict=True)
            ]
        except RuntimeError:  # the lengths of its parts do not fit: something is appended to texts
            break
        if same_features(torch.cat(found), expected):
            return cut
    remark(
        f"Texts are encoded at their full length of {tokens.shape[1]} tokens: cut to their own, "
        "this model's features would be others."
    )
    return None
