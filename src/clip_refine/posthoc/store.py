"""A fitted peer on disk: `peer.json` says what it is, `peer.safetensors` holds its tensors.

A single peer is stored as a chain of one, so there is one format.
"""

from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_refine.errors import DataError
from clip_refine.posthoc.chain import Chain
from clip_refine.posthoc.kinds import PEERS
from clip_refine.posthoc.peer import Peer
from clip_refine.run_folder import complete_folder


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Step(_Record):
    """One peer: its name, what it was fitted with, and what its tensors must agree with."""

    kind: str
    dim: StrictInt
    fitted_on_images: StrictInt
    fitted_on_texts: StrictInt
    settings: dict[str, StrictInt | StrictFloat]


class _PeerFile(_Record):
    format: Literal[1] = 1
    clip_refine_version: str
    steps: list[_Step]


def save_peer(peer: Peer, folder: Path, *, overwrite: bool = False) -> None:
    """Write a peer into a new folder, which appears complete or not at all.

    Args:
        peer: Fitted; also a chain.
        folder: Must not exist.
        overwrite: Replace it where it does.

    Raises:
        OutputError: The folder exists, or cannot be written.
    """
    steps = _flat(peer)
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, step in enumerate(steps)
        for name, value in _attributes(step).items()
        if isinstance(value, Tensor)
    }
    record = _PeerFile(clip_refine_version=_version(), steps=[_describe(step) for step in steps])
    with complete_folder(folder, overwrite=overwrite) as partial_folder:
        save_file(tensors, partial_folder / "peer.safetensors")
        text = record.model_dump_json(indent=2) + "\n"
        (partial_folder / "peer.json").write_text(text, encoding="utf-8")


def load_peer(folder: Path) -> Peer:
    """Read what `save_peer` wrote.

    Raises:
        DataError: A file is missing or damaged, the kind is not known, or the two files do not
            belong together.
    """
    record = _read_record(folder / "peer.json")
    path = folder / "peer.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Fit the peer again.") from error
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


def _version() -> str:
    try:
        return version("clip-refine")
    except PackageNotFoundError:  # run from a folder of sources
        return "unknown"


def _flat(peer: Peer) -> list[Peer]:
    if isinstance(peer, Chain):
        return [inner for step in peer.steps for inner in _flat(step)]
    return [peer]


def _attributes(peer: Peer) -> dict[str, Any]:
    """What its class is made from: tensors and numbers."""
    return {field.name: getattr(peer, field.name) for field in fields(peer)}  # pyright: ignore


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
        return _PeerFile.model_validate_json(path.read_bytes())
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


def _rebuild(number: int, step: _Step, tensors: dict[str, Tensor]) -> Peer:
    """The peer of one step; takes its tensors out of `tensors`."""
    chosen = next((peer for peer in PEERS if peer.kind == step.kind), None)
    if chosen is None:
        raise ValueError(f"step {number}: there is no peer {step.kind!r}")
    counts = {"image_count": step.fitted_on_images, "text_count": step.fitted_on_texts}
    made_from = {field.name: field.type for field in fields(chosen)}  # pyright: ignore
    values: dict[str, Any] = {name: counts[name] for name in COUNTS if name in made_from}
    for name in made_from:
        if f"{number}.{name}" in tensors:
            values[name] = _floating(f"{number}.{name}", tensors.pop(f"{number}.{name}"))
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


def _floating(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    return tensor
