"""A model's two towers as ONNX files, with what is needed to feed them."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from clip_refine.models.encoder import Savable, files_of
from clip_refine.saving.exchange import CLIP_VOCABULARY_SIZE, write_clip_tokenizer
from clip_refine.support.errors import ModelError, first_line

OPSET = 18  # onnxruntime 1.14 (2023) and later read it
INSTALL = "pip install 'clip-refine[onnx]'"
CONFIG_FILE = "onnx_config.json"
IMAGE_FILE, TEXT_FILE = "image.onnx", "text.onnx"
_PROBES = ["a photo of a dog", "two"]
_LARGEST = 1_500_000_000  # bytes of weights inside one file; the format ends at 2 GB


class _Tower(nn.Module):
    """One method of a model as a module, which is what is exported."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor) -> Tensor:
        is_image = self.name == "image"
        return self.model.encode_image(inputs) if is_image else self.model.encode_text(inputs)


def write_onnx(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write `image.onnx`, `text.onnx`, `onnx_config.json` and the tokenizer's files.

    Inputs are `pixel_values` (B, 3, H, W) float32 and `input_ids` (B, L) int64, outputs the raw
    `image_features` and `text_features` (B, d); B is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    height, width = image_size(model)
    pixels = torch.zeros(2, 3, height, width, device=device)
    files = files_of(model)
    # full length: an exported graph has no lengths that depend on the texts
    tokens = files.full_length_tokenizer(_PROBES).to(device)
    _write_tower(model, pixels, folder / IMAGE_FILE, header, "image")
    _write_tower(model, tokens, folder / TEXT_FILE, header, "text")
    context_length = tokens.shape[1]
    tokenizer = _write_tokenizer(files, folder, context_length)
    bias = getattr(model, "logit_bias", None)
    settings = {
        "opset": OPSET,
        "image": {
            "file": IMAGE_FILE,
            "input": "pixel_values",
            "output": "image_features",
            "shape": ["batch", 3, height, width],
            "preprocessing": files.preprocessing(),
        },
        "text": {
            "file": TEXT_FILE,
            "input": "input_ids",
            "output": "text_features",
            "shape": ["batch", context_length],
            **tokenizer,
        },
        "features": "raw; divide by their norm before comparing by dot product",
        "logit_scale": float(model.logit_scale.detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "made_by": dict(header),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of the pixels that a model's own preprocessing makes."""
    height, width = model.preprocess(Image.new("RGB", (64, 64))).shape[-2:]
    return height, width


def _write_tower(
    model: nn.Module, example: Tensor, path: Path, header: Mapping[str, str], name: str
) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX export needs {error.name}. Install it with {INSTALL}.") from error
    tower = _Tower(model, name)
    in_one_file = sum(p.numel() * p.element_size() for p in tower.parameters()) < _LARGEST
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracers remark on what they do, not on results
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                input_names=["pixel_values" if name == "image" else "input_ids"],
                output_names=[f"{name}_features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ModelError(
            f"the {name} tower cannot be exported to ONNX: {first_line(error)}"
        ) from error
    if program is None:
        raise ModelError(f"the {name} tower cannot be exported to ONNX.")
    program.model.metadata_props.update(header)
    program.save(path, external_data=not in_one_file)


def _write_tokenizer(files: Savable, folder: Path, context_length: int) -> dict[str, Any]:
    """Put the tokenizer's files beside the towers; what `onnx_config.json` says about it."""
    tokenizer = files.full_length_tokenizer
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        if tokenizer.vocab_size != CLIP_VOCABULARY_SIZE:
            return {"tokenizer": "open_clip's SimpleTokenizer with additional tokens"}
        write_clip_tokenizer(folder, context_length=context_length)
        padding = "any id, behind the end" if files.padding_is_free else "id 0, behind the end"
        ids = {"start": tokenizer.sot_token_id, "end": tokenizer.eot_token_id}
        return {"tokenizer": "CLIPTokenizer, files beside", "padding": padding, **ids}
    if not hasattr(tokenizer, "save_pretrained"):
        return {"tokenizer": f"the model's own {type(tokenizer).__name__}"}
    tokenizer.save_pretrained(str(folder))
    return {"tokenizer": "AutoTokenizer, files beside", "padding": "its own, to the full length"}
