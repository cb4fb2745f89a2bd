"""What goes wrong, in few kinds.

A message says what was wrong, what was found, what is allowed and what to do next. The command
line prints it without a traceback; from Python every kind is a `ClipRefineError`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager


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


class TrainingError(ClipRefineError):
    """Training cannot go on, for example after a loss that is not finite."""

    status = 1


class Planned(ClipRefineError):  # noqa: N818, nothing went wrong
    """What was asked for is said and was all: `dry_run`."""

    status = 0


class OutputError(ClipRefineError):
    """The results cannot be written where they were asked for."""


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
