"""Where results go: a folder that appears complete or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clip_refine.errors import OutputError


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse an output path that exists, unless it may be replaced.

    Raises:
        OutputError: The path exists, or its parent cannot hold it.
    """
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path}: exists already. Pass --overwrite to replace it, or another --out."
        )
    blocking = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    if blocking:
        raise OutputError(f"{path}: {blocking} is a file, not a folder. Choose another --out.")


@contextmanager
def complete_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error.

    Until then it is a hidden neighbour of `path`; after an error it is removed, and what stood at
    `path` before is still there.

    Raises:
        OutputError: `path` exists and `overwrite` is off, or it cannot be written.
    """
    check_free(path, overwrite=overwrite)
    partial = path.parent / f".{path.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}). Choose another."
        ) from error
    try:
        yield partial
        _replace(path, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(path: Path, complete: Path) -> None:
    if not path.exists():
        complete.rename(path)
        return
    previous = path.parent / f".{path.name}.previous"
    _remove(previous)
    path.rename(previous)
    complete.rename(path)
    _remove(previous)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
