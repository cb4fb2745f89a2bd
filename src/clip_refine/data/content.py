"""What images and captions hold, as short fingerprints."""

import hashlib
from pathlib import Path

from clip_refine.data.loader import Images

_DIGEST_BYTES = 16


def image_fingerprint(images: Images, index: int) -> str:
    """Of the file's bytes, or of the pixels and the name of an image that is no file.

    Raises:
        DataError: The image cannot be read.
    """
    name = images.image_name(index)
    try:
        return fingerprint(Path(name).read_bytes())
    except (OSError, ValueError):  # drawn, or gone: then loading says so
        image = images.load_image(index)
        return fingerprint(
            name.encode(), image.mode.encode(), repr(image.size).encode(), image.tobytes()
        )


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
