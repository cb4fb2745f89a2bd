"""Where results go: folders and files that appear complete or not at all, and stay what they are.

One mechanism for all: written beside under a hidden name, on the disk before it is renamed, under
a lock; what processes that died have left is recognised and cleared with a word.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clip_refine.support.console import remark
from clip_refine.support.errors import DataError, OutputError, first_line, unwritable
from clip_refine.support.limits import is_regular, read_text
from clip_refine.support.process import is_alive, process_tag

# files that tell a folder of this program's results from anything else a user keeps
OURS = (
    "scores.json",
    "comparison.json",
    "peer.json",
    "vectors.json",
    "open_clip_config.json",
    "provenance.json",
)

# --------------------------------------------------------------------------------------------------
# One at a time.


@contextmanager
def locked(file: Path, *, wait: str | None = None) -> Iterator[bool]:
    """Hold a lock while in the block; yields whether it is held, which without `wait` it may not.

    The kernel drops the lock of a process that dies. The file is removed while the lock is held,
    and whoever then gets the lock of a removed file begins again with the one that is there: so no
    two hold it at once. With `wait`, which is said after a second, the file stays. An OSError where
    the file system has no locks.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)  # again, where who held it removed all
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _take(descriptor, wait):
                yield False
                return
            try:
                there = os.path.samestat(os.fstat(descriptor), os.stat(file))
            except FileNotFoundError:
                there = False
            if there:
                try:
                    yield True
                finally:
                    if wait is None:
                        file.unlink(missing_ok=True)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # worker processes have it open, too
                return
        finally:
            os.close(descriptor)


_SILENT_SECONDS = 1.0


def _take(descriptor: int, wait: str | None) -> bool:
    """Try, or wait for the lock of an open file."""
    since = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if wait is None:
                return False
        if time.monotonic() - since > _SILENT_SECONDS:
            remark(wait)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return True
        time.sleep(0.002)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One writer of a path at a time, since a second would clear what the first has written."""
    with ExitStack() as holding:
        try:
            held = holding.enter_context(locked(_hidden(path, "lock")))
        except OSError:  # a file system without locks; what else is wrong shows at writing
            held = True
        if not held:
            raise OutputError(f"{path}: another run is writing it. Choose another --out.")
        yield


def _hidden(path: Path, what: str) -> Path:
    return path.parent / f".{path.name}.{what}"


# --------------------------------------------------------------------------------------------------
# Folders.


def check_free(path: Path, *, overwrite: bool, folder: bool = True) -> None:
    """Refuse an output path that exists, unless it holds our results and may be replaced."""
    blocking = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    if blocking:
        raise OutputError(f"{path}: {blocking} is a file, not a folder. Choose another --out.")
    if not path.exists():
        return
    if path.is_dir() != folder:
        kind = "folder" if path.is_dir() else "file"
        raise OutputError(f"{path}: is a {kind} already. Choose another --out.")
    if folder and any(path.iterdir()) and not any((path / name).is_file() for name in OURS):
        raise OutputError(
            f"{path}: exists already and holds no results of an earlier run, so --overwrite leaves "
            "it alone. Choose another --out."
        )
    if not overwrite:
        raise OutputError(
            f"{path}: exists already. Pass --overwrite to replace it, or another --out."
        )
    if path.resolve() == Path.cwd() or path.resolve() in Path.cwd().parents:
        raise OutputError(f"{path}: is the folder you are in. Choose another --out.")


WORK = "state"
"""Folder within a run's for what it goes on from; see `train/state.py`."""
SUMS = "SHA256SUMS"
FINISHED = ".finished"
"""List within a folder in the making of those of its files that are finished already."""


@contextmanager
def complete_folder(
    path: Path, *, overwrite: bool, go_on: bool = False, sums: Mapping[Path, str] | None = None
) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends without an error.

    Until then it is a hidden neighbour of `path`, and what stood at `path` before is still there.
    After an error it is removed, unless it holds a state that a run can go on from or a finished
    model: these are never removed. With `go_on` the one that was left is used again. `sums` are
    those of files in it that whoever wrote them knows when the block ends.
    """
    path = path.resolve()
    with alone(path):
        _finish_renames(path)
        check_free(path, overwrite=overwrite)
        partial = hidden_work(path)
        try:
            if not go_on:
                _put_aside(partial, path)
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error, begun=False) from error
        try:
            with writing(path):
                yield partial
                seal(partial, sums)
                partial.rename(_hidden(path, "complete"))
                _finish_renames(path, own=True)
        finally:
            if _holds_work(partial):
                remark(f"What was finished is kept in {partial}; --resume auto goes on.", "yellow")
            elif (partial / FINISHED).is_file():
                remark(f"What was finished is kept in {partial}; the same command goes on.")
            else:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what the disk refuses within the block that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, begun=True) from error


def hidden_work(path: Path) -> Path:
    """Where a folder is written before it becomes `path`."""
    return _hidden(path.resolve(), "partial")


def recover(path: Path) -> None:
    """Finish what a run that was killed at its very end has left, unless it still runs."""
    path = path.resolve()
    if _hidden(path, "complete").exists() or _hidden(path, "previous").exists():
        with suppress(OutputError), alone(path):
            _finish_renames(path)


def _finish_renames(path: Path, *, own: bool = False) -> None:
    """Put a complete folder in the place of what stood there; also of a run that was killed in it.

    Complete is what has that name, so a kill between any two of these lines loses nothing.
    """
    complete, previous = _hidden(path, "complete"), _hidden(path, "previous")
    if complete.exists():
        if path.exists():
            _remove(previous)
            path.rename(previous)
        complete.rename(path)
    elif previous.exists() and not path.exists():
        previous.rename(path)
    if previous.exists():
        (_remove if own else clear_left)(previous)
    with suppress(OSError):
        sync(path.parent)


def _holds_work(partial: Path) -> bool:
    """Whether a run was so far in it that nobody wants to lose it."""
    return any((partial / WORK).glob("step-*")) or (partial / "model" / SUMS).is_file()


def _put_aside(partial: Path, path: Path) -> None:
    """Clear what a run that died has left, or move it to where it is seen."""
    if not partial.exists():
        return
    if not _holds_work(partial):
        clear_left(partial)
        return
    numbers = (f"-{number}" if number > 1 else "" for number in range(1, 10**6))
    aside = next(
        at for n in numbers if not (at := path.parent / f"{path.name}-unfinished{n}").exists()
    )
    partial.rename(aside)
    finished = (aside / "model" / SUMS).is_file()
    found = f"its finished model is {aside}/model" if finished else "its training had begun"
    more = f"; --resume {aside} goes on with it" if any((aside / WORK).glob("step-*")) else ""
    remark(f"An earlier run to {path} did not end: {found}{more}.", "yellow")


def set_aside(path: Path) -> None:
    """Make room at `path` without losing what is there, until `drop_aside`."""
    aside = _hidden(path.resolve(), "aside")  # not what `recover` would remove
    if not path.exists():
        return
    if aside.exists():  # of one that was not completed: what is older is complete
        _remove(path)
    else:
        path.rename(aside)


def drop_aside(path: Path) -> None:
    """Remove what `set_aside` kept."""
    aside = _hidden(path.resolve(), "aside")
    if aside.exists():
        _remove(aside)


def default_cache() -> Path:
    """Where this user's programs keep what they can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "clip-refine"


