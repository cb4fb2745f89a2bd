"""The contact sheet: pictures whole, captions in full or cut visibly."""

import pytest
from PIL import Image, ImageFont

from clip_refine.roads import check as contact_sheet
from clip_refine.roads.check import PICTURE, Sample, draw_sheet


def sample(caption: str, colour: str = "red", size: tuple[int, int] = (100, 50)) -> Sample:
    name = "a name that is far too long for one line" * 2
    return Sample(Image.new("RGB", size, colour), name, caption)


def test_pictures_are_whole_and_in_order():
    sheet = draw_sheet([sample("one"), sample("two", "blue", (40, 80))])
    assert sheet.width == 2 * (PICTURE + 24)
    middle = 12 + PICTURE // 2
    assert sheet.getpixel((middle, middle)) == (255, 0, 0)
    assert sheet.getpixel((middle, 14)) == (230, 230, 230)
    assert sheet.getpixel((264 + middle, 14)) == (0, 0, 255)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "two\nlines\tand  spaces",
        "half a \ud83d character \x1b[31m",
        "word " * 200,
        "w" * 500,
        "漢字" * 100,
        "é" * 60,
    ],
)
@pytest.mark.parametrize("fonts", [contact_sheet.FONTS, ("no such font.ttf",)])
def test_any_caption_fits(caption: str, fonts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contact_sheet, "FONTS", fonts)
    font = contact_sheet._font(12)
    assert isinstance(font, ImageFont.FreeTypeFont)
    name, *lines = contact_sheet._lines(sample(caption), font)
    assert len(lines) <= 6
    assert all(font.getlength(line.rstrip()) <= PICTURE for line in (name, *lines))
    shown, whole = ("".join(text.split()) for text in ("".join(lines), caption))
    whole = "".join(letter if letter.isprintable() else "�" for letter in whole)
    assert shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]))
    draw_sheet([sample(caption)] * 6)
