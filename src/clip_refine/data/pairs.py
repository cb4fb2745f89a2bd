"""Images with captions: which are the same, rows that become them or are bad, parts, mixtures."""

import bisect
import hashlib
import itertools
import json
import os
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps

from clip_refine.config import DataConfig
from clip_refine.data.images import (
    ImageInMemory,
    ImagePlace,
    image_problem,
    load_place,
    read_place,
    to_rgb,
)
from clip_refine.data.rows import Row, SourceSettings, find_columns
from clip_refine.support.console import Bar, remark
from clip_refine.support.errors import DataError

# --------------------------------------------------------------------------------------------------
# What anybody may pass: small protocols, which every source in the package fits, too.


class Images(Protocol):
    """What image batches need of a source; it may also have `image_bytes(index) -> bytes`."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        ...

    @abstractmethod
    def image_name(self, index: int) -> str:
        """What to call image `index` in a message, usually its path."""
        ...


class ImageCaptions(Images, Protocol):
    """Images with their captions, by position; every kind of source becomes one of these.

    Attributes:
        name: What to call the source in logs and tables.
        captions: `captions[i]` are the texts of image `i`, at least one.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def captions(self) -> Sequence[Sequence[str]]: ...  # noqa: D102


class LabelledImages(Images, Protocol):
    """Images with one class each and the prompts that name the classes.

    Attributes:
        name: The task's name in tables, for example `cifar10`.
        class_names: What goes into the templates, one text a class.
        templates: Prompts with one `{}` for the class name.
        labels: `labels[i]` is the position of image `i`'s class in `class_names`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def templates(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> Sequence[int]: ...  # noqa: D102


# --------------------------------------------------------------------------------------------------
# What happens to bad rows: the one place that decides, for every kind of source.


LISTED = 10
"""Bad rows that a message shows."""
ENOUGH = 200
"""Rows of a stream after which a share of bad ones means something."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        where: File and row.
        problem: What is wrong and what to do.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class BadRowPolicy:
    """What to do about bad rows.

    Attributes:
        skip: Go on without them instead of stopping.
        limit: Share of bad rows above which to stop all the same, 0-1.
    """

    skip: bool = False
    limit: float = 0.05


class BadRows:
    """The bad rows of one source, and of how many rows in all."""

    def __init__(self, source: str, policy: BadRowPolicy) -> None:
        self.source = source
        self.policy = policy
        self.found: list[BadRow] = []
        self.total = 0

    def add(self, where: str, problem: str) -> None:
        """Put a row on the list."""
        self.found.append(BadRow(where, problem))

    def settle(self, *, say: bool = True) -> None:
        """All rows were seen: stop, or go on without the bad ones."""
        if not self.found:
            return
        if not self.policy.skip:
            raise DataError(f"{self._listed()}\n{self.source}: {self._counted()}. {self._advice()}")
        if self.share > self.policy.limit:
            raise DataError(f"{self._listed()}\n{self._too_many()}")
        if say:
            remark(
                f"{self.source}: {self._counted()} and skipped, the first: {self.found[0]}",
                "yellow",
            )

    def settle_so_far(self) -> None:
        """A stream goes on: stop at the first bad row, or when they are too many."""
        if not self.found:
            return
        if not self.policy.skip:
            raise DataError(
                f"{self._listed()}\n{self.source}: a bad row in a stream. Mend it, or pass "
                "--data.skip-bad to go on without such rows."
            )
        if self.total >= ENOUGH and self.share > self.policy.limit:
            raise DataError(f"{self._listed()}\n{self._too_many()}")

    @property
    def share(self) -> float:
        """Of the rows seen, 0-1."""
        return len(self.found) / max(1, self.total)

    def _listed(self) -> str:
        """Rows with what is wrong with them; what several have in common stands once."""
        by_advice: dict[str, dict[str, list[str]]] = {}
        for row in self.found[:LISTED]:
            fact, _, advice = row.problem.partition(". ")
            by_advice.setdefault(advice, {}).setdefault(fact, []).append(row.where)
        lines = []
        for advice, facts in by_advice.items():
            own = [f"{_places(where)}: {fact}" for fact, where in facts.items()]
            if advice:
                own = [f"{line}." for line in own]
                own = [*own, advice] if len(own) > 1 else [f"{own[0]} {advice}"]
            lines += own
        more = len(self.found) - LISTED
        return "\n".join(lines + [f"... and {more:,} more bad rows."] * (more > 0))

    def _counted(self) -> str:
        return f"{len(self.found):,} of {self.total:,} rows are bad ({self.share:.1%})"

    def _advice(self) -> str:
        if self.share <= self.policy.limit:
            return "Mend them, or pass --data.skip-bad to go on without them."
        if self.share == 1 and all(" not found" in row.problem for row in self.found):
            return "Where the images lie elsewhere, name their folder with --data.image-folder."
        return (
            "Mend them: --data.skip-bad goes on without bad rows only up to "
            f"{self.policy.limit:.1%} of all (--data.max-bad)."
        )

    def _too_many(self) -> str:
        return (
            f"{self.source}: {self._counted()}, more than the {self.policy.limit:.1%} that "
            "--data.skip-bad lets pass. Look at them, or raise --data.max-bad."
        )


