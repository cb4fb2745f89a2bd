"""Tokens before they are cut, for every kind of tokenizer."""

from pathlib import Path

import open_clip
import torch

from clip_refine.models import OpenClipEncoder, load_transformers
from clip_refine.models.encoder import CountingTokenizer
from clip_refine.models.open_clip import OpenClipTokenizer
from tests.conftest import needs

TEXTS = ["a", "a photo of a dog on a beach.", "word " * 40]


def test_clips_own(tiny: OpenClipEncoder):
    assert tiny.tokenizer.context_length == 32
    assert tiny.tokenizer.token_counts(TEXTS) == [3, 11, 42]
    kept = (tiny.full_length_tokenizer(TEXTS) != 0).sum(dim=1)
    assert kept.tolist() == [3, 11, 32]


def test_an_unknown_one():
    def tokenizer(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 4)

    assert not isinstance(tokenizer, CountingTokenizer)
    assert OpenClipTokenizer(tokenizer).context_length is None
    assert OpenClipTokenizer(tokenizer).token_counts(TEXTS) is None


def test_long_texts_of_the_usual_context():
    tokenizer = OpenClipTokenizer(open_clip.get_tokenizer("ViT-L-14"))
    assert tokenizer.context_length == 77
    assert tokenizer.token_counts(["word " * 76]) == [78]


def test_transformers_own(tmp_path: Path):
    needs("transformers", "hf")
    from tests.models.tiny_transformers import write_clip

    tokenizer = load_transformers(str(write_clip(tmp_path / "clip"))).tokenizer
    texts = ["a", "a b c", "a " * 200]
    counts = tokenizer.token_counts(texts)
    assert counts
    assert counts[1] - counts[0] == 2
    limit = tokenizer.context_length
    assert limit
    assert counts[2] > limit
    assert tokenizer(texts).shape == (3, limit)


def test_open_clips_own_of_hugging_face(tmp_path: Path):
    needs("transformers", "hf")
    from tests.models.tiny_transformers import clip_tokenizer

    clip_tokenizer().save_pretrained(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=8)
    tokenizer = OpenClipTokenizer(theirs)
    assert tokenizer.context_length == 8
    counts = tokenizer.token_counts(["a", "a " * 30])
    assert counts
    assert counts[1] - counts[0] == 29
