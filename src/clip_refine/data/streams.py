"""Pairs that come one after another, for sources too large to be listed first."""

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clip_refine.data.images import ImageInMemory, ImagePlace, image_problem
from clip_refine.data.pairs import (
    BadRow,
    BadRowPolicy,
    BadRows,
    CaptionedImages,
    Ending,
    Images,
    StoredImages,
    image_bytes,
    image_ending,
    row_problem,
    warn_of_shared,
)
from clip_refine.data.rows import OpenRows, Row
from clip_refine.support.errors import DataError
from clip_refine.support.folder import size_text
from clip_refine.support.limits import HELD

Item = TypeVar("Item")
Share = tuple[int, int]
"""Which of how many parts of a stream's files, from 0."""
WHOLE: Share = (0, 1)


@dataclass(frozen=True)
class StreamedPair(StoredImages):
    """An image with the caption that was drawn for it; as a source of images, one of one image."""

    place: ImagePlace  # where the image is, often its content in memory
    caption: str  # its text
    number: int  # position in the stream, from 0

    def __len__(self) -> int:
        return 1

    def place_of(self, index: int) -> ImagePlace:
        """Where the image is."""
        return self.place


def _in_memory(place: ImagePlace) -> ImagePlace:
    """The image read once, perhaps from far away, for all that look at it; files stay files."""
    if isinstance(place, Path | ImageInMemory):
        return place
    try:
        return ImageInMemory(str(place), place.read())
    except OSError:
        return place  # checking says what is wrong


class _Drawn(NamedTuple):
    place: ImagePlace
    text: str
    held: int  # bytes of memory; what captions share is divided among them


def _bytes_held(item: int | _Drawn) -> int:
    """Of one in the buffer, of which its number alone may be known."""
    return 0 if isinstance(item, int) else item.held


class FileCount(NamedTuple):
    """What a file of a stream holds."""

    pairs: int  # that were drawn
    rows: int  # good and bad ones
    bad: int  # rows that were left out


