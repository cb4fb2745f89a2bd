"""WebDataset shards: tar files in which the parts of a sample stand side by side under one key.

`000012.jpg`, `000012.txt` and `000012.json` are one sample, as img2dataset writes them. They are
read by their position, so nothing is unpacked or copied.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clip_refine.data.datasets import readable
from clip_refine.data.images import SUFFIXES
from clip_refine.data.rows import ImageInMemory, OpenRows, Row, SourceSettings, is_remote
from clip_refine.data.tables import in_any_order, texts_of
from clip_refine.support.errors import DataError

TEXTS = ("txt", "text", "caption")
_IMAGES = tuple(suffix[1:] for suffix in sorted(SUFFIXES))


@dataclass(frozen=True, slots=True)
class ImageInTar:
    """An image between two positions of a local tar file."""

    shard: str
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def read(self) -> bytes:
        """The content of the image file."""
        with open(self.shard, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass
class Sample:
    """The parts of one key, as they come out of a tar file."""

    shard: str  # the tar file
    key: str  # what the parts are called without their extension
    content: dict[str, bytes] = field(default_factory=dict)  # extension → content
    start: dict[str, int] = field(default_factory=dict)  # extension → position in the tar file
    repeated: bool = False

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return f"{self.shard}, sample {self.key}"


def shard_rows(name: str, files: Sequence[str], settings: SourceSettings) -> Iterator[Row]:
    """The rows of shards, one a sample; remote ones are fetched first."""
    for shard in _downloaded(name, files):
        yield from _sample_rows(shard, settings)


def shard_stream(
    name: str, files: Sequence[str], settings: SourceSettings
) -> tuple[OpenRows, int | None]:
    """Passes over shards with the images' content, and their samples where that is written."""

    def read(shard: str) -> Iterator[Row]:
        return _sample_rows(shard, settings, keep=True)

    return in_any_order(files, read), _count_samples(files)


def _count_samples(files: Sequence[str]) -> int | None:
    """By the `_stats.json` that img2dataset writes beside each shard."""
    total = 0
    for file in files:
        stats = Path(file).with_name(f"{Path(file).stem}_stats.json")
        try:
            total += int(json.loads(stats.read_text())["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return total


def _sample_rows(shard: str, settings: SourceSettings, *, keep: bool = False) -> Iterator[Row]:
    """The rows of a shard; images are where they lie in it, or are kept in memory."""
    listed = settings.listed
    for sample in read_samples(shard):
        captions, problem = _sample_texts(sample, settings)
        extension = _sample_image(sample, settings)
        name = f"{sample.key}.{extension}"
        if listed is not None and name not in listed and sample.key not in listed:
            continue
        image = None
        if extension is not None:
            content = sample.content[extension]
            image = ImageInTar(shard, name, sample.start[extension], len(content))
            if keep:
                image = ImageInMemory(str(image), content)
        elif problem is None:
            problem = f"has no image but {', '.join(sorted(sample.content))}. Remove it."
        yield Row(sample.where, image, captions, problem)


def read_samples(shard: str) -> Iterator[Sample]:
    """The samples of a shard, local or remote, in order."""
    sample: Sample | None = None
    seen: set[str] = set()
    for name, start, content in _members(shard):
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem or base.startswith("._"):
            continue
        key = f"{folder}{slash}{stem}"
        extension = extension.lower()
        if sample is None or sample.key != key or extension in sample.content:
            if sample is not None:
                yield sample
            sample = Sample(shard, key, repeated=key in seen)
            seen.add(key)
        sample.content[extension] = content
        sample.start[extension] = start
    if sample is not None:
        yield sample


def _sample_image(sample: Sample, settings: SourceSettings) -> str | None:
    """The extension of the sample's image, None where it has none."""
    wanted = (settings.image_column,) if settings.image_column else _IMAGES
    return next((extension for extension in wanted if extension in sample.content), None)


def _sample_texts(sample: Sample, settings: SourceSettings) -> tuple[tuple[str, ...], str | None]:
    """The captions of a sample, and what is wrong with them.

    They are its .txt, else what its .json has; `caption_column` names another extension or
    another value in the .json. A sample without any has no captions, which is no mistake.
    """
    if sample.repeated:
        return (), "its key stands earlier in the shard already. Give it one of its own."
    wanted = (settings.caption_column,) if settings.caption_column else TEXTS
    for extension in wanted:
        if extension in sample.content:
            return (sample.content[extension].decode("utf-8-sig", errors="surrogateescape"),), None
    if "json" not in sample.content:
        return (), None
    try:
        record = json.loads(sample.content["json"].decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        return (), f"its .json is no JSON ({error}). Mend or remove it."
    value: Any = record
    if settings.caption_column and isinstance(record, dict):
        value = record.get(settings.caption_column)
    captions = texts_of(value)
    return ((), f"its .json {captions}") if isinstance(captions, str) else (captions, None)


class _Watched:
    """A file that remembers how it ended, because tarfile does not say that the end is missing."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.last = b""

    def read(self, size: int) -> bytes:
        """As the file's."""
        content = self.file.read(size)
        self.last = (self.last + content[-512:])[-512:]
        return content


def _members(shard: str) -> Iterator[tuple[str, int, bytes]]:
    """(name, position, content) of every file in a tar file."""
    import fsspec

    try:
        with fsspec.open(shard, "rb") as file:
            watched = _Watched(file)  # pyright: ignore[reportArgumentType]
            with tarfile.open(fileobj=watched, mode="r|") as tar:  # pyright: ignore
                for member in tar:
                    content = tar.extractfile(member) if member.isfile() else None
                    if content is not None:
                        yield member.name, member.offset_data, content.read()
            if watched.last.strip(b"\0"):
                raise tarfile.ReadError("the end is missing")
    except tarfile.TarError as error:
        raise DataError(
            f"{shard}: is cut off or no tar file ({error}). Write or download it again."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{shard}: cannot be read ({getattr(error, 'strerror', None) or error}). Check the "
            "path."
        ) from error


def _downloaded(name: str, shards: Sequence[str]) -> list[str]:
    """The shards as local files; remote ones are fetched once into the cache of `datasets`."""
    remote = [shard for shard in shards if is_remote(shard)]
    if not remote:
        return list(shards)
    import datasets

    with readable(name):
        fetched = datasets.DownloadManager().download(remote)
    local = dict(zip(remote, fetched, strict=True))
    return [str(local.get(shard, shard)) for shard in shards]
