"""Tab-separated values, where some programs quote fields and others mean quotes as they stand."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

_LONGEST = 100
"""Lines that one quoted field may go on over."""


def read_tab_separated(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    r"""(number of the last line, fields) of every row; a blank line has no fields.

    A field is quoted where it begins and ends with a double quote and holds others only in twos;
    every other double quote is part of the text. A quoted field goes on over lines that have too
    few fields to be rows of their own.

    >>> list(read_tab_separated(['image\ttext', 'a.png\t"Stop" signs', 'b.png\t"so ""be"" it"']))
    [(1, ['image', 'text']), (2, ['a.png', '"Stop" signs']), (3, ['b.png', 'so "be" it'])]
    """
    rest = iter(lines)
    ahead: deque[str] = deque()
    width: int | None = None
    number = 0
    while (line := ahead.popleft() if ahead else next(rest, None)) is not None:
        number += 1
        width = line.count("\t") if width is None else width
        last = line.rpartition("\t")[2].rstrip("\r\n")
        if last.startswith('"') and not _is_quoted(last):
            ahead.extend(islice(rest, _LONGEST - len(ahead)))
            for _ in range(_continued(line, ahead, width)):
                line += ahead.popleft()
                number += 1
        line = line.rstrip("\r\n")
        yield number, [_unquoted(field) for field in line.split("\t")] if line.strip() else []


def _continued(line: str, following: Iterable[str], width: int) -> int:
    """Over how many further lines the last field goes on; 0 where its quote is just a quote."""
    for count, text in enumerate(following, start=1):
        if text.count("\t") >= width:
            return 0
        line += text
        if _is_quoted(line.rstrip("\r\n").rpartition("\t")[2]):
            return count
    return 0


def _is_quoted(field: str) -> bool:
    """Whether a field is a quoted one, complete."""
    if len(field) < 2 or not (field.startswith('"') and field.endswith('"')):
        return False
    return '"' not in field[1:-1].replace('""', "")


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if _is_quoted(field) else field
