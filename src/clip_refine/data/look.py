"""What is in a source of images: sizes, formats, duplicates, a contact sheet."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clip_refine.data.images import decode_image, opened
from clip_refine.data.pairs import Images, fingerprint, image_bytes
from clip_refine.data.pixels import in_parallel
from clip_refine.support.errors import DataError

# --------------------------------------------------------------------------------------------------
# What can be said of each image of a source by decoding it once.


HASHED_SIDE = 128
"""Pixels a side that are enough for a perceptual hash, which looks at 32."""
DRAWN = "drawn"


@dataclass(frozen=True)
class ImageFacts:
    """One readable image."""

    content: str  # fingerprint of its file
    look: int  # 64-bit perceptual hash
    width: int  # in pixels, as stored
    height: int  # in pixels, as stored
    kind: str  # its format, as in JPEG
    odd: tuple[str, ...] = ()  # what had to be done to see it as it is meant


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    problem: str  # A sentence that names it and says what to do


def scan_images(images: Images, *, workers: int) -> list[ImageFacts | Unreadable]:
    """Decode every image once."""
    scan, title = partial(_scan, images), "Decoding images"
    return list(in_parallel(scan, len(images), title, workers=workers, visible=True))


def _scan(images: Images, index: int) -> ImageFacts | Unreadable:
    name = images.image_name(index)
    try:
        data = image_bytes(images, index)
        if data is None:
            image = images.load_image(index)
            content = fingerprint(image.tobytes())
            return ImageFacts(content, _look(image), *image.size, DRAWN)
        return scan_image(data, name)
    except DataError as error:
        return Unreadable(str(error))


def scan_image(data: bytes, name: str) -> ImageFacts:
    """Everything about one image file."""
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
    try:
        orientation = int(header.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF, as in images.py
        orientation = 1
    found = {
        "turned by EXIF": orientation > 1,
        "transparent": header.has_transparency_data,
        "CMYK": header.mode == "CMYK",
        "16 bits": header.mode.startswith("I"),
        "animated": header.format != "MPO" and getattr(header, "n_frames", 1) > 1,
    }
    return [name for name, is_so in found.items() if is_so]


# --------------------------------------------------------------------------------------------------
# Images that look the same, by perceptual hash.


BITS = 64
_ROWS = 1024  # hashes compared with their whole bucket at once; bounds the memory


def near_groups(hashes: NDArray[np.uint64], distance: int) -> list[list[int]]:
    """Groups of positions of 64-bit hashes that differ in few bits, directly or over others."""
    unique, group_of = np.unique(hashes, return_inverse=True)
    edges = [pairs for pairs in _near_pairs(unique, distance) if len(pairs)]
    ends = np.concatenate(edges).T if edges else np.empty((2, 0), np.int64)
    links = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(len(unique),) * 2)
    component = connected_components(links, directed=False)[1][group_of]
    order = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.diff(component[order])) + 1
    groups = [group.tolist() for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups)


def _near_pairs(unique: NDArray[np.uint64], distance: int) -> Iterator[NDArray[np.int64]]:
    """(P, 2) positions of pairs of different hashes; a pair may come several times."""
    # Hashes at a distance of d agree in one of d + 1 parts, so only those that share a part are
    # compared: about a second for 100,000 images that look different.
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in pairwise(edges):
        part = (unique >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order])) + 1
        for bucket in np.split(order, starts):
            for at in range(0, len(bucket) - 1, _ROWS):
                yield _compare(unique, bucket[at : at + _ROWS], bucket[at:], distance)


def _compare(
    unique: NDArray[np.uint64], rows: NDArray[np.int64], others: NDArray[np.int64], distance: int
) -> NDArray[np.int64]:
    differing = np.bitwise_count(unique[rows, None] ^ unique[None, others])
    row, other = np.nonzero(differing <= distance)
    pairs = np.stack([rows[row], others[other]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


# --------------------------------------------------------------------------------------------------
# A few pairs on one sheet, to see at a glance whether captions belong to their images.


COLUMNS = 5
PICTURE = 240
FONTS = (
    *("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf"),
    *("LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
)
"""Looked for among the system's, those with most letters first; Pillow's own has only ASCII."""
_MARGIN = 12
_LINES = 6
_LETTERS = 500
_LINE = 17
_INK, _GREY, _PAPER, _FRAME = "#1a1a1a", "#808080", "white", "#e6e6e6"


@dataclass(frozen=True)
class Sample:
    """A pair on the sheet."""

    image: Image.Image  # in RGB, of any size
    name: str  # what the image is called
    caption: str  # one of its texts


def draw_sheet(samples: Sequence[Sample]) -> Image.Image:
    """Pictures in rows of five, each with its name and its caption underneath."""
    font = _font(12)
    texts = [_lines(sample, font) for sample in samples]
    rows = [range(at, min(at + COLUMNS, len(samples))) for at in range(0, len(samples), COLUMNS)]
    heights = [PICTURE + 3 * _MARGIN + _LINE * max(len(texts[i]) for i in row) for row in rows]
    width = PICTURE + 2 * _MARGIN
    sheet = Image.new("RGB", (width * max(map(len, rows), default=1), sum(heights) or 1), _PAPER)
    for number, row in enumerate(rows):
        for column, index in enumerate(row):
            corner = (column * width + _MARGIN, sum(heights[:number]) + _MARGIN)
            _draw(sheet, samples[index].image, texts[index], corner, font)
    return sheet


def _draw(
    sheet: Image.Image, image: Image.Image, lines: Sequence[str], corner: tuple[int, int], font: Any
) -> None:
    left, top = corner
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, left + PICTURE - 1, top + PICTURE - 1), fill=_FRAME)
    picture = ImageOps.contain(image, (PICTURE, PICTURE))
    across, down = (PICTURE - picture.width) // 2, (PICTURE - picture.height) // 2
    sheet.paste(picture, (left + across, top + down))
    for number, line in enumerate(lines):
        place = (left, top + PICTURE + _MARGIN // 2 + number * _LINE)
        pen.text(place, line, fill=_INK if number else _GREY, font=font)


def _lines(sample: Sample, font: Any) -> list[str]:
    """The name in one line, and the caption in a few."""
    name, caption = _drawable(sample.name)[-_LETTERS:], _drawable(sample.caption)[:_LETTERS]
    while font.getlength(name) > PICTURE:
        name = f"…{name[2:]}"
    lines = [""]
    for part in re.findall(r"\S+\s*", caption):
        word = part
        while font.getlength(lines[-1] + word.rstrip()) > PICTURE:
            if lines[-1]:
                lines.append("")
                continue
            fits = _letters_that_fit(word, font)  # one long word, or a script without spaces
            lines[-1], word = word[:fits], word[fits:]
            lines.append("")
        lines[-1] += word
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1][:-2]}…"]
    return [name, *lines]


def _letters_that_fit(word: str, font: Any) -> int:
    counts = range(1, len(word) + 1)
    return max(1, bisect_right(counts, PICTURE, key=lambda count: font.getlength(word[:count])))


def _drawable(text: str) -> str:
    """One line, without control characters and halves of characters."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "�" for letter in line)


def _font(size: int) -> Any:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except (OSError, ImportError):  # not here, or Pillow without FreeType
            continue
    return ImageFont.load_default(size)
