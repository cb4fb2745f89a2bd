"""The teacher's features of the training pairs, computed once, kept on disk, read by every run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_refine.data import EpochPlan, ImageCaptions, PairBatch
from clip_refine.data.images import DECODING
from clip_refine.data.loader import preprocess_fingerprint
from clip_refine.data.pairs import fingerprint
from clip_refine.models import Teacher
from clip_refine.models.embed import EmbeddedPairs, Embedder, FeatureStore, embed_pairs
from clip_refine.models.encoder import identity, quick_on_cpu
from clip_refine.models.weights import Heads
from clip_refine.train.towers import TowerPrecision, autocast


class CachedTeacher(Teacher):
    """A teacher that looks features up instead of running, following the trainer's batches."""

    runs = False

    def __init__(
        self,
        features: EmbeddedPairs,
        *,
        image_factor: float = 1.0,
        text_factor: float = 1.0,
        heads: Heads | None = None,
    ) -> None:
        """Start at no batch; `heads` are those that features from a trunk still lack."""
        self._features = features
        self.heads = heads and (heads[0].copied(), heads[1].copied())
        self._first_caption = features.first_caption
        self._factors = (image_factor, text_factor)
        self._image_rows = self._text_rows = torch.empty(0, dtype=torch.int64)

    def follow(self, batches: Iterable[PairBatch], plan: EpochPlan) -> Iterator[PairBatch]:
        """Hand the batches of an epoch on, and be ready for each of them."""
        choice = torch.tensor(plan.caption_choice)
        for batch in batches:
            self._image_rows = torch.tensor(list(batch.indices))
            first = self._first_caption[self._image_rows]
            self._text_rows = first + choice[self._image_rows]
            yield batch

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, d) raw features of the batch that was handed on last."""
        rows = self._features.image_features[self._image_rows] * self._factors[0]
        return rows.to(pixels.device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, d) raw features of the batch that was handed on last."""
        rows = self._features.text_features[self._text_rows] * self._factors[1]
        return rows.to(tokens.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: there are no weights here."""
        return {}


def kept_features(
    pairs: ImageCaptions,
    embedder: Embedder,
    precision: TowerPrecision,
    folder: Path,
    heads: Heads | None = None,
) -> EmbeddedPairs:
    """Those of all images and captions as a live teacher has them, from disk where they are there.

    A folder for each model, preprocessing and precision, which is that of training. With the
    model's `heads` they are those of the trunk below.
    """
    model: Any = embedder.model
    if heads:
        model = Teacher(model, heads).encoder
    side = embedder.reader and embedder.reader.side
    made_by = f"{model_fingerprint(model, precision)} {DECODING} {side}"
    store = FeatureStore(folder / "teacher" / fingerprint(made_by.encode()))
    silent = {**vars(embedder), "model": model, "visible": False}
    undo = quick_on_cpu(model)
    try:
        return embed_pairs(_TrainingEmbedder(**silent, precision=precision), pairs, store)
    finally:
        undo()


@dataclass(frozen=True, kw_only=True)
class _TrainingEmbedder(Embedder):
    """Encodes at the precision of training, so as a live teacher would."""

    precision: TowerPrecision

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        with autocast(self.precision.image_bf16, self.device):
            return super().encode_pixels(pixels)

    def encode_texts(self, texts: list[str]) -> Tensor:
        with autocast(self.precision.text_bf16, self.device):
            return super().encode_texts(texts)


def model_fingerprint(model: Any, precision: TowerPrecision) -> str:
    """Of weights, architecture, preprocessing, tokenizer and precision."""
    return fingerprint(
        preprocess_fingerprint(model.preprocess).encode(), *identity(model, precision.name)
    )
