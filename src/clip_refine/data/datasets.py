"""Sources that are records of named values: JSON lines, Parquet, datasets, image folders → rows."""

import base64
import binascii
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clip_refine.data.images import (
    SUFFIXES,
    ImageInMemory,
    ImagePlace,
    StoredImage,
    image_files,
    is_clutter,
)
from clip_refine.data.rows import (
    BYTES_COLUMNS,
    LINK,
    OpenRows,
    Row,
    SourceSettings,
    Written,
    choose_split,
    encoding_of,
    file_rows,
    find_columns,
    read_json,
    readable_file,
    refuse_split,
    table_rows,
    texts_of,
    whole_text,
)
from clip_refine.support.console import console
from clip_refine.support.errors import DataError, foreign
from clip_refine.support.limits import LINE, TEXT, leads_out, lines_of, parse_json

# --------------------------------------------------------------------------------------------------
# Records of named values, as JSONL, Parquet and datasets hold them → image and captions.


_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


def image_of(value: Any, *, encoded: bool = False) -> bytes | str | None:
    """The image in a value: the content of its file, its path, or None."""
    match value:
        case None:
            return None
        case bytes():
            return value
        case str() if encoded or _DATA_URI.match(value):
            return _from_base64(value)
        case str():
            return value
        case {"bytes": bytes() as content}:
            return content
        case {"bytes": str() as content} if content:
            return _from_base64(content)
        case {"path": str() as path}:
            return path
    raise ValueError(f"has an image that is neither path nor bytes but {value!r:.40}.")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(_DATA_URI.sub("", text, count=1), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"has an image that is no valid base64 ({error}).") from error


def record_row(
    where: str,
    record: Mapping[str, Any],
    columns: tuple[str, str],
    place: Callable[[bytes], StoredImage],
) -> Written:
    """A record's image and captions as a row; `place` says where an image with content is."""
    image_column, caption_column = columns
    captions = texts_of(record.get(caption_column))
    if isinstance(captions, str):
        return Written(where, "", (), captions)
    image = record.get(image_column)
    try:
        found = image_of(image, encoded=image_column in BYTES_COLUMNS)
    except ValueError as error:
        return Written(where, "", captions, f"{error} Mend it or remove the row.")
    if isinstance(found, bytes):
        name = image.get("path") if isinstance(image, Mapping) else None
        return Written(where, place(found), captions, name=name or None)
    return Written(where, found or "", captions)


# --------------------------------------------------------------------------------------------------
# JSON lines: one object a line, with an image path or base64 content and captions.


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


def jsonl_stream(
    name: str, files: Sequence[str], settings: SourceSettings
) -> tuple[OpenRows, int | None]:
    """Passes over .jsonl files, which do not tell how many rows they have."""

    def read(file: str) -> Iterator[Row]:
        return file_rows(Path(file), jsonl_rows(Path(file), settings), settings)

    return in_any_order(files, read), None


def in_any_order(files: Sequence[str], read: Callable[[str], Iterator[Row]]) -> OpenRows:
    """Passes that read file after file."""

    def begin(generator: random.Random | None) -> list[Callable[[], Iterator[Row]]]:
        order = list(files)
        if generator is not None:
            generator.shuffle(order)
        return [partial(read, file) for file in order]

    return begin


def jsonl_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a .jsonl file."""
    columns: tuple[str, str] | None = None
    start = 0
    with readable_file(path):
        encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        raise DataError(f"{path}: is UTF-16. Save it as UTF-8.")
    with readable_file(path), path.open("rb") as file:
        for number, line in enumerate(lines_of(file, LINE), start=1):
            where, here = f"{path}, line {number}", start
            start += len(line)
            if not line.strip():
                continue
            record = _record(line)
            if isinstance(record, str):
                yield Written(where, "", (), record)
                continue
            if columns is None:
                columns = find_columns(path, list(record), settings)
            place = ImageInLine(path, number, here, columns[0])
            yield record_row(where, record, columns, lambda _, place=place: place)


def json_list_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a JSON file that is a list of objects, as LLaVA's are."""
    records = read_json(path)
    if not is_json_list(records):
        raise DataError(f"{path}: is no list of JSON objects with an image and captions each.")
    names = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
    columns = find_columns(path, list(names), settings)
    for position, record in enumerate(records):
        where = f"{path}, [{position}]"
        if not isinstance(record, dict):
            problem = f"is no JSON object but {record!r:.40}. Mend or remove the row."
            yield Written(where, "", (), problem)
            continue
        yield record_row(
            where, record, columns, lambda content, where=where: ImageInMemory(where, content)
        )


