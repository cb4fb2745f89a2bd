"""A model's two towers as ONNX files, with what is needed to feed them."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip_refine.models.encoder import OPEN_CLIP, Savable, files_of
from clip_refine.models.open_clip import quiet_open_clip
from clip_refine.saving.exchange import (
    can_clean,
    preprocessing_to_open_clip,
    write_cleaning_tokenizer,
    write_clip_tokenizer,
)
from clip_refine.support.errors import ModelError, first_line

OPSET = 18  # onnxruntime 1.14 (2023) and later read it
INSTALL = "pip install 'clip-refine[onnx]'"
CONFIG_FILE = "onnx_config.json"
_PROBES = ["a photo of a dog", "two"]
_LARGEST = 1_500_000_000  # bytes of weights inside one file; the format ends at 2 GB


@dataclass(frozen=True)
class Layout:
    """What a program expects of the two towers; image first, then text."""

    files: tuple[str, str]
    inputs: tuple[str, str]
    outputs: tuple[str, str]
    ids: torch.dtype  # of token ids
    unit: bool  # whether features are divided by their norm


LAYOUTS = {
    "onnx": Layout(
        ("image.onnx", "text.onnx"),
        ("pixel_values", "input_ids"),
        ("image_features", "text_features"),
        torch.int64,
        unit=False,
    ),
    # as immich_ml reads a folder of its models' cache
    "immich": Layout(
        ("visual/model.onnx", "textual/model.onnx"),
        ("image", "text"),
        ("image_embedding", "text_embedding"),
        torch.int32,
        unit=True,
    ),
}


class _Tower(nn.Module):
    """One method of a model as a module, which is what is exported."""

    def __init__(self, model: Any, method: str, *, unit: bool) -> None:
        super().__init__()
        self.model, self.method, self.unit = model, method, unit

    def forward(self, inputs: Tensor) -> Tensor:
        features = getattr(self.model, self.method)(inputs)
        return normalize(features, dim=-1) if self.unit else features


def write_onnx(
    model: Any,
    folder: Path,
    header: Mapping[str, str],
    *,
    layout: str = "onnx",
    precision: str = "fp32",
) -> None:
    """Write two towers, `onnx_config.json` and the tokenizer's files.

    In the layout `onnx` inputs are `pixel_values` (B, 3, H, W) float32 and `input_ids` (B, L)
    int64, outputs the raw `image_features` and `text_features` (B, d); B is free. `immich` has its
    own names, ids of 32 bits and unit features.

    `fp16` keeps weights in half precision, for half the size, and computes in float32; `int8`
    computes matrix products in 8 bits, convolutions as they were.
    """
    form, files = LAYOUTS[layout], files_of(model)
    for file in form.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    height, width = image_size(model)
    pixels = torch.zeros(2, 3, height, width, device=device)
    # full length: an exported graph has no lengths that depend on the texts
    tokens = files.full_length_tokenizer(_PROBES).to(device, form.ids)
    context_length = tokens.shape[1]
    preprocessing = _preprocessing(files)
    beside = folder
    if layout == "immich":
        beside = folder / "textual"
        _write_immich_settings(model, folder, preprocessing)
    elif list(preprocessing) == ["transformers"]:  # whose own processor makes the pixels
        _write_json(folder / "preprocessor_config.json", preprocessing["transformers"])
    # immich cleans texts itself, before it asks for tokens
    tokenizer = _write_tokenizer(files, beside, context_length, cleaning=layout == "onnx")
    towers = []
    for which, example in enumerate((pixels, tokens)):
        path = folder / form.files[which]
        _write_tower(model, example, path, header, form, which)
        _convert(path, precision)
        outside = external_files(path)
        towers.append(
            {
                "file": form.files[which],
                **({"external_data": outside} if outside else {}),
                "input": form.inputs[which],
                "output": form.outputs[which],
            }
        )
    bias = getattr(model, "logit_bias", None)
    settings = {
        "opset": OPSET,
        "precision": precision,
        "image": {
            **towers[0],
            "shape": ["batch", 3, height, width],
            "preprocessing": preprocessing,
        },
        "text": {**towers[1], "shape": ["batch", context_length], **tokenizer},
        "features": "unit"
        if form.unit
        else "raw; divide by their norm before comparing by dot product",
        "logit_scale": float(model.logit_scale.detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "made_by": dict(header),
    }
    _write_json(folder / CONFIG_FILE, settings)


def record_check(folder: Path, check: Mapping[str, Any]) -> None:
    """Add to `onnx_config.json` how the features compare with the model's own."""
    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_json(folder / CONFIG_FILE, {**settings, "check": dict(check)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _preprocessing(files: Savable) -> dict[str, Any]:
    """What the model's library says of its preprocessing, and open_clip where that can do it."""
    found = files.preprocessing()
    if "transformers" in found:
        try:
            return found | {"open_clip": preprocessing_to_open_clip(found["transformers"])}
        except (ModelError, KeyError):
            pass
    return found


def _write_immich_settings(model: Any, folder: Path, preprocessing: Mapping[str, Any]) -> None:
    settings = getattr(model, "model_config", None)
    if settings is None:
        raise ModelError(
            "immich takes models of open_clip's kind. Export this one --to open_clip, and that "
            "folder --to immich."
        )
    image = preprocessing["open_clip"]
    height, width = (image["size"],) * 2 if isinstance(image["size"], int) else image["size"]
    if height != width or image["resize_mode"] not in ("shortest", "squash"):
        raise ModelError(
            f"immich cannot resize by {image['resize_mode']!r} to {height} x {width}: only by "
            "'shortest' or 'squash' to a square. Export --to onnx."
        )
    _write_json(folder / "config.json", settings)
    _write_json(folder / "visual" / "preprocess_cfg.json", image)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of the pixels that a model's own preprocessing makes."""
    height, width = model.preprocess(Image.new("RGB", (64, 64))).shape[-2:]
    return height, width


def _write_tower(
    model: nn.Module,
    example: Tensor,
    path: Path,
    header: Mapping[str, str],
    form: Layout,
    which: int,
) -> None:
    """Export the image tower, 0, or the text tower, 1."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX export needs {error.name}. Install it with {INSTALL}.") from error
    name = ("image", "text")[which]
    tower = _Tower(model, f"encode_{name}", unit=form.unit)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracers remark on what they do, not on results
            program = torch.onnx.export(
                tower.eval(),
                (example,),
                input_names=[form.inputs[which]],
                output_names=[form.outputs[which]],
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
    size = sum(p.numel() * p.element_size() for p in tower.parameters())
    program.save(path, external_data=size >= _LARGEST)


def _convert(path: Path, precision: str) -> None:
    """Replace a tower by one with smaller weights."""
    if precision == "fp32":
        return
    import onnx

    outside = external_files(path)
    if precision == "fp16":
        model = onnx.load(path)
        _halve_weights(model.graph)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        smaller = path.with_suffix(".int8")
        with quiet_open_clip():  # it advises what makes no difference here
            quantize_dynamic(
                path,
                smaller,
                # not convolutions: in 8 bits they lose most accuracy and run slower on a CPU
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=bool(outside),
            )
        model = onnx.load(smaller)
        for file in (*external_files(smaller), smaller.name):
            (smaller.parent / file).unlink()
    for file in outside:
        (path.parent / file).unlink()
    beside = {"save_as_external_data": True, "location": f"{path.name}.data"} if outside else {}
    onnx.save(model, path, **beside)


def _halve_weights(graph: Any) -> None:
    """Store weights in float16 behind a cast, which onnxruntime folds when it loads them.

    Not all in float16: onnxruntime 1.32 falls over its own fused layer norms of such graphs.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half, name = f"{tensor.name}.half", tensor.name
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, half))
            casts.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    nodes = list(graph.node)
    graph.ClearField("node")
    graph.node.extend([*casts, *nodes])