def _places(rows: Sequence[str]) -> str:
    """Rows of one file by their numbers, others by their names.

    >>> _places(["a.csv, line 2", "a.csv, line 5"]), _places(["pairs[0]", "pairs[1]"])
    ('a.csv, line 2, 5', 'pairs[0, 1]')
    """
    found = [re.fullmatch(r"(.*[ \[])(\d+)(\]?)", row) for row in rows]
    parts = [one.groups() for one in found if one]
    if len(parts) == len(rows) and len({(head, tail) for head, _, tail in parts}) == 1:
        head, _, tail = parts[0]
        return f"{head}{', '.join(number for _, number, _ in parts)}{tail}"
    return ", ".join(rows)


def write_skipped(skipped: Sequence[BadRow], path: Path) -> None:
    """One JSON object a line: `where` and `problem`. Writes nothing where nothing was skipped."""
    if skipped:
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in skipped]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def skipped_rows(sources: Iterable[Any]) -> list[BadRow]:
    """What was skipped in these sources, each row once."""
    rows = [row for source in sources for row in source.skipped]
    return list(dict.fromkeys(rows))


# --------------------------------------------------------------------------------------------------
# What every source in the package declares besides, and the one way there from any other object.


Mixing = tuple[Sequence[int], Sequence[float]]
"""For each image the number of its group, and for each group its weight."""
Ending = tuple[int, str]
"""Size of an image file and fingerprint of its last bytes, which tell it from most others."""


GivenPairs = ImageCaptions | Sequence[tuple[Any, Any]] | Any
"""What Python callers may give: an object that fits the protocol; a list, or a dataset as torch has
them, of (PIL image or path, caption or captions) or of named values; or a `datasets.Dataset`."""


class ImageSource(Images):
    """Images of which some are files, or stored as files are."""

    def image_bytes(self, index: int) -> bytes | None:
        """The content of image `index`'s file, None where it is drawn; OSError where it is gone."""
        return None

    def image_ending(self, index: int) -> Ending | None:
        """Of image `index`'s file, None where it is drawn; OSError where it is gone."""
        data = self.image_bytes(index)
        return None if data is None else ending(data)

    def origin(self, index: int) -> tuple["ImageSource", int]:
        """The source that stores image `index`, and its position there."""
        return self, index


class PairSource(ImageSource):
    """Images with captions."""

    name: str  # what to call it
    captions: Sequence[Sequence[str]]  # the texts of each image
    skipped: Sequence[BadRow] = ()  # rows that were left out
    mixing: Mixing | None = None  # what an epoch takes from where; None for each image once

    def __len__(self) -> int:
        return len(self.captions)


class StoredImages(ImageSource):
    """Images that lie in files, or in something larger such as an archive or a table."""

    places: Sequence[Any]  # where each image is

    def __len__(self) -> int:
        return len(self.places)

    def place_of(self, index: int) -> ImagePlace:
        """Where image `index` is."""
        return self.places[index]

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB; DataError where that cannot be done."""
        return load_place(self.place_of(index))

    def image_name(self, index: int) -> str:
        """The image's path, or what it is called in its table or archive."""
        return str(self.place_of(index))

    def image_bytes(self, index: int) -> bytes:
        """The content of the image's file; OSError where it is gone."""
        return read_place(self.place_of(index))

    def image_ending(self, index: int) -> Ending:
        """Of the image's file; OSError where it is gone."""
        place = self.place_of(index)
        return file_ending(place) if isinstance(place, Path) else ending(place.read())