def check_room(folder: Path, needed: int, what: str, advice: str) -> int:
    """Free bytes of the disk that a folder is or will be on, enough for `needed` and some spare."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed + SPARE > free:
        raise OutputError(
            f"{folder}: {what} take {size_text(needed)}, but only {size_text(free)} are free "
            f"there. {advice}"
        )
    return free


SPARE = 2**28  # bytes of the disk that are left alone


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Files.


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A file to write to that becomes `path` when the block ends without an error."""
    partial, begun = _hidden(path, f"{process_tag()}.partial"), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, f".{path.name}.")
        with readable(partial):
            begun = True
            yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # the second from who writes tensors
        raise unwritable(path, error, begun=begun) from error
    finally:
        with suppress(OSError):  # of a name too long, or below a file, there is none
            partial.unlink()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Give a file that is written within the block the mode of any new file here.

    safetensors lets only the owner read its own.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def clear_left(path: Path) -> None:
    """Remove what a process that died has left, with a word."""
    _remove(path)
    remark(f"Cleared {path}, which a run that was killed had left.")


def clear_leftovers(folder: Path, beginning: str) -> None:
    """Remove temporary files of processes that died."""
    for file in folder.iterdir():  # a name may hold what a pattern would take for its own
        tag = file.name.removeprefix(beginning).removesuffix(".partial")
        if file.name == f"{beginning}{tag}.partial" and tag.count("-") > 1 and not is_alive(tag):
            clear_left(file)


def write_file(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    with complete_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# What is written stays what it is: checksums of tensors, as `sha256sum --check` reads them.


_TENSORS = (".safetensors", ".onnx", ".data", ".npy", ".arrow")


def seal(folder: Path, sums: Mapping[Path, str] | None = None) -> None:
    """Write checksums beside all files of tensors, `sums` if known, and everything to the disk."""
    known = sums or {}
    for inner in (folder, *(path for path in sorted(folder.rglob("*")) if path.is_dir())):
        files = sorted(path for path in inner.iterdir() if path.is_file())
        tensors = [p for p in files if p.suffix in _TENSORS and p.name.isprintable()]
        if tensors and not (inner / SUMS).is_file():
            lines = [f"{known.get(path) or file_sum(path)}  {path.name}\n" for path in tensors]
            (inner / SUMS).write_text("".join(lines), encoding="utf-8")
            files.append(inner / SUMS)
        for path in files:
            sync(path)
        sync(inner)


def sum_beside(file: Path) -> Path:
    """Where the checksum of a file is that does not lie in a folder of ours."""
    return file.with_name(f"{file.name}.sha256")


def check_sums(path: Path) -> None:
    """Compare the tensors of a folder, or one file, with the checksums beside, if there are any."""
    within = path.is_dir()
    sums = path / SUMS if within else sum_beside(path)
    if not os.path.isfile(sums):  # nor a pipe; whatever else is wrong shows when it is read
        return
    try:
        lines = [line.partition("  ") for line in read_text(sums).split("\n") if line]
        if not within:  # where a user may keep sums of another form
            lines = [line for line in lines if re.fullmatch("[0-9a-f]{64}", line[0])]
    except (OSError, ValueError) as error:
        raise DataError(f"{sums}: cannot be read ({first_line(error)}).") from error
    # by name, so that no list has one file read many times
    for name, expected in {name: expected for expected, _, name in lines}.items():
        file = path / name if within else path  # which may have another name by now
        if within and (not name or Path(name).name != name):
            continue
        try:
            found = file_sum(file) if is_regular(file) else ""
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read ({first_line(error)}).") from error
        if found != expected:
            raise DataError(
                f"{file}: is not what was written there, by its checksum in {sums.name}. Copy or "
                f"make it again; if you changed it on purpose, remove {sums}."
            )


def file_sum(file: Path) -> str:
    """The SHA-256 of what is in a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk keep what was written to a file, or which files a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # which some file systems do not sync
            raise
    finally:
        os.close(descriptor)


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
