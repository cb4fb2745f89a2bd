"""Folders of images with a `metadata` file, as Hugging Face's `imagefolder` has them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from clip_refine.data.images import SUFFIXES
from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources.dataset_rows import parquet_rows
from clip_refine.data.sources.jsonl import jsonl_rows
from clip_refine.data.sources.split_files import choose_split
from clip_refine.data.sources.tables import table_rows
from clip_refine.errors import DataError

KIND = "image folder with metadata"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = ("train", "validation", "val", "dev", "test")


def metadata_files(folder: Path) -> list[Path]:
    """The metadata files in a folder and those below it."""
    return sorted(path for name in METADATA for path in folder.rglob(name))


def image_folder_rows(folder: Path, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of all metadata files, then the images that none of them mentions.

    Where the files lie in folders named like splits, only those of one split are read.

    Raises:
        DataError: There is no metadata file, or it is not clear which split to read.
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
