"""Exported folders, loaded by the library they are for and without any of ours."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from clip_refine.errors import ModelError
from clip_refine.exporting.check import Encoders
from clip_refine.models.transformers_encoder import quiet_transformers
from clip_refine.saving.onnx_files import IMAGE_FILE, INSTALL, TEXT_FILE, full_length_tokenizer

_INSTALL_HF = "pip install 'clip-refine[hf]'"


def load_back(folder: Path, kind: str, model: Any) -> Encoders:
    """An exported model as its users load it.

    Args:
        folder: What was written.
        kind: In which format.
        model: The source, whose preprocessing feeds ONNX files: these have none of their own.

    Raises:
        ModelError: The library is not installed.
    """
    try:
        match kind:
            case "open_clip":
                return _open_clip(folder)
            case "transformers":
                return _transformers(folder)
            case "sentence-transformers":
                return _sentence_transformers(folder)
            case _:
                return _onnx(folder, model)
    except ImportError as error:
        install = INSTALL if kind == "onnx" else _INSTALL_HF
        raise ModelError(
            f"the export cannot be checked without {error.name}. Install it with {install}."
        ) from error


def _open_clip(folder: Path) -> Encoders:
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, precision="fp32")
    tokenizer = open_clip.get_tokenizer(name)
    clip: Any = model.eval()

    def images(these: list[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in these])  # type: ignore[operator]
        return clip.encode_image(pixels, normalize=False)

    return Encoders(images, lambda texts: clip.encode_text(tokenizer(texts), normalize=False))


def _transformers(folder: Path) -> Encoders:
    from transformers import AutoModel, AutoProcessor

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(folder)

    def pooled(features: Any) -> Tensor:  # Transformers 5 wraps them, Transformers 4 does not
        return features if isinstance(features, Tensor) else features.pooler_output

    def images(these: list[Image.Image]) -> Tensor:
        return pooled(model.get_image_features(**processor(images=these, return_tensors="pt")))

    def texts(these: list[str]) -> Tensor:
        tokens = processor(text=these, padding="max_length", truncation=True, return_tensors="pt")
        return pooled(model.get_text_features(**tokens))

    return Encoders(images, texts)


def _sentence_transformers(folder: Path) -> Encoders:
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        model = SentenceTransformer(str(folder), device="cpu")

    def encode(these: list[Any]) -> Tensor:
        return model.encode(these, convert_to_tensor=True, show_progress_bar=False)

    return Encoders(images=encode, texts=encode)


def _onnx(folder: Path, model: Any) -> Encoders:
    from onnxruntime import InferenceSession

    image_tower = InferenceSession(folder / IMAGE_FILE, providers=["CPUExecutionProvider"])
    text_tower = InferenceSession(folder / TEXT_FILE, providers=["CPUExecutionProvider"])
    tokenizer = full_length_tokenizer(model)

    def images(these: list[Image.Image]) -> Tensor:
        pixels = torch.stack([model.preprocess(image) for image in these])
        return torch.from_numpy(image_tower.run(None, {"pixel_values": pixels.numpy()})[0])

    def texts(these: list[str]) -> Tensor:
        return torch.from_numpy(text_tower.run(None, {"input_ids": tokenizer(these).numpy()})[0])

    return Encoders(images, texts)
