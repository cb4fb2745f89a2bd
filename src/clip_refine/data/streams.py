"""Pairs that come one after another, for sources too large to be listed first."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from clip_refine.data.bad_rows import BadRow, BadRowPolicy, BadRows
from clip_refine.data.pairs import CaptionedImages, StoredImages, row_problem
from clip_refine.data.rows import ImagePlace, OpenRows, image_problem
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

    def pairs(self, *, seed: int) -> Iterator[StreamedPair]:
        """Pass after pass without end, each in an order and with captions of its own.

        Raises:
            DataError: The source cannot be read, has bad rows as `policy` has it, or no good ones.
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
            problem = row_problem(row)
            if problem is None and row.image is not None:
                problem = image_problem(row.image)
            if problem is not None:
                bad.add(row.where, problem)
                bad.settle_so_far()
                self.skipped.append(bad.found[-1])
            elif row.image is not None and row.captions:
                yield row.image, tuple(text.strip() for text in row.captions)
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

    def pairs(self, *, seed: int) -> Iterator[StreamedPair]:
        """Without end; a source that ends begins anew while others go on.

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


Stream = PairStream | StreamMixture


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
