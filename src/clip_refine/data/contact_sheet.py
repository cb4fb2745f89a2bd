"""A few pairs on one sheet, to see at a glance whether captions belong to their images."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

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
    """A pair on the sheet.

    Attributes:
        image: In RGB, of any size.
        name: What the image is called.
        caption: One of its texts.
    """

    image: Image.Image
    name: str
    caption: str


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
