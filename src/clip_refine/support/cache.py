"""Rows kept by fingerprint: on disk, read again instead of made again."""

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_refine.support.console import remark
from clip_refine.support.errors import OutputError, unwritable
from clip_refine.support.folder import locked

_KEY_BYTES = 16  # of a fingerprint
_SUM_BYTES = 4  # of a checksum


class RowCache:
    """Rows of one shape and type by the fingerprint of what they were made from.

    Rows are only ever added, at the end, and each is listed after it is on the disk. So a reader
    needs no lock, a writer that was killed loses what it had not listed, and what one run adds
    every later one finds. A changed image or text has another fingerprint and so a row of its own.
    Beside each row stands its checksum; one that rotted counts as missing and is made again.
    """

    def __init__(self, folder: Path, *, flag: str) -> None:
        self.folder = folder  # of `layout.json`, `rows`, `sums`, `fingerprints` and `lock`
        self.flag = flag  # the setting that chose the folder, for messages
        self._lock: ExitStack | None = None  # held
        self._forget()

    def __reduce__(self) -> Any:
        # a worker process maps the file for itself
        return partial(RowCache, self.folder, flag=self.flag), ()

    def known(self) -> dict[str, int]:
        """Fingerprint → row, of all rows that are there whole."""
        try:
            row_bytes = self._row_type().itemsize
            with (self.folder / "fingerprints").open("rb") as file:
                rows = (self.folder / "rows").stat().st_size // row_bytes
                sums = (self.folder / "sums").stat().st_size // _SUM_BYTES
                count = min(os.fstat(file.fileno()).st_size // _KEY_BYTES, rows, sums)
                if count < self._count:  # the files were cut off
                    self._forget()
                # what is new and no more: with a million rows this is asked before every batch
                file.seek(self._count * _KEY_BYTES)
                keys = file.read((count - self._count) * _KEY_BYTES)
        except (FileNotFoundError, ValueError):  # nothing yet, or nothing that can be understood
            self._forget()
            return {}
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot be read ({error.strerror}). Choose another {self.flag}."
            ) from error
        for row, at in enumerate(range(0, len(keys), _KEY_BYTES), self._count):
            self._known[keys[at : at + _KEY_BYTES].hex()] = row
        self._count = count
        return self._known

    def missing(self, names: Sequence[str]) -> list[int]:
        """Positions of the fingerprints that have no row yet, each fingerprint once."""
        known = self.known()
        first = {name: position for position, name in reversed(list(enumerate(names)))}
        return sorted(position for name, position in first.items() if name not in known)

    def sound(self, number: int) -> NDArray[Any] | None:
        """Row `number` as it lies in the file, not to be written to; None where it has rotted."""
        row = self._rows(number)[0][number]
        if zlib.crc32(row) == self._rows(number)[1][number]:
            return row
        if number not in self._rotten:
            self._rotten.add(number)
            remark(f"{self.folder}: row {number} has rotted on the disk and is not used.", "yellow")
        return None

    def check(self, names: Sequence[str]) -> None:
        """Forget the rows of these fingerprints that have rotted, so that they are missing."""
        known = self.known()
        for name in set(names) & known.keys():
            if self.sound(known[name]) is None:
                del self._known[name]

    def _rows(self, number: int) -> tuple[Any, Any]:
        """All rows and their checksums, mapped at least as far as `number`."""
        if self._mapped is None or number >= len(self._mapped[0]):
            file, kind = self.folder / "rows", self._row_type()
            sums = np.fromfile(self.folder / "sums", "<u4")
            # the last may have been cut off, or a writer has not come to its sum yet
            whole = min(file.stat().st_size // kind.itemsize, len(sums))
            self._mapped = np.memmap(file, kind, "r", shape=(whole,)), sums
            with suppress(OSError):  # others' files; disks that note no reading are many
                os.utime(file)
        return self._mapped

    def read(self, names: Sequence[str]) -> NDArray[Any]:
        """(N, ...) copies of the rows of these fingerprints, in order."""
        known = self.known()
        lacking = sum(name not in known for name in names)
        if lacking:
            raise OutputError(
                f"{self.folder}: {lacking} rows that were just computed are not there. Is "
                f"{self.flag} a folder that all processes share?"
            )
        places = [known[name] for name in names]
        return np.asarray(self._rows(max(places))[0][places])

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone: another writer waits until this one is done, then finds its rows."""
        if self._lock:  # by this one already
            yield
            return
        with ExitStack() as held:
            file = self.folder / "lock"
            try:
                wait = f"Another run is adding to {self.folder}; waiting for it."
                held.enter_context(locked(file, wait=wait))
            except OSError as error:
                raise unwritable(self.folder, error, f"another {self.flag}", begun=False) from error
            self._lock = held
            try:
                yield
            finally:
                self._lock = None

    def add(self, names: Sequence[str], rows: NDArray[Any]) -> None:
        """Append (N, ...) rows under their fingerprints; what is there already stays."""
        with self.writing():
            chosen = self.missing(names)
            keys = b"".join(bytes.fromhex(names[position]) for position in chosen)
            try:
                if not self._count:
                    layout = {"type": rows.dtype.str, "shape": rows.shape[1:]}
                    _write_behind(self.folder / "layout.json", 0, json.dumps(layout).encode())
                    self._forget()
                if np.dtype((rows.dtype, rows.shape[1:])) != self._row_type():
                    raise ValueError(f"{self.folder}: rows of {self._type}, got {rows.shape[1:]}")
                # the list last, since what it names has to be there whole
                size = self._count * rows[0].nbytes
                _write_behind(self.folder / "rows", size, rows[chosen].tobytes())
                sums = np.array([zlib.crc32(row) for row in np.ascontiguousarray(rows[chosen])])
                at = self._count * _SUM_BYTES
                _write_behind(self.folder / "sums", at, sums.astype("<u4").tobytes())
                _write_behind(self.folder / "fingerprints", self._count * _KEY_BYTES, keys)
            except OSError as error:
                raise unwritable(self.folder, error, f"another {self.flag}", begun=True) from error

    def _forget(self) -> None:
        """Begin again with what the folder holds."""
        self._type: np.dtype[Any] | None = None  # of a row, with its shape
        self._known: dict[str, int] = {}
        self._count = 0  # rows that are known
        self._mapped: tuple[Any, Any] | None = None  # rows and their checksums
        self._rotten: set[int] = set()  # rows that are not what was written

    def _row_type(self) -> np.dtype[Any]:
        """What the first writer laid down; ValueError where that is nothing that it would."""
        if self._type is None:
            layout = json.loads((self.folder / "layout.json").read_bytes())
            try:
                row_type = np.dtype((layout["type"], tuple(layout["shape"])))
            except (KeyError, TypeError) as error:
                raise ValueError("no layout") from error
            if not row_type.itemsize:
                raise ValueError("rows of nothing")
            self._type = row_type
        return self._type


# --------------------------------------------------------------------------------------------------
# All that is kept in a cache folder: how much it is, and how it goes.


@dataclass(frozen=True)
class KeptRows:
    """A folder of rows."""

    folder: Path
    rows: int
    size: int  # bytes on the disk
    unused_days: float  # since a row was added or read

    @classmethod
    def all_in(cls, folder: Path) -> "list[KeptRows]":
        """Those of teachers, features and pixels, the largest first."""
        found = []
        for layout in folder.glob("*/**/layout.json"):
            files = {path.name: path.stat() for path in layout.parent.iterdir() if path.is_file()}
            # looking reads all others; without rows nothing was ever kept
            file = files.get("rows", files["layout.json"])
            used = max(file.st_mtime, file.st_atime)
            rows = len(RowCache(layout.parent, flag="--cache").known())
            size = sum(file.st_size for file in files.values())
            found.append(cls(layout.parent, rows, size, (time.time() - used) / 86400))
        return sorted(found, key=lambda kept: -kept.size)

    def remove(self) -> bool:
        """Unless a run adds to it just now; one that reads it keeps the files that it has open."""
        with locked(self.folder / "lock") as held:
            if held:
                shutil.rmtree(self.folder, ignore_errors=True)
        return held


def _write_behind(path: Path, size: int, data: bytes) -> None:
    """Write behind the first `size` bytes; what lay there was never listed."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(size)
        file.seek(size)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
