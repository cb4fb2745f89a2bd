"""CSV and TSV files of image paths and captions."""

import csv
import difflib
from collections.abc import Iterator
from pathlib import Path

from clip_refine.data.bad_rows import BadRowPolicy
from clip_refine.data.captioned import CaptionedImages, collect
from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.data.sources.quoted_lines import read_tab_separated
from clip_refine.errors import DataError

IMAGE_COLUMNS = (
    *("image", "image_path", "file_name", "filename", "filepath", "file_path", "path"),
    *("image_name", "img", "img_path"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "title", "sentence", "sentences", "description"),
    *("comment", "raw"),
)
KINDS = {",": "CSV table", "\t": "TSV table", "|": "table with | between the columns"}


def read_table(
    path: Path, *, image_column: str | None = None, caption_column: str | None = None
) -> CaptionedImages:
    """Read a .csv or .tsv file with a header; rows of one image become its captions.

    Relative image paths start at the file's own folder, or at one beside it where the images are
    found. Images keep the order of their first row.

    Raises:
        DataError: The file cannot be read, lacks a column, has no rows, or a row has an empty
            caption or an image that is missing or is no image. Up to ten bad rows are listed.
    """
    options = ReadOptions(image_column=image_column, caption_column=caption_column)
    return collect(str(path), table_kind(path), table_rows(path, options), BadRowPolicy())


def table_rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a table with a header.

    Raises:
        DataError: The file cannot be read or lacks a column.
    """
    return file_rows(path, _written(path, options), options)


def table_kind(path: Path) -> str:
    """What to call such a table."""
    return KINDS[_delimiter(path)]


def _written(path: Path, options: ReadOptions) -> Iterator[Written]:
    delimiter = _delimiter(path)
    lines = _rows(path, delimiter)
    header = [name.strip() for name in next(lines, (0, []))[1]]
    image_at = find_column(path, header, options.image_column, IMAGE_COLUMNS, "image")
    caption_at = find_column(path, header, options.caption_column, CAPTION_COLUMNS, "caption")
    for number, row in lines:
        if not row:
            continue
        where = f"{path}, line {number}"
        if len(row) == len(header):
            yield Written(where, row[image_at].strip(), (row[caption_at].strip(),))
            continue
        advice = (
            f"Put captions that hold a {delimiter!r} in double quotes."
            if delimiter == ","
            else "Mend or remove the row."
        )
        problem = f"{len(row)} fields, but the header has {len(header)}. {advice}"
        yield Written(where, row[0].strip() if row else "", (), problem)


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row, the header first; bytes that are no UTF-8 as surrogates.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if delimiter == ",":
                reader = csv.reader(file, strict=True)
                for row in reader:
                    yield reader.line_num, row
            elif delimiter == "\t":
                yield from read_tab_separated(file)
            else:
                for number, line in enumerate(file, start=1):
                    fields = line.rstrip("\r\n").split(delimiter)
                    yield number, fields if line.strip() else []
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except csv.Error as error:
        raise DataError(f"{path}: is no valid CSV file ({error}).") from error


def _delimiter(path: Path) -> str:
    """By the first line: a | only where there are neither tabs nor commas; by the name in doubt."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            first = file.readline()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    if path.suffix.lower() == ".tsv":
        return "\t"
    if "|" in first and "," not in first:
        return "|"
    return "\t" if "\t" in first and "," not in first else ","


def find_column(
    path: Path | str, header: list[str], wanted: str | None, known: tuple[str, ...], what: str
) -> int:
    """Position of the wanted column, or of the first known one.

    Raises:
        DataError: There is none.
    """
    for name in (wanted,) if wanted else known:
        if name in header:
            return header.index(name)
    if wanted:
        near = difflib.get_close_matches(wanted, header, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{path}: has no column {wanted!r}, only {', '.join(header)}.{hint}")
    raise DataError(
        f"{path}: no {what} column among {', '.join(header) or 'no columns'}; looked for "
        f"{', '.join(known)}. Name it with --data.{what}-column."
    )
