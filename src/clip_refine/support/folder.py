"""Where results go: a folder that appears complete or not at all."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from clip_refine.support.errors import OutputError

# files that tell a folder of this program's results from anything else a user keeps
OURS = (
    "scores.json",
    "comparison.json",
    "peer.json",
    "vectors.json",
    "open_clip_config.json",
    "provenance.json",
)


def check_free(path: Path, *, overwrite: bool, folder: bool = True) -> None:
    """Refuse an output path that exists, unless it holds our results and may be replaced."""
    blocking = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    if blocking:
        raise OutputError(f"{path}: {blocking} is a file, not a folder. Choose another --out.")
    if not path.exists():
        return
    if path.is_dir() != folder and overwrite:
        kind = "folder" if path.is_dir() else "file"
        raise OutputError(f"{path}: is a {kind} already. Choose another --out.")
    if not overwrite:
        raise OutputError(
            f"{path}: exists already. Pass --overwrite to replace it, or another --out."
        )
    if folder and any(path.iterdir()) and not any((path / name).is_file() for name in OURS):
        raise OutputError(
            f"{path}: holds no results of an earlier run, so --overwrite leaves it alone. Choose "
            "another --out."
        )
    if path.resolve() == Path.cwd() or path.resolve() in Path.cwd().parents:
        raise OutputError(f"{path}: is the folder you are in. Choose another --out.")


@contextmanager
def complete_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error.

    Until then it is a hidden neighbour of `path`; after an error it is removed, and what stood at
    `path` before is still there.
    """
    check_free(path, overwrite=overwrite)
    path = path.resolve()
    partial = path.parent / f".{path.name}.partial"
    with _alone(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
            partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror}). Choose another."
            ) from error
        try:
            yield partial
            previous = path.parent / f".{path.name}.previous"
            _remove(previous)
            if path.exists():
                path.rename(previous)
            partial.rename(path)
            _remove(previous)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One writer at a time, since a second one would clear what the first has written so far."""
    file = path.parent / f".{path.name}.lock"
    lock = FileLock(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"{path}: another run is writing it. Choose another --out.") from error
    except (OSError, NotImplementedError):
        yield  # a file system without locks; what else is wrong with it shows when it is written to
        return
    try:
        yield
    finally:
        lock.release()
        file.unlink(missing_ok=True)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A file to write to that becomes `path` when the block ends without an error."""
    partial = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # the second from who writes tensors
        reason = error.strerror if isinstance(error, OSError) else None
        raise OutputError(
            f"{path}: cannot be written ({reason or error}). Choose another."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with complete_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# What a run ran on, for `environment.json`.


_PACKAGES = (
    "clip-refine",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "accelerate",
    "numpy",
)


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, machine, device, command and the git commit of the working folder if any."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "device": device,
        "command": sys.argv,
        "git_commit": _git_commit(),
    }


def write_environment(path: Path, device: str) -> None:
    """Write `environment.json`."""
    text = json.dumps(describe_environment(device), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def package_version(package: str) -> str | None:
    """As it is installed; None where it is not, as when this program runs from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
