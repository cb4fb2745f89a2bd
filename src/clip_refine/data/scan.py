"""What can be said of each image of a source by decoding it once."""

from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from clip_refine.data.content import fingerprint, image_bytes
from clip_refine.data.images import decode_image, opened
from clip_refine.data.pairs import Images
from clip_refine.data.parallel import in_parallel
from clip_refine.errors import DataError

HASHED_SIDE = 128
"""Pixels a side that are enough for a perceptual hash, which looks at 32."""
DRAWN = "drawn"


@dataclass(frozen=True)
class ImageFacts:
    """One readable image.

    Attributes:
        content: Fingerprint of its file.
        look: 64-bit perceptual hash.
        width: In pixels, as stored.
        height: In pixels, as stored.
        kind: Its format, as in JPEG.
        odd: What had to be done to see it as it is meant.
    """

    content: str
    look: int
    width: int
    height: int
    kind: str
    odd: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded.

    Attributes:
        problem: A sentence that names it and says what to do.
    """

    problem: str


class _Scan(Dataset[ImageFacts | Unreadable]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> ImageFacts | Unreadable:
        name = self.images.image_name(index)
        try:
            data = image_bytes(self.images, index)
            if data is None:
                image = self.images.load_image(index)
                content = fingerprint(image.tobytes())
                return ImageFacts(content, _look(image), *image.size, DRAWN)
            return scan_image(data, name)
        except DataError as error:
            return Unreadable(str(error))


def scan_images(
    images: Images, *, workers: int = 0, visible: bool = True
) -> list[ImageFacts | Unreadable]:
    """Decode every image once."""
    title = "Decoding images"
    found = in_parallel(_Scan(images), len(images), title, workers=workers, visible=visible)
    return list(found)


def scan_image(data: bytes, name: str) -> ImageFacts:
    """Everything about one image file.

    Raises:
        DataError: It cannot be decoded.
    """
    image = decode_image(data, name, side=HASHED_SIDE)
    with opened(data) as header:
        width, height = header.size
        kind = "JPEG" if header.format == "MPO" else header.format or "unknown"
        odd = tuple(_oddities(header))
    return ImageFacts(fingerprint(data), _look(image), width, height, kind, odd)


def _look(image: Image.Image) -> int:
    bits = np.packbits(imagehash.phash(image).hash.flatten())
    return int.from_bytes(bits.tobytes(), "big")


def _oddities(header: Image.Image) -> list[str]:
    found = {
        "turned by EXIF": _orientation(header) > 1,
        "transparent": header.has_transparency_data,
        "CMYK": header.mode == "CMYK",
        "16 bits": header.mode.startswith("I"),
        "animated": header.format != "MPO" and getattr(header, "n_frames", 1) > 1,
    }
    return [name for name, is_so in found.items() if is_so]


def _orientation(header: Image.Image) -> int:
    try:
        return int(header.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF, as in images.py
        return 1
