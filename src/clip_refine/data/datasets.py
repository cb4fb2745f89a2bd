"""Sources that the `datasets` library reads: Hub, Parquet, saved, image folders → rows."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from clip_refine.data.images import SUFFIXES
from clip_refine.data.rows import ReadOptions, Row, StoredImage, Written, choose_split, file_rows
from clip_refine.data.tables import (
    BYTES_COLUMNS,
    find_columns,
    image_of,
    jsonl_rows,
    table_rows,
    texts_of,
)
from clip_refine.errors import DataError
from clip_refine.support.console import console

# --------------------------------------------------------------------------------------------------
# Datasets on the Hugging Face Hub, read by `datasets` by their name there.


HUB_KIND = "dataset on the Hub"
_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")


@dataclass(frozen=True, slots=True)
class ImageOnHub:
    """An image file of a dataset that is streamed."""

    address: str

    def __str__(self) -> str:
        return self.address

    def read(self) -> bytes:
        """The content of the image file."""
        import fsspec

        with fsspec.open(self.address, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]


def hub_rows(name: str, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of a dataset on the Hub."""
    import datasets

    split = hub_split(name, options, training=training)
    with readable(f"hf:{name}"):
        table = datasets.load_dataset(name, options.subset, split=split)
    written = hub_paths(table_written(table, f"hf:{name} ({split})", options), name)
    return file_rows(hub_file(name), written, options)


def hub_split(name: str, options: ReadOptions, *, training: bool) -> str:
    """The split to read, as `datasets` writes it."""
    import datasets

    if options.split and "[" in options.split:  # a slice, which `datasets` understands
        return options.split
    with readable(f"hf:{name}"):
        found = {str(s) for s in datasets.get_dataset_split_names(name, options.subset)}
    return "+".join(choose_split(f"hf:{name}", found, options.split, training=training))


def hub_file(name: str) -> Path:
    """Relative image paths start beside this."""
    return Path(name) / "data"


def hub_paths(written: Iterable[Written], name: str) -> Iterator[Written]:
    """Rows with the image files that `datasets` itself found for them.

    It writes them as absolute paths into its caches, or as addresses on the Hub. Any other path is
    the dataset's own and left to be checked.
    """
    from datasets import config
    from huggingface_hub import constants

    caches = (constants.HF_HUB_CACHE, config.DOWNLOADED_DATASETS_PATH, name)
    roots = [Path(root).resolve() for root in caches]
    for row in written:
        image = row.image
        if not isinstance(image, str):
            yield row
        elif _on_hub(image):
            yield replace(row, image=ImageOnHub(image))
        elif any(_inside(image, root) for root in roots):
            yield replace(row, image=Path(image))
        else:
            yield row


def _on_hub(address: str) -> bool:
    """Whether an address is of a file on the Hub, or of a file in an archive there."""
    *inner, outer = address.split("::")
    archived = all(part.partition("://")[0] in _ARCHIVES for part in inner)
    return archived and outer.startswith("hf://datasets/")


def _inside(path: str, folder: Path) -> bool:
    return Path(path).is_absolute() and Path(path).resolve().is_relative_to(folder)


# --------------------------------------------------------------------------------------------------
# Tables that Hugging Face `datasets` reads: Parquet, folders of `save_to_disk`, any other.


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
    """The rows of Parquet files, which may be remote; relative paths start beside the first."""
    import datasets

    with readable(name):
        table = datasets.load_dataset("parquet", data_files=list(files), split="train")
    return dataset_table_rows(table, name, Path(files[0]), options)


def saved_rows(folder: Path, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` wrote."""
    import datasets

    with readable(str(folder)):
        saved = datasets.load_from_disk(str(folder))
    called = str(folder)
    if isinstance(saved, datasets.DatasetDict):
        found = {str(name) for name in saved}
        names = choose_split(str(folder), found, options.split, training=training)
        saved = datasets.concatenate_datasets([saved[name] for name in names])
        called = f"{folder} ({'+'.join(names)})"  # rows of two splits are told apart by it
    return dataset_table_rows(saved, called, folder / "dataset_info.json", options)


def dataset_table_rows(table: Any, name: str, file: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a `datasets` table with an image and a caption column."""
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
    """Errors of `datasets` as one of ours, its log and bars kept off what is no terminal."""
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
    """Errors of `datasets` as one of ours."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, KeyError, TypeError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(f"{name}: cannot be read ({reason:.300}). Check it.") from error


# --------------------------------------------------------------------------------------------------
# Folders of images with a `metadata` file, as Hugging Face's `imagefolder` has them.


FOLDER_KIND = "image folder with metadata"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = ("train", "validation", "val", "dev", "test")


def metadata_files(folder: Path) -> list[Path]:
    """The metadata files in a folder and those below it."""
    return sorted(path for name in METADATA for path in folder.rglob(name))


def image_folder_rows(folder: Path, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of all metadata files, then the images that none of them mentions.

    Where the files lie in folders named like splits, only those of one split are read.
    """
    files = metadata_files(folder)
    if not files:
        raise DataError(f"{folder}: has no {', '.join(METADATA)}. Give one with the captions.")
    found = {split for path in files if (split := path.relative_to(folder).parts[0]) in SPLITS}
    if found:
        splits = choose_split(str(folder), found, options.split, training=training)
        files = [path for path in files if path.relative_to(folder).parts[0] in splits]
    options = replace(options, split=None)
    return chain.from_iterable(_rows(path, options) for path in files)


def _rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    match path.suffix:
        case ".jsonl":
            rows = jsonl_rows(path, options)
        case ".csv":
            rows = table_rows(path, options)
        case _:
            rows = parquet_rows([str(path)], str(path), options)
    mentioned = set()
    for row in rows:
        mentioned.add(row.image)
        yield row
    for image in sorted(path.parent.rglob("*")):
        if image.suffix.lower() in SUFFIXES and image not in mentioned:
            yield Row(str(image), image, ())
