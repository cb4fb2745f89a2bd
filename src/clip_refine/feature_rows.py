"""Rows of features on disk, each beside the fingerprint of what it was made from.

A folder holds many small files, so that an interrupted run loses little, several processes can
add to it at the same time, and each file is there whole or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_refine.errors import OutputError


class FeatureRows:
    """A folder of features.

    Attributes:
        folder: Made when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def missing(self, names: Sequence[str]) -> list[int]:
        """Positions of the fingerprints that have no row yet, each fingerprint once."""
        known = self._places()
        first = {name: position for position, name in reversed(list(enumerate(names)))}
        return sorted(position for name, position in first.items() if name not in known)

    def read(self, names: Sequence[str]) -> Tensor:
        """(N, d) float32, a row a fingerprint.

        Raises:
            OutputError: A row is missing: the folder is not the same for all processes.
        """
        known = self._places()
        lacking = sum(name not in known for name in names)
        if lacking:
            raise OutputError(
                f"{self.folder}: {lacking} rows that were just computed are not there. Is --cache "
                "a folder that all processes share?"
            )
        loaded: dict[Path, Tensor] = {}
        rows = []
        for name in names:
            path, row = known[name]
            if path not in loaded:
                loaded[path] = _features(path)
            rows.append(loaded[path][row])
        return torch.stack(rows)

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """Keep rows under their fingerprints.

        Raises:
            OutputError: The folder cannot be written.
        """
        listed = [list(bytes.fromhex(name)) for name in names]
        fingerprints = torch.tensor(listed, dtype=torch.uint8)
        tensors = {"features": rows.contiguous(), "fingerprints": fingerprints}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as partial:
                temporary = Path(partial.name)
            save_file(tensors, temporary)
            temporary.replace(temporary.with_suffix(".safetensors"))
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot be written ({error.strerror}). Choose another --cache."
            ) from error

    def _places(self) -> dict[str, tuple[Path, int]]:
        """Fingerprint → the file and row; damaged files count as not there."""
        found: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as stored:
                    listed = stored.get_tensor("fingerprints").numpy()
                    rows = stored.get_slice("features").get_shape()[0]
            except (OSError, SafetensorError):
                continue
            if rows == len(listed):
                found |= {bytes(row).hex(): (path, place) for place, row in enumerate(listed)}
        return found


def _features(path: Path) -> Tensor:
    with safe_open(path, "pt") as stored:
        return stored.get_tensor("features")
