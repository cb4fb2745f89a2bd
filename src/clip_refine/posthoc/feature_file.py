"""Features of a model on disk: one file with those of images and texts, and who describes whom.

A `.safetensors` file, or a `.npz` file to read, with `image_features` (N, d), `text_features`
(M, d) and where captions are not one an image in order `text_to_image` (M,). `clip-refine evaluate
--features` writes one. The names `image` and `text` are understood, too.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_refine.errors import DataError, OutputError
from clip_refine.run_folder import check_free

OTHER_NAMES = {"image": "image_features", "text": "text_features"}


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What a model makes of some images and their captions.

    Attributes:
        image_features: (N, d), floating point.
        text_features: (M, d), floating point.
        text_to_image: (M,) int64, the image of each caption; None where caption i is of image i.
    """

    image_features: Tensor
    text_features: Tensor
    text_to_image: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what is no set of features.

        Raises:
            ValueError: On wrong shapes or types, or a number that is not finite.
        """
        for name in ("image_features", "text_features"):
            features = getattr(self, name)
            if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
                raise ValueError(
                    f"{name} must be (rows, dim) of floating point, both at least 1; "
                    f"got {tuple(features.shape)} of {features.dtype}"
                )
            if not features.isfinite().all():
                row = int((~features.isfinite().all(dim=1)).nonzero()[0, 0])
                raise ValueError(f"{name}: row {row} is not finite (NaN or infinity)")
        image_dim, text_dim = self.image_features.shape[1], self.text_features.shape[1]
        if image_dim != text_dim:
            raise ValueError(
                f"image_features and text_features must have one dimension, "
                f"got {image_dim} and {text_dim}"
            )
        if self.text_to_image is not None:
            _check_owners(self.text_to_image, len(self.image_features), len(self.text_features))


def read_features(path: Path) -> FeatureSet:
    """Read a `.safetensors` or `.npz` file of features.

    Raises:
        DataError: The file is missing or damaged, or its arrays are not those named above.
    """
    found = _read_tensors(path)
    tensors = {OTHER_NAMES.get(name, name): tensor for name, tensor in found.items()}
    known = {"image_features", "text_features", "text_to_image"}
    if not {"image_features", "text_features"} <= set(tensors) <= known or len(tensors) < len(
        found
    ):
        raise DataError(
            f"{path}: expected image_features, text_features and perhaps text_to_image, "
            f"got {', '.join(sorted(found)) or 'nothing'}. Rename or remove what is in the file."
        )
    try:
        return FeatureSet(**tensors)
    except ValueError as error:
        raise DataError(f"{path}: {error}. Write the features again.") from error


def write_features(
    path: Path, features: FeatureSet, *, note: Mapping[str, str | int], overwrite: bool = False
) -> None:
    """Write a `.safetensors` file that appears complete or not at all.

    Args:
        path: Where to; must not exist.
        features: Written as they are, contiguous and from the CPU.
        note: What they are, kept as JSON in the file's metadata under `clip_refine`.
        overwrite: Replace `path` where it exists.

    Raises:
        OutputError: `path` exists, has another ending, or cannot be written.
    """
    check_features_path(path, overwrite=overwrite)
    tensors = {"image_features": features.image_features, "text_features": features.text_features}
    if features.text_to_image is not None:
        tensors["text_to_image"] = features.text_to_image.long()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key only: safetensors writes several in random order, and one input shall give one file
    metadata = {"clip_refine": json.dumps(dict(note), sort_keys=True)}
    partial = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written ({error}). Choose another.") from error
    finally:
        partial.unlink(missing_ok=True)


def check_features_path(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that `write_features` would refuse, before any work is done.

    Raises:
        OutputError: `path` exists, or does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: features are written as .safetensors. Give such a name.")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder. Give the name of a file.")
    check_free(path, overwrite=overwrite, folder=False)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, SafetensorError, zipfile.BadZipFile, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    raise DataError(f"{path}: not a kind of feature file. Give a .safetensors or .npz file.")


def _check_owners(text_to_image: Tensor, image_count: int, text_count: int) -> None:
    if text_to_image.shape != (text_count,) or text_to_image.dtype not in (
        torch.int64,
        torch.int32,
    ):
        raise ValueError(
            f"text_to_image must be ({text_count},) whole numbers, one a text; "
            f"got {tuple(text_to_image.shape)} of {text_to_image.dtype}"
        )
    if text_to_image.min() < 0 or text_to_image.max() >= image_count:
        raise ValueError(
            f"text_to_image must be from 0 to {image_count - 1}, "
            f"got {int(text_to_image.min())} to {int(text_to_image.max())}"
        )
