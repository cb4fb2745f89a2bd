"""JSON lines: one object a line, with an image path or base64 content and captions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.data.sources.records import (
    BYTES_COLUMNS,
    RECORD_CAPTIONS,
    RECORD_IMAGES,
    image_of,
    texts_of,
)
from clip_refine.data.sources.tables import find_column
from clip_refine.errors import DataError

KIND = "JSON lines"


@dataclass(frozen=True, slots=True)
class ImageInLine:
    """An image whose content stands in a line, read again when it is needed."""

    path: Path
    line: int
    start: int
    column: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    def read(self) -> bytes:
        """The content of the image file."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = image_of(json.loads(file.readline())[self.column], encoded=True)
        if not isinstance(content, bytes):
            raise OSError(f"{self} changed while it was in use")
        return content


def jsonl_rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a .jsonl file.

    Raises:
        DataError: The file cannot be read, or its first line lacks a column.
    """
    return file_rows(path, _written(path, options), options)


def _written(path: Path, options: ReadOptions) -> Iterator[Written]:
    columns: tuple[str, str] | None = None
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where, here = f"{path}, line {number}", start
                start += len(line)
                if not line.strip():
                    continue
                record = _record(line)
                if isinstance(record, str):
                    yield Written(where, "", (), record)
                    continue
                if columns is None:
                    columns = find_columns(path, list(record), options)
                place = ImageInLine(path, number, here, columns[0])
                yield _row(where, record, columns, place)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def _row(
    where: str, record: dict[str, Any], columns: tuple[str, str], place: ImageInLine
) -> Written:
    image_column, caption_column = columns
    captions = texts_of(record.get(caption_column))
    if isinstance(captions, str):
        return Written(where, "", (), captions)
    try:
        image = image_of(record.get(image_column), encoded=image_column in BYTES_COLUMNS)
    except ValueError as error:
        return Written(where, "", captions, f"{error} Mend it or remove the row.")
    return Written(where, place if isinstance(image, bytes) else image or "", captions)


def find_columns(name: Path | str, header: list[str], options: ReadOptions) -> tuple[str, str]:
    """Names of the image and the caption column among those of a record.

    Raises:
        DataError: One is missing.
    """
    image = find_column(name, header, options.image_column, RECORD_IMAGES, "image")
    caption = find_column(name, header, options.caption_column, RECORD_CAPTIONS, "caption")
    return header[image], header[caption]


def _record(line: bytes) -> dict[str, Any] | str:
    """The object of a line; or, as a text, what is wrong."""
    try:
        record = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        return f"is no JSON ({error}). Mend or remove the row."
    if not isinstance(record, dict):
        return f"is no JSON object but {record!r:.40}. Mend or remove the row."
    return record