def is_json_list(content: Any) -> bool:
    """Whether a JSON file is a list of objects."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def _record(line: bytes) -> dict[str, Any] | str:
    """The object of a line; or, as a text, what is wrong."""
    try:
        record = parse_json(line.decode("utf-8-sig", errors="surrogateescape"))
    except ValueError as error:
        return f"is no JSON ({error}). Mend or remove the row."
    if not isinstance(record, dict):
        return f"is no JSON object but {record!r:.40}. Mend or remove the row."
    return record


# --------------------------------------------------------------------------------------------------
# Datasets on the Hugging Face Hub, read by `datasets` by their name there.


HUB_PREFIX = "hf:"
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


def hub_table(name: str, settings: SourceSettings) -> tuple[Any, str]:
    """A dataset on the Hub, fetched where it is not here yet, and the split that was chosen."""
    import datasets

    split = _hub_split(name, settings)
    with readable(name):
        return datasets.load_dataset(_on_hub(name), settings.subset, split=split), split


def hub_rows(name: str, files: Sequence[str], settings: SourceSettings) -> Iterator[Row]:
    """The rows of a dataset on the Hub, which knows its files itself."""
    table, split = hub_table(name, settings)
    written = _table_written(table, f"{name} ({split})", settings)
    return file_rows(_hub_file(name), hub_paths(written, _on_hub(name)), settings)


def hub_stream(
    name: str, files: Sequence[str], settings: SourceSettings
) -> tuple[OpenRows, int | None]:
    """Passes over a dataset on the Hub, and its rows where it tells."""
    import datasets

    split = _hub_split(name, settings)
    with readable(name):
        table = datasets.load_dataset(_on_hub(name), settings.subset, split=split, streaming=True)
    found = (table.info.splits or {}).get(split)
    length = getattr(found, "num_examples", None)

    def resolved(written: Iterator[Written]) -> Iterator[Written]:
        return hub_paths(written, _on_hub(name))

    return _table_passes(table, name, _hub_file(name), settings, resolved), length or None


def _on_hub(name: str) -> str:
    return name.removeprefix(HUB_PREFIX)


def _hub_split(name: str, settings: SourceSettings) -> str:
    """The split to read, as `datasets` writes it."""
    import datasets

    if settings.split and "[" in settings.split:  # a slice, which `datasets` understands
        return settings.split
    with readable(name):
        names = datasets.get_dataset_split_names(_on_hub(name), settings.subset)
    found = {str(split) for split in names}
    return "+".join(choose_split(name, found, settings.split, training=settings.training))


def _hub_file(name: str) -> Path:
    """Relative image paths start beside this."""
    return Path(_on_hub(name)) / "data"


def hub_paths(written: Iterable[Written], name: str) -> Iterator[Written]:
    """Rows with the files or addresses that `datasets` found; other paths are checked later."""
    from datasets import config
    from huggingface_hub import constants

    caches = (constants.HF_HUB_CACHE, config.DOWNLOADED_DATASETS_PATH, name)
    roots = [Path(root).resolve() for root in caches]
    for row in written:
        image = row.image
        if not isinstance(image, str):
            yield row
        elif _is_on_hub(image):
            inner = image.partition("::")[0].partition("://")[2]
            yield replace(row, image=ImageOnHub(image), name=inner)
        elif Path(image).is_absolute() and any(map(Path(image).resolve().is_relative_to, roots)):
            yield replace(row, image=Path(image), name=image)
        else:
            yield row


def _is_on_hub(address: str) -> bool:
    """Whether an address is of a file on the Hub, or of a file in an archive there."""
    *inner, outer = address.split("::")
    archived = all(part.partition("://")[0] in _ARCHIVES for part in inner)
    return archived and outer.startswith("hf://datasets/")


# --------------------------------------------------------------------------------------------------
# Tables that Hugging Face `datasets` reads: Parquet, folders of `save_to_disk`, any other.


@dataclass(frozen=True, slots=True)
class ImageInTable:
    """An image whose content is a cell of a table."""

    table: Any  # of `datasets`, whose tables are equal only to themselves
    row: int
    column: str
    label: str

    def __str__(self) -> str:
        return f"{self.label}, row {self.row}"

    def read(self) -> bytes:
        """The content of the image file."""
        content = image_of(self.table[self.row][self.column], encoded=self.column in BYTES_COLUMNS)
        if not isinstance(content, bytes):
            raise OSError(f"{self} changed while it was in use")
        return content


def parquet_rows(name: str, files: Sequence[str], settings: SourceSettings) -> Iterator[Row]:
    """The rows of Parquet files, which may be remote; relative paths start beside the first."""
    import datasets

    with readable(name):
        table = datasets.load_dataset("parquet", data_files=list(files), split="train")
    return file_rows(Path(files[0]), _table_written(table, name, settings), settings)


def parquet_stream(
    name: str, files: Sequence[str], settings: SourceSettings
) -> tuple[OpenRows, int | None]:
    """Passes over Parquet files, and the rows that their footers tell of."""
    import datasets

    with readable(name):
        table = datasets.load_dataset(
            "parquet", data_files=list(files), split="train", streaming=True
        )
    return _table_passes(table, name, Path(files[0]), settings), _count_rows(files)


def _count_rows(files: Sequence[str]) -> int | None:
    import fsspec
    from pyarrow import parquet

    total = 0
    try:
        for file in files:
            with fsspec.open(file, "rb") as opened:
                total += parquet.ParquetFile(opened).metadata.num_rows
    except (OSError, ValueError):  # reading it says what is wrong
        return None
    return total


def saved_rows(name: str, files: Sequence[str], settings: SourceSettings) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` wrote."""
    import datasets

    with readable(name):
        saved = datasets.load_from_disk(name)
    called = name
    if isinstance(saved, datasets.DatasetDict):
        found = {str(split) for split in saved}
        splits = choose_split(name, found, settings.split, training=settings.training)
        saved = datasets.concatenate_datasets([saved[split] for split in splits])
        called = f"{name} ({'+'.join(splits)})"  # rows of two splits are told apart by it
    else:
        refuse_split(name, "saved", settings)
    written = _table_written(saved, called, settings)
    return file_rows(Path(name) / "dataset_info.json", written, settings)


