"""Flickr8k's and Flickr30k's token files: `1000268201.jpg#0<tab>A child in a pink dress .`."""

import re
from collections.abc import Iterator
from pathlib import Path

from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.errors import DataError

KIND = "token file"
_LINE = re.compile(r"(?P<image>[^\t]+?)#\d+\t(?P<caption>.*)", re.DOTALL)


def is_token_line(line: str) -> bool:
    r"""Whether a file that begins with this line is a token file.

    >>> is_token_line("1000268201_693b08cb0e.jpg#0\tA child in a pink dress .")
    True
    """
    return _LINE.match(line) is not None


def token_rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a token file.

    Raises:
        DataError: The file cannot be read.
    """
    return file_rows(path, _written(path), options)


def _written(path: Path) -> Iterator[Written]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                found = _LINE.fullmatch(line.rstrip("\r\n"))
                if found:
                    yield Written(where, found["image"].strip(), (found["caption"],))
                else:
                    problem = "expected 'image.jpg#0', a tab and a caption. Mend or remove the row."
                    yield Written(where, "", (), problem)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
