"""Files of features and of fitted transforms."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import StrictFloat, StrictInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_refine.results import Record
from clip_refine.support.errors import DataError, OutputError, foreign
from clip_refine.support.folder import (
    check_free,
    check_sums,
    complete_file,
    complete_folder,
    package_version,
    readable,
)
from clip_refine.support.limits import check_regular, read_text
from clip_refine.vectors.transforms import MAPS, PEERS, Chain, Peer, check_rows

# --------------------------------------------------------------------------------------------------
# Features of a model on disk: one file with those of images and texts, and who describes whom.
#
# A `.safetensors` file, or a `.npz` file to read, with `image_features` (N, d), `text_features`
# (M, d) and where captions are not one an image in order `text_to_image` (M,). `clip-refine
# evaluate --save-features` writes one. The names `image` and `text` are understood, too.


OTHER_NAMES = {"image": "image_features", "text": "text_features"}


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What a model makes of some images and their captions."""

    image_features: Tensor  # (N, d), floating point
    text_features: Tensor  # (M, d), floating point
    # (M,) int64, the image of each caption; None where caption i is of image i
    text_to_image: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what is no set of features."""
        for name in ("image_features", "text_features"):
            features = getattr(self, name)
            check_rows(name, features)
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
    """Read a `.safetensors` or `.npz` file of features."""
    check_sums(path)
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
    """Write a `.safetensors` file that appears complete or not at all."""
    check_features_path(path, overwrite=overwrite)
    tensors = {"image_features": features.image_features, "text_features": features.text_features}
    if features.text_to_image is not None:
        tensors["text_to_image"] = features.text_to_image.long()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key only: safetensors writes several in random order, and one input shall give one file
    noted = {**note, "sha256": _content_sum(tensors)}
    metadata = {"clip_refine": json.dumps(noted, sort_keys=True)}
    with complete_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def check_features_path(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that `write_features` would refuse, before any work is done."""
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: features are written as .safetensors. Give such a name.")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder. Give the name of a file.")
    check_free(path, overwrite=overwrite, folder=False)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".npz"):
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder.")
        raise DataError(f"{path}: not a kind of feature file. Give a .safetensors or .npz file.")
    with foreign(DataError, f"{path}: cannot be read"):
        check_regular(path)
        if path.suffix == ".npz":
            found, _ = read_npz(path)
            return {name: torch.from_numpy(array) for name, array in found.items()}
        tensors = load_file(path)
        noted = _noted(path)
        if noted.get("sha256", "") not in ("", _content_sum(tensors)):
            raise ValueError("not what was written there, by its checksum; make it again")
        return tensors


def _noted(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("clip_refine", "{}"))