def dataset_rows(table: Any, name: str, settings: SourceSettings) -> Iterator[Row]:
    """The rows of a dataset in memory."""
    return file_rows(Path(name), _table_written(table, name, settings), settings)


def undecoded(table: Any) -> Any:
    """The table with images as the content of their files."""
    import datasets

    for column, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _table_written(table: Any, name: str, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a table, with image paths as it has them."""
    columns = find_columns(name, list(table.column_names), settings)
    table = undecoded(table.select_columns(list(columns)))
    for number in range(len(table)):
        where = f"{name}, row {number}"
        place = ImageInTable(table, number, columns[0], name)
        try:
            record = table[number]
        except UnicodeDecodeError as error:
            problem = (
                f"has a text that is not UTF-8 ({error.reason}). Save it as UTF-8 or remove it."
            )
            yield Written(where, place, (), problem)
            continue
        yield record_row(where, record, columns, lambda _, place=place: place)


def _table_passes(
    table: Any,
    name: str,
    file: Path,
    settings: SourceSettings,
    resolved: Callable[[Iterator[Written]], Iterator[Written]] = iter,
) -> OpenRows:
    """Passes over an iterable table, its files in an order of their own each time."""
    with readable(name):  # column names may not be known before the first row
        header = table.column_names or list(next(iter(table), {}))
    columns = find_columns(name, header, settings)
    table = undecoded(table.select_columns(list(columns)))

    def begin(generator: random.Random | None) -> list[Callable[[], Iterator[Row]]]:
        order = list(range(table.num_shards))
        if generator is not None:  # its own shuffle reads several files at once in threads
            generator.shuffle(order)
        return [partial(read, index) for index in order]

    def read(index: int) -> Iterator[Row]:
        written = _streamed(table.shard(table.num_shards, index), name, columns)
        return file_rows(file, resolved(written), settings)

    return begin


def _streamed(table: Any, name: str, columns: tuple[str, str]) -> Iterator[Written]:
    with explained(name):
        for record in table:
            where = f"{name}, row with the caption {record[columns[1]]!r:.60}"

            def place(content: bytes, where: str = where) -> StoredImage:
                return ImageInMemory(where, content)

            yield record_row(where, record, columns, place)


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
    with foreign(DataError, f"{name}: cannot be read", " Check it."):
        try:
            yield
        except Exception as error:
            raise error.__cause__ or error from None  # the cause says what was wrong


# --------------------------------------------------------------------------------------------------
# Folders of images with a `metadata` file, as Hugging Face's `imagefolder` has them.


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = ("train", "validation", "val", "dev", "test")


def image_folder_rows(name: str, files: Sequence[str], settings: SourceSettings) -> Iterator[Row]:
    """The rows of all metadata files, of one split where folders are splits; then other images."""
    folder = Path(name)
    paths = sorted(path for metadata in METADATA for path in folder.rglob(metadata))
    paths = [path for path in paths if not is_clutter(path.relative_to(folder))]
    if not paths:
        raise DataError(f"{name}: has no {', '.join(METADATA)}. Give one with the captions.")
    found = {split for path in paths if (split := path.relative_to(folder).parts[0]) in SPLITS}
    if found:
        splits = choose_split(name, found, settings.split, training=settings.training)
        paths = [path for path in paths if path.relative_to(folder).parts[0] in splits]
    else:
        refuse_split(name, "imagefolder", settings)
    for path in paths:
        yield from _metadata_rows(path, folder, settings)


def _metadata_rows(path: Path, folder: Path, settings: SourceSettings) -> Iterator[Row]:
    match path.suffix:
        case ".jsonl":
            rows = file_rows(path, jsonl_rows(path, settings), settings)
        case ".csv":
            rows = file_rows(path, table_rows(path, settings), settings)
        case _:
            rows = parquet_rows(str(path), [str(path)], settings)

    mentioned = set()
    for row in rows:
        mentioned.add(row.image)
        if _is_chosen(row.image, folder, settings):
            yield row
    others = frozenset((".jsonl", ".csv", ".parquet"))
    for image in image_files(path.parent, expected=others, links=settings.allow_outside):
        if image not in mentioned and _is_chosen(image, folder, settings):
            yield Row(str(image), image, ())


def _is_chosen(image: ImagePlace | None, folder: Path, settings: SourceSettings) -> bool:
    """Whether a split file names it, folders too: `train/1.jpg` is not `1.jpg` in `test`."""
    listed = settings.listed if isinstance(image, Path) else None
    return listed is None or os.path.relpath(str(image), folder) in listed


# --------------------------------------------------------------------------------------------------
# Folders of images with a text file each: img2dataset's `files`, kohya's and TAO's layout.


SIDECARS = (".txt", ".caption")
"""Endings of the files that hold an image's captions, one a line."""
_BESIDE = frozenset({*SIDECARS, ".json", ".parquet", ".npz"})  # what those programs write, too
# cameras write endings in capitals
_OF_IMAGES, _OF_TEXTS = ((*known, *map(str.upper, known)) for known in (SUFFIXES, SIDECARS))
_CAPTION_FOLDERS = ("captions", "texts", "text", "labels")
_TRIED = 20


def has_sidecars(folder: Path) -> bool:
    """Whether text files lie in a folder that are called as images are."""
    texts = (path for path in folder.rglob("*") if path.suffix.lower() in SIDECARS)
    return any(_image_of(text, folder) for text in islice(texts, _TRIED))


def _image_of(text: Path, folder: Path) -> bool:
    inner = text.relative_to(folder)
    for place in (text, folder.joinpath("images", *inner.parts[1:])):
        if any(place.with_suffix(ending).is_file() for ending in _OF_IMAGES):
            return True
    return False


def sidecar_rows(name: str, files: Sequence[str], settings: SourceSettings) -> Iterator[Row]:
    """One row an image, with the lines of its text file as captions; of some there is no file."""
    folder = Path(name)
    for image in image_files(folder, expected=_BESIDE, links=settings.allow_outside):
        if not _is_chosen(image, folder, settings):
            continue
        text = _text_of(image, folder)
        if text is None:
            yield Row(str(image), image, ())
            continue
        if not settings.allow_outside and leads_out(text, folder):
            yield Row(str(text), image, (), LINK)
            continue
        lines = [line for line in whole_text(text, TEXT).splitlines() if line.strip()]
        problem = None if lines else "is empty. Write a caption into it or remove it."
        yield Row(str(text), image, tuple(lines), problem)


def _text_of(image: Path, folder: Path) -> Path | None:
    """The text beside an image, or at its place in a folder of captions instead of images."""
    inner = image.relative_to(folder)
    places = [image]
    if inner.parts[0] == "images":
        places += [folder.joinpath(other, *inner.parts[1:]) for other in _CAPTION_FOLDERS]
    found = (place.with_suffix(ending) for place in places for ending in _OF_TEXTS)
    return next((path for path in found if path.is_file()), None)
