"""Images wherever they lie → their first picture as it is meant to be seen, in 8-bit RGB.

Rotated as its EXIF data says, transparent parts on white, 16 bits scaled to 8, of several frames
the first. A model's own preprocessing starts from here; those of open_clip know nothing of EXIF
and turn transparent parts into whatever colour the file hides there, often black.
"""

import io
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from clip_refine.support.console import remark
from clip_refine.support.errors import DataError
from clip_refine.support.limits import IMAGE, PIXELS, SCANS, is_regular, leads_out

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".j2c", ".jpc"),
    "AVIF": (".avif",),
}
"""What is decoded, and the endings by which files are taken for images where a folder or an archive
is searched; Pillow knows more, such as EPS, for which it would start another program."""
SUFFIXES = frozenset(ending for endings in FORMATS.values() for ending in endings)
MAX_RATIO = PIXELS // 512**2
"""Times that an image may be as long as it is narrow: preprocessing first brings the shorter side
to the model's, up to 512 pixels, and what that makes may not be larger than what is stored."""

Encoded = Path | bytes
DECODING = 1
"""Raised when images come out otherwise than before, so that pixels kept on disk are made anew."""
_BACKGROUND = (255, 255, 255, 255)
_STRIP = 1 << 22  # pixels that are put on it at a time
_NOT_FOUND = "is not there"


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB."""
    return decode_image(path, str(path))


def decode_image(encoded: Encoded, name: str, *, side: int | None = None) -> Image.Image:
    """Decode an image file or its content to RGB; of a large JPEG `side` pixels may be enough."""
    try:
        try:
            return _decoded(encoded, side)
        except (OSError, SyntaxError, ValueError):
            if (sound := _without_metadata(encoded)) is None:
                raise
            return _decoded(sound, side)
    except MemoryError:
        raise
    except Exception as error:  # parsers of damaged files trip in many ways: struct, zlib, index
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{name}: image file not found. Check the path.") from error
        raise DataError(f"{name}: {_why(error)}. Replace it or remove its rows.") from error


def _decoded(encoded: Encoded, side: int | None) -> Image.Image:
    with opened(encoded) as image:
        if image.format in ("JPEG", "MPO"):
            _check_scans(encoded)
        if side is not None:
            _decode_smaller(image, side)
        image.load()
        _rotate(image)
        return to_rgb(image)


# A scan's whole header: length and number of components. The marker alone stands once in 65 kB of
# anything, such as the film that a phone puts behind a picture.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")


def _check_scans(encoded: Encoded) -> None:
    """Refuse a JPEG that goes over all its blocks again and again, for a few bytes each time."""
    content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    if (count := len(_SCAN.findall(content))) > SCANS:
        raise _RefusedError(f"has {count:,} scans, more than the {SCANS} that are decoded")


def check_image(encoded: Encoded) -> str | None:
    """What is wrong with a file or its content as far as its header tells, or None."""
    try:
        with opened(encoded):
            return None
    except MemoryError:
        raise
    except Exception as error:  # see decode_image
        return _why(error)


def check_image_file(path: Path) -> str | None:
    """`check_image` of a file as a sentence that names it."""
    problem = check_image(path)
    if problem is None:
        return None
    if problem == _NOT_FOUND:
        return f"image file {path} not found. Check the path."
    return f"{path} {problem}. Replace it or remove the row."


@contextmanager
def opened(encoded: Encoded) -> Iterator[ImageFile.ImageFile]:
    """The image with its header read."""
    if isinstance(encoded, Path) and not is_regular(encoded):
        raise _RefusedError("is no file but a folder, a pipe or a device")
    size = len(encoded) if isinstance(encoded, bytes) else encoded.stat().st_size
    if not size:
        raise _RefusedError("is empty (0 bytes)")
    if size > IMAGE:
        raise _RefusedError(f"has {size:,} bytes, more than the {IMAGE:,} that are read")
    with warnings.catch_warnings():
        # metadata oddities and Pillow's own size warnings say nothing about the pixels
        warnings.simplefilter("ignore")
        with _header(encoded) as image:
            if image.width * image.height > PIXELS:
                raise _RefusedError(
                    f"has {image.width} x {image.height} pixels, more than the "
                    f"{PIXELS:,} that are decoded. If it is meant to be so large, shrink it"
                )
            if max(image.size) > MAX_RATIO * min(image.size):
                raise _RefusedError(
                    f"has {image.width} x {image.height} pixels, so it is more than {MAX_RATIO} "
                    "times as long as it is narrow and would fill the memory when its shorter "
                    "side is resized to the model's. Crop it"
                )
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                raise _RefusedError(
                    f"has 32-bit pixels (mode {image.mode}), of which nobody knows what is white. "
                    "Save it with 8 or 16 bits"
                )
            yield image


def _header(encoded: Encoded) -> ImageFile.ImageFile:
    source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        return Image.open(source, formats=_formats())
    except (OSError, SyntaxError, ValueError):
        if (sound := _without_metadata(encoded)) is None:
            raise
        return Image.open(io.BytesIO(sound), formats=_formats())


_PNG = b"\x89PNG\r\n\x1a\n"
_XMP = b"XML:com.adobe.xmp"  # may say how the image is to be turned, so it stays where it is sound


def _without_metadata(encoded: Encoded) -> bytes | None:
    """A PNG without texts and profile; None where it is no PNG, or has nothing to leave out.

    Pillow refuses a whole image for a large profile or a text with a wrong checksum, which say
    nothing about the pixels.
    """
    try:
        data = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    except OSError:
        return None
    if not data.startswith(_PNG):
        return None
    kept, at = [_PNG], len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunk = data[at : at + 12 + length]
        at += len(chunk)
        whole = len(chunk) == 12 + length
        sound = whole and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            if sound and chunk[8:].startswith(_XMP) and length < PngImagePlugin.MAX_TEXT_CHUNK:
                kept.append(chunk)
        elif sound or not whole or kind[:1].isupper() or kind == b"tRNS":
            kept.append(chunk)  # without the pixels' own chunks nothing can be shown
    found = b"".join(kept)
    return found if len(found) < len(data) else None


def _decode_smaller(image: ImageFile.ImageFile, side: int) -> None:
    """Ask for a JPEG at the smallest size that is large enough; other formats take no notice.

    A rounded side would shift everything by up to half a pixel, which costs far more accuracy
    than the coarser filter (docs/log.md).
    """
    width, height = image.size
    for scale in (8, 4, 2):
        if min(width, height) >= scale * side and width % scale == height % scale == 0:
            image.draft(None, (width // scale, height // scale))
            return


class _RefusedError(ValueError):
    """The message says why."""


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _why(error: Exception) -> str:
    match error:
        case _RefusedError():
            return str(error)
        case FileNotFoundError():
            return _NOT_FOUND
        case UnidentifiedImageError():
            return f"is not a readable image (known kinds: {', '.join(FORMATS)})"
        case Image.DecompressionBombError():
            return f"has more than the {PIXELS:,} pixels that are decoded"
        case OSError() if error.strerror:
            return f"cannot be read ({error.strerror})"
    reason = str(error).rstrip(".") or type(error).__name__
    return f"cannot be decoded as an image ({reason})"


def _rotate(image: ImageFile.ImageFile) -> None:
    """Turn the pixels as the EXIF data says; where that is unreadable they stay as stored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # cameras and editors write all kinds of broken EXIF around sound pixels
        return


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB with transparent parts on white and 16-bit grey scaled."""
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = Image.new("RGB", image.size)
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):  # whole, a large image would be there four times
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, _BACKGROUND)
        shown.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return shown


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """8 bits of 16: the upper byte, as Pillow does for 16-bit colour."""
    levels = np.asarray(image)
    grey = (levels >> 8).astype(np.uint8)
    if (see_through := image.info.get("transparency")) is not None:
        grey[levels == see_through] = 255
    return Image.fromarray(grey)


# --------------------------------------------------------------------------------------------------
# The places where an image can be.


class StoredImage(Hashable, Protocol):
    """An image that lies inside something larger; its text is what to call it in a message."""

    def read(self) -> bytes:
        """The content of the image file."""
        ...


ImagePlace = Path | StoredImage


@dataclass(frozen=True, slots=True, eq=False)
class ImageInMemory:
    """An image whose content was read with its row."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The content of the image file."""
        return self.content


