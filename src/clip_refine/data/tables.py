"""CSV and TSV files of image paths and captions."""

import csv
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_refine.console import Bar
from clip_refine.data.images import check_image_file, open_image
from clip_refine.errors import DataError

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "file_path", "path")
CAPTION_COLUMNS = ("caption", "text", "title", "sentence", "description")


@dataclass(frozen=True)
class ImageFileCaptions:
    """Image files with one or more captions each.

    Attributes:
        name: The file that listed them.
        paths: One path an image.
        captions: `captions[i]` are the texts of `paths[i]`.
    """

    name: str
    paths: Sequence[Path]
    captions: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` in RGB.

        Raises:
            DataError: The file is gone or cannot be decoded.
        """
        return open_image(self.paths[index])

    def image_name(self, index: int) -> str:
        """The image's path."""
        return str(self.paths[index])


def read_table(
    path: Path, *, image_column: str | None = None, caption_column: str | None = None
) -> ImageFileCaptions:
    """Read a .csv or .tsv file with a header; rows of one image become its captions.

    Relative image paths start at the file's own folder. Images keep the order of their first row.

    Raises:
        DataError: The file cannot be read, lacks a column, has no rows, or a row has an empty
            caption or an image that is missing or is no image. Up to ten bad rows are listed.
    """
    captions: dict[Path, list[str]] = {}
    problems: list[str] = []
    rows = _rows(path, image_column, caption_column)
    for row_number, image, caption in Bar(f"Checking {path.name}", transient=True).over(rows):
        image_path = path.parent / image
        problem = None
        if not caption:
            problem = f"image {image!r} has an empty caption. Add one or remove the row."
        elif image_path not in captions:
            problem = check_image_file(image_path)
        if problem:
            problems.append(f"{path}, line {row_number}: {problem}")
        else:
            captions.setdefault(image_path, []).append(caption)
    if problems:
        more = f"\n... and {len(problems) - 10} more bad rows." if len(problems) > 10 else ""
        raise DataError("\n".join(problems[:10]) + more)
    if not captions:
        raise DataError(f"{path}: has a header but no rows. Add pairs of image and caption.")
    return ImageFileCaptions(
        name=str(path),
        paths=tuple(captions),
        captions=tuple(tuple(texts) for texts in captions.values()),
    )


def _rows(
    path: Path, image_column: str | None, caption_column: str | None
) -> Iterator[tuple[int, str, str]]:
    """(line number, image path as written, caption) of every row that is not blank."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            image_at = _column(path, header, image_column, IMAGE_COLUMNS, "image")
            caption_at = _column(path, header, caption_column, CAPTION_COLUMNS, "caption")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, but the header has "
                        f"{len(header)}. Put captions that hold a {delimiter!r} in double quotes."
                    )
                yield reader.line_num, row[image_at].strip(), row[caption_at].strip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: is no valid {path.suffix[1:].upper()} file ({error}).") from error


def _column(
    path: Path, header: list[str], wanted: str | None, known: tuple[str, ...], what: str
) -> int:
    """Position of the wanted column, or of the first known one."""
    for name in (wanted,) if wanted else known:
        if name in header:
            return header.index(name)
    if wanted:
        near = difflib.get_close_matches(wanted, header, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{path}: has no column {wanted!r}, only {', '.join(header)}.{hint}")
    raise DataError(
        f"{path}: no {what} column among {', '.join(header) or 'no columns'}; looked for "
        f"{', '.join(known)}. Name it with --data.{what}-column."
    )
