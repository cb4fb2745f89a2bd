"""What `clip-refine data check` finds, as plain data: its JSON."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Finding):
    """Some whole numbers in five.

    Attributes:
        smallest: The smallest.
        median: The one in the middle, of two the lower.
        mean: Their mean.
        high: 95 % are not above it.
        largest: The largest.
    """

    smallest: int
    median: int
    mean: float
    high: int
    largest: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Spread | None":
        """That of some numbers, None where there are none.

        >>> Spread.of([4, 1, 1, 2]).median
        1
        """
        if not numbers:
            return None
        ranked = sorted(numbers)
        last = len(ranked) - 1
        return cls(
            smallest=ranked[0],
            median=ranked[last // 2],
            mean=sum(ranked) / len(ranked),
            high=ranked[round(0.95 * last)],
            largest=ranked[-1],
        )


class Problem(_Finding):
    """Something that a run would stop at.

    Attributes:
        where: The row or image.
        problem: What is wrong and what to do.
    """

    where: str
    problem: str


class CaptionFindings(_Finding):
    """About the texts.

    Attributes:
        count: All of them.
        per_image: How many an image has, of those that have any.
        characters: Their lengths.
        words: Their lengths in words.
        tokens: Their lengths as the model's tokenizer has them, with start and end; None where it
            does not tell.
        context_length: Tokens that the model reads; None where it is not known.
        too_long: Captions that are cut for the model.
        too_long_examples: The longest of them, longest first.
        shared: Text → how many images have it, of those that several have, most common first.
    """

    count: int
    per_image: Spread | None
    characters: Spread | None
    words: Spread | None
    tokens: Spread | None
    context_length: int | None
    too_long: int
    too_long_examples: tuple[str, ...]
    shared: Mapping[str, int]


class ImageFindings(_Finding):
    """About the images.

    Attributes:
        count: Different ones that rows name, readable or not.
        kinds: Format → how many.
        odd: What had to be done to see them as they are meant → how many.
        short_side: In pixels.
        long_side: In pixels.
        unreadable: Those that cannot be decoded.
        without_captions: Their names.
        duplicates: Groups of names with the same content.
        near_duplicates: Groups of names that look the same but differ in content.
    """

    count: int
    kinds: Mapping[str, int]
    odd: Mapping[str, int]
    short_side: Spread | None
    long_side: Spread | None
    unreadable: tuple[Problem, ...]
    without_captions: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]


class Findings(_Finding):
    """Everything about a source.

    Attributes:
        source: As it was named.
        kind: What it was recognised as.
        rows: All of them, bad ones too.
        bad_rows: Those with something wrong besides the image.
        broken_off: Why reading stopped before the end, if it did.
        images: About its images.
        captions: About its captions.
    """

    source: str
    kind: str
    rows: int
    bad_rows: tuple[Problem, ...]
    broken_off: str | None
    images: ImageFindings
    captions: CaptionFindings

    @property
    def sound(self) -> bool:
        """Whether a run on this source would start as it stands."""
        return not (self.bad_rows or self.broken_off or self.images.unreadable)
