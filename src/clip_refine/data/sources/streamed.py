"""A name of a kind that can be read row by row → a stream of pairs."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_refine.config import SourceKind
from clip_refine.data.bad_rows import BadRowPolicy
from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources import dataset_rows, hub, jsonl, shards
from clip_refine.data.sources.kinds import HUB_PREFIX, files_of
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.data.sources.patterns import is_remote
from clip_refine.data.streams import OpenRows, PairStream
from clip_refine.errors import DataError

STREAMED = ("webdataset", "parquet", "jsonl", "hub")


@dataclass(frozen=True, slots=True, eq=False)
class ImageInMemory:
    """An image whose content was read with its row."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The content of the image file."""
        return self.content


def open_stream(
    name: str,
    kind: SourceKind,
    options: ReadOptions,
    policy: BadRowPolicy,
    *,
    buffer: int,
    every_caption: bool = False,
) -> PairStream:
    """A source as a stream.

    Args:
        name: File, pattern or dataset.
        kind: What it is.
        options: How to read it.
        policy: What to do about bad rows.
        buffer: Rows among which the next one is drawn.
        every_caption: Whether every caption is a pair.

    Raises:
        DataError: This kind cannot be streamed, or nothing is there.
    """
    rows, length = _open(name, kind, options)
    return PairStream(
        name=name,
        kind=f"stream of {kind}",
        open_rows=rows,
        policy=policy,
        buffer=buffer,
        every_caption=every_caption,
        length=None if every_caption else length,
    )


def _open(name: str, kind: SourceKind, options: ReadOptions) -> tuple[OpenRows, int | None]:
    match kind:
        case "webdataset":
            files = files_of(name, kind)
            return _in_order(files, lambda file: _shard(file, options)), _count_samples(files)
        case "jsonl" if not is_remote(name):
            files = files_of(name, kind)
            return _in_order(files, lambda file: jsonl.jsonl_rows(Path(file), options)), None
        case "parquet":
            files = files_of(name, kind)
            table = _streamed(name, lambda d: d.load_dataset(
                "parquet", data_files=files, split="train", streaming=True
            ))  # fmt: skip
            return _of_table(table, name, Path(files[0]), options), _count_rows(files)
        case "hub":
            called = name.removeprefix(HUB_PREFIX)
            split = hub.hub_split(called, options, training=True)
            table = _streamed(name, lambda d: d.load_dataset(
                called, options.subset, split=split, streaming=True
            ))  # fmt: skip
            found = (table.info.splits or {}).get(split)
            length = getattr(found, "num_examples", None)
            rows = _of_table(
                table, name, hub.hub_file(called), options, lambda rows: hub.hub_paths(rows, called)
            )
            return rows, length or None
    raise DataError(
        f"{name}: {kind} cannot be streamed, only {', '.join(STREAMED)}. Leave out "
        "--data.streaming, or write the pairs as one of these."
    )


def _in_order(files: Sequence[str], read: Callable[[str], Iterator[Row]]) -> OpenRows:
    """Passes that read file after file."""

    def begin(generator: random.Random | None) -> Iterator[Row]:
        order = list(files)
        if generator is not None:
            generator.shuffle(order)
        for file in order:
            yield from read(file)

    return begin


def _shard(shard: str, options: ReadOptions) -> Iterator[Row]:
    """The rows of a shard, with the images' content."""
    for sample in shards.read_samples(shard):
        row = shards.sample_row(sample, options)
        extension = shards.sample_image(sample, options)
        if extension is None:
            yield row
            continue
        image = ImageInMemory(str(row.image), sample.content[extension])
        yield Row(row.where, image, row.captions, row.problem)


def _streamed(name: str, load: Callable[[Any], Any]) -> Any:
    """An iterable table of `datasets`."""
    import datasets

    with dataset_rows.readable(name):
        return load(datasets)


def _of_table(
    table: Any,
    name: str,
    file: Path,
    options: ReadOptions,
    resolved: Callable[[Iterator[Written]], Iterator[Written]] = iter,
) -> OpenRows:
    """Passes over an iterable table, its files in an order of their own each time."""
    with dataset_rows.readable(name):  # column names may not be known before the first row
        header = table.column_names or list(next(iter(table), {}))
    columns = jsonl.find_columns(name, header, options)
    table = dataset_rows.undecoded(table.select_columns(list(columns)))

    def begin(generator: random.Random | None) -> Iterator[Row]:
        count = table.num_shards
        order = list(range(count))
        if generator is not None:  # its own shuffle reads several files at once in threads
            generator.shuffle(order)
        for index in order:
            written = _written(table.shard(count, index), name, columns)
            yield from file_rows(file, resolved(written), options)

    return begin


def _written(table: Any, name: str, columns: tuple[str, str]) -> Iterator[Written]:
    image_column, caption_column = columns
    with dataset_rows.explained(name):
        for record in table:
            image, caption = record[image_column], record[caption_column]
            where = f"{name}, row with the caption {caption!r:.60}"
            content = dataset_rows.content_of(image, image_column)
            place = None if content is None else ImageInMemory(where, content)
            yield dataset_rows.record_row(where, image, caption, image_column, place)


def _count_rows(files: Sequence[str]) -> int | None:
    """Rows of Parquet files, by their footers."""
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


def _count_samples(files: Sequence[str]) -> int | None:
    """Samples of shards, by the `_stats.json` that img2dataset writes beside each."""
    total = 0
    for file in files:
        stats = Path(file).with_name(f"{Path(file).stem}_stats.json")
        try:
            total += int(json.loads(stats.read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return total
