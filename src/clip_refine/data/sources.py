"""The kinds of sources, and a source's name → images with captions, or a stream of pairs."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clip_refine.config import DataConfig
from clip_refine.data.datasets import (
    HUB_PREFIX,
    METADATA,
    has_sidecars,
    hub_rows,
    hub_stream,
    image_folder_rows,
    is_json_list,
    json_list_rows,
    jsonl_rows,
    jsonl_stream,
    parquet_rows,
    parquet_stream,
    saved_rows,
    sidecar_rows,
)
from clip_refine.data.pairs import (
    AllRows,
    BadRowPolicy,
    CaptionedImages,
    ImageCaptions,
    Mixture,
    PairSource,
    collect,
    read_all,
)
from clip_refine.data.rows import (
    OpenRows,
    Row,
    SourceSettings,
    Written,
    coco_rows,
    encoding_of,
    expand,
    expand_braces,
    file_rows,
    is_coco,
    is_karpathy,
    is_remote,
    is_table_line,
    is_token_line,
    karpathy_rows,
    read_json,
    refuse_split,
    table_kind,
    table_rows,
    token_rows,
)
from clip_refine.data.shards import shard_rows, shard_stream
from clip_refine.data.streams import PairStream, Stream, StreamMixture
from clip_refine.support.console import remark
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.support.limits import parse_json

# --------------------------------------------------------------------------------------------------
# The kinds of sources: all that is known of each.


TOY = "toy"

Read = Callable[[str, Sequence[str], SourceSettings], Iterator[Row]]
"""Name, files, settings → rows, not yet checked."""
Passes = Callable[[str, Sequence[str], SourceSettings], tuple[OpenRows, int | None]]
"""The same → passes over the rows, and how many rows a pass has where the source tells."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How sources of one kind are called, recognised and read."""

    title: str | Callable[[Sequence[str]], str]  # what to call one, of some kinds by its files
    rows: Read | None = None  # None for what is drawn
    stream: Passes | None = None  # None where it cannot be streamed
    splits: bool = False  # whether there are some that have several splits
    several: bool = False  # whether a pattern or a folder stands for several files
    remote: bool = False  # whether it is read from an address, too
    give: str = ""  # how a message says to give one, where the suffixes do not
    # what it is recognised by, in this order
    prefix: str | None = None  # of its name
    suffixes: tuple[str, ...] = ()  # of its name
    in_folder: tuple[str, ...] = ()  # patterns, one of which a folder has
    is_folder: Callable[[Path], bool] | None = None  # where a pattern does not tell
    first_line: Callable[[str], bool] | None = None  # of a text file
    in_json: Callable[[Any], bool] | None = None  # the content of a JSON file


def _each(read: Callable[[Path, SourceSettings], Iterator[Written]]) -> Read:
    """The rows of one file after the other."""
    return lambda name, files, settings: chain.from_iterable(
        file_rows(Path(file), read(Path(file), settings), settings) for file in files
    )