class _OwnImages(ImageSource):
    """A user's own object: what it may have besides the protocol is looked for here alone."""

    def __init__(self, own: Images) -> None:
        self.own = own
        self._read: Callable[[int], bytes | None] | None = getattr(own, "image_bytes", None)

    def __len__(self) -> int:
        return len(self.own)

    def load_image(self, index: int) -> Image.Image:
        return self.own.load_image(index)

    def image_name(self, index: int) -> str:
        return self.own.image_name(index)

    def image_bytes(self, index: int) -> bytes | None:
        return self._read(index) if self._read else None

    def image_ending(self, index: int) -> Ending | None:
        try:  # the name is a path most often, which saves reading all of the file
            return self._read and file_ending(Path(self.image_name(index)))
        except (OSError, ValueError):
            return super().image_ending(index)


class _OwnPairs(_OwnImages, PairSource):
    """The same with captions."""

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        self.name, self.captions = own.name, own.captions
        self.skipped = getattr(own, "skipped", ())
        self.mixing = getattr(own, "mixing", None)


def as_images(images: Images) -> ImageSource:
    """The images with all members declared."""
    return images if isinstance(images, ImageSource) else _OwnImages(images)


def as_pairs(pairs: GivenPairs, data: DataConfig | None = None) -> PairSource:
    """The pairs with all members declared, from anything that pairs may be given as.

    Of named values `data` says which are image and caption where they are called as nobody knows.
    """
    if isinstance(pairs, PairSource):
        return pairs
    needed = ("name", "captions", "__len__", "load_image", "image_name")
    missing = [name for name in needed if not hasattr(pairs, name)]
    if not missing:
        return _OwnPairs(pairs)
    columns = data.model_dump(include={"image_column", "caption_column"}) if data else {}
    settings = SourceSettings(allow_outside=True, **columns)  # of the caller's own
    listed = isinstance(pairs, list | tuple)
    given: Any = pairs
    if hasattr(given, "iloc"):  # a table of pandas
        pairs, listed = given.to_dict("records"), True
    if isinstance(pairs, Mapping):
        raise DataError(
            f"{type(pairs).__name__} of {', '.join(map(repr, pairs))}: give one of them."
        )
    if not listed and hasattr(pairs, "select_columns") and hasattr(pairs, "__len__"):
        from clip_refine.data.datasets import dataset_rows  # which files need nothing of

        name = str(getattr(pairs, "builder_name", None) or "dataset")
        return collect(name, "dataset", dataset_rows(pairs, name, settings), BadRowPolicy())
    if isinstance(pairs, str | bytes) or not {"__len__", "__getitem__"} <= {*dir(pairs)}:
        raise DataError(
            f"{type(pairs).__name__}: has no {', '.join(missing)}, so it is no source of pairs. "
            "Give a list, or a dataset with a length, of (image or path, caption or captions) or "
            f"of named values, a datasets.Dataset, or an object with {', '.join(needed)}; what is "
            "to be opened or streamed is named in data.train."
        )
    name = "pairs" if listed else type(pairs).__name__
    return collect(name, "list", _given_rows(pairs, name, settings), BadRowPolicy())


def has_columns(pairs: GivenPairs) -> bool:
    """Whether pairs that were given are named values, or of a kind that `as_pairs` refuses."""
    rows: Any = pairs
    if hasattr(rows, "load_image"):
        return False
    if isinstance(rows, Mapping) or not {"__len__", "__getitem__"} <= {*dir(rows)}:
        return True
    named = hasattr(rows, "column_names") or hasattr(rows, "iloc")
    return named or (len(rows) > 0 and isinstance(rows[0], Mapping))


_ASKING = threading.Lock()  # as a dataset of torch is asked by one thread only


