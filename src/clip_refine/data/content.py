"""What images and captions hold, as short fingerprints."""

import hashlib
from pathlib import Path
from typing import Any

from clip_refine.data.pairs import ImageCaptions, Images
from clip_refine.errors import DataError

_DIGEST_BYTES = 16


def image_bytes(images: Images, index: int) -> bytes | None:
    """The content of the file that image `index` is decoded from, or None for a drawn one.

    Raises:
        DataError: The file cannot be read.
    """
    source: Any = images
    if not hasattr(source, "image_bytes"):
        return None
    try:
        return source.image_bytes(index)
    except OSError as error:
        raise DataError(
            f"{images.image_name(index)}: cannot be read ({error.strerror or error}). Check the "
            "path."
        ) from error


def image_fingerprint(images: Images, index: int) -> str:
    """Of the image file's content, wherever it is stored.

    Of the pixels and the name where there is no such content, because the image is drawn.

    Raises:
        DataError: The image cannot be read.
    """
    data = image_bytes(images, index)
    if data is not None:
        return fingerprint(data)
    image = images.load_image(index)
    name = images.image_name(index)
    return fingerprint(
        name.encode(), image.mode.encode(), repr(image.size).encode(), image.tobytes()
    )


def pairs_fingerprint(pairs: ImageCaptions) -> str:
    """Which images with which captions, whatever their order and the folder they lie in.

    Of every image's file name, file size and captions; no image is read, so that it costs a look
    at each file. Images that were changed without a change of size keep it: `image_fingerprint`
    tells those apart.
    """
    of_each = sorted(
        fingerprint(
            Path(name).name.encode(),
            str(_file_size(name)).encode(),
            *(caption.encode() for caption in captions),
        ).encode()
        for name, captions in (
            (pairs.image_name(index), pairs.captions[index]) for index in range(len(pairs))
        )
    )
    return fingerprint(*of_each)


def _file_size(name: str) -> int:
    """In bytes; 0 for what is no file of its own, such as a drawn image or one in an archive."""
    try:
        return Path(name).stat().st_size
    except (OSError, ValueError):
        return 0


def fingerprint(*parts: bytes) -> str:
    """32 hexadecimal digits, other ones for other parts.

    >>> fingerprint(b"ab", b"c") == fingerprint(b"a", b"bc")
    False
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
