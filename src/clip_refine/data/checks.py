"""Whether the image of a row can be used: the header, and the end that a cut-off file lacks."""

from pathlib import Path

from clip_refine.data.images import check_image, check_image_file
from clip_refine.data.rows import ImagePlace, load_place, read_place
from clip_refine.errors import DataError

_TAIL = 64


def image_problem(place: ImagePlace, *, decode: bool = False) -> str | None:
    """What is wrong with an image, or None.

    Reads the header and the last bytes; what does not end as its format should is decoded to be
    sure, since many sound files have something behind their end.

    Args:
        place: Where it is.
        decode: Decode every image, which also finds damage in the middle of a file.
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