# Of two kinds that both recognise a source it is of the first: lines of a token file have tabs as
# those of a table, metadata of an image folder may be a .parquet file, and img2dataset writes such
# files beside its .tar files and beside its folders of images.
KINDS = {
    "token": Kind(
        title="token file",
        rows=_each(token_rows),
        give="Flickr's token file",
        first_line=is_token_line,
    ),
    "table": Kind(
        title=lambda files: table_kind(Path(files[0])),
        rows=_each(table_rows),
        suffixes=(".csv", ".tsv"),
        first_line=is_table_line,
    ),
    "coco": Kind(
        title="COCO captions",
        rows=_each(coco_rows),
        give="COCO's .json",
        in_json=is_coco,
    ),
    "karpathy": Kind(
        title="Karpathy split file",
        rows=_each(karpathy_rows),
        splits=True,
        give="Karpathy's .json",
        in_json=is_karpathy,
    ),
    "jsonl": Kind(
        title="JSON lines",
        rows=_each(jsonl_rows),
        stream=jsonl_stream,
        several=True,
        suffixes=(".jsonl", ".ndjson"),
    ),
    "json": Kind(
        title="JSON list",
        rows=_each(json_list_rows),
        give="a .json list of objects",
        in_json=is_json_list,
    ),
    "saved": Kind(
        title="dataset saved to disk",
        rows=saved_rows,
        splits=True,
        give="a folder of `save_to_disk`",
        in_folder=("dataset_dict.json", "state.json"),
    ),
    "imagefolder": Kind(
        title="image folder with metadata",
        rows=image_folder_rows,
        splits=True,
        give="a folder with metadata.jsonl or metadata.csv",
        in_folder=tuple(f"**/{name}" for name in METADATA),
    ),
    "sidecars": Kind(
        title="images with a text file each",
        rows=sidecar_rows,
        give="a folder of images with a .txt file each",
        is_folder=has_sidecars,
    ),
    "webdataset": Kind(
        title=lambda files: f"WebDataset of {len(files):,} shard{'s'[: len(files) != 1]}",
        rows=shard_rows,
        stream=shard_stream,
        several=True,
        remote=True,
        suffixes=(".tar",),
        in_folder=("**/*.tar",),
    ),
    "parquet": Kind(
        title="Parquet",
        rows=parquet_rows,
        stream=parquet_stream,
        several=True,
        remote=True,
        suffixes=(".parquet",),
        in_folder=("**/*.parquet",),
    ),
    "hub": Kind(
        title="dataset on the Hub",
        rows=hub_rows,
        stream=hub_stream,
        splits=True,
        give="hf:ORG/NAME",
        prefix=HUB_PREFIX,
    ),
    TOY: Kind(title="drawn world", give="'toy'"),
}


# --------------------------------------------------------------------------------------------------
# Which kind of source a name stands for.


_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def recognise(name: str) -> str:
    """The kind of a source, by its name and, where that does not tell, by how it begins.

    >>> recognise("shards-{0000..0127}.tar"), recognise("hf:nlphuji/flickr30k")
    ('webdataset', 'hub')

    Raises:
        DataError: It is missing, or of no known kind.
    """
    if name == TOY:
        return TOY
    plain = name.partition("?")[0] if is_remote(name) else name
    suffix = Path(expand_braces(plain)[0].rstrip("*")).suffix.lower()
    found = _first(lambda kind: kind.prefix and name.startswith(kind.prefix))
    found = found or _first(lambda kind: suffix in kind.suffixes)
    path = Path(name)
    if found is None and path.is_dir():
        found = _first(lambda kind: _is_folder(path, kind))
        if found is None:
            files = [pattern for kind in KINDS.values() for pattern in kind.in_folder]
            names = _in_words([pattern.removeprefix("**/") for pattern in files])
            tables = sorted(each for end in (".csv", ".tsv") for each in path.glob(f"*{end}"))
            raise DataError(
                f"{path}: a folder without {names}, so there are no captions in it. "
                + (f"Did you mean {tables[0]}?" if tables else _help())
            )
    elif found is None and suffix in _COMPRESSED:
        raise DataError(f"{name}: is compressed. Unpack it, and give what was in it.")
    elif found is None and suffix in ("", ".json", ".txt", ".token") and not is_remote(name):
        found = _recognise_file(path)
    if found is None:
        raise DataError(f"{name}: not a kind of source that can be read. {_help()}")
    return found


def _first(recognises: Callable[[Kind], object]) -> str | None:
    return next((name for name, kind in KINDS.items() if recognises(kind)), None)


def _is_folder(path: Path, kind: Kind) -> bool:
    by_pattern = any(any(path.glob(pattern)) for pattern in kind.in_folder)
    return by_pattern or (kind.is_folder is not None and kind.is_folder(path))


def _in_words(names: Sequence[str], last: str = "or") -> str:
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def _help() -> str:
    suffixes = [suffix for kind in KINDS.values() for suffix in kind.suffixes]
    others = [kind.give for kind in KINDS.values() if kind.give]
    return (
        f"Give a {_in_words(suffixes)} file (several as in {{000..127}}.tar), {_in_words(others)}."
    )


def _recognise_file(path: Path) -> str | None:
    try:
        with path.open(encoding=encoding_of(path), errors="replace") as file:
            first = file.readline(4096)
    except OSError as error:
        hint = " A dataset on the Hub is written hf:ORG/NAME." if path.suffix == "" else ""
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check the path.{hint}"
        ) from error
    found = _first(lambda kind: kind.first_line and kind.first_line(first))
    if found is None and first.lstrip()[:1] in ("{", "["):
        return _recognise_json(path, first)
    return found


