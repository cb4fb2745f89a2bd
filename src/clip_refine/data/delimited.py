"""Lines with marks between their values → fields, where a mistake costs one line."""

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

Fields = Iterator[tuple[int, list[str] | str]]
"""(line number, fields) of every row, the header first; as a text, what is wrong with a row."""


# --------------------------------------------------------------------------------------------------
# Values with commas or semicolons in between, where fields that hold such a mark, a quote or a line
# break stand in double quotes.


QUOTING = ",;"
"""Marks between columns that fields may hold in double quotes."""
_LONGEST = 100
"""Lines that one quoted field may go on over."""


def read_quoted(lines: Iterable[str], delimiter: str) -> Fields:
    """(number of the last line, fields) of every row; a blank line has no fields.

    A mistake costs one line: reading goes on behind it.

    >>> list(read_quoted(['image,text', 'a.png,"never closed', 'b.png,one'], ","))[1:]
    [(2, 'has a double quote that is never closed. Close it, or write it as "".'), (3, ['b.png', \
'one'])]
    """
    rest, ahead, number = iter(lines), deque[str](), 0
    while (line := ahead.popleft() if ahead else next(rest, None)) is not None:
        number += 1
        row = _quoted_row(line, delimiter)
        if row is None:
            ahead.extend(islice(rest, _LONGEST - len(ahead)))
            used, row = _closed(line, ahead, delimiter)
            number += used
            for _ in range(used):
                ahead.popleft()
        yield number, row


def _closed(line: str, following: Iterable[str], delimiter: str) -> tuple[int, list[str] | str]:
    """Over how many further lines an open quote goes on, and the row then."""
    for count, text in enumerate(following, start=1):
        line += text
        # only a quote can close it, so that long ones are not parsed anew with every line
        row = _quoted_row(line, delimiter) if '"' in text else None
        if isinstance(row, list):
            return count, row
        if row is not None:
            break
    return 0, 'has a double quote that is never closed. Close it, or write it as "".'


def _quoted_row(text: str, delimiter: str) -> list[str] | str | None:
    """The fields of a row; a text where it has a mistake, None where a quote is still open."""
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        if "field limit" in str(error):
            return f"has a field of more than {csv.field_size_limit():,} letters. Shorten it."
        return (
            "has text before or behind a field in double quotes. Put the whole field in quotes, "
            f'and write those inside as "" ({error}).'
        )


# --------------------------------------------------------------------------------------------------
# Tab-separated values, where some programs quote fields and others mean quotes as they stand.


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
