"""Files of weights of open_clip's trainer, OpenAI and others, read without running anything."""

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_refine.errors import ModelError
from clip_refine.models.torchscript import is_torchscript, read_torchscript

_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Kept beside OpenAI's weights, and by nobody else."""
_PREFIXES = ("module.", "_orig_mod.")  # of data-parallel and compiled models


@dataclass(frozen=True)
class CheckpointFile:
    """A file of weights.

    Attributes:
        path: As it was given.
        readable: Where open_clip reads the same weights: the file itself, or a copy in its form.
        shapes: Names and shapes of the weights; empty for big_vision's .npz.
        is_openai: Whether OpenAI made it, whose models have QuickGELU.
        run_name: What open_clip's trainer called its run, "" elsewhere.
    """

    path: Path
    readable: Path
    shapes: Mapping[str, tuple[int, ...]]
    is_openai: bool = False
    run_name: str = ""


@contextmanager
def open_checkpoint(path: Path) -> Iterator[CheckpointFile]:
    """A file of weights, ready for open_clip within the block.

    Raises:
        ModelError: It is damaged, holds no weights, or holds more than weights and plain settings.
    """
    if path.suffix in (".npz", ".npy"):
        yield CheckpointFile(path, path, {})
    elif path.suffix == ".safetensors":
        yield CheckpointFile(path, path, _safetensors_shapes(path))
    elif is_torchscript(path):
        with _rewritten(path, read_torchscript(path), is_openai=True) as checkpoint:
            yield checkpoint
    else:
        with torch.serialization.safe_globals(_plain_settings()):
            stored = _read_pickle(path)
            weights, run_name = _state_dict(path, stored)
            cleaned = _cleaned(weights)
            if _as_open_clip_names(weights) == set(cleaned):
                shapes = {name: tuple(weight.shape) for name, weight in cleaned.items()}
                yield CheckpointFile(path, path, shapes, run_name=run_name)
            else:
                is_openai = any(name in weights for name in _OPENAI_NUMBERS)
                with _rewritten(path, cleaned, is_openai=is_openai) as checkpoint:
                    yield replace(checkpoint, run_name=run_name)


@contextmanager
def _rewritten(
    path: Path, weights: Mapping[str, Tensor], *, is_openai: bool
) -> Iterator[CheckpointFile]:
    """A copy as .safetensors, there within the block."""
    cleaned = {name: weight.contiguous().clone() for name, weight in _cleaned(weights).items()}
    shapes = {name: tuple(weight.shape) for name, weight in cleaned.items()}
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.safetensors"
        save_file(cleaned, copy)
        yield CheckpointFile(path, copy, shapes, is_openai)


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not re.search("Unsupported (global|class)|unrecognized function", str(error)):
            raise ModelError(f"{path}: is damaged or no file of weights.") from error
        raise ModelError(
            f"{path}: could not be loaded: it holds more than weights, and other objects are not "
            "unpickled because they can run code. Save it as .safetensors, or save its state_dict "
            "only."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: is damaged or no file of weights ({reason}).") from error


def _state_dict(path: Path, stored: Any) -> tuple[dict[str, Tensor], str]:
    """The weights in what was stored, and the run's name."""
    weights = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(w, Tensor) for w in weights.values()):
        raise ModelError(
            f"{path}: holds no weights. Give a state dict, or a training checkpoint of open_clip "
            "with one under 'state_dict'."
        )
    name = stored.get("name", "") if stored is not weights else ""
    return {str(key): w for key, w in weights.items() if isinstance(w, Tensor)}, str(name)


def _cleaned(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers, and without what is no weight."""
    cleaned = {}
    for name, weight in weights.items():
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name not in _OPENAI_NUMBERS and not name.endswith("attn_mask"):
            cleaned[name] = weight
    return cleaned


def _as_open_clip_names(weights: Mapping[str, Tensor]) -> set[str]:
    """The names as open_clip's own loader would have them."""
    prefixed = next(iter(weights)).startswith("module.")
    return {name[len("module.") :] if prefixed else name for name in weights}


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: is damaged or no .safetensors file ({error}).") from error


def _plain_settings() -> list[Any]:
    """What trainers put beside weights and what cannot run code: settings and numbers."""
    scalar = np.float64(0).__reduce__()[0]  # numpy's own rebuilding of one number
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")}
    return [
        argparse.Namespace,
        np.dtype,
        *kinds,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (_encode, "_codecs.encode"),  # how older pickles hold bytes
    ]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode(encoding)