@dataclass(frozen=True, eq=False)
class PairStream:
    """Rows of a source, checked as they come, shuffled in a buffer.

    Attributes:
        name: What to call it.
        kind: What it was recognised as.
        open_rows: Begins a pass.
        policy: What to do about bad rows.
        buffer: Rows among which the next one is drawn.
        every_caption: Whether every caption is a pair, or one is drawn for each image.
        length: Pairs of a pass where the source tells, else None.
        skipped: Rows that were left out so far.
        read: For each pass, what was in each of its files that were read to their end.
    """

    name: str
    kind: str
    open_rows: OpenRows
    policy: BadRowPolicy
    buffer: int
    every_caption: bool = False
    length: int | None = None
    skipped: list[BadRow] = field(default_factory=list)
    read: list[list[FileCount]] = field(default_factory=list)

    def pairs(
        self, *, seed: int, at_least: int = 1, skip: int = 0, share: Share = WHOLE
    ) -> Iterator[StreamedPair]:
        """Pass after pass without end, each in an order and with captions of its own.

        The first `skip` pairs are left out. Of the files that they were in, as far as `read` knows
        them, only those are read that had a pair in the buffer then. With a `share` only one of so
        many parts of the files is read, which are others in each pass.

        Raises:
            DataError: The source cannot be read, has bad rows as `policy` has it, fewer good pairs
                than a pass must have `at_least`, or fewer files than parts.
        """
        number = 0
        for epoch in itertools.count():
            before = number
            for pair in self._pass(f"{seed} {epoch}", epoch, skip - number, share):
                if pair is not None:
                    yield StreamedPair(pair.place, pair.text, number)
                number += 1
            if number == before:
                raise DataError(f"{self.name}: {self.kind} without pairs.")
            if number - before < at_least:
                raise DataError(
                    f"{self.name}: {number - before} pairs, fewer than a batch of {at_least}. Give "
                    "more pairs or a smaller --train.batch-size."
                )

    def _pass(self, seed: str, epoch: int, skip: int, share: Share) -> Iterator[Any]:
        """One pass; None for each of the first `skip` pairs."""
        generator = random.Random(seed)
        part, parts = share
        every = self.open_rows(generator)
        files = every[part::parts]
        if not files:
            raise DataError(
                f"{self.name}: {len(every)} files, too few for {parts} processes to have one each. "
                "Write more and smaller ones, or leave --data.own-files out."
            )
        self.read.extend([] for _ in range(epoch + 1 - len(self.read)))
        counts = self.read[epoch]
        # files that had been read when the last of these pairs was drawn
        ends = list(itertools.accumulate(count.pairs for count in counts))
        passed = bisect.bisect_right(ends, skip + self.buffer) if skip > 0 else 0
        del counts[passed:], self.skipped[sum(c.bad for of in self.read for c in of) :]
        bad = BadRows(self.name, self.policy)
        bad.total = sum(count.rows for count in counts)
        bad.found += self.skipped[len(self.skipped) - sum(count.bad for count in counts) :]

        def drawn(file: int, bad: BadRows, skipped: list[BadRow]) -> Iterator[_Drawn]:
            captions = random.Random(f"{seed} {part + file * parts}")
            for place, texts in self._checked(files[file](), bad, skipped):
                chosen = texts if self.every_caption else (captions.choice(texts),)
                held = len(place.content) if isinstance(place, ImageInMemory) else 0
                for text in chosen:
                    yield _Drawn(place, text, held // len(chosen))

        def items() -> Iterator[int | _Drawn]:
            yield from range(ends[passed - 1] if passed else 0)
            for file in range(passed, len(files)):
                before, pairs = (bad.total, len(bad.found)), 0
                for pairs, item in enumerate(drawn(file, bad, self.skipped), start=1):  # noqa: B007
                    yield item
                counts.append(FileCount(pairs, bad.total - before[0], len(bad.found) - before[1]))
            bad.settle(say=epoch == 0)

        def found(buffer: list[Any]) -> list[Any]:
            """The pairs that so far are only known by their number in the pass."""
            wanted = sorted(item for item in buffer if isinstance(item, int))
            have: dict[int, _Drawn] = {}
            # bad ones were settled by all rows; a single file may have more than its share
            settled = BadRowPolicy(skip=True, limit=1)
            for file, numbers in itertools.groupby(wanted, partial(bisect.bisect_right, ends)):
                inside, start = set(numbers), ends[file - 1] if file else 0
                again = drawn(file, BadRows(self.name, settled), [])
                again = itertools.islice(again, max(inside) - start + 1)
                have |= {n: item for n, item in enumerate(again, start) if n in inside}
            return [have.get(item, item) if isinstance(item, int) else item for item in buffer]

        drawn_items: Iterator[Any] = items()  # numbers are found before they are given
        yield from shuffled(
            drawn_items, self.buffer, generator, skip=skip, found=found, weigh=_bytes_held
        )

    def progress(self) -> dict[str, Any]:
        """What `go_on` needs, as plain data."""
        read = [[list(count) for count in counts] for counts in self.read]
        return {"read": read, "skipped": [[row.where, row.problem] for row in self.skipped]}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """Know what was read by the run whose `progress` this is."""
        self.read[:] = [[FileCount(*count) for count in counts] for counts in progress["read"]]
        self.skipped[:] = [BadRow(*row) for row in progress["skipped"]]

    def join(self, progress: Mapping[str, Any]) -> None:
        """Know what another process left out, whose `progress` this is."""
        self.skipped.extend(BadRow(*row) for row in progress["skipped"])

    def prefix(self, count: int) -> CaptionedImages:
        """The first images in the source's own order, kept in memory.

        Raises:
            DataError: As `pairs`.
        """
        bad = BadRows(self.name, self.policy)
        every = (row for file in self.open_rows(None) for row in file())
        rows = list(itertools.islice(self._checked(every, bad, []), count))
        if not rows:
            raise DataError(f"{self.name}: {self.kind} without pairs.")
        return CaptionedImages(
            name=f"{self.name} (first {len(rows):,} images)",
            kind=self.kind,
            places=[place for place, _ in rows],
            captions=[captions for _, captions in rows],
        )

    def _checked(
        self, rows: Iterable[Row], bad: BadRows, skipped: list[BadRow]
    ) -> Iterator[tuple[ImagePlace, tuple[str, ...]]]:
        """Image and captions of every good row that has captions."""
        for row in rows:
            bad.total += 1
            image, problem = row.image, row_problem(row)
            if problem is None and image is not None:
                image = _in_memory(image)
                problem = image_problem(image)
            if problem is not None:
                bad.add(row.where, problem)
                bad.settle_so_far()
                skipped.append(bad.found[-1])
            elif image is not None and row.captions:
                yield image, tuple(text.strip() for text in row.captions)


@dataclass(frozen=True, eq=False)
class StreamMixture:
    """Several streams as one; the source of every pair is drawn anew.

    Attributes:
        sources: What is mixed.
        weights: One a source; only their ratios count.
    """

    sources: Sequence[PairStream]
    weights: Sequence[float]
    length: None = None

    @property
    def name(self) -> str:
        """All their names."""
        return " + ".join(source.name for source in self.sources)

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that were left out so far."""
        return [row for source in self.sources for row in source.skipped]

    def pairs(
        self, *, seed: int, at_least: int = 1, skip: int = 0, share: Share = WHOLE
    ) -> Iterator[StreamedPair]:
        """Without end; a source that ends, however short it is, begins anew while others go on.

        Raises:
            DataError: As those of the sources.
        """
        generator = random.Random(f"{seed} mixture")
        places = range(len(self.sources))
        skipped = Counter(generator.choices(places, self.weights)[0] for _ in range(skip))
        streams = [
            source.pairs(seed=seed + place, skip=skipped[place], share=share)
            for place, source in enumerate(self.sources)
        ]
        for number in itertools.count(skip):
            (chosen,) = generator.choices(streams, self.weights)
            yield replace(next(chosen), number=number)

    def progress(self) -> dict[str, Any]:
        """Those of the sources."""
        return {"sources": [source.progress() for source in self.sources]}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """As those of the sources."""
        for source, one in zip(self.sources, progress["sources"], strict=True):
            source.go_on(one)

    def join(self, progress: Mapping[str, Any]) -> None:
        """As those of the sources."""
        for source, one in zip(self.sources, progress["sources"], strict=True):
            source.join(one)

    def prefix(self, count: int) -> CaptionedImages:
        """The first images of each, in the shares of the mixture.

        Raises:
            DataError: As those of the sources.
        """
        shares = [max(1, round(count * w / sum(self.weights))) for w in self.weights]
        parts = [one.prefix(n) for one, n in zip(self.sources, shares, strict=True)]
        return CaptionedImages(
            name=f"{self.name} (first images)",
            kind="mixture",
            places=[place for part in parts for place in part.places],
            captions=[texts for part in parts for texts in part.captions],
        )


class WatchedStream:
    """A stream that notes positions of images that come (`seen`) and are among `held_out`."""

    def __init__(self, stream: "Stream", held_out: Images) -> None:
        self.stream = stream
        self.held_out = held_out
        self.seen: set[int] = set()
        self.name, self.length, self.prefix = stream.name, stream.length, stream.prefix
        self._with_ending: dict[Ending | None, list[int]] = {}
        for index in range(len(held_out)):
            self._with_ending.setdefault(image_ending(held_out, index), []).append(index)

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that were left out so far."""
        return self.stream.skipped

    def progress(self) -> dict[str, Any]:
        """The stream's, and what was seen."""
        return {**self.stream.progress(), "seen": sorted(self.seen)}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """As the stream's."""
        self.stream.go_on(progress)
        self.seen |= set(progress["seen"])

    def join(self, progress: Mapping[str, Any]) -> None:
        """As the stream's, and what was seen there."""
        self.stream.join(progress)
        self.seen |= set(progress["seen"])

    def pairs(
        self, *, seed: int, at_least: int = 1, skip: int = 0, share: Share = WHOLE
    ) -> Iterator[StreamedPair]:
        """The stream's."""
        for pair in self.stream.pairs(seed=seed, at_least=at_least, skip=skip, share=share):
            for index in self._with_ending.get(image_ending(pair, 0), ()):
                new = index not in self.seen
                if new and image_bytes(pair, 0) == image_bytes(self.held_out, index):
                    self.seen.add(index)
            yield pair

    def warn(self) -> None:
        """Say how many held-out images came, if any did."""
        warn_of_shared(self.held_out, sorted(self.seen))


Stream = PairStream | StreamMixture | WatchedStream


def shuffled(
    items: Iterator[Item],
    size: int,
    generator: random.Random,
    *,
    skip: int = 0,
    found: Callable[[list[Item]], list[Item]] = list,
    weigh: Callable[[Item], int] = lambda _: 0,
) -> Iterator[Item | None]:
    """All items, each drawn from a buffer that the next one then takes a place in.

    The first `skip` come as None, and `found` makes items of what the buffer then holds. A
    DataError where those in the buffer `weigh` more bytes than may be held.
    """
    buffer: list[Item] = []
    held = 0
    for item in items:
        held += weigh(item)
        if held > HELD:
            raise DataError(
                f"{len(buffer):,} pairs that wait to be drawn take more than {size_text(HELD)}. "
                f"Use a smaller --data.shuffle-buffer than {size:,}, or store smaller images."
            )
        if len(buffer) < size:
            buffer.append(item)
            continue
        position = generator.randrange(size)
        held -= weigh(buffer[position])
        yield None if skip > 0 else buffer[position]
        buffer[position] = item
        skip -= 1
        if not skip:
            buffer = found(buffer)
            held = sum(map(weigh, buffer))
    generator.shuffle(buffer)
    past = min(max(0, skip), len(buffer))
    yield from [None] * past
    yield from found(buffer[past:]) if past else buffer
