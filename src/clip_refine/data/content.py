"""What images and captions hold, as short fingerprints."""

import hashlib
from pathlib import Path
from typing import Any

from clip_refine.data.loader import Images
from clip_refine.data.split import Subset

_DIGEST_BYTES = 16


def image_fingerprint(images: Images, index: int) -> str:
    """Of the image file's content, wherever it is stored.

    Of the pixels and the name where there is no such content, because the image is drawn.

    Raises:
        DataError: The image cannot be read.
    """
    name = images.image_name(index)
    try:
        content = image_bytes(images, index)
        return fingerprint(Path(name).read_bytes() if content is None else content)
    except (OSError, ValueError):  # drawn, or gone: then loading says so
        image = images.load_image(index)
        return fingerprint(
            name.encode(), image.mode.encode(), repr(image.size).encode(), image.tobytes()
        )


def image_bytes(images: Any, index: int) -> bytes | None:
    """The content of the image file, None where the source has no such thing.

    Raises:
        OSError: It is gone.
    """
    if isinstance(images, Subset):
        return image_bytes(images.source, images.indices[index])
    read = getattr(images, "image_bytes", None)
    return read(index) if read else None


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