def load_place(place: ImagePlace) -> Image.Image:
    """The image there, in RGB."""
    if isinstance(place, Path):
        return open_image(place)
    return decode_image(place.read(), str(place))


def read_place(place: ImagePlace) -> bytes:
    """The content of the image file there."""
    return place.read_bytes() if isinstance(place, Path) else place.read()


# --------------------------------------------------------------------------------------------------
# Whether an image can be used: the header, and the end that a cut-off file lacks.


_TAIL = 64


def image_problem(place: ImagePlace, *, decode: bool = False) -> str | None:
    """What is wrong with an image, or None.

    Reads the header and the last bytes; what does not end as its format should is decoded to be
    sure, since many sound files have something behind their end.
    """
    try:
        problem, whole = _look(place)
    except OSError as error:
        return f"{place} cannot be read ({error.strerror or error})."
    if problem is None and (decode or not whole):
        try:
            load_place(place)
        except DataError as error:
            return str(error)
    return problem


def _look(place: ImagePlace) -> tuple[str | None, bool]:
    """What the header tells, and whether the file ends as it should."""
    if isinstance(place, Path):
        problem = check_image_file(place)
        if problem:
            return problem, False
        size = place.stat().st_size
        with place.open("rb") as file:
            head = file.read(16)
            file.seek(max(0, size - _TAIL))
            return None, _ends_well(head, file.read(), size)
    data = read_place(place)
    problem = check_image(data)
    if problem:
        return f"{place} {problem}. Replace it or remove the row.", False
    return None, _ends_well(data[:16], data[-_TAIL:], len(data))


