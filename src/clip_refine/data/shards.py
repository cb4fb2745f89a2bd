"""WebDataset shards: tar files in which the parts of a sample stand under one key.

`000012.jpg`, `000012.txt` and `000012.json` are one sample, as img2dataset writes them. They are
read by their position, so nothing is unpacked or copied. A key goes on behind a dot that a digit
follows, as in `img.001.jpg`; WebDataset itself ends it at the first.
"""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from clip_refine.data.datasets import in_any_order, readable
from clip_refine.data.images import SUFFIXES, ImageInMemory, is_clutter
from clip_refine.data.rows import OpenRows, Row, SourceSettings, is_remote, texts_of
from clip_refine.support.errors import DataError
from clip_refine.support.limits import IMAGE, TEXT, listed, parse_json, read_text

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
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension → position, size
    # extension → content, where it is kept, or as a text why it was not read
    content: dict[str, bytes | str] = field(default_factory=dict)
    problem: str | None = None  # what is wrong with it as a whole

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
        return _sample_rows(shard, settings, stream=True)

    return in_any_order(files, read), _count_samples(files)


def _count_samples(files: Sequence[str]) -> int | None:
    """By the `_stats.json` that img2dataset writes beside each shard."""
    total = 0
    for file in files:
        stats = Path(file).with_name(f"{Path(file).stem}_stats.json")
        try:
            total += int(parse_json(read_text(stats))["successes"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None
    return total


def _sample_rows(shard: str, settings: SourceSettings, *, stream: bool = False) -> Iterator[Row]:
    """The rows of a shard; images are where they lie in it, or are kept in memory."""
    listed = settings.listed
    for sample in read_samples(shard, settings, stream=stream):
        captions, problem = _sample_texts(sample, settings)
        wanted = (settings.image_column,) if settings.image_column else _IMAGES
        extension = next((part for part in wanted if part in sample.places), None)
        name = f"{sample.key}.{extension}"
        if listed is not None and name not in listed and sample.key not in listed:
            continue
        image = None
        if extension is not None:
            image = ImageInTar(shard, name, *sample.places[extension])
            content = sample.content.get(extension)
            if isinstance(content, str):
                problem = problem or f"its part .{extension} {content}"
            elif content is not None and problem is None:
                image = ImageInMemory(str(image), content)
        elif problem is None:
            problem = _without_image(sample)
        yield Row(sample.where, image, captions, problem)


def _without_image(sample: Sample) -> str:
    parts = sorted(sample.places)
    images = [part for part in parts if part.rpartition(".")[2] in _IMAGES]
    if not images:
        return f"has no image but {listed(parts)}. Remove it."
    return (
        f"has no image but {listed(parts)}: what stands behind the first dot is the part's "
        f"extension. Name it with --data.image-column {images[0]}, and that of the text with "
        "--data.caption-column."
    )


def read_samples(shard: str, settings: SourceSettings, *, stream: bool = False) -> Iterator[Sample]:
    """A shard's samples in order of their first part; in a stream the parts stand side by side."""
    waiting: list[Sample] = []
    current: dict[str, Sample] = {}
    seen: set[str] = set()
    texts = {*TEXTS, "json", settings.caption_column}
    images = {*_IMAGES, settings.image_column} - texts

    def most_of(name: str) -> tuple[int | None, bool]:
        """The bytes that a part may have, where it is of use, and whether it is read at once."""
        extension = _key(name, settings)[1]
        most = TEXT if extension in texts else IMAGE if extension in images else None
        return most, most is not None and (stream or extension in texts)

    broken: DataError | None = None
    try:
        for name, start, size, content in _members(shard, most_of):
            key, extension = _key(name, settings)
            if not key or is_clutter(PurePosixPath(name)):
                continue
            sample = current.get(key)
            if sample is None or extension in sample.places:
                if stream:
                    yield from waiting
                    waiting, current = [], {}
                sample = current[key] = Sample(shard, key)
                if key in seen:
                    advice = " or, in a stream, side by side with it, as by `tar --sort=name`"
                    sample.problem = (
                        "its key stands earlier in the shard already. Give it one of its own"
                        f"{advice * stream}."
                    )
                seen.add(key)
                waiting.append(sample)
            sample.places[extension] = start, size
            if content is not None:
                sample.content[extension] = content
    except DataError as error:
        broken = error  # what was read before is good all the same
    yield from waiting
    if broken is not None:
        raise broken


def _key(name: str, settings: SourceSettings) -> tuple[str, str]:
    """A sample's key and the part's extension; no key where a name has no extension."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    named = (settings.image_column or "", settings.caption_column or "")
    if not any("." in column for column in named):
        while extension[:1].isdigit() and "." in extension:
            more, _, extension = extension.partition(".")
            stem = f"{stem}.{more}"
    return (f"{folder}{slash}{stem}" if dot and stem else ""), extension.lower()


def _sample_texts(sample: Sample, settings: SourceSettings) -> tuple[tuple[str, ...], str | None]:
    """The captions of a sample, and what is wrong with them.

    They are its .txt, else what its .json has; `caption_column` names another extension or
    another value in the .json. A sample without any has no captions, which is no mistake.
    """
    if sample.problem:
        return (), sample.problem
    wanted = (settings.caption_column,) if settings.caption_column else TEXTS
    used = next((part for part in (*wanted, "json") if part in sample.content), None)
    if used is None:
        return (), None
    content = sample.content[used]
    if isinstance(content, str):
        return (), f"its part .{used} {content}"
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if used in wanted:
        return (text,), None
    try:
        record = parse_json(text)
    except ValueError as error:
        return (), f"its .json is no JSON ({error}). Mend or remove it."
    value: Any = record
    if settings.caption_column and isinstance(record, dict):
        value = record.get(settings.caption_column)
    captions = texts_of(value)
    return ((), f"its .json {captions}") if isinstance(captions, str) else (captions, None)


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""Programs that compress whole files, by the bytes that these begin with."""


class _Watched:
    """A file that remembers how it ended, because tarfile does not say that the end is missing."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.first = b""
        self.last = b""

    def read(self, size: int) -> bytes:
        """As the file's."""
        content = self.file.read(size)
        self.first = self.first or content[:8]
        self.last = (self.last + content[-512:])[-512:]
        return content


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes | str:
    """The content of a file in a tar file, or as a text why it is not read."""
    if member.issparse():
        return "is a sparse file. Write the shard anew without such."
    if member.size > most:
        return f"has {member.size:,} bytes, more than the {most:,} that are read. Shorten it."
    file = tar.extractfile(member)
    return file.read() if file else "is no file."


def _members(
    shard: str, most_of: Callable[[str], tuple[int | None, bool]]
) -> Iterator[tuple[str, int, int, bytes | str | None]]:
    """(name, position, size, content where it is wanted) of every file in a tar file."""
    import fsspec

    watched = None
    try:
        with fsspec.open(shard, "rb") as file:
            watched = _Watched(file)  # pyright: ignore[reportArgumentType]
            with tarfile.open(fileobj=watched, mode="r|") as tar:  # pyright: ignore
                for member in tar:
                    if not member.isfile():
                        continue
                    most, at_once = most_of(member.name)
                    content = None
                    if most is not None and (at_once or member.issparse() or member.size > most):
                        content = _content(tar, member, most)
                    yield member.name, member.offset_data, member.size, content
            if watched.last.strip(b"\0"):
                raise tarfile.ReadError("the end is missing")
    except tarfile.TarError as error:
        first = watched.first if watched else b""
        packed = next((name for magic, name in _PACKED.items() if first.startswith(magic)), None)
        if packed:
            raise DataError(
                f"{shard}: is compressed with {packed}, and its images could not be read by their "
                "position. Unpack it to a plain .tar file first."
            ) from error
        raise DataError(
            f"{shard}: is cut off or no tar file ({error}). Write or download it again."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # headers can say anything
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
