"""A row of a source as its reader gives it, and the places where an image can be."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from clip_refine.data.images import decode_image, open_image


class StoredImage(Hashable, Protocol):
    """An image that lies inside something larger; its text is what to call it in a message."""

    def read(self) -> bytes:
        """The content of the image file."""
        ...


ImagePlace = Path | StoredImage


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, not yet checked.

    Attributes:
        where: What to call the row in a message, as in `captions.csv, line 3`.
        image: Where its image is; rows with equal places belong to one image. None where the row
            names none.
        captions: Its texts; none at all for an image that nobody has described.
        problem: What the reader found wrong with it.
    """

    where: str
    image: ImagePlace | None
    captions: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How to read a source, where there is more than one way.

    Attributes:
        image_column: Column of images; None for the first known one.
        caption_column: Column of captions; None for the first known one.
        image_folder: Where relative image paths start; None to look near the annotation file.
        split: Which part of a source that has several.
        subset: Which configuration of a dataset on the Hub.
        split_file: Karpathy's JSON or a list of file names, which says what is in `split`.
        allow_outside: Whether image paths may be absolute or hold `..`.
    """

    image_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None
    split: str | None = None
    subset: str | None = None
    split_file: Path | None = None
    allow_outside: bool = False


def load_place(place: ImagePlace) -> Image.Image:
    """The image there, in RGB.

    Raises:
        DataError: It is gone or cannot be decoded.
    """
    if isinstance(place, Path):
        return open_image(place)
    return decode_image(place.read(), str(place))


def read_place(place: ImagePlace) -> bytes:
    """The content of the image file there.

    Raises:
        OSError: It is gone.
    """
    return place.read_bytes() if isinstance(place, Path) else place.read()
