"""Preprocessing: open_clip's `preprocess_cfg` and Transformers' `preprocessor_config.json`."""

from collections.abc import Mapping
from typing import Any

from clip_refine.errors import ModelError

_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def preprocessing_to_transformers(
    preprocess_config: Mapping[str, Any], *, processor: str
) -> dict[str, Any]:
    """The settings of an image processor that does what open_clip's inference transform does.

    Args:
        preprocess_config: open_clip's, complete: `size`, `mean`, `std`, `interpolation`,
            `resize_mode`.
        processor: `CLIP` or `Siglip`.

    Raises:
        ModelError: Transformers' image processor cannot do that.
    """
    size, mode = preprocess_config["size"], preprocess_config["resize_mode"]
    height, width = (size, size) if isinstance(size, int) else size
    whole = {"height": height, "width": width}
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise ModelError(
            f"Transformers' {processor}ImageProcessor cannot resize by {mode!r} to "
            f"{height} x {width}. Export --to onnx, or use open_clip's format."
        )
    crops = {"do_center_crop": True, "crop_size": whole} if mode == "shortest" else {}
    return {
        "image_processor_type": f"{processor}ImageProcessor",
        "processor_class": f"{processor}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if mode == "shortest" else whole,
        "resample": _RESAMPLE[preprocess_config["interpolation"]],
        "do_center_crop": False,
        **crops,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_config["mean"]),
        "image_std": list(preprocess_config["std"]),
    }


def preprocessing_to_open_clip(image_processor: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` for an image processor's `to_dict()`.

    Raises:
        ModelError: open_clip's transform cannot do that.
    """
    size = dict(image_processor["size"])
    if "shortest_edge" in size:
        edge, crop = size["shortest_edge"], image_processor.get("crop_size") or {}
        fits = image_processor.get("do_center_crop") and set(crop.values()) == {edge}
        mode, side = "shortest", edge
    else:
        fits = not image_processor.get("do_center_crop")
        mode, side = "squash", [size["height"], size["width"]]
        side = side[0] if side[0] == side[1] else side
    names = {number: name for name, number in _RESAMPLE.items()}
    interpolation = names.get(int(image_processor["resample"]))
    steps = ("do_resize", "do_rescale", "do_normalize")
    if not fits or interpolation is None or not all(image_processor.get(step) for step in steps):
        raise ModelError(
            "open_clip's transform cannot do what this image processor does: it resizes, crops the "
            "same size from the centre or squashes, and normalises."
        )
    return {
        "size": side,
        "mean": list(image_processor["image_mean"]),
        "std": list(image_processor["image_std"]),
        "interpolation": interpolation,
        "resize_mode": mode,
    }