@dataclass(slots=True, eq=False)
class _GivenImage:
    """An image that is handed in as an object, asked for each time but the first."""

    name: str
    pairs: Any  # with those that come with it
    number: int
    settings: SourceSettings
    first: Image.Image | None  # as it came with its captions, until it was looked at

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The content of an image file that decodes to it bit by bit, made without compressing."""
        file = BytesIO()
        image, self.first = self.first, None
        if image is None:
            image, _ = _pair_of(self.pairs, self.number, self.name, self.settings)
        to_rgb(ImageOps.exif_transpose(image)).save(file, "PPM")
        return file.getvalue()


def _given_rows(pairs: Any, name: str, settings: SourceSettings) -> Iterator[Row]:
    for number in range(len(pairs)):
        where = f"{name}[{number}]"
        image, captions = _pair_of(pairs, number, where, settings)
        is_path = not isinstance(image, Image.Image)
        place = Path(image) if is_path else _GivenImage(where, pairs, number, settings, image)
        yield Row(where, place, captions)


def _pair_of(
    pairs: Any, number: int, where: str, settings: SourceSettings
) -> tuple[Any, tuple[str, ...]]:
    """Image and captions that stand there, checked."""
    with _ASKING:
        pair = pairs[number]
    if isinstance(pair, Mapping):
        pair = [pair[column] for column in find_columns(where, list(pair), settings)]
    image, texts = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
    captions = (texts,) if isinstance(texts, str) else texts
    if (
        not isinstance(image, Image.Image | str | Path)
        or not (isinstance(captions, list | tuple) and captions)
        or not all(isinstance(text, str) for text in captions)
    ):
        raise DataError(
            f"{where}: expected (image, caption), the image a PIL image or a path, so without a "
            "transform to tensors, and the caption a text or a list of texts, got "
            f"{pair!r:.80}."
        )
    return image, tuple(captions)


# --------------------------------------------------------------------------------------------------
# What images and captions hold, as short fingerprints.


def image_bytes(images: Images, index: int) -> bytes | None:
    """The content of the file that image `index` is decoded from, or None for a drawn one."""
    try:
        return as_images(images).image_bytes(index)
    except OSError as error:
        raise _unreadable(images.image_name(index), error) from error


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name}: cannot be read ({error.strerror or error}). Check the path.")


def image_fingerprint(images: Images, index: int) -> str:
    """Of the image file's content, wherever it is stored; of a drawn image's pixels and name."""
    data = image_bytes(images, index)
    if data is not None:
        return fingerprint(data)
    image = images.load_image(index)
    name = images.image_name(index)
    return fingerprint(
        name.encode(), image.mode.encode(), repr(image.size).encode(), image.tobytes()
    )


def pairs_fingerprint(pairs: ImageCaptions, *, in_order: bool = False) -> str:
    """Which images with which captions, whatever the folder they lie in and, by default, the order.

    Of every image's file name, file size and captions; no image is read, so that it costs a look
    at each file. Images that were changed without a change of size keep it: `image_fingerprint`
    tells those apart.
    """
    of_each = []
    for index, captions in enumerate(pairs.captions):
        name = pairs.image_name(index)
        facts = (Path(name).name, str(_file_size(name)), *captions)
        of_each.append(fingerprint(*(fact.encode() for fact in facts)).encode())
    return fingerprint(*(of_each if in_order else sorted(of_each)))


def _file_size(name: str) -> int:
    """In bytes; 0 for what is no file of its own, such as a drawn image or one in an archive."""
    try:
        return Path(name).stat().st_size
    except (OSError, ValueError):
        return 0


def fingerprint(*parts: bytes) -> str:
    """32 hexadecimal digits, other ones for other parts: ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # so that parts cannot run together
        digest.update(part)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Which images are the same: by content, whatever they are called and wherever they lie.


_END = 2048
"""Bytes at the end of a file. Whoever checked the image has just read there, so the disk need not
be asked again; nearly all different images of one size differ in them."""


def ending(data: bytes) -> Ending:
    """Of the content of a file."""
    return len(data), fingerprint(data[-_END:])


