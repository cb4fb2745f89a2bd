"""What goes wrong, in few kinds.

A message says what was wrong, what was found, what is allowed and what to do next. The command
line prints it without a traceback; from Python every kind is a `ClipRefineError`.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the file's name, which our messages begin with
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out. Of a CPU's PyTorch raises a plain `RuntimeError`."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "ried to allocate" in str(error))
    )


class ClipRefineError(Exception):
    """Base of every error that this package raises on purpose."""

    status = 2  # of the command line's exit: usage and input


_FLAG = re.compile(r"(`[^`]*`)|(?<![\w-])--([a-z]+(?:[.-][a-z]+)*)(?!\w)")


def in_python(message: str) -> str:
    """With settings called as in Python, but for commands and other programs' flags.

    >>> in_python("data.val is missing. Give --data.val-split, or `clip-refine evaluate --suite X`")
    'data.val is missing. Give data.val_split, or `clip-refine evaluate --suite X`'
    """
    return _FLAG.sub(lambda found: found[1] or found[2].replace("-", "_"), message)


class ConfigError(ClipRefineError):
    """A setting is unknown, out of range, or does not go with another."""


class DataError(ClipRefineError):
    """Images or captions are missing, unreadable or too few."""


class ModelError(ClipRefineError):
    """A model, tag, tokenizer or checkpoint cannot be found or does not fit."""


class FailedError(ClipRefineError):
    """What was asked for is right, and failed: a full disk, a process that was killed, memory."""

    status = 1


class EndedError(FailedError):
    """Another process of a run of several has failed, so that this one ends."""

    def __init__(
        self, said: str = "another process of this run has ended: see what that one says."
    ) -> None:
        super().__init__(said)


class TrainingError(FailedError):
    """Training cannot go on, for example after a loss that is not finite."""


class Planned(ClipRefineError):  # noqa: N818, nothing went wrong
    """What was asked for is said and was all: `dry_run`."""

    status = 0


class OutputError(ClipRefineError):
    """The place where results are asked for is none: not to be written to, or not free."""


_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # whatever the place


def unwritable(path: Path, error: Exception, choose: str = "another", *, begun: bool) -> Exception:
    """What to raise: a place where nothing could be begun is a wrong one; later it is a failure."""
    if begun or (isinstance(error, OSError) and error.errno in _BROKEN):
        return FailedError(
            f"{path}: cannot be written ({first_line(error)}). Make room, or choose {choose}."
        )
    return OutputError(f"{path}: cannot be written ({first_line(error)}). Choose {choose}.")


@contextmanager
def foreign(kind: type[ClipRefineError], before: str, after: str = "") -> Iterator[None]:
    """Around another library's parser: whatever a file makes it raise becomes one of our errors.

    Parsers of damaged and hostile files trip in more ways than a list of exceptions can hold.
    `before`, the file and what is wrong, stands in front of the reason; `after` says what to do.
    """
    try:
        yield
    except (ClipRefineError, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{before} ({first_line(error):.300}).{after}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of parsers in Rust
            raise
        raise kind(f"{before} ({first_line(error):.300}).{after}") from error