def features_note(path: Path) -> dict[str, Any]:
    """What `write_features` noted of a file; nothing where there is no such note."""
    # what is wrong with it is said when it is read
    with suppress(OSError, ValueError, RecursionError, SafetensorError):
        found = _noted(path) if path.suffix == ".safetensors" and path.is_file() else {}
        return found if isinstance(found, dict) else {}
    return {}


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays of a `.npz` file, and whether they are compressed."""
    # opened here, since NumPy leaves a file open that is no archive
    with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
        entries = found.zip.infolist()
        if sum(entry.file_size for entry in entries) > _PACKED * path.stat().st_size + 2**24:
            raise ValueError("unpacks to far more than it is long; save it unpacked")
        arrays = {name: found[name] for name in found.files}
    return arrays, any(entry.compress_type for entry in entries)


_PACKED = 20
"""Times as long as a compressed file its arrays may be; of features they hardly are twice."""


def _content_sum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


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


# --------------------------------------------------------------------------------------------------
# A fitted peer on disk: `peer.json` says what it is, `peer.safetensors` holds its tensors.
#
# A single peer is stored as a chain of one, so there is one format.


class _Step(Record):
    """One peer: its name, what it was fitted with, and what its tensors must agree with."""

    kind: str
    dim: StrictInt
    fitted_on_images: StrictInt
    fitted_on_texts: StrictInt
    settings: dict[str, StrictInt | StrictFloat]


class _PeerFile(Record):
    format: Literal[1] = 1
    clip_refine_version: str
    steps: list[_Step]


def save_peer(peer: Peer, folder: Path, *, overwrite: bool = False) -> None:
    """Write a peer into a new folder, which appears complete or not at all."""
    with complete_folder(folder, overwrite=overwrite) as partial_folder:
        write_peer(peer, partial_folder)


def peer_sum(peer: Peer) -> str:
    """A checksum of all that a peer transforms by."""
    values = {
        f"{number}.{name}": torch.as_tensor(value)
        for number, step in enumerate(_flat(peer))
        for name, value in _attributes(step).items()
    }
    return f"{peer.name} {_content_sum(values)}"


def write_peer(peer: Peer, folder: Path) -> None:
    """Write a peer's two files."""
    steps = _flat(peer)
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, step in enumerate(steps)
        for name, value in _attributes(step).items()
        if isinstance(value, Tensor)
    }
    record = _PeerFile(
        clip_refine_version=package_version("clip-refine") or "unknown",
        steps=[_describe(step) for step in steps],
    )
    path, described = folder / "peer.safetensors", folder / "peer.json"
    with readable(path):
        save_file(tensors, path)
    described.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_peer(folder: Path) -> Peer:
    """Read a transform from a folder that `vectors refine`, `align` or `posthoc fit` wrote.

    Its `transform_image` and `transform_text` take (N, d) features, raw or unit, to (N, d) ones.

    Raises:
        DataError: Files that are missing, damaged or of no transform.
    """
    record = _read_record(folder / "peer.json")
    check_sums(folder)
    path = folder / "peer.safetensors"
    with foreign(DataError, f"{path}: cannot be read", " Fit the peer again."):
        check_regular(path)
        tensors = load_file(path)
    try:
        steps = [_rebuild(number, step, tensors) for number, step in enumerate(record.steps)]
        if tensors:
            raise ValueError(f"{', '.join(sorted(tensors))} not expected")
        return steps[0] if len(steps) == 1 else Chain(tuple(steps))
    except ValueError as error:
        raise DataError(
            f"{folder}: peer.json and peer.safetensors do not make a peer ({error}). "
            "Fit the peer again."
        ) from error


def _flat(peer: Peer) -> list[Peer]:
    if isinstance(peer, Chain):
        return [inner for step in peer.steps for inner in _flat(step)]
    return [peer]


def _attributes(peer: Peer) -> dict[str, Any]:
    """What its class is made from: tensors and numbers."""
    return {field.name: getattr(peer, field.name) for field in fields(peer)}


COUNTS = ("image_count", "text_count")
"""Attributes of some peers that the file gives for all of them, outside `settings`."""


def _describe(peer: Peer) -> _Step:
    images, texts = peer.fitted_on
    settings = {
        name: value
        for name, value in _attributes(peer).items()
        if not isinstance(value, Tensor) and name not in COUNTS
    }
    return _Step(
        kind=peer.kind,
        dim=peer.dim,
        fitted_on_images=images,
        fitted_on_texts=texts,
        settings=settings,
    )


def _read_record(path: Path) -> _PeerFile:
    try:
        return _PeerFile.model_validate_json(read_text(path))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). "
            "Give a folder that `clip-refine posthoc fit` wrote."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: is no description of a fitted peer ({where}: {first['msg']}). "
            "Fit the peer again."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}). Fit the peer again.") from error


def _rebuild(number: int, step: _Step, tensors: dict[str, Tensor]) -> Peer:
    """The peer of one step; takes its tensors out of `tensors`."""
    chosen = (PEERS | MAPS).get(step.kind)
    if chosen is None:
        raise ValueError(f"step {number}: there is no peer {step.kind!r}")
    counts = {"image_count": step.fitted_on_images, "text_count": step.fitted_on_texts}
    made_from = [field.name for field in fields(chosen)]
    values: dict[str, Any] = {name: counts[name] for name in COUNTS if name in made_from}
    for name in made_from:
        tensor = tensors.pop(f"{number}.{name}", None)
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{number}.{name} must be float32 or float64, got {tensor.dtype}")
        values[name] = tensor
    given = [*values, *step.settings]
    if sorted(given) != sorted(made_from):
        raise ValueError(
            f"step {number}: {step.kind} is made from {', '.join(made_from)}; "
            f"got {', '.join(given) or 'nothing'}"
        )
    values |= step.settings
    peer = chosen(**values)
    stated = (step.dim, (step.fitted_on_images, step.fitted_on_texts))
    if (peer.dim, peer.fitted_on) != stated:
        raise ValueError(
            f"step {number}: dim {step.dim}, fitted on {stated[1]}, but the tensors are of "
            f"dim {peer.dim}, fitted on {peer.fitted_on}"
        )
    return peer
