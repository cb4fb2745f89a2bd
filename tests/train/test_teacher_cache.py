"""Cached teacher features: those of a live teacher, kept by content, never stale."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_refine.data import (
    CaptionedImages,
    EpochPlan,
    ImageCaptions,
    Subset,
    pair_batches,
    read_table,
)
from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.models.embed import EmbeddedPairs, Embedder
from clip_refine.toy import ToyPairs
from clip_refine.train import TowerPrecision
from clip_refine.train.teacher_cache import CachedTeacher, kept_features, model_fingerprint

FP32 = TowerPrecision.from_name("fp32")


class Counting:
    """Counts what is encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: OpenClipEncoder) -> None:
        self.images = self.texts = 0
        encode_image, encode_text = model.encode_image, model.encode_text

        def image(pixels: torch.Tensor) -> torch.Tensor:
            self.images += len(pixels)
            return encode_image(pixels)

        def text(tokens: torch.Tensor) -> torch.Tensor:
            self.texts += len(tokens)
            return encode_text(tokens)

        monkeypatch.setattr(model, "encode_image", image)
        monkeypatch.setattr(model, "encode_text", text)

    def take(self) -> tuple[int, int]:
        seen, self.images, self.texts = (self.images, self.texts), 0, 0
        return seen


def cache(
    model: OpenClipEncoder, folder: Path, precision: TowerPrecision = FP32
) -> Callable[[ImageCaptions], EmbeddedPairs]:
    embedder = Embedder(model, torch.device("cpu"), 50)
    return lambda pairs: kept_features(pairs, embedder, precision, folder)


def test_every_batch_gets_what_a_live_teacher_gives(
    tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path
):
    part = Subset(pairs, [5, 3, 60, 17, 8, 41], "part")
    found = cache(tiny, tmp_path)(pairs).part(part.indices)
    cached = CachedTeacher(found, image_factor=0.5, text_factor=2.0)
    live = Teacher(tiny)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):  # epochs, so that other captions are drawn
        plan = EpochPlan.draw(part, generator=generator)
        batches = pair_batches(
            part, plan, batch_size=3, preprocess=tiny.preprocess, tokenizer=tiny.tokenizer
        )
        for batch in cached.follow(batches, plan):
            image, text = cached.encode_image(batch.pixels), cached.encode_text(batch.tokens)
            torch.testing.assert_close(image, live.encode_image(batch.pixels) / 2)
            torch.testing.assert_close(text, live.encode_text(batch.tokens) * 2)


def test_a_changed_image_invalidates_only_itself(
    tiny: OpenClipEncoder, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = read_table(table)
    kept = cache(tiny, tmp_path / "cache")
    counting = Counting(monkeypatch, tiny)
    first = kept(source)
    unique = len({text for texts in source.captions for text in texts})
    assert counting.take() == (64, unique)
    again = kept(source)
    assert counting.take() == (0, 0)
    assert torch.equal(first.image_features, again.image_features)

    Image.new("RGB", (48, 48), "red").save(source.places[7])
    captions = [*source.captions]
    captions[9] = ("something new", *captions[9][1:])
    changed = kept(CaptionedImages(source.name, source.kind, source.places, captions))
    assert counting.take() == (1, 1)
    differing = (changed.image_features != first.image_features).any(dim=1).nonzero().flatten()
    assert differing.tolist() == [7]
    differing = (changed.text_features != first.text_features).any(dim=1).nonzero().flatten()
    assert differing.tolist() == [27]  # image 9's first of three captions each


def test_drawn_images_and_reordered_ones_are_found(
    tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept = cache(tiny, tmp_path)
    first = kept(pairs)
    counting = Counting(monkeypatch, tiny)
    order = list(reversed(range(64)))
    found = kept(Subset(pairs, order, "reversed"))
    assert counting.take() == (0, 0)
    assert torch.equal(found.image_features, first.image_features[order])
    assert torch.equal(
        found.text_features[found.first_caption], first.text_features[first.first_caption[order]]
    )


def test_another_model_preprocessing_or_precision_has_a_cache_of_its_own(tiny: OpenClipEncoder):
    base = model_fingerprint(tiny, FP32)
    assert model_fingerprint(copy.deepcopy(tiny), FP32) == base
    assert model_fingerprint(tiny, TowerPrecision.from_name("bf16")) != base
    other = copy.deepcopy(tiny)
    other.preprocess = lambda image: 2 * tiny.preprocess(image)
    brighter = model_fingerprint(other, FP32)
    other.preprocess = lambda image: 3 * tiny.preprocess(image)
    assert len({base, brighter, model_fingerprint(other, FP32)}) == 3
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.clip.visual.proj[0, 0] += 1e-3
    assert model_fingerprint(other, FP32) != base


def test_a_damaged_file_is_made_again(tiny: OpenClipEncoder, pairs: ToyPairs, tmp_path: Path):
    kept = cache(tiny, tmp_path)
    first = kept(pairs)
    [file] = tmp_path.rglob("images/rows")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(kept(pairs).image_features, first.image_features)
