"""Names of sources → images with captions."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from clip_refine.config import DataConfig, SourceKind
from clip_refine.console import remark
from clip_refine.data import (
    BadRowPolicy,
    CaptionedImages,
    ImageCaptions,
    Mixture,
    PairStream,
    ReadOptions,
    Stream,
    StreamMixture,
    open_pairs,
    open_stream,
    recognise,
)
from clip_refine.data.all_rows import AllRows, read_all
from clip_refine.data.sources.opened import source_rows
from clip_refine.errors import ConfigError
from clip_refine.toy import toy_train, toy_val

TOY = "toy"
_WITHOUT_SPLITS = ("table", "token", "coco", "jsonl", "parquet", "webdataset")
_OWN = ("kind", "split", "subset", "images")
"""What can stand behind a source, as in `captions.json#split=val&images=val2014`."""


def open_source(name: str, config: DataConfig, *, training: bool = True) -> ImageCaptions:
    """Recognise a source of captioned images, open it, and say what it is.

    Args:
        name: File, folder, pattern or dataset, and its own settings behind a `#`.
        config: Settings of all sources.
        training: Whether to take the training split or the validation split where there are both
            and none is named.

    Raises:
        ConfigError: A setting behind `#` is not known.
        DataError: The kind is not known, or the source is bad.
    """
    name, own = split_name(name)
    kind: SourceKind = own.get("kind") or config.kind or recognise(name)
    if kind == "toy":
        toy = toy_train() if training else toy_val()
        _say(toy.name, "drawn world", toy)
        return toy
    _check_split(name, kind, own.get("split") or (config.split if training else None), config)
    pairs = open_pairs(name, kind, _read_options(config, own), policy(config), training=training)
    _say(name, pairs.kind, pairs)
    return pairs


def open_training(config: DataConfig) -> ImageCaptions | Stream:
    """All training sources as one, before any of it is held out.

    Raises:
        ConfigError: There is not one weight for each source, or none for streams that are to be
            mixed, or a setting behind `#` is not known.
        DataError: A source is bad, or cannot be streamed.
    """
    if config.weights and len(config.weights) != len(config.sources):
        raise ConfigError(
            f"data.weights: {len(config.weights)} numbers for {len(config.sources)} sources in "
            "data.train. Give one for each."
        )
    if config.streaming:
        streams = [_open_stream(name, config) for name in config.sources]
        if len(streams) == 1:
            return streams[0]
        if not config.weights:
            raise ConfigError(
                "data.weights is missing: streams do not tell how long they are, so say in which "
                f"shares to mix these {len(streams)}, as in --data.weights 2 1."
            )
        return StreamMixture(streams, config.weights)
    opened = [open_source(name, config) for name in config.sources]
    return opened[0] if len(opened) == 1 else Mixture(opened, config.weights)


def _open_stream(name: str, config: DataConfig) -> PairStream:
    name, own = split_name(name)
    kind: SourceKind = own.get("kind") or config.kind or recognise(name)
    _check_split(name, kind, own.get("split") or config.split, config)
    stream = open_stream(
        name,
        kind,
        _read_options(config, own),
        policy(config),
        buffer=config.shuffle_buffer,
        every_caption=config.captions == "all",
    )
    length = "unknown length" if stream.length is None else f"{stream.length:,} rows"
    remark(f"{name}: {stream.kind}, {length}.")
    return stream


def read_all_rows(name: str, config: DataConfig) -> AllRows:
    """Recognise a source of captioned images and read all of its rows, good or bad.

    Raises:
        ConfigError: A setting behind `#` is not known.
        DataError: The kind is not known, or nothing can be read.
    """
    name, own = split_name(name)
    kind: SourceKind = own.get("kind") or config.kind or recognise(name)
    if kind == "toy":
        toy = toy_train()
        return AllRows("drawn world", toy, sum(map(len, toy.captions)))
    _check_split(name, kind, own.get("split") or config.split, config)
    called, rows = source_rows(name, kind, _read_options(config, own), training=True)
    return read_all(name, called, rows)


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """A source and the settings behind its last `#`, where they are such.

    >>> split_name("hf:nlphuji/flickr30k#split=test")
    ('hf:nlphuji/flickr30k', {'split': 'test'})

    Raises:
        ConfigError: A kind is not known.
    """
    source, mark, settings = name.rpartition("#")
    pairs = [setting.partition("=") for setting in settings.split("&")]
    if not mark or not all(equals and key in _OWN for key, equals, _ in pairs):
        return name, {}
    own = {key: value for key, _, value in pairs}
    if "kind" in own and own["kind"] not in get_args(SourceKind):
        kinds = ", ".join(get_args(SourceKind))
        raise ConfigError(f"{name}: there is no kind {own['kind']!r}. There are {kinds}.")
    return source, own


def policy(config: DataConfig) -> BadRowPolicy:
    """What to do about bad rows."""
    return BadRowPolicy(skip=config.skip_bad, limit=config.max_bad)


def absolute_source(name: str) -> str:
    """A source that means the same from any folder."""
    plain, own = split_name(name)
    if "images" in own:
        own["images"] = str(Path(own["images"]).resolve())
    behind = "&".join(f"{key}={value}" for key, value in own.items())
    is_path = plain != TOY and "://" not in plain and not plain.startswith("hf:")
    absolute = os.path.abspath(plain) if is_path else plain
    return f"{absolute}#{behind}" if behind else absolute


def _check_split(name: str, kind: SourceKind, split: str | None, config: DataConfig) -> None:
    """Refuse a split that would be passed over, so that nobody trains on what they test on."""
    if split and kind in _WITHOUT_SPLITS and not config.split_file:
        raise ConfigError(
            f"{name}: split {split!r} was asked for, but a source of kind {kind} has no splits. "
            "Leave it out, say NAME#split=... of the source that has it, or choose images with "
            "--data.split-file."
        )


def _read_options(config: DataConfig, own: dict[str, Any]) -> ReadOptions:
    options = ReadOptions(
        image_column=config.image_column,
        caption_column=config.caption_column,
        image_folder=config.image_folder,
        split=config.split,
        subset=config.subset,
        split_file=config.split_file,
        allow_outside=config.allow_outside,
    )
    changes: dict[str, Any] = {name: own[name] for name in ("split", "subset") if name in own}
    if "images" in own:
        changes["image_folder"] = Path(own["images"])
    return replace(options, **changes)


def _say(name: str, kind: str, pairs: ImageCaptions) -> None:
    """One line about what was recognised."""
    captions = sum(map(len, pairs.captions))
    line = f"{name}: {kind}, {len(pairs):,} images, {captions:,} captions"
    if isinstance(pairs, CaptionedImages) and pairs.uncaptioned:
        count, first = len(pairs.uncaptioned), pairs.uncaptioned[0]
        line += f"; {count:,} images without captions are left out, the first: {first}"
    remark(f"{line}.")
