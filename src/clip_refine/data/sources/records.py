"""Records of named values, as JSONL, Parquet and datasets hold them → image and captions."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_refine.data.sources.tables import CAPTION_COLUMNS, IMAGE_COLUMNS

BYTES_COLUMNS = ("image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "image_base64", "image_data")
RECORD_IMAGES = (*IMAGE_COLUMNS, *BYTES_COLUMNS)
RECORD_CAPTIONS = (*CAPTION_COLUMNS, "txt", "json")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


def texts_of(value: Any) -> tuple[str, ...] | str:
    """The captions in a value: a text, a list of texts, or objects that hold one as `raw`.

    Returns:
        The texts; or, as one text, what is wrong.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bytes):
        return (value.decode("utf-8", errors="surrogateescape"),)
    if isinstance(value, Mapping):
        for name in ("raw", *CAPTION_COLUMNS):
            if name in value and value[name] is not None:
                return texts_of(value[name])
        return f"no caption among {', '.join(map(str, value)) or 'nothing'}. Add one or remove it."
    if isinstance(value, Sequence):
        texts: list[str] = []
        for part in value:
            found = texts_of(part)
            if isinstance(found, str):
                return found
            texts += found
        return tuple(texts) or "has no caption. Add one or remove the row."
    if value is None:
        return "has no caption. Add one or remove the row."
    return f"has a caption that is no text but {value!r:.40}. Mend it or remove the row."


def image_of(value: Any, *, encoded: bool = False) -> bytes | str | None:
    """The image in a value: the content of its file, its path, or None.

    Args:
        value: Bytes, a path, base64 text, or an object with `bytes` and `path`.
        encoded: Whether a text is base64 rather than a path.

    Raises:
        ValueError: It is none of these; the message says what is wrong.
    """
    match value:
        case None:
            return None
        case bytes():
            return value
        case str() if encoded or _DATA_URI.match(value):
            return _from_base64(value)
        case str():
            return value
        case {"bytes": bytes() as content}:
            return content
        case {"bytes": str() as content} if content:
            return _from_base64(content)
        case {"path": str() as path}:
            return path
    raise ValueError(f"has an image that is neither path nor bytes but {value!r:.40}.")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(_DATA_URI.sub("", text, count=1), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"has an image that is no valid base64 ({error}).") from error
