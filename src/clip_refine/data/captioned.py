"""Rows of any source → images with captions, every row checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from clip_refine.console import Bar
from clip_refine.data.bad_rows import BadRow, BadRowPolicy, BadRows
from clip_refine.data.checks import image_problem
from clip_refine.data.rows import ImagePlace, Row, load_place, read_place
from clip_refine.errors import DataError


@dataclass(frozen=True)
class CaptionedImages:
    """Images with one or more captions each, wherever they are stored.

    Attributes:
        name: The file, folder or dataset that they come from.
        kind: What it was recognised as.
        places: Where each image is.
        captions: `captions[i]` are the texts of image `i`.
        skipped: Rows that were left out.
        uncaptioned: Images of the source that have no caption, by name.
    """

    name: str
    kind: str
    places: Sequence[ImagePlace]
    captions: Sequence[tuple[str, ...]]
    skipped: Sequence[BadRow] = ()
    uncaptioned: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.places)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` in RGB.

        Raises:
            DataError: The file is gone or cannot be decoded.
        """
        return load_place(self.places[index])

    def image_name(self, index: int) -> str:
        """The image's path, or what it is called in its table or archive."""
        return str(self.places[index])

    def image_bytes(self, index: int) -> bytes:
        """The content of the image file.

        Raises:
            OSError: The file is gone.
        """
        return read_place(self.places[index])


def collect(
    name: str, kind: str, rows: Iterable[Row], policy: BadRowPolicy | None = None
) -> CaptionedImages:
    """Check every row and put the captions of one image together.

    Images keep the order of their first row.

    Raises:
        DataError: There are bad rows, as `policy` has it, or no good ones.
    """
    policy = policy or BadRowPolicy()
    bad = BadRows(name, policy)
    captions: dict[ImagePlace, list[str]] = {}
    problems: dict[ImagePlace, str | None] = {}
    for row in Bar(f"Checking {name}", transient=True).over(rows):
        bad.total += 1
        problem = row_problem(row)
        if problem is None and row.image is not None:
            if row.image not in problems:
                problems[row.image] = image_problem(row.image, decode=policy.skip)
            problem = problems[row.image]
        if problem is not None:
            bad.add(row.where, problem)
        elif row.image is not None:
            captions.setdefault(row.image, []).extend(text.strip() for text in row.captions)
    bad.settle()
    described = {place: tuple(texts) for place, texts in captions.items() if texts}
    if not described:
        raise DataError(f"{name}: {kind} without pairs. Add pairs of image and caption.")
    return CaptionedImages(
        name=name,
        kind=kind,
        places=tuple(described),
        captions=tuple(described.values()),
        skipped=tuple(bad.found),
        uncaptioned=tuple(str(place) for place, texts in captions.items() if not texts),
    )


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