def _ends_well(head: bytes, tail: bytes, size: int) -> bool:
    r"""Whether the last bytes are those that the format ends with; False where that is not known.

    >>> _ends_well(b"\xff\xd8\xff\xe0", b"...\xff\xd9", 900)
    True
    """
    if head.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in tail
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"GIF8"):
        return tail.endswith(b"\x3b")
    return False


# --------------------------------------------------------------------------------------------------
# The image files of a folder.


_CLUTTER = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def is_clutter(path: PurePath) -> bool:
    """Whether a relative path leads to what programs leave behind, hidden or by its name.

    >>> is_clutter(PurePath(".ipynb_checkpoints/a-checkpoint.png")), is_clutter(PurePath("b/._c"))
    (True, True)
    """
    return any(part.startswith(".") or part in _CLUTTER for part in path.parts)


def image_files(
    folder: Path, *, expected: frozenset[str] = frozenset(), links: bool = False
) -> list[Path]:
    """The images in a folder and below, sorted; says what else is there but `expected` endings."""
    found, others = find_images(folder, links=links)
    say_others(folder, Counter({end: n for end, n in others.items() if end not in expected}))
    return found


def find_images(folder: Path, *, links: bool = False) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and below, sorted, and the endings of all else that is no clutter."""
    found: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for path, inner, names in os.walk(folder, followlinks=links):
        if (real := os.path.realpath(path)) in seen:  # links may lead in circles
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        for number, name in enumerate([*names, *inner]):
            file, is_folder = Path(path, name), number >= len(names)
            if is_clutter(file.relative_to(folder)):
                continue
            is_image = not is_folder and file.suffix.lower() in SUFFIXES
            if not links and (is_image or is_folder) and leads_out(file, folder):
                raise DataError(
                    f"{file}: is a link out of {folder}. Copy it there, or pass "
                    "--data.allow-outside if meant, which suites do not take."
                )
            if is_image:
                found.append(file)
            elif not is_folder:
                others[file.suffix.lower()] += 1
    return sorted(found), others


def say_others(folder: Path, others: Counter[str]) -> None:
    """Say in one line which files of a folder are passed over, so that no format is missed."""
    if others:
        listed = ", ".join(f"{n:,} {end or 'without'}" for end, n in others.most_common(5))
        remark(f"{folder}: {others.total():,} files are no images by their endings ({listed}).")
