"""Every row of a source, good or bad, and every image that a row names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clip_refine.console import Bar
from clip_refine.data.bad_rows import BadRow
from clip_refine.data.captioned import CaptionedImages, row_problem
from clip_refine.data.pairs import ImageCaptions
from clip_refine.data.rows import ImagePlace, Row
from clip_refine.errors import DataError


@dataclass(frozen=True)
class AllRows:
    """What a source holds, before anything is left out.

    Attributes:
        kind: What the source was recognised as.
        images: All that rows name, readable or not; some have no captions.
        rows: How many there are.
        bad: Those with something wrong besides the image.
        broken_off: Why reading stopped before the end, if it did.
    """

    kind: str
    images: ImageCaptions
    rows: int
    bad: Sequence[BadRow] = ()
    broken_off: str | None = None


def read_all(name: str, kind: str, rows: Iterable[Row], *, visible: bool = True) -> AllRows:
    """Go through a source without opening its images or stopping at what is wrong.

    Raises:
        DataError: Not even the first row can be read.
    """
    captions: dict[ImagePlace, list[str]] = {}
    bad: list[BadRow] = []
    count, broken_off = 0, None
    try:
        for row in Bar(f"Reading {name}", visible=visible, transient=True).over(rows):
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
