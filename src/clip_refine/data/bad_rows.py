"""What happens to bad rows: the one place that decides, for every kind of source."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_refine.support.console import remark
from clip_refine.support.errors import DataError

LISTED = 10
"""Bad rows that a message shows."""
ENOUGH = 200
"""Rows of a stream after which a share of bad ones means something."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        where: File and row.
        problem: What is wrong and what to do.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class BadRowPolicy:
    """What to do about bad rows.

    Attributes:
        skip: Go on without them instead of stopping.
        limit: Share of bad rows above which to stop all the same, 0-1.
    """

    skip: bool = False
    limit: float = 0.05


class BadRows:
    """The bad rows of one source.

    Attributes:
        found: All of them.
        total: Rows seen, good ones too.
    """

    def __init__(self, source: str, policy: BadRowPolicy) -> None:
        self.source = source
        self.policy = policy
        self.found: list[BadRow] = []
        self.total = 0

    def add(self, where: str, problem: str) -> None:
        """Put a row on the list."""
        self.found.append(BadRow(where, problem))

    def settle(self, *, say: bool = True) -> None:
        """All rows were seen: stop, or go on without the bad ones."""
        if not self.found:
            return
        if not self.policy.skip:
            raise DataError(f"{self._listed()}\n{self.source}: {self._counted()}. {self._advice()}")
        if self.share > self.policy.limit:
            raise DataError(f"{self._listed()}\n{self._too_many()}")
        if say:
            remark(
                f"{self.source}: {self._counted()} and skipped, the first: {self.found[0]}",
                "yellow",
            )

    def settle_so_far(self) -> None:
        """A stream goes on: stop at the first bad row, or when they are too many."""
        if not self.found:
            return
        if not self.policy.skip:
            raise DataError(
                f"{self._listed()}\n{self.source}: a bad row in a stream. Mend it, or pass "
                "--data.skip-bad to go on without such rows."
            )
        if self.total >= ENOUGH and self.share > self.policy.limit:
            raise DataError(f"{self._listed()}\n{self._too_many()}")

    @property
    def share(self) -> float:
        """Of the rows seen, 0-1."""
        return len(self.found) / max(1, self.total)

    def _listed(self) -> str:
        more = len(self.found) - LISTED
        lines = [str(row) for row in self.found[:LISTED]]
        return "\n".join(lines + [f"... and {more:,} more bad rows."] * (more > 0))

    def _counted(self) -> str:
        return f"{len(self.found):,} of {self.total:,} rows are bad ({self.share:.1%})"

    def _advice(self) -> str:
        if self.share <= self.policy.limit:
            return "Mend them, or pass --data.skip-bad to go on without them."
        if self.share == 1 and all(" not found" in row.problem for row in self.found):
            return "Where the images lie elsewhere, name their folder with --data.image-folder."
        return (
            "Mend them: --data.skip-bad goes on without bad rows only up to "
            f"{self.policy.limit:.1%} of all (--data.max-bad)."
        )

    def _too_many(self) -> str:
        return (
            f"{self.source}: {self._counted()}, more than the {self.policy.limit:.1%} that "
            "--data.skip-bad lets pass. Look at them, or raise --data.max-bad."
        )


def write_skipped(skipped: Sequence[BadRow], path: Path) -> None:
    """One JSON object a line: `where` and `problem`. Writes nothing where nothing was skipped."""
    if skipped:
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in skipped]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def skipped_rows(sources: Iterable[Any]) -> list[BadRow]:
    """What was skipped in these sources, each row once."""
    rows = [row for source in sources for row in source.skipped]
    return list(dict.fromkeys(rows))
