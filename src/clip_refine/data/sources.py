"""The kinds of sources: how each is recognised, opened and streamed."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clip_refine.config import SourceKind
from clip_refine.data.datasets import (
    FOLDER_KIND,
    HUB_KIND,
    PARQUET,
    SAVED,
    content_of,
    explained,
    hub_file,
    hub_paths,
    hub_rows,
    hub_split,
    image_folder_rows,
    metadata_files,
    parquet_rows,
    readable,
    record_row,
    saved_rows,
    undecoded,
)
from clip_refine.data.pairs import CaptionedImages, collect
from clip_refine.data.rows import (
    BadRowPolicy,
    ReadOptions,
    Row,
    Written,
    expand,
    expand_braces,
    file_rows,
    is_karpathy,
    is_remote,
    read_json,
)
from clip_refine.data.shards import (
    KIND,
    downloaded,
    read_samples,
    sample_image,
    sample_row,
    shard_rows,
)
from clip_refine.data.streams import OpenRows, PairStream
from clip_refine.data.tables import (
    COCO,
    JSONL_KIND,
    KARPATHY,
    TOKEN_KIND,
    coco_rows,
    find_columns,
    is_coco,
    is_token_line,
    jsonl_rows,
    karpathy_rows,
    table_kind,
    table_rows,
    token_rows,
)
from clip_refine.errors import DataError

# --------------------------------------------------------------------------------------------------
# Which kind of source a name stands for.


HUB_PREFIX = "hf:"
TOY = "toy"

_BY_SUFFIX: dict[str, SourceKind] = {
    ".csv": "table",
    ".tsv": "table",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_HELP = (
    "Give a .csv, .tsv, .jsonl, .parquet or .tar file (several as in {000..127}.tar), COCO's or "
    "Karpathy's .json, Flickr's token file, a folder with metadata.jsonl or metadata.csv, a folder "
    "of `save_to_disk`, hf:ORG/NAME, or 'toy'."
)


def recognise(name: str) -> SourceKind:
    """The kind of a source, by its name and, where that does not tell, by how it begins.

    >>> recognise("shards-{0000..0127}.tar"), recognise("hf:nlphuji/flickr30k")
    ('webdataset', 'hub')

    Raises:
        DataError: It is missing, or of no known kind.
    """
    if name == TOY:
        return "toy"
    if name.startswith(HUB_PREFIX):
        return "hub"
    plain = name.partition("?")[0] if is_remote(name) else name
    suffix = Path(expand_braces(plain)[0].rstrip("*")).suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if suffix in ("", ".json", ".txt", ".token") and not is_remote(name):
        return _file(path)
    raise DataError(f"{name}: not a kind of source that can be read. {_HELP}")


def _folder(path: Path) -> SourceKind:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "saved"
    if metadata_files(path):
        return "imagefolder"
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if next(path.rglob(f"*{suffix}"), None):
            return kind  # pyright: ignore[reportReturnType]
    raise DataError(
        f"{path}: a folder without metadata.jsonl, metadata.csv, .tar or .parquet files, so there "
        f"are no captions in it. {_HELP}"
    )


def _file(path: Path) -> SourceKind:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            first = file.readline(4096)
    except OSError as error:
        hint = " A dataset on the Hub is written hf:ORG/NAME." if path.suffix == "" else ""
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path.{hint}"
        ) from error
    if is_token_line(first):
        return "token"
    if first.lstrip()[:1] in ("{", "["):
        return _json(path, first)
    if "," in first or "\t" in first or "|" in first:
        return "table"
    raise DataError(f"{path}: not a kind of source that can be read. {_HELP}")


def _json(path: Path, first: str) -> SourceKind:
    try:
        whole = isinstance(json.loads(first), dict)
    except ValueError:
        whole = False
    if path.suffix.lower() != ".json" and whole:
        return "jsonl"
    try:
        content = read_json(path)
    except DataError:
        if whole:  # objects line by line, whatever the file is called
            return "jsonl"
        raise
    if is_karpathy(content):
        return "karpathy"
    if is_coco(content):
        return "coco"
    raise DataError(
        f"{path}: JSON, but neither COCO captions (images and annotations) nor Karpathy's "
        "(images with filename, split and sentences). One object a line is a .jsonl file."
    )


def files_of(name: str, kind: SourceKind) -> list[str]:
    """The files that a name of this kind stands for."""
    match kind:
        case "webdataset":
            return expand(name, (".tar",))
        case "parquet":
            return expand(name, (".parquet",))
        case "jsonl":
            return expand(name, (".jsonl", ".ndjson"))
    return [name]


# --------------------------------------------------------------------------------------------------
# A name of any kind → images with captions.


def open_pairs(
    name: str,
    kind: SourceKind,
    options: ReadOptions,
    policy: BadRowPolicy,
    *,
    training: bool = True,
) -> CaptionedImages:
    """Read a source of a known kind, every row checked.

    Args:
        name: File, folder, pattern or dataset.
        kind: What it is.
        options: How to read it.
        policy: What to do about bad rows.
        training: Whether to take the training split or the validation split where there are both
            and `options.split` names none.

    Raises:
        DataError: It cannot be read, or has bad rows.
    """
    called, rows = source_rows(name, kind, options, training=training)
    return collect(name, called, rows, policy)


def source_rows(
    name: str, kind: SourceKind, options: ReadOptions, *, training: bool
) -> tuple[str, Iterator[Row]]:
    """What to call the kind, and the rows, not yet checked."""
    if is_remote(name) and kind not in ("webdataset", "parquet"):
        raise DataError(
            f"{name}: only .tar and .parquet files are read from elsewhere. Download it together "
            "with its images first."
        )
    match kind:
        case "table":
            return table_kind(Path(name)), table_rows(Path(name), options)
        case "token":
            return TOKEN_KIND, token_rows(Path(name), options)
        case "coco":
            return COCO, coco_rows(Path(name), options)
        case "karpathy":
            rows = karpathy_rows(Path(name), options, training=training)
            return KARPATHY, rows
        case "jsonl":
            each = (jsonl_rows(Path(file), options) for file in files_of(name, kind))
            return JSONL_KIND, chain.from_iterable(each)
        case "parquet":
            rows = parquet_rows(files_of(name, kind), name, options)
            return PARQUET, rows
        case "imagefolder":
            rows = image_folder_rows(Path(name), options, training=training)
            return FOLDER_KIND, rows
        case "webdataset":
            local = downloaded(name, files_of(name, kind))
            called = f"{KIND} of {len(local):,} shards"
            return called, shard_rows(local, options)
        case "saved":
            return SAVED, saved_rows(Path(name), options, training=training)
        case "hub":
            rows = hub_rows(name.removeprefix(HUB_PREFIX), options, training=training)
            return HUB_KIND, rows
    raise DataError(f"{name}: {kind} is no kind that is read from files.")


# --------------------------------------------------------------------------------------------------
# A name of a kind that can be read row by row → a stream of pairs.


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
            return _in_order(files, lambda file: jsonl_rows(Path(file), options)), None
        case "parquet":
            files = files_of(name, kind)
            table = _streamed(name, lambda d: d.load_dataset(
                "parquet", data_files=files, split="train", streaming=True
            ))  # fmt: skip
            return _of_table(table, name, Path(files[0]), options), _count_rows(files)
        case "hub":
            called = name.removeprefix(HUB_PREFIX)
            split = hub_split(called, options, training=True)
            table = _streamed(name, lambda d: d.load_dataset(
                called, options.subset, split=split, streaming=True
            ))  # fmt: skip
            found = (table.info.splits or {}).get(split)
            length = getattr(found, "num_examples", None)
            rows = _of_table(
                table, name, hub_file(called), options, lambda rows: hub_paths(rows, called)
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
    for sample in read_samples(shard):
        row = sample_row(sample, options)
        extension = sample_image(sample, options)
        if extension is None:
            yield row
            continue
        image = ImageInMemory(str(row.image), sample.content[extension])
        yield Row(row.where, image, row.captions, row.problem)


def _streamed(name: str, load: Callable[[Any], Any]) -> Any:
    """An iterable table of `datasets`."""
    import datasets

    with readable(name):
        return load(datasets)


def _of_table(
    table: Any,
    name: str,
    file: Path,
    options: ReadOptions,
    resolved: Callable[[Iterator[Written]], Iterator[Written]] = iter,
) -> OpenRows:
    """Passes over an iterable table, its files in an order of their own each time."""
    with readable(name):  # column names may not be known before the first row
        header = table.column_names or list(next(iter(table), {}))
    columns = find_columns(name, header, options)
    table = undecoded(table.select_columns(list(columns)))

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
    with explained(name):
        for record in table:
            image, caption = record[image_column], record[caption_column]
            where = f"{name}, row with the caption {caption!r:.60}"
            content = content_of(image, image_column)
            place = None if content is None else ImageInMemory(where, content)
            yield record_row(where, image, caption, image_column, place)


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