def file_ending(path: Path) -> Ending:
    """Of a file, of which no more is read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        return size, fingerprint(file.read())


def image_groups(*sources: Images) -> list[list[int]]:
    """For every image of each source the number of its group: equal where the content is equal.

    Files are told apart by their size, those of one size by their end, and only those that end
    alike are read as a whole. Drawn images are the same where name and pixels are.
    """
    places = [[_place(source, i) for i in range(len(source))] for source in map(as_images, sources)]
    first = {same: (size, at) for of_one in places for same, size, at in of_one}
    by_size: dict[Hashable, list[Hashable]] = {}
    for same, (size, _) in first.items():
        by_size.setdefault(size, []).append(same)
    groups = list(by_size.values())
    for look in (image_ending, image_fingerprint):
        groups = list(_apart(groups, lambda same, look=look: look(*first[same][1])))
    number_of = {same: number for number, group in enumerate(groups) for same in group}
    return [[number_of[same] for same, _, _ in of_one] for of_one in places]


def _place(source: ImageSource, index: int) -> tuple[Hashable, Hashable, tuple[ImageSource, int]]:
    """What is surely one image, what equal images have in common at least, and where to look."""
    source, index = source.origin(index)
    place = source.place_of(index) if isinstance(source, StoredImages) else None
    if isinstance(place, Path):
        try:
            found = place.stat()
        except OSError as error:
            raise _unreadable(str(place), error) from error
        # a file is the same under every name and link
        return (found.st_dev, found.st_ino), found.st_size, (source, index)
    at_end = image_ending(source, index)
    size = source.image_name(index) if at_end is None else at_end[0]
    same = (id(source), index) if place is None else place
    return same, size, (source, index)


def image_ending(source: Images, index: int) -> Ending | None:
    """Of the file that image `index` is decoded from, or None for a drawn one."""
    try:
        return as_images(source).image_ending(index)
    except OSError as error:
        raise _unreadable(source.image_name(index), error) from error


def _apart(
    groups: Iterable[list[Hashable]], look: Callable[[Hashable], Hashable]
) -> Iterator[list[Hashable]]:
    """Groups of several split by what is seen in each."""
    for group in groups:
        if len(group) < 2:
            yield group
            continue
        parts: dict[Hashable, list[Hashable]] = {}
        for one in group:
            parts.setdefault(look(one), []).append(one)
        yield from parts.values()


def warn_of_shared(held_out: Images, shared: Sequence[int]) -> None:
    """Say that some held-out images, by their positions, are trained on, too."""
    if shared:
        remark(
            f"Beware: {len(shared):,} of the {len(held_out):,} held-out images are trained on, "
            "too, so the scores after training are not held-out scores. The first: "
            f"{held_out.image_name(shared[0])}.",
            "yellow",
        )


# --------------------------------------------------------------------------------------------------
# Rows of any source → images with captions, every row checked.


@dataclass(frozen=True)
class CaptionedImages(StoredImages, PairSource):
    """Images with one or more captions each, wherever they are stored.

    Attributes:
        name: The file, folder or dataset that they come from.
        kind: What it was recognised as.
        places: Where each image is.
        captions: `captions[i]` are the texts of image `i`.
        skipped: Rows that were left out.
        uncaptioned: Images of the source that have no caption, by name.
        endings: Of each image the size and the end of its file where they were read, to be told
            from others; else None, or empty for none at all.
    """

    name: str
    kind: str
    places: Sequence[ImagePlace]
    captions: Sequence[Sequence[str]]
    skipped: Sequence[BadRow] = ()
    uncaptioned: Sequence[str] = ()
    endings: Sequence[Ending | None] = ()

    def image_ending(self, index: int) -> Ending:
        """Of the image's file; OSError where it is gone."""
        known = self.endings[index] if self.endings else None
        return known or super().image_ending(index)


def collect(name: str, kind: str, rows: Iterable[Row], policy: BadRowPolicy) -> CaptionedImages:
    """Check every row; one image is one content, with its captions, however many files have it."""
    bad = BadRows(name, policy)
    captions: dict[ImagePlace, list[str]] = {}
    checked: dict[ImagePlace, tuple[str | None, Ending | None]] = {}
    for row in Bar(f"Checking {name}", transient=True).over(rows):
        bad.total += 1
        problem = row_problem(row)
        if problem is None and row.image is not None:
            if row.image not in checked:
                checked[row.image] = _checked(row.image, decode=policy.skip)
            problem = checked[row.image][0]
        if problem is not None:
            bad.add(row.where, problem)
        elif row.image is not None:
            captions.setdefault(row.image, []).extend(text.strip() for text in row.captions)
    bad.settle()
    places, texts = tuple(captions), list(captions.values())
    endings = tuple(checked[place][1] for place in places)
    (groups,) = image_groups(CaptionedImages(name, kind, places, texts, endings=endings))
    first: dict[int, int] = {}
    for index, group in enumerate(groups):
        if first.setdefault(group, index) != index:
            texts[first[group]] += texts[index]
    described = [index for index in first.values() if texts[index]]
    if not described:
        raise DataError(f"{name}: {kind} without pairs. Add pairs of image and caption.")
    return CaptionedImages(
        name=name,
        kind=kind,
        places=tuple(places[index] for index in described),
        captions=tuple(tuple(texts[index]) for index in described),
        skipped=tuple(bad.found),
        uncaptioned=tuple(str(places[index]) for index in first.values() if not texts[index]),
        endings=tuple(endings[index] for index in described),
    )


