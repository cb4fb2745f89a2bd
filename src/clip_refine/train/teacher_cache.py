"""The teacher's features of the training pairs, computed once, kept on disk, read by every run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_refine.data import EpochPlan, ImageCaptions, PairBatch, PixelReader, Subset, image_batches
from clip_refine.data.images import DECODING
from clip_refine.data.pairs import fingerprint, image_fingerprint
from clip_refine.data.pixels import preprocess_fingerprint
from clip_refine.models import Teacher
from clip_refine.models.encoder import identity
from clip_refine.support.cache import FeatureRows
from clip_refine.train.precision import TowerPrecision, autocast


@dataclass(frozen=True)
class TeacherFeatures:
    """Raw features of pairs as the untouched model gives them, on the CPU in float32."""

    image_features: Tensor  # (N, d), one row an image
    text_features: Tensor  # (M, d), one row a caption, image by image
    first_caption: Tensor  # (N,) int64, the row of each image's first caption

    def part(self, indices: Sequence[int]) -> "TeacherFeatures":
        """Those of some images, as a `Subset` with these indices counts them."""
        return TeacherFeatures(
            self.image_features[list(indices)],
            self.text_features,
            self.first_caption[list(indices)],
        )


class CachedTeacher(Teacher):
    """A teacher that looks its features up instead of running.

    It follows the batches that go to the trainer, so that it knows which pairs are asked for.
    """

    def __init__(
        self, features: TeacherFeatures, *, image_factor: float = 1.0, text_factor: float = 1.0
    ) -> None:
        """Start at no batch."""
        self._features = features
        self._factors = (image_factor, text_factor)
        self._image_rows = self._text_rows = torch.empty(0, dtype=torch.int64)

    def follow(self, batches: Iterable[PairBatch], plan: EpochPlan) -> Iterator[PairBatch]:
        """Hand the batches of an epoch on, and be ready for each of them."""
        choice = torch.tensor(plan.caption_choice)
        for batch in batches:
            self._image_rows = torch.tensor(list(batch.indices))
            first = self._features.first_caption[self._image_rows]
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


@dataclass(frozen=True)
class TeacherCache:
    """Features on disk, a folder for each model, preprocessing and precision.

    Every row stands beside the fingerprint of the image or caption that it was made from, so that
    a changed or new one is computed and all others are read.
    """

    folder: Path  # where; made when needed
    model: Any  # the untouched dual encoder, in evaluation mode on `device`
    precision: TowerPrecision  # what training runs at, so what a live teacher would run at
    device: torch.device  # where to compute
    batch_size: int  # images or captions at a time
    workers: int = 0  # processes that decode images
    # how images become pixels, where not by the model's preprocessing alone
    reader: PixelReader | None = None

    @torch.no_grad()
    def features(self, pairs: ImageCaptions) -> TeacherFeatures:
        """Features of all images and all captions, from disk where they are there."""
        side = self.reader and self.reader.side
        made_by = f"{model_fingerprint(self.model, self.precision)} {DECODING} {side}"
        folder = self.folder / "teacher" / fingerprint(made_by.encode())
        texts = [text for captions in pairs.captions for text in captions]
        counts = torch.tensor([len(captions) for captions in pairs.captions])
        return TeacherFeatures(
            _kept(
                FeatureRows(folder / "images"),
                [image_fingerprint(pairs, index) for index in range(len(pairs))],
                lambda missing: self._encode_images(Subset(pairs, missing, pairs.name)),
            ),
            _kept(
                FeatureRows(folder / "captions"),
                [fingerprint(text.encode()) for text in texts],
                lambda missing: self._encode_texts([texts[index] for index in missing]),
            ),
            counts.cumsum(0) - counts,
        )

    def _encode_images(self, pairs: ImageCaptions) -> Tensor:
        batches = image_batches(
            pairs,
            batch_size=self.batch_size,
            preprocess=self.reader or self.model.preprocess,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        rows = []
        for pixels in batches:
            with autocast(self.precision.image_bf16, self.device):
                rows.append(self.model.encode_image(pixels.to(self.device)).float().cpu())
        return torch.cat(rows)

    def _encode_texts(self, texts: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.model.tokenizer(texts[start : start + self.batch_size])
            with autocast(self.precision.text_bf16, self.device):
                rows.append(self.model.encode_text(tokens.to(self.device)).float().cpu())
        return torch.cat(rows)


def model_fingerprint(model: Any, precision: TowerPrecision) -> str:
    """Of weights, architecture, preprocessing, tokenizer and precision."""
    return fingerprint(
        preprocess_fingerprint(model.preprocess).encode(), *identity(model, precision.name)
    )


def _kept(
    rows: FeatureRows, names: Sequence[str], compute: Callable[[list[int]], Tensor]
) -> Tensor:
    """(N, d) rows by fingerprint; what is not on disk is computed and added to it."""
    if missing := rows.missing(names):
        rows.add([names[index] for index in missing], compute(missing))
    return rows.read(names)
