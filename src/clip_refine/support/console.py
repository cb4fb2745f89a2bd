"""What a person sees while it runs: remarks, bars, seconds, memory."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from unicodedata import category

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

if TYPE_CHECKING:
    import torch  # seconds to import, which help and reports need not wait for


class Clock:
    """Times named parts of a run: `with clock("train"): ...`, then `clock.seconds`."""

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


_GB = 1e9


class PeakMemory:
    """Watches from its making on: of the GPU where the model is on one, else of the process.

    On Linux a process's mark is reset, so that each part is seen alone; elsewhere it is the most
    that the process ever held.
    """

    def __init__(self, device: "torch.device") -> None:
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the high-water mark
        except OSError:
            return  # no Linux, or not allowed

    @property
    def gigabytes(self) -> float:
        """The peak so far in 10⁹ bytes."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device) / _GB
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / _GB
        except OSError:
            pass
        try:
            import resource
        except ImportError:
            return 0  # Windows does not say
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB


Item = TypeVar("Item")

# which way text runs
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""Text from data without what would move a terminal's cursor, turn text or set a title.

    >>> printable("a\x1b[2Jb"), printable("line\n")
    ('a\ufffd[2Jb', 'line\n')
    """
    return "".join(
        "\ufffd" if c != "\n" and (category(c) in ("Cc", "Cs") or c in _TURNING) else c
        for c in text
    )


class PlainConsole(Console):
    """Writes no control characters but its own: names of folders and classes may hold others."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich's."""
        for segment in super().render(renderable, options):
            clean = segment.control or segment.text.isprintable()
            yield segment if clean else segment._replace(text=printable(segment.text))


console = PlainConsole(stderr=True, highlight=False)
"""Progress and remarks go to standard error, so that results can be piped."""


def say(*texts: object, end: str = "\n") -> None:
    """Print results to standard output, names of others' files as they can be shown."""
    print(*(printable(str(text)) for text in texts), end=end)


def remark(line: str, style: str | None = None) -> None:
    """Print a line as it stands, once where several processes run."""
    if not int(os.environ.get("RANK", "0")):
        console.print(printable(line), style=style, markup=False, soft_wrap=True)


class Bar:
    """A progress bar over something iterable, with a remark that can change.

    Where standard error is no terminal only the finished bar is printed; `transient` bars vanish
    when done; `visible=False` (other processes of a group) prints nothing.
    """

    def __init__(
        self, title: str, total: int | None = None, *, visible: bool = True, transient: bool = False
    ) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[remark]}", style="dim"),
            console=console,
            transient=transient,
            disable=not visible or (transient and not console.is_terminal),
        )
        self.task = self.progress.add_task(title, total=total, remark="")

    def over(self, items: Iterable[Item], *, step: int = 1) -> Iterator[Item]:
        """Yield the items, moving on by `step` after each."""
        with self.progress:
            for item in items:
                yield item
                self.progress.advance(self.task, step)

    def remark(self, text: str) -> None:
        """Show a short text behind the bar."""
        self.progress.update(self.task, remark=text)