def _checked(place: ImagePlace, *, decode: bool) -> tuple[str | None, Ending | None]:
    """What is wrong with an image or None, and its ending where its content had to be read."""
    if isinstance(place, Path):
        return image_problem(place, decode=decode), None
    try:
        content = place.read()
    except OSError:
        return image_problem(place, decode=decode), None
    if isinstance(place, _GivenImage):  # which was decoded just now
        return None, ending(content)
    return image_problem(ImageInMemory(str(place), content), decode=decode), ending(content)


def row_problem(row: Row) -> str | None:
    """What is wrong with a row apart from its image, or None."""
    if row.problem is not None:
        return row.problem
    if row.image is None:
        return "names no image. Name one or remove the row."
    for text in row.captions:
        if not text.strip():
            return f"image {_short(row.image)!r} has an empty caption. Add one or remove the row."
        if not _is_text(text):
            return (
                f"image {_short(row.image)!r} has a caption that is not UTF-8. Save it as UTF-8 "
                "or remove the row."
            )
    return None


def _short(place: ImagePlace) -> str:
    return getattr(place, "name", None) or str(place)


def _is_text(text: str) -> bool:
    """Whether a text read with `surrogateescape` was sound."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class AllRows:
    """What a source holds, before anything is left out."""

    kind: str  # what the source was recognised as
    images: ImageCaptions  # all that rows name, readable or not; some have no captions
    rows: int  # how many there are
    bad: Sequence[BadRow] = ()  # those with something wrong besides the image
    broken_off: str | None = None  # why reading stopped before the end, if it did


def read_all(name: str, kind: str, rows: Iterable[Row]) -> AllRows:
    """Go through a source without opening its images or stopping at what is wrong."""
    captions: dict[ImagePlace, list[str]] = {}
    bad: list[BadRow] = []
    count, broken_off = 0, None
    try:
        for row in Bar(f"Reading {name}", transient=True).over(rows):
            count += 1
            problem = row_problem(row)
            if problem is not None:
                bad.append(BadRow(row.where, problem))
            if row.image is not None:
                texts = captions.setdefault(row.image, [])
                texts += [text.strip() for text in row.captions] if problem is None else []
    except DataError as error:
        if not count:
            raise
        broken_off = str(error)
    images = CaptionedImages(
        name=name,
        kind=kind,
        places=tuple(captions),
        captions=tuple(tuple(texts) for texts in captions.values()),
    )
    return AllRows(kind, images, count, bad, broken_off)


# --------------------------------------------------------------------------------------------------
# Views: the images of other sources, fewer, more often or together.


class _View(ImageSource):
    """Asks everything about an image of the source that has it."""

    @abstractmethod
    def _at(self, index: int) -> tuple[ImageSource, int]:
        """Which source has image `index`, and where."""

    def origin(self, index: int) -> tuple[ImageSource, int]:
        """Where image `index` is stored, whatever views lie between."""
        source, position = self._at(index)
        return source.origin(position)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        source, position = self._at(index)
        return source.load_image(position)

    def image_name(self, index: int) -> str:
        """Image `index` as its source calls it."""
        source, position = self._at(index)
        return source.image_name(position)

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image's file, None where the source has none."""
        source, position = self._at(index)
        return source.image_bytes(position)


class ChosenImages(_View):
    """Images of one source by their positions there, with captions or without."""

    def __init__(self, source: Images, indices: Sequence[int]) -> None:
        self.source = as_images(source)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def _at(self, index: int) -> tuple[ImageSource, int]:
        return self.source, self.indices[index]


class _ChosenPairs(PairSource, ChosenImages):
    """The same with captions."""

    source: PairSource

    def __init__(self, source: ImageCaptions, indices: Sequence[int]) -> None:
        super().__init__(as_pairs(source), indices)
        self.skipped = self.source.skipped
        if self.source.mixing is not None:
            group_of, weights = self.source.mixing
            self.mixing = [group_of[index] for index in indices], weights


