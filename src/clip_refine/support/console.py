"""What a person sees while it runs: remarks, bars, seconds, memory."""

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    if text.isprintable():
        return text
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
            if self.no_color:  # nor bold and dim, which rich keeps
                segment = segment._replace(style=None)
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = PlainConsole(stderr=True, highlight=False)
"""Progress and remarks go to standard error, so that results can be piped."""


@dataclass
class Talk:
    """How much of its progress a process tells."""

    pace: float = 30.0  # seconds between lines where standard error is no terminal
    always: bool = False  # such lines on a terminal, too


TALK = Talk()


def talk(*, quiet: bool, verbose: bool) -> None:
    """`--quiet`: nothing on standard error but errors. `--verbose`: a line a second."""
    console.quiet = quiet
    if verbose:
        TALK.pace, TALK.always = 1.0, True


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars and remarks of single runs where one verb makes many."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def say(*texts: object) -> None:
    """Print results to standard output, names of others' files as they can be shown."""
    print(*(printable(str(text)) for text in texts))


def speaks() -> bool:
    """Whether this is the process that speaks for all, where several run."""
    return int(os.environ.get("WORLD_SIZE") or 1) == 1 or not int(os.environ.get("RANK") or 0)


def remark(line: str, style: str | None = None) -> None:
    """Print a line as it stands, once where several processes run."""
    if speaks():
        console.print(printable(line), style=style, markup=False, soft_wrap=True)


class Bar:
    """A progress bar over something iterable, with a remark that can change.

    Where standard error is no terminal, as of Slurm, a line every `TALK.pace` seconds stands for
    it, and the finished bar; `transient` bars vanish when done; `visible=False` (other processes
    of a group) prints nothing.
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
            speed_estimate_period=1e6,  # of steps that take longer than rich's 30 s, too
            # of two at once the outer one, which stays on the screen, is shown
            disable=not visible or console.quiet or (transient and not console.is_terminal),
        )
        self.task = self.progress.add_task(title, total=total, remark="")
        self._lines = visible and (TALK.always or not console.is_terminal)
        self._said = time.monotonic()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, moving on after each."""
        with self.progress:
            for item in items:
                yield item
                self.advance()

    def advance(self, step: int = 1) -> None:
        """Move on, and say so where it is time to."""
        self.progress.advance(self.task, step)
        now, [task] = time.monotonic(), self.progress.tasks
        if self._lines and now - self._said >= TALK.pace and not task.finished:
            self._said = now
            left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
            of = "" if task.total is None else f" of {task.total:,.0f}"
            text = task.fields["remark"] and f", {task.fields['remark']}"
            remark(f"{task.description}: {task.completed:,.0f}{of}{left}{text}")

    def expect(self, more: int) -> None:
        """So many more than were counted, or fewer."""
        self.progress.update(self.task, total=(self.progress.tasks[0].total or 0) + more)

    def remark(self, text: str) -> None:
        """Show a short text behind the bar."""
        self.progress.update(self.task, remark=text)


def duration(seconds: float) -> str:
    """As people say it.

    >>> duration(8.2), duration(700), duration(9000)
    ('8 s', '12 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
