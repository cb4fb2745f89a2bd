"""Pairs that come one after another, for sources too large to be listed first."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from clip_refine.data.pairs import (
    CaptionedImages,
    Ending,
    Images,
    StoredImages,
    image_bytes,
    image_ending,
    row_problem,
    warn_of_shared,
)
from clip_refine.data.rows import (
    BadRow,
    BadRowPolicy,
    BadRows,
    ImageInMemory,
    ImagePlace,
    OpenRows,
    image_problem,
)
from clip_refine.support.errors import DataError

Item = TypeVar("Item")


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
    """

    name: str
    kind: str
    open_rows: OpenRows
    policy: BadRowPolicy
    buffer: int
    every_caption: bool = False
    length: int | None = None
    skipped: list[BadRow] = field(default_factory=list)

    def pairs(self, *, seed: int, at_least: int = 1) -> Iterator[StreamedPair]:
        """Pass after pass without end, each in an order and with captions of its own.

        Raises:
            DataError: The source cannot be read, has bad rows as `policy` has it, or fewer good
                pairs than a pass must have `at_least`.
        """
        number = 0
        for epoch in itertools.count():
            generator = random.Random(f"{seed} {epoch}")
            drawn = self._drawn(generator, say=epoch == 0)
            before = number
            for place, caption in shuffled(drawn, self.buffer, generator):
                yield StreamedPair(place, caption, number)
                number += 1
            if number == before:
                raise DataError(f"{self.name}: {self.kind} without pairs.")
            if number - before < at_least:
                raise DataError(
                    f"{self.name}: {number - before} pairs, fewer than a batch of {at_least}. Give "
                    "more pairs or a smaller --train.batch-size."
                )

    def prefix(self, count: int) -> CaptionedImages:
        """The first images in the source's own order, kept in memory.

        Raises:
            DataError: As `pairs`.
        """
        rows = list(itertools.islice(self._checked(None, say=False), count))
        if not rows:
            raise DataError(f"{self.name}: {self.kind} without pairs.")
        return CaptionedImages(
            name=f"{self.name} (first {len(rows):,} images)",
            kind=self.kind,
            places=[place for place, _ in rows],
            captions=[captions for _, captions in rows],
        )

    def _checked(
        self, generator: random.Random | None, *, say: bool
    ) -> Iterator[tuple[ImagePlace, tuple[str, ...]]]:
        """Image and captions of every good row that has captions."""
        bad = BadRows(self.name, self.policy)
        for row in self.open_rows(generator):
            bad.total += 1
            image, problem = row.image, row_problem(row)
            if problem is None and image is not None:
                image = _in_memory(image)
                problem = image_problem(image)
            if problem is not None:
                bad.add(row.where, problem)
                bad.settle_so_far()
                self.skipped.append(bad.found[-1])
            elif image is not None and row.captions:
                yield image, tuple(text.strip() for text in row.captions)
        bad.settle(say=say)

    def _drawn(self, generator: random.Random, *, say: bool) -> Iterator[tuple[ImagePlace, str]]:
        for place, captions in self._checked(generator, say=say):
            for text in captions if self.every_caption else (generator.choice(captions),):
                yield place, text


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

    def pairs(self, *, seed: int, at_least: int = 1) -> Iterator[StreamedPair]:
        """Without end; a source that ends, however short it is, begins anew while others go on.

        Raises:
            DataError: As those of the sources.
        """
        generator = random.Random(f"{seed} mixture")
        streams = [source.pairs(seed=seed + number) for number, source in enumerate(self.sources)]
        for number in itertools.count():
            (chosen,) = generator.choices(streams, self.weights)
            yield replace(next(chosen), number=number)

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
    """A stream whose images are compared with held-out ones as they come.

    Attributes:
        stream: What is watched.
        held_out: Images that should not come.
        seen: Positions of those that came all the same.
    """

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

    def pairs(self, *, seed: int, at_least: int = 1) -> Iterator[StreamedPair]:
        """The stream's."""
        for pair in self.stream.pairs(seed=seed, at_least=at_least):
            for index in self._with_ending.get(image_ending(pair, 0), ()):
                new = index not in self.seen
                if new and image_bytes(pair, 0) == image_bytes(self.held_out, index):
                    self.seen.add(index)
            yield pair

    def warn(self) -> None:
        """Say how many held-out images came, if any did."""
        warn_of_shared(self.held_out, sorted(self.seen))


Stream = PairStream | StreamMixture | WatchedStream


def shuffled(items: Iterator[Item], size: int, generator: random.Random) -> Iterator[Item]:
    """All items, each drawn from a buffer that the next one then takes a place in.

    >>> sorted(shuffled(iter(range(5)), 2, random.Random(0)))
    [0, 1, 2, 3, 4]
    """
    buffer = list(itertools.islice(items, size))
    for item in items:
        position = generator.randrange(size)
        yield buffer[position]
        buffer[position] = item
    generator.shuffle(buffer)
    yield from buffer
