"""Tables that Hugging Face `datasets` reads: Parquet, folders of `save_to_disk`, any other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_refine.console import console
from clip_refine.data.rows import ReadOptions, Row, StoredImage
from clip_refine.data.sources.jsonl import find_columns
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.data.sources.records import BYTES_COLUMNS, image_of, texts_of
from clip_refine.data.sources.split_files import choose_split
from clip_refine.errors import DataError

PARQUET = "Parquet"
SAVED = "dataset saved to disk"


class ImageInTable:
    """An image whose content is a cell of a table."""

    __slots__ = ("column", "label", "row", "table")

    def __init__(self, table: Any, row: int, column: str, label: str) -> None:
        self.table = table
        self.row = row
        self.column = column
        self.label = label

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ImageInTable) and self.table is other.table and self.row == other.row
        )

    def __hash__(self) -> int:
        return hash((id(self.table), self.row))

    def __str__(self) -> str:
        return f"{self.label}, row {self.row}"

    def read(self) -> bytes:
        """The content of the image file."""
        content = image_of(self.table[self.row][self.column], encoded=self.column in BYTES_COLUMNS)
        if not isinstance(content, bytes):
            raise OSError(f"{self} changed while it was in use")
        return content


def parquet_rows(files: Sequence[str], name: str, options: ReadOptions) -> Iterator[Row]:
    """The rows of Parquet files, which may be remote; relative paths start beside the first.

    Raises:
        DataError: They cannot be read or lack a column.
    """
    import datasets

    with readable(name):
        table = datasets.load_dataset("parquet", data_files=list(files), split="train")
    return table_rows(table, name, Path(files[0]), options)


def saved_rows(folder: Path, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` wrote.

    Raises:
        DataError: It cannot be read, or it is not clear which split to read.
    """
    import datasets

    with readable(str(folder)):
        saved = datasets.load_from_disk(str(folder))
    called = str(folder)
    if isinstance(saved, datasets.DatasetDict):
        found = {str(name) for name in saved}
        names = choose_split(str(folder), found, options.split, training=training)
        saved = datasets.concatenate_datasets([saved[name] for name in names])
        called = f"{folder} ({'+'.join(names)})"  # rows of two splits are told apart by it
    return table_rows(saved, called, folder / "dataset_info.json", options)


def table_rows(table: Any, name: str, file: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a `datasets` table with an image and a caption column.

    Args:
        table: Of `datasets`, map-style.
        name: What to call it.
        file: Relative image paths start beside it.
        options: Columns, and what else there is to choose.

    Raises:
        DataError: A column is missing.
    """
    return file_rows(file, table_written(table, name, options), options)


def table_written(table: Any, name: str, options: ReadOptions) -> Iterator[Written]:
    """As `table_rows`, with image paths as the table has them."""
    image_column, caption_column = find_columns(name, list(table.column_names), options)
    table = undecoded(table.select_columns([image_column, caption_column]))
    return _written(table, name, image_column, caption_column)


def undecoded(table: Any) -> Any:
    """The table with images as the content of their files."""
    import datasets

    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _written(table: Any, name: str, image_column: str, caption_column: str) -> Iterator[Written]:
    for number in range(len(table)):
        where = f"{name}, row {number}"
        place = ImageInTable(table, number, image_column, name)
        try:
            record = table[number]
        except UnicodeDecodeError as error:
            problem = (
                f"has a text that is not UTF-8 ({error.reason}). Save it as UTF-8 or remove it."
            )
            yield Written(where, place, (), problem)
            continue
        yield record_row(where, record[image_column], record[caption_column], image_column, place)


def record_row(
    where: str, image: Any, caption: Any, image_column: str, place: StoredImage | None
) -> Written:
    """A record's image and captions as a row; an image with content is at `place`."""
    captions = texts_of(caption)
    if isinstance(captions, str):
        return Written(where, "", (), captions)
    try:
        found = image_of(image, encoded=image_column in BYTES_COLUMNS)
    except ValueError as error:
        return Written(where, "", captions, f"{error} Mend it or remove the row.")
    if isinstance(found, bytes) and place is not None:
        return Written(where, place, captions)
    return Written(where, found if isinstance(found, str) else "", captions)


def content_of(image: Any, image_column: str) -> bytes | None:
    """The content of an image in a record, None where it is a path or nothing sound."""
    try:
        content = image_of(image, encoded=image_column in BYTES_COLUMNS)
    except ValueError:
        return None
    return content if isinstance(content, bytes) else None


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Errors of `datasets` as one of ours, its log and bars kept off what is no terminal.

    Raises:
        DataError: Something could not be read.
    """
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not console.is_terminal:
        datasets.disable_progress_bars()
    try:
        with explained(name):
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Errors of `datasets` as one of ours.

    Raises:
        DataError: Something could not be read.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(f"{name}: cannot be read ({reason:.300}). Check it.") from error
