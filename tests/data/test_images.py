"""Odd images: decoded as they are meant to be seen, or refused with one clear error."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_refine.data import images
from clip_refine.data.images import (
    PIXELS,
    check_image,
    check_image_file,
    decode_image,
    open_image,
    to_rgb,
)
from clip_refine.support.errors import DataError
from tests.data.files import encoded

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def decoded(image: Image.Image, kind: str, **settings) -> np.ndarray:
    picture = decode_image(encoded(image, kind, **settings), "test")
    assert picture.mode == "RGB"
    return np.asarray(picture)


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG file with this header, whatever its rows hold."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def corners() -> Image.Image:
    """30 x 20, each quarter of another grey."""
    image = Image.new("RGB", (30, 20))
    for place, level in (((0, 0), 20), ((15, 0), 90), ((0, 10), 160), ((15, 10), 230)):
        image.paste((level, level, level), (*place, place[0] + 15, place[1] + 10))
    return image


TURNED_BACK = {  # what a camera stores, by the orientation that it writes beside it
    1: lambda upright: upright,
    2: lambda upright: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda upright: upright.transpose(Image.Transpose.ROTATE_180),
    4: lambda upright: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda upright: upright.transpose(Image.Transpose.TRANSPOSE),
    6: lambda upright: upright.transpose(Image.Transpose.ROTATE_90),
    7: lambda upright: upright.transpose(Image.Transpose.TRANSVERSE),
    8: lambda upright: upright.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("orientation", TURNED_BACK)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(orientation: int, kind: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = TURNED_BACK[orientation](corners())
    settings = {"lossless": True} if kind == "WEBP" else {}
    shown = decoded(stored, kind, exif=exif, **settings)
    np.testing.assert_array_equal(shown, np.asarray(corners()))


def test_exif_rotation_of_a_jpeg_and_broken_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = corners().transpose(Image.Transpose.ROTATE_90)
    shown = decoded(stored, "JPEG", exif=exif, quality=100)
    assert abs(shown.astype(int) - np.asarray(corners())).max() < 5
    broken = encoded(stored, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f no such place")
    assert decode_image(broken, "test").size == (20, 30)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize(("level", "expected"), [(0, 0), (300, 1), (32768, 128), (65535, 255)])
def test_16_bits_are_scaled_not_clipped(kind: str, level: int, expected: int):
    image = Image.fromarray(np.full((4, 4), level, np.uint16))
    assert (decoded(image, kind) == expected).all()


def test_16_bit_colour():
    rows = b"".join(b"\x00" + struct.pack(">3H", 65535, 32768, 0) * 2 for _ in range(2))
    picture = decode_image(png(2, 2, rows, depth=16, colour=2), "test")
    assert picture.getpixel((1, 1)) == (255, 128, 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused_by_their_header(mode: str):
    data = encoded(Image.new(mode, (4, 4)), "TIFF")
    assert "32-bit pixels" in (check_image(data) or "")
    with pytest.raises(DataError, match=r"deep.tif: has 32-bit pixels.*Save it with 8 or 16 bits"):
        decode_image(data, "deep.tif")


def test_cmyk_grey_bilevel_and_palette():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert abs(decoded(ink, "JPEG")[8, 8].astype(int) - RED).max() < 5
    assert abs(decoded(Image.new("L", (16, 16), 77), "JPEG").astype(int) - 77).max() < 3
    assert (decoded(Image.new("1", (4, 4), 1), "PNG") == 255).all()
    palette = Image.new("RGB", (4, 4), GREEN).quantize(4)
    assert (decoded(palette, "GIF") == GREEN).all()
    assert (decoded(palette, "PNG") == GREEN).all()


def test_what_is_transparent_shows_white():
    for mode, hidden in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        assert (decoded(Image.new(mode, (4, 4), hidden), "PNG") == 255).all()
    half = decoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert (half == 127).all()
    assert (decoded(Image.new("RGBA", (4, 4), (*RED, 255)), "PNG") == RED).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, *RED])
    for kind in ("PNG", "GIF"):
        assert (decoded(palette, kind, transparency=0) == 255).all()
    assert (decoded(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0)) == 255).all()
    grey = Image.fromarray(np.array([[7, 65535], [7, 0]], np.uint16))
    assert decoded(grey, "PNG", transparency=7)[..., 0].tolist() == [[255, 255], [255, 0]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, WHITE)]
    settings = {"lossless": True} if kind == "WEBP" else {}
    shown = decoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert (shown == RED).all()


def test_cut_off_files():
    noise = Image.effect_noise((64, 64), 50)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        whole = encoded(noise, kind)
        with pytest.raises(DataError, match=r"^cut: .*\. Replace it or remove its rows\.$"):
            decode_image(whole[: len(whole) // 2], "cut")


def test_empty_missing_and_other_files(tmp_path: Path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "folder.jpg").mkdir()
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "vector.jpg").write_text(script)
    messages = {
        "empty.jpg": r"empty.jpg: is empty \(0 bytes\). Replace it",
        "page.jpg": r"page.jpg: is not a readable image \(known kinds: JPEG, PNG",
        "folder.jpg": r"folder.jpg: is no file but a folder, a pipe",
        "vector.jpg": r"vector.jpg: is not a readable image",
        "gone.jpg": r"gone.jpg: image file not found. Check the path.",
    }
    for name, message in messages.items():
        with pytest.raises(DataError, match=message):
            open_image(tmp_path / name)
        assert name in (check_image_file(tmp_path / name) or "")
    with pytest.raises(DataError, match=r"^row 7: is empty"):
        decode_image(b"", "row 7")


@pytest.mark.parametrize(("width", "height"), [(13_400, 13_400), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width: int, height: int):
    assert width * height > PIXELS
    bomb = png(width, height, b"\x00" * 100)
    with pytest.raises(DataError, match=rf"^bomb: has .*more than the {PIXELS:,}"):
        decode_image(bomb, "bomb")
    assert "178,956,970" in (check_image(bomb) or "")


def test_the_limit_holds_where_somebody_turned_pillows_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match=r"bomb: has 60000 x 60000 pixels, more than.*shrink it"):
        decode_image(png(60_000, 60_000, b""), "bomb")


def test_a_picture_of_100_megapixels_is_read(tmp_path: Path):
    """As medium-format cameras make it."""
    Image.new("L", (11_648, 8_736), 200).save(tmp_path / "large.jpg")
    assert check_image(tmp_path / "large.jpg") is None
    assert open_image(tmp_path / "large.jpg").getpixel((11_647, 8_735)) == (200, 200, 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "1", "RGB"])
def test_what_is_transparent_is_the_same_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch):
    noise = np.random.default_rng(0).integers(256, size=(13, 7, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB" if mode in ("P", "1") else "RGBA").convert(mode)
    if mode in ("P", "L", "1", "RGB"):
        image.info["transparency"] = (9, 9, 9) if mode == "RGB" else image.getpixel((0, 0))
    whole = np.asarray(to_rgb(image))
    monkeypatch.setattr(images, "_STRIP", 20)
    assert np.array_equal(np.asarray(to_rgb(image)), whole)


def test_path_and_bytes_are_the_same(tmp_path: Path):
    path = tmp_path / "corners.png"
    corners().save(path)
    from_bytes = decode_image(path.read_bytes(), "corners")
    assert open_image(path).tobytes() == from_bytes.tobytes() == corners().tobytes()
    assert check_image(path) is None
    assert check_image_file(path) is None


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((1024, 768), 100, (256, 192)),
        ((1024, 768), 96, (128, 96)),
        ((1024, 768), 300, (512, 384)),
        ((1024, 768), 385, (1024, 768)),
        ((1022, 766), 90, (511, 383)),  # quarters would be rounded, which shifts everything
        ((1023, 767), 90, (1023, 767)),
    ],
)
def test_a_large_jpeg_is_decoded_smaller_where_enough_is_left(size, side, expected):
    gradient = Image.linear_gradient("L").resize(size).convert("RGB")
    data = encoded(gradient, "JPEG", quality=95)
    small = decode_image(data, "test", side=side)
    assert small.size == expected
    shrunk = gradient.resize(expected, Image.Resampling.BOX)
    assert abs(np.asarray(small).astype(int) - np.asarray(shrunk)).max() <= 4
    assert decode_image(data, "test").size == size
    assert decode_image(encoded(gradient, "PNG"), "test", side=side).size == size


def test_a_smaller_jpeg_is_still_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = corners().resize((240, 160), Image.Resampling.NEAREST)
    data = encoded(stored.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100)
    shown = decode_image(data, "test", side=40)
    assert shown.size == (60, 40)
    assert shown.getpixel((10, 30)) == pytest.approx((160, 160, 160), abs=3)


def repeated_scans(count: int) -> bytes:
    """A JPEG that is not progressive, whose first colour comes again and again."""
    file = io.BytesIO()
    Image.new("L", (32, 32), 128).save(file, "JPEG")
    grey = file.getvalue()
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    three = b"\xff\xc0\x00\x11" + grey[frame + 4 : frame + 9] + b"\3\1\x11\0\2\x11\0\3\x11\0"
    body = grey[scan:-2]
    of = [body[:5] + bytes([colour]) + body[6:] for colour in (1, 2, 3)]
    tables = grey[frame + 13 : scan]
    return b"".join([grey[:frame], three, tables, of[0] * count, *of[1:], grey[-2:]])


def test_scans_are_counted_whatever_the_kind_of_jpeg():
    assert decode_image(repeated_scans(90), "a.jpg").size == (32, 32)
    with pytest.raises(DataError, match="has 103 scans, more than the 100"):
        decode_image(repeated_scans(101), "a.jpg")


def test_what_stands_behind_a_picture_is_no_scan():
    """As the film that a phone puts there: the marker alone is in any 65 kB."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG", progressive=True)
    film = np.random.default_rng(0).integers(0, 256, 12_000_000, dtype="u1").tobytes()
    assert film.count(b"\xff\xda") > 100
    assert decode_image(file.getvalue() + film, "a.jpg").size == (64, 48)