class Subset(_ChosenPairs):
    """Some images of a source with all their captions.

    Attributes:
        source: Where the images are.
        indices: Positions in `source`.
        name: What to call this part.
        captions: The texts of each image in this part.
    """

    def __init__(self, source: ImageCaptions, indices: Sequence[int], name: str) -> None:
        super().__init__(source, indices)
        self.name = name
        captions = self.source.captions
        self.captions = [captions[index] for index in indices]


class EveryCaption(_ChosenPairs):
    """A source in which each image stands once for each of its captions.

    Attributes:
        source: Where images and captions are.
        image_of: For each pair the position of its image in `source`.
        name: What to call it.
        captions: One text a pair.
    """

    def __init__(self, source: ImageCaptions) -> None:
        source = as_pairs(source)
        counted = list(enumerate(source.captions))
        self.image_of = [image for image, texts in counted for _ in texts]
        super().__init__(source, self.image_of)
        self.name = source.name
        self.captions = [(text,) for _, texts in counted for text in texts]


class Mixture(PairSource, _View):
    """The images of several sources, one source behind the other.

    Without weights an epoch uses every image once. With weights it has as many pairs, of which each
    source gives its share: one that has too few images begins anew, so that some come twice or more
    often, and one that has too many gives another part of them each epoch.

    Attributes:
        sources: What is mixed.
        name: All their names.
        captions: The texts of each image.
        group_of: For each image the number of its source.
        weights: One a source, or none.
    """

    def __init__(self, sources: Sequence[ImageCaptions], weights: Sequence[float] = ()) -> None:
        """Mix.

        Args:
            sources: At least one.
            weights: As many positive numbers; only their ratios count.

        Raises:
            ValueError: There are weights, but not one for each source.
        """
        if weights and len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources")
        self.sources = tuple(map(as_pairs, sources))
        self.weights = tuple(weights)
        self.name = " + ".join(source.name for source in self.sources)
        self.captions = [texts for source in self.sources for texts in source.captions]
        self.group_of = [n for n, source in enumerate(self.sources) for _ in range(len(source))]
        self.skipped = skipped_rows(self.sources)
        if weights:
            self.mixing = (self.group_of, self.weights)
        sizes = [len(source) for source in self.sources]
        self._starts = [0, *itertools.accumulate(sizes[:-1])]

    def _at(self, index: int) -> tuple[PairSource, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


# --------------------------------------------------------------------------------------------------
# A seeded split into training and held-out images.


TRAINING = " (training part)"
MINIMUM_HELD_OUT = 100
"""Images; of so many, one is a whole point of recall@1."""


def hold_out(
    source: ImageCaptions, *, fraction: float, seed: int
) -> tuple[Subset | EveryCaption, Subset]:
    """Split by what the images hold, so that none is both held out and trained on.

    Images of one content, as sources of a mixture may have them, are one image, of which only one
    copy is held out and none is trained on.

    Args:
        source: At least 200 different images.
        fraction: Share of the different images to hold out; never fewer than 100.
        seed: Same seed, same split.

    Returns:
        Training part and held-out part, each in the order of the source. Of `EveryCaption` the
        training part has every caption again, the held-out part the images with all captions.

    Raises:
        DataError: Less than half of the images would be left to train on.
    """
    if isinstance(source, EveryCaption):
        training, held_out = hold_out(source.source, fraction=fraction, seed=seed)
        return EveryCaption(training), held_out
    source = as_pairs(source)
    (groups,) = image_groups(source)
    different = len(set(groups))
    count = max(MINIMUM_HELD_OUT, round(fraction * different))
    if count > different // 2:
        raise DataError(
            f"{source.name}: {different} images, too few to hold {count} of them out for the "
            "before/after numbers. Give evaluation pairs of their own with --data.val."
        )
    chosen: dict[int, int] = {}  # group → its copy that comes first
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if len(chosen) == count:
            break
        chosen.setdefault(groups[index], index)
    others = [index for index, group in enumerate(groups) if group not in chosen]
    whole = source.name.removesuffix(TRAINING)  # of a training part others are chosen on
    held_out = "held-out" if whole == source.name else "selection"
    return (
        Subset(source, others, f"{whole}{TRAINING}"),
        Subset(source, sorted(chosen.values()), f"{whole} ({held_out} part)"),
    )