def external_files(path: Path) -> list[str]:
    """The files beside an ONNX file that hold its large tensors; they move together."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    graph = onnx.load(path, load_external_data=False).graph
    outside = filter(uses_external_data, graph.initializer)
    names = sorted({ExternalDataInfo(tensor).location for tensor in outside})
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ModelError(
                f"{path}: its weights are in {name}, which is not beside it. Copy both files, or "
                "export again."
            )
    return names


def _write_tokenizer(
    files: Any, folder: Path, context_length: int, *, cleaning: bool
) -> dict[str, Any]:
    """Put the tokenizer's files beside the towers; what `onnx_config.json` says about it."""
    tokenizer = files.full_length_tokenizer
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        added = [tokenizer.decoder[number] for number in tokenizer.all_special_ids[2:]]
        write_clip_tokenizer(folder, context_length=context_length, added=added)
        padding = "any id, behind the end" if files.padding_is_free else "id 0, behind the end"
        ids = {"start": tokenizer.sot_token_id, "end": tokenizer.eot_token_id}
        return {"tokenizer": "CLIPTokenizer, files beside", "padding": padding, **ids}
    if not hasattr(tokenizer, "save_pretrained"):
        return {"tokenizer": f"the model's own {type(tokenizer).__name__}"}
    if cleaning and files.format == OPEN_CLIP and can_clean(tokenizer):
        write_cleaning_tokenizer(files, folder)
    else:
        tokenizer.save_pretrained(str(folder))
    return {"tokenizer": "AutoTokenizer, files beside", "padding": "its own, to the full length"}
