"""How much is read of files that others wrote, and how: docs/security.md tells the same.

Each is of one file, line or image, unless it says of what else, and each process counts for itself.
What is refused raises a `ValueError` that says why, so that a reader needs one `except (OSError,
ValueError)` whatever the parser of a format trips over.
"""

import json
import os
import reprlib
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, AnyStr

import yaml

TEXT = 1 << 20
"""Bytes of settings, of a text beside an image or in an archive; letters of a line of a table."""
LINE = 1 << 26
"""Bytes of a line of JSON lines, which may hold an image."""
IMAGE = 1 << 28
"""Bytes of an image file."""
HELD = 1 << 32
"""Bytes of image files that a stream holds to draw from."""
WHOLE = 1 << 30
"""Bytes of a JSON file of annotations or results, and of a list of names: they are read whole."""
FILES = 1_000_000
"""Files that one pattern may stand for, and values that a YAML file may stand for."""
PIXELS = 178_956_970
"""Width times height of an image, above which Pillow itself refuses; known before it is decoded.
Cameras make 100 million."""
SCANS = 100
"""Times that a JPEG goes over its blocks, for each of which a few bytes are enough; encoders make
about 10."""
LETTERS = 50
"""Letters for each token that a model reads, behind which a text is not tokenized."""
LAYERS = 1000
"""Layers that settings of a model may ask for, which are made one by one; open_clip's deepest has
56."""
_NAMES = 20


def too_many_layers(settings: Any) -> str | None:
    """The name of a setting, however deep, that asks for more than `LAYERS`, if there is one.

    >>> too_many_layers({"text": {"num_layers": 12}, "image": {"layers": [3, 10**30]}})
    'image.layers'
    """
    for name, value in settings.items() if isinstance(settings, dict) else ():
        counts = value if isinstance(value, list | tuple) else [value]
        numbers = [count for count in counts if isinstance(count, int | float)]
        if ("layer" in str(name) or "depth" in str(name)) and any(n > LAYERS for n in numbers):
            return f"{name}"
        if inner := too_many_layers(value):
            return f"{name}.{inner}"
    return None


def listed(names: Iterable[Any]) -> str:
    """Names for a message, which no file can make longer than a screen.

    >>> listed(range(1000))[-25:]
    '17, 18, 19 and 980 others'
    """
    names = [str(name) for name in names]
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in names[:_NAMES]]
    return ", ".join(shown) + (f" and {len(names) - _NAMES} others" if names[_NAMES:] else "")


def shown(value: Any) -> str:
    """A value for a message, cut off, and without writing out what is nested.

    >>> shown([1, [2, [3, [4, [5, [6, [7]]]]]]])
    '[1, [2, [3, [4, [5, [6, [...]]]]]]]'
    """
    return reprlib.repr(value)


def read_text(path: Path, most: int = TEXT) -> str:
    """A file in UTF-8, up to `most` bytes (else a ValueError); a pipe from the shell, too."""
    if not str(path).startswith(("/dev/", "/proc/")):  # as `<(...)`; others may never end
        check_regular(path)
    with path.open("rb") as file:
        return read_all(file, most).decode("utf-8-sig")


def read_all(file: IO[AnyStr], most: int) -> AnyStr:
    """All of a file; a ValueError where it is longer than `most`."""
    parts, left = [], most + 1
    # not all at once, as memory is taken for as much as is asked for, however short the file is
    piece = max(os.fstat(file.fileno()).st_size, TEXT) + 1
    while left and (part := file.read(min(piece, left))):
        parts.append(part)
        left -= len(part)
    content = file.read(0).join(parts)
    if not left:
        raise ValueError(
            f"has more than the {most:,} {_unit(content)} that are read of such a file"
        )
    return content


def _unit(text: str | bytes) -> str:
    return "letters" if isinstance(text, str) else "bytes"


def lines_of(file: IO[AnyStr], most: int) -> Iterator[AnyStr]:
    """The lines of a file; a ValueError where one is longer than `most`."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise ValueError(
                f"line {number} has more than the {most:,} {_unit(line)} that are read"
            )
        yield line


def parse_json(text: str | bytes) -> Any:
    """A JSON text; a ValueError where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """A YAML text of plain values; refuses one nested too deeply or far more than it is long."""
    try:
        loader = yaml.SafeLoader(text)  # the one in Python, which knows how deep it is
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # dates, numbers and tags that do not hold what they say
        said = " ".join(str(error).split())
        raise ValueError(f"holds a value that is none ({said or type(error).__name__})") from error


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values that a node stands for, each reference counted as what it refers to."""
    if id(node) not in known:
        known[id(node)] = FILES + 1  # what holds itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
        if known[id(node)] > FILES:
            raise yaml.YAMLError(f"stands for more than the {FILES:,} values that are read")
    return known[id(node)]


def is_regular(path: Path) -> bool:
    """Whether it is a file, not a pipe, a device or a folder, of which reading may never end."""
    return stat.S_ISREG(os.stat(path).st_mode)


def check_regular(path: Path) -> None:
    """A ValueError where it is none."""
    if not is_regular(path):
        raise ValueError("a pipe, a device or a folder, not a file")


@lru_cache(1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether links lead from a path inside a folder to one outside; the folder may be a link."""
    parent, name = os.path.split(path)
    real = os.path.join(_real(parent), name)
    if os.path.islink(real):
        real = os.path.realpath(real)
    inside = _real(str(folder))
    return os.path.commonpath([real, inside]) != inside
