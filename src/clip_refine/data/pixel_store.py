"""Rows of pixels in one memory-mapped file that several runs read and one at a time adds to."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from clip_refine.console import console
from clip_refine.errors import OutputError

_KEY_BYTES = 16
_SPARE = 2**28
"""Bytes of the disk that are left alone."""


class PixelStore:
    """(3, H, W) uint8 rows by the fingerprint of what they were made from.

    Rows are only ever added, at the end, and each is listed after it is on the disk. So a reader
    needs no lock, a writer that was killed loses what it had not listed, and what one run adds
    every later one finds. A changed image has another fingerprint and so a row of its own.

    Attributes:
        folder: Holds `pixels`, `keys` and `lock`; made by the first writer.
        shape: Of one row.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder = folder
        self.shape = shape
        self.row_bytes = int(np.prod(shape))
        self._mapped: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # a worker process maps the file for itself

    def known(self) -> dict[str, int]:
        """Fingerprint → row, of all rows that are there whole."""
        try:
            keys = (self.folder / "keys").read_bytes()
            rows = (self.folder / "pixels").stat().st_size // self.row_bytes
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unusable(error) from error
        count = min(len(keys) // _KEY_BYTES, rows)
        starts = range(0, count * _KEY_BYTES, _KEY_BYTES)
        return {keys[at : at + _KEY_BYTES].hex(): row for row, at in enumerate(starts)}

    def row(self, number: int) -> NDArray[np.uint8]:
        """Row `number` as it lies in the file; not to be written to."""
        if self._mapped is None or number >= len(self._mapped):
            path = self.folder / "pixels"
            count = path.stat().st_size // self.row_bytes
            self._mapped = np.memmap(path, np.uint8, "r", shape=(count, *self.shape))
        return self._mapped[number]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone: another writer waits until this one is done, then finds its rows.

        Raises:
            OutputError: The folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                console.print(
                    f"Another run is adding to {self.folder}; waiting for it.", markup=False
                )
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def check_room(self, count: int) -> int:
        """Free bytes where `count` more rows are to go.

        Raises:
            OutputError: They would not fit.
        """
        free = shutil.disk_usage(self.folder).free
        needed = count * self.row_bytes
        if needed + _SPARE > free:
            raise OutputError(
                f"{self.folder}: pixels of {count:,} images take {size_text(needed)}, but only "
                f"{size_text(free)} are free there. Make room, choose another --data.cache-folder, "
                "or leave --data.cache-images out."
            )
        return free

    def add(self, batches: Iterable[Mapping[str, NDArray[np.uint8]]]) -> None:
        """Append rows by fingerprint, each batch in one go; only inside `writing`.

        Raises:
            OutputError: They cannot be written, for example because the disk is full.
        """
        count = len(self.known())
        try:
            with (
                _appending(self.folder / "pixels", count * self.row_bytes) as pixels,
                _appending(self.folder / "keys", count * _KEY_BYTES) as keys,
            ):
                for batch in batches:
                    for levels in batch.values():
                        pixels.write(levels.tobytes())
                    _onto_disk(pixels)
                    keys.write(b"".join(bytes.fromhex(key) for key in batch))
                    _onto_disk(keys)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> OutputError:
        reason = getattr(error, "strerror", None) or str(error)
        return OutputError(
            f"{self.folder}: cannot be used ({reason}). Choose another --data.cache-folder."
        )


def size_text(count: int) -> str:
    """Bytes as people read them.

    >>> size_text(301_056_000)
    '301 MB'
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            shown = count / unit
            return f"{shown:.1f} {name}" if shown < 10 else f"{shown:,.0f} {name}"
    return f"{count / 1000:.0f} kB"


@contextmanager
def _appending(path: Path, size: int) -> Iterator[Any]:
    """A file to write to behind its first `size` bytes; what lies there was never listed."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size)
        yield file


def _onto_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
