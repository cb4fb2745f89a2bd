"""Tokens before they are cut, for every kind of tokenizer."""

from pathlib import Path

import open_clip
import pytest
import torch

from clip_refine.models import OpenClipEncoder, load_transformers
from clip_refine.models.transformers import context_length, token_counts

TEXTS = ["a", "a photo of a dog on a beach.", "word " * 40]


def test_clips_own(tiny: OpenClipEncoder):
    assert context_length(tiny.tokenizer) == 32
    assert token_counts(tiny.tokenizer, TEXTS) == [3, 11, 42]
    kept = (tiny.full_length_tokenizer(TEXTS) != 0).sum(dim=1)
    assert kept.tolist() == [3, 11, 32]


def test_an_unknown_one():
    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 4)

    assert context_length(tokenizer) is None
    assert token_counts(tokenizer, TEXTS) is None


def test_long_texts_of_the_usual_context():
    tokenizer = open_clip.get_tokenizer("ViT-L-14")
    assert context_length(tokenizer) == 77
    assert token_counts(tokenizer, ["word " * 76]) == [78]


def test_transformers_own(tmp_path: Path):
    pytest.importorskip("transformers")
    from tests.models.tiny_transformers import write_clip

    tokenizer = load_transformers(str(write_clip(tmp_path / "clip"))).tokenizer
    texts = ["a", "a b c", "a " * 200]
    counts = token_counts(tokenizer, texts)
    assert counts
    assert counts[1] - counts[0] == 2
    limit = context_length(tokenizer)
    assert limit
    assert counts[2] > limit
    assert tokenizer(texts).shape == (3, limit)


def test_open_clips_own_of_hugging_face(tmp_path: Path):
    pytest.importorskip("transformers")
    from tests.models.tiny_transformers import clip_tokenizer

    clip_tokenizer().save_pretrained(tmp_path)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=8)
    assert context_length(tokenizer) == 8
    counts = token_counts(tokenizer, ["a", "a " * 30])
    assert counts
    assert counts[1] - counts[0] == 29