def _recognise_json(path: Path, first: str) -> str:
    try:
        whole = isinstance(parse_json(first), dict)
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
    found = _first(lambda kind: kind.in_json and kind.in_json(content))
    if found is None:
        raise DataError(
            f"{path}: JSON, but neither COCO captions (images and annotations) nor Karpathy's "
            "(images with filename, split and sentences) nor a list of objects with an image and "
            "captions each. One object a line is a .jsonl file."
        )
    return found


# --------------------------------------------------------------------------------------------------
# A name with the settings behind it → its kind, and how it is read.


_OWN = {
    "images": "image_folder",
    **{
        name: name
        for name in ("kind", "split", "subset", "split_file", "image_column", "caption_column")
    },
}
"""What can stand behind a source, as in `captions.json#split=val&images=val2014`, and the setting
of `data` that it is."""


def split_name(name: str) -> tuple[str, dict[str, str]]:
    """A source and the settings behind its last `#`, where they are such: `NAME#split=test`."""
    source, mark, settings = name.rpartition("#")
    pairs = [setting.partition("=") for setting in settings.split("&")]
    own = {key.replace("-", "_"): value for key, equals, value in pairs if equals}
    if not mark or len(own) < len(pairs) or not own.keys() <= _OWN.keys():
        return name, {}
    return source, own


def absolute_source(name: str) -> str:
    """A source that means the same from any folder."""
    plain, own = split_name(name)
    for key in {"images", "split_file"} & own.keys():
        own[key] = str(Path(own[key]).resolve())
    behind = "&".join(f"{key}={value}" for key, value in own.items())
    is_path = plain != TOY and not is_remote(plain) and not plain.startswith(HUB_PREFIX)
    absolute = os.path.abspath(plain) if is_path else plain
    return f"{absolute}#{behind}" if behind else absolute


def resolve(name: str, data: DataConfig, *, training: bool) -> tuple[str, str, SourceSettings]:
    """A source without what stands behind it, its kind, and the settings to read it with."""
    plain, behind = split_name(name)
    own = {_OWN[key]: value for key, value in behind.items()}
    settings = SourceSettings.model_validate({**data.model_dump(), **own, "training": training})
    kind = settings.kind or recognise(plain)
    if kind not in KINDS:
        raise ConfigError(f"{name}: there is no kind {kind!r}. There are {', '.join(KINDS)}.")
    if not KINDS[kind].splits:
        refuse_split(plain, kind, settings)
    if is_remote(plain) and not KINDS[kind].remote:
        suffixes = [end for one in KINDS.values() if one.remote for end in one.suffixes]
        raise DataError(
            f"{plain}: only {_in_words(suffixes, 'and')} files are read from elsewhere. Download "
            "it together with its images first."
        )
    return plain, kind, settings


# --------------------------------------------------------------------------------------------------
# A name of any kind → images with captions, all rows, or a stream of pairs.


def open_pairs(
    name: str, data: DataConfig | None = None, *, training: bool = True
) -> ImageCaptions:
    """Recognise a source of captioned images, check every row of it, and say what it is.

    Args:
        name: File, folder, pattern, dataset or `toy`, perhaps with settings behind a `#`.
        data: How to read it where nothing is said there.
        training: Whether to take the training split or the validation split where there are both
            and none is named.

    Raises:
        ConfigError: A setting does not go with the source.
        DataError: It cannot be read, or has bad rows.
    """
    name, kind, settings = resolve(name, data or DataConfig(), training=training)
    if kind == TOY:
        pairs, title, without = _toy_pairs(training=training), KINDS[TOY].title, ()
    else:
        pairs = _collect(name, kind, settings)
        title, without = pairs.kind, pairs.uncaptioned
    captions = sum(map(len, pairs.captions))
    line = f"{pairs.name}: {title}, {len(pairs):,} images, {captions:,} captions"
    if without:
        line += f"; {len(without):,} images without captions are left out, the first: {without[0]}"
    remark(f"{line}.")
    return pairs


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
    settings = SourceSettings(image_column=image_column, caption_column=caption_column)
    return _collect(str(path), "table", settings)


