"""What goes wrong, in few kinds.

A message says what was wrong, what was found, what is allowed and what to do next. The command
line prints it without a traceback; from Python every kind is a `ClipRefineError`.
"""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class ClipRefineError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ClipRefineError):
    """A setting is unknown, out of range, or does not go with another."""


class DataError(ClipRefineError):
    """Images or captions are missing, unreadable or too few."""


class ModelError(ClipRefineError):
    """A model, tag, tokenizer or checkpoint cannot be found or does not fit."""


class TrainingError(ClipRefineError):
    """Training cannot go on, for example after a loss that is not finite."""


class OutputError(ClipRefineError):
    """The results cannot be written where they were asked for."""
