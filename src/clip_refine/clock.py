"""Wall-clock seconds of the parts of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times named parts: `with clock("train"): ...`, then `clock.seconds`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        start = time.perf_counter()
        yield
        self._parts[part] = time.perf_counter() - start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part so far, and `total` since the clock was made."""
        return {**self._parts, "total": time.perf_counter() - self._start}
