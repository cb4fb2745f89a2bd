"""The terminal: one console on standard error, one kind of progress bar."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar
from unicodedata import category

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

console = Console(stderr=True, highlight=False)
"""Progress and remarks go to standard error, so that results can be piped."""


def printable(text: str) -> str:
    """Text from data without what would move a terminal's cursor or change its title."""
    return "".join("\ufffd" if c != "\n" and category(c) in ("Cc", "Cs") else c for c in text)


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
        self,
        title: str,
        total: int | None = None,
        *,
        visible: bool = True,
        transient: bool = False,
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
