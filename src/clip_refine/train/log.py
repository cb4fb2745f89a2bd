"""One line of JSON a step."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType


class StepLog:
    """Appends records to a JSON Lines file, each on disk before the next step.

    Attributes:
        path: The file, None to write nothing (every process but the first).
        also: Receives every record, too.
    """

    def __init__(
        self, path: Path | None, also: Callable[[dict[str, float]], None] | None = None
    ) -> None:
        self.path = path
        self.also = also
        self._file = path.open("w", encoding="utf-8") if path else None

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()

    def write(self, record: Mapping[str, float]) -> None:
        """Add one line."""
        if self._file:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self.also:
            self.also(dict(record))