def read_all_rows(name: str, data: DataConfig) -> AllRows:
    """Recognise a source of captioned images and read all of its rows, good or bad."""
    name, kind, settings = resolve(name, data, training=True)
    if kind == TOY:
        toy = _toy_pairs(training=True)
        return AllRows(str(KINDS[TOY].title), toy, sum(map(len, toy.captions)))
    return read_all(name, *_rows(name, kind, settings))


def _toy_pairs(*, training: bool) -> PairSource:
    from clip_refine.toy import toy_train, toy_val  # late, since it is made of what is in data/

    return toy_train() if training else toy_val()


def _collect(name: str, kind: str, settings: SourceSettings) -> CaptionedImages:
    return collect(name, *_rows(name, kind, settings), _policy(settings))


def _policy(data: DataConfig) -> BadRowPolicy:
    return BadRowPolicy(skip=data.skip_bad, limit=data.max_bad)


def _rows(name: str, kind: str, settings: SourceSettings) -> tuple[str, Iterator[Row]]:
    """What to call the kind, and the rows, not yet checked."""
    files, title, read = _files(name, kind), KINDS[kind].title, KINDS[kind].rows
    if read is None:
        raise DataError(f"{name}: {kind} is no kind that is read from files.")
    rows = _any_listed(read(name, files, settings), name, settings)
    return title if isinstance(title, str) else title(files), rows


def _files(name: str, kind: str) -> list[str]:
    return expand(name, KINDS[kind].suffixes) if KINDS[kind].several else [name]


def _any_listed(rows: Iterator[Row], name: str, settings: SourceSettings) -> Iterator[Row]:
    """The rows; an error where a split file chooses none of them."""
    none = settings.listed is not None
    for row in rows:
        none = False
        yield row
    if none:
        raise DataError(
            f"{settings.split_file}: none of its {len(settings.listed or ()):,} images is in "
            f"{name}. Both must call them the same."
        )


def open_stream(name: str, data: DataConfig | None = None) -> PairStream:
    """Recognise a source, say what it is, and read it pair by pair as they are asked for.

    Args:
        name: File, pattern or dataset, perhaps with settings behind a `#`.
        data: How to read it where nothing is said there; among how many rows to draw the next one,
            and whether every caption is a pair.

    Raises:
        ConfigError: A setting does not go with the source.
        DataError: This kind cannot be streamed, or nothing is there.
    """
    data = data or DataConfig()
    name, kind, settings = resolve(name, data, training=True)
    passes = KINDS[kind].stream
    if passes is None:
        streamed = ", ".join(key for key, one in KINDS.items() if one.stream)
        raise DataError(
            f"{name}: {kind} cannot be streamed, only {streamed}. Leave out --data.streaming, or "
            "write the pairs as one of these."
        )
    rows, length = passes(name, _files(name, kind), settings)
    # nobody knows beforehand how many captions there are, or how many rows a split file chooses
    if data.captions == "all" or settings.split_file is not None:
        length = None
    stream = PairStream(
        name=name,
        kind=f"stream of {kind}",
        open_rows=rows,
        policy=_policy(data),
        buffer=data.shuffle_buffer,
        every_caption=data.captions == "all",
        length=length,
    )
    counted = "unknown length" if length is None else f"{length:,} rows"
    remark(f"{name}: {stream.kind}, {counted}.")
    return stream


def open_training(data: DataConfig) -> ImageCaptions | Stream:
    """All training sources as one, before any of it is held out."""
    if data.weights and len(data.weights) != len(data.sources):
        raise ConfigError(
            f"data.weights: {len(data.weights)} numbers for {len(data.sources)} sources in "
            "data.train. Give one for each."
        )
    if data.streaming:
        streams = [open_stream(name, data) for name in data.sources]
        if len(streams) == 1:
            return streams[0]
        if not data.weights:
            raise ConfigError(
                "data.weights is missing: streams do not tell how long they are, so say in which "
                f"shares to mix these {len(streams)}, as in --data.weights 2 1."
            )
        return StreamMixture(streams, data.weights)
    opened = [open_pairs(name, data) for name in data.sources]
    return opened[0] if len(opened) == 1 else Mixture(opened, data.weights)
