"""Whether an exported model gives the same features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import basic_clean
from PIL import Image
from torch import Tensor

from clip_refine import build
from clip_refine.config import RefineConfig, load_config
from clip_refine.data import ImageCaptions, Subset
from clip_refine.errors import ClipRefineError
from clip_refine.saving.onnx_files import image_size
from clip_refine.toy import toy_val

SAMPLE = 16
"""Images and captions that are compared."""


@dataclass(frozen=True)
class Encoders:
    """An exported model as its users run it.

    Attributes:
        images: PIL images → (B, d) raw features.
        texts: Texts → (B, d) raw features.
    """

    images: Callable[[list[Image.Image]], Tensor]
    texts: Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class ExportCheck:
    """How an exported model compares with its source.

    Attributes:
        pairs: Name of the pairs that were compared.
        count: How many.
        image_difference: Largest difference in any dimension of any image's raw features, as a
            share of their mean norm, for images of the model's own size.
        text_difference: The same for captions, with characters cleaned as open_clip does.
        image_cosine: Lowest cosine for the images as they are, each side resizing by itself.
        text_cosine: Lowest cosine for the captions as they are.
        tolerance: What the differences may be.
    """

    pairs: str
    count: int
    image_difference: float
    text_difference: float
    image_cosine: float
    text_cosine: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both differences are within the tolerance; not where one is not a number."""
        differences = (self.image_difference, self.text_difference)
        return all(difference <= self.tolerance for difference in differences)

    def __str__(self) -> str:
        """The differences in half a sentence."""
        return (
            f"features differ by at most {self.image_difference:.1e} (images) and "
            f"{self.text_difference:.1e} (texts) of their norm, {self.tolerance:.0e} allowed, on "
            f"{self.count} pairs of {self.pairs}"
        )


def sample_pairs(run: Path | None) -> ImageCaptions:
    """16 held-out pairs of a run where they can be read, else of the drawn world."""
    pairs: ImageCaptions = toy_val()
    if run:
        try:
            config = load_config(RefineConfig, run / "config.yaml")
            held_out = build.build_held_out(config.data, seed=config.seed)
            first = Subset(held_out, range(min(SAMPLE, len(held_out))), held_out.name)
            for index in range(len(first)):
                first.load_image(index)
            return first
        except ClipRefineError:
            pass  # the data are elsewhere by now
    return Subset(pairs, range(SAMPLE), "drawn pairs")


@torch.no_grad()
def compare_features(
    model: Any, exported: Encoders, pairs: ImageCaptions, *, tolerance: float
) -> ExportCheck:
    """Encode the same pairs by both.

    Args:
        model: A dual encoder, the source.
        exported: The other.
        pairs: What to encode, each image with its first caption.
        tolerance: See `ExportCheck`.
    """
    originals = [pairs.load_image(index).convert("RGB") for index in range(len(pairs))]
    height, width = image_size(model)
    images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in originals]
    captions = [pairs.captions[index][0] for index in range(len(pairs))]
    cleaned = [" ".join(basic_clean(caption).split()) for caption in captions]
    source = _encoders(model)
    return ExportCheck(
        pairs=Path(pairs.name).name,
        count=len(pairs),
        image_difference=_difference(source.images(images), exported.images(images)),
        text_difference=_difference(source.texts(cleaned), exported.texts(cleaned)),
        image_cosine=_lowest_cosine(source.images(originals), exported.images(originals)),
        text_cosine=_lowest_cosine(source.texts(captions), exported.texts(captions)),
        tolerance=tolerance,
    )


def _encoders(model: Any) -> Encoders:
    device = next(model.parameters()).device

    def images(these: Sequence[Image.Image]) -> Tensor:
        return model.encode_image(torch.stack([model.preprocess(i) for i in these]).to(device))

    return Encoders(
        images=images, texts=lambda texts: model.encode_text(model.tokenizer(texts).to(device))
    )


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference of two (B, d) features over the mean norm of the first."""
    found = found.to(expected)
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.norm(dim=-1).mean())


def _lowest_cosine(expected: Tensor, found: Tensor) -> float:
    return float(torch.cosine_similarity(expected, found.to(expected), dim=-1).min())
