"""Hugging Face Transformers dual encoders: CLIP, SigLIP and whatever encodes images and texts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_refine.errors import ModelError
from clip_refine.models.sentence_folder import SentenceFolder
from clip_refine.models.transformers_text import detect_text_input


@dataclass(frozen=True)
class TransformersPreprocess:
    """One image as the model's own image processor makes it.

    Attributes:
        processor: Transformers' image processor.
    """

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → (3, H, W)."""
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


class TransformersEncoder(nn.Module):
    """A Transformers model with image and text features behind the `DualEncoder` protocol.

    Attributes:
        model: The Transformers model itself.
        processor: Its processor, which holds image processor and tokenizer.
        preprocess: Its image processor for one image.
        tokenizer: Its tokenizer; rows end with the longest text where that is exact.
        sentence_folder: What makes its folder one of sentence-transformers, None for a plain one.
    """

    def __init__(
        self, model: nn.Module, processor: Any, *, sentence_folder: SentenceFolder | None = None
    ) -> None:
        """Wrap a model.

        Args:
            model: With `get_image_features`, `get_text_features` and `logit_scale`.
            processor: With `image_processor` and `tokenizer`.
            sentence_folder: Given where the model is to be saved for sentence-transformers.

        Raises:
            ModelError: The model is no dual encoder, or its images are not of one size.
        """
        super().__init__()
        self.model: Any = model
        self.processor = processor
        self.preprocess = TransformersPreprocess(processor.image_processor)
        self.sentence_folder = sentence_folder
        self.eval()
        _check(model, self.preprocess)
        self._text_input = detect_text_input(model, processor.tokenizer, self._text_features)
        self.tokenizer = self._text_input.tokenizer
        self._check_dimensions()

    @property
    def logit_scale(self) -> Tensor:
        """0-d factor on cosines."""
        if hasattr(self.model, "logit_scale"):
            limit = getattr(self.model, "max_log_logit_scale", None)  # AIMv2's
            stored = self.model.logit_scale
            return (stored if limit is None else stored.clamp(0.0, limit)).exp().squeeze()
        return (1 / self.model.temperature).squeeze()  # ALIGN's

    @property
    def logit_bias(self) -> Tensor | None:
        """0-d offset of SigLIP-type models, None for others."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.squeeze()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw image features."""
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw text features; L is the context length, or less where cut."""
        return self._text_features(**self._text_input.arguments(tokens))

    @torch.no_grad()
    def _check_dimensions(self) -> None:
        pixels = self.preprocess(Image.new("RGB", (40, 30)))[None].to(self.model.device)
        dims = (
            self.encode_image(pixels).shape[1:],
            self.encode_text(self.tokenizer(["a"])).shape[1:],
        )
        if dims[0] != dims[1]:
            raise ModelError(
                f"{type(self.model).__name__}: image features have shape {tuple(dims[0])} and text "
                f"features {tuple(dims[1])}, so they cannot be compared. It is no dual encoder."
            )

    def _text_features(self, **arguments: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(**arguments))

    def save(self, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write a folder that Transformers' `from_pretrained` loads, in the model's own dtype.

        A model from a sentence-transformers folder is written as one.

        Args:
            folder: Created where missing.
            metadata: Texts for the safetensors header.
        """
        target = folder / self.sentence_folder.module if self.sentence_folder else folder
        target.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            self.model.save_pretrained(target)
            self.processor.save_pretrained(target)
            # where Transformers 4 looks for it
            self.processor.image_processor.save_pretrained(target)
        for path in target.glob("*.safetensors"):
            save_file(load_file(path), path, metadata={"format": "pt", **(metadata or {})})
            path.chmod((target / "config.json").stat().st_mode)
        if self.sentence_folder:
            self.sentence_folder.write(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without Transformers' own bars and remarks: what matters is said in one line by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check(model: Any, preprocess: TransformersPreprocess) -> None:
    """Whether the wrapped model does what the protocol asks for."""
    kind = type(model).__name__
    if not (hasattr(model, "logit_scale") or hasattr(model, "temperature")):
        raise ModelError(f"{kind}: has no logit_scale, which a dual encoder needs.")
    shape = tuple(preprocess(Image.new("RGB", (40, 30))).shape)
    if len(shape) != 3:
        raise ModelError(
            f"{kind}: its image processor makes {shape} of one image, where (3, H, W) is needed."
        )


def _pooled(features: Any) -> Tensor:
    """The features themselves: Transformers 5 wraps them, Transformers 4 does not."""
    return features if isinstance(features, Tensor) else features.pooler_output
