"""Files of captions → rows: which files a name means, where images are, splits, and every layout.

CSV and TSV, token files, COCO's annotations, Karpathy's; records are read in data/datasets.py.
"""

import ast
import csv
import difflib
import glob
import os
import random
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from clip_refine.config import DataConfig
from clip_refine.data.images import SUFFIXES, ImagePlace, is_clutter
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.support.limits import (
    FILES,
    TEXT,
    WHOLE,
    is_regular,
    leads_out,
    lines_of,
    listed,
    parse_json,
    read_all,
)

# --------------------------------------------------------------------------------------------------
# A row of a source as its reader gives it, and how sources are read.


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, not yet checked."""

    where: str  # what to call the row in a message, as in `captions.csv, line 3`
    # where its image is; rows with equal places belong to one image. None where the row names
    # none.
    image: ImagePlace | None
    captions: tuple[str, ...]  # its texts; none at all for an image that nobody has described
    problem: str | None = None  # what the reader found wrong with it


OpenRows = Callable[[random.Random | None], Sequence[Callable[[], Iterator[Row]]]]
"""Begins a pass over the rows, with files or shards in an order drawn from the generator, or in
their own order without one."""


class SourceSettings(DataConfig):
    """How one source is read: the settings of `data` with those behind the source's `#`."""

    training: bool = True
    """Whether the training or the validation split is meant where `split` names none."""

    @cached_property
    def listed(self) -> "Listed | None":
        """The images that `split_file` chooses; None where there is no such file."""
        if self.split_file is None:
            return None
        return read_split_file(self.split_file, self.split, training=self.training)


# --------------------------------------------------------------------------------------------------
# Names of several files in one: `shards-{0000..0127}.tar`, `data/*.parquet`.


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def is_remote(name: str) -> bool:
    """Whether a name is an address such as `https://...` or `s3://...`."""
    return "://" in name


def expand_braces(name: str) -> list[str]:
    """Every name that a pattern with braces stands for.

    >>> expand_braces("a-{08..10}.tar"), expand_braces("{a,b}.tar")
    (['a-08.tar', 'a-09.tar', 'a-10.tar'], ['a.tar', 'b.tar'])
    """
    found = _BRACES.search(name)
    if found is None:
        return [name]
    between = _RANGE.fullmatch(found[1])
    if between is None and "," not in found[1]:
        return [name]
    rest = expand_braces(name[found.end() :])
    first, last = map(int, between.groups()) if between else (1, found[1].count(",") + 1)
    if (abs(last - first) + 1) * len(rest) > FILES:
        raise DataError(f"{name:.80}: stands for more than {FILES:,} files. Name fewer.")
    if between:
        width = len(between[1])
        step = 1 if last >= first else -1
        options = [f"{number:0{width}}" for number in range(first, last + step, step)]
    else:
        options = found[1].split(",")
    return [f"{name[: found.start()]}{option}{end}" for option in options for end in rest]


def expand(name: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a name stands for, in order."""
    files: list[str] = []
    for one in expand_braces(name):
        if is_remote(one):
            files += _remote(one) if "*" in one else [one]
        elif Path(one).is_dir():
            found = (path for suffix in suffixes for path in Path(one).rglob(f"*{suffix}"))
            files += sorted(str(path) for path in found if not is_clutter(path.relative_to(one)))
        else:
            files += sorted(glob.glob(one)) if "*" in one or "?" in one else [one]
    missing = [file for file in files if not is_remote(file) and not Path(file).is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file ({len(missing)} of {len(files)} missing).")
    if not files:
        raise DataError(f"{name}: stands for no file. Check the path.")
    return files


def _remote(pattern: str) -> list[str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(str(found)) for found in sorted(filesystem.glob(path))]
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{pattern}: cannot be listed ({error}). Check the address.") from error


# --------------------------------------------------------------------------------------------------
# Where the images of an annotation file are.


IMAGE_FOLDERS = (
    *("images", "Images", "image", "imgs", "jpg", "train2014", "val2014", "train2017", "val2017"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Images", "flickr8k_images"),
    *("flickr30k_images", "flickr30k-images", "Flickr30k_images", "flickr30k_images/Images"),
    *("flickr30k_images/flickr30k_images", "coco", "coco2014", "coco2017"),
)
"""Folders beside an annotation file, or beside its folder, in which its images are looked for."""
_TRIED = 20


def find_image_folder(file: Path, written: Iterable[str], settings: SourceSettings) -> Path:
    """The folder where relative image paths start."""
    if settings.image_folder is not None:
        if not settings.image_folder.is_dir():
            raise DataError(f"{settings.image_folder}: no such folder. Check --data.image-folder.")
        return settings.image_folder
    here = file.parent
    stem = file.stem.removeprefix("captions_").removeprefix("dataset_")
    near = [here, here / stem, here.parent / stem, here.parent / "images" / stem]
    near += [folder / name for name in IMAGE_FOLDERS for folder in (here, here.parent)]
    near.append(here.parent)
    names = [name for name in islice(written, _TRIED) if not problem_of_path(name)]
    for folder in near:
        if any(file_in(folder, name).is_file() for name in names):
            return folder
    return here


def file_in(folder: Path, written: str) -> Path:
    """The file that a path means: as written, else with other separators or accents."""
    # tables from Windows have back-slashes, archives from macOS hold "é" as an e and an accent
    path = folder / written
    if ("\\" not in written and written.isascii()) or path.exists():
        return path
    for name in (written, written.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            other = folder / unicodedata.normalize(form, name)
            if other.exists():
                return other
    return path


_NAME = 255
"""Bytes that a file's name may have."""
LINK = "is a link out of its folder. Copy the file there, or pass --data.allow-outside if meant."


def problem_of_path(written: str, *, allow_outside: bool = False) -> str | None:
    """Why an image path of an annotation file is not followed, or None."""
    if not written:
        return "names no image. Name one or remove the row."
    if "://" in written or written.startswith("data:"):
        return f"{written!r:.80} is an address, not a path. Download the images first."
    pure = (PurePosixPath(written), PureWindowsPath(written))
    if any(path.is_absolute() or path.drive for path in pure) and not allow_outside:
        return (
            f"{written!r} is an absolute path. Name the images' folder with --data.image-folder, "
            "where its end must lie, or pass --data.allow-outside."
        )
    if any(".." in path.parts for path in pure) and not allow_outside:
        return f"{written!r} leads out of its folder by '..'. Pass --data.allow-outside if meant."
    try:
        is_name = b"\0" not in os.fsencode(written)
    except UnicodeEncodeError:
        is_name = False
    is_name = is_name and all(len(os.fsencode(part)) <= _NAME for part in pure[0].parts)
    return None if is_name else f"{written!r:.80} is no file name. Mend it or remove the row."


@dataclass(frozen=True, slots=True)
class Written:
    """A row as an annotation file has it."""

    where: str  # what to call it in a message
    # the image's path as written, or its place where it is no file of its own
    image: str | ImagePlace
    captions: tuple[str, ...]  # its texts
    problem: str | None = None  # what the reader found wrong with it
    name: str | None = None  # of an image with a place: what its file was called, if that is known


def file_rows(file: Path, written: Iterable[Written], settings: SourceSettings) -> Iterator[Row]:
    """Rows with the paths of their image files, of the images that a split file chooses."""
    rows = iter(written)
    first = list(islice(rows, _TRIED))
    names = [row.image for row in first if isinstance(row.image, str)]
    folder = find_image_folder(file, names, settings)
    for row in chain(first, rows):
        if not _is_chosen(row, settings):
            continue
        if not isinstance(row.image, str):
            yield Row(row.where, row.image, row.captions, row.problem)
            continue
        outside = settings.allow_outside
        name = row.image
        # what the user follows and has stays; all else may be another machine's
        if settings.image_folder and not (outside and os.path.exists(name)):
            name = _end_in(folder, name)
        problem = row.problem or problem_of_path(name, allow_outside=outside)
        image = None if problem else file_in(folder, name)
        if image and not outside and leads_out(image, folder) and leads_out(image, file.parent):
            image, problem = None, f"{image} {LINK}"
        yield Row(row.where, image, row.captions, problem)


def _end_in(folder: Path, written: str) -> str:
    """The end of an absolute path that lies in the images' folder, else what was written."""
    pure = PurePosixPath(written), PureWindowsPath(written)
    parts = next((path.parts for path in pure if path.is_absolute()), ())
    ends = ["/".join(parts[at:]) for at in range(1, len(parts))] if ".." not in parts else []
    return next((end for end in ends if os.path.isfile(folder / end)), written)


def _is_chosen(row: Written, settings: SourceSettings) -> bool:
    name = row.image if isinstance(row.image, str) else row.name
    if settings.listed is None:
        return True
    if name is not None:
        return name in settings.listed
    if row.problem:  # which nobody can say of which image it is
        return False
    raise DataError(
        f"{row.where}: its image is stored without a file name, so {settings.split_file} cannot "
        "choose it. Leave the split file out, or store the names, too."
    )


# --------------------------------------------------------------------------------------------------
# Files that say which images belong to which split.


TRAINING = ("train", "restval")
"""Karpathy's `restval` is what nearly everybody trains on, too."""


@contextmanager
def readable_file(path: Path) -> Iterator[None]:
    """Errors of reading a file as one of ours."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeError as error:
        raise DataError(f"{path}: is damaged UTF-16 ({error}). Save it as UTF-8.") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}. Mend it.") from error


def encoding_of(path: Path) -> str:
    """UTF-16 by its mark or by the zeros of its first letter, else UTF-8.

    `utf-8-sig`, because spreadsheet programs put a byte order mark before the first column's name.
    """
    if not is_regular(path):  # reading a pipe may never end, and it cannot be read twice
        raise DataError(f"{path}: is no file but a folder, a pipe or a device. Save it as a file.")
    with path.open("rb") as file:
        first = file.read(2)
    if first in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if len(first) == 2 and 0 in first:
        return "utf-16-be" if first[0] == 0 else "utf-16-le"
    return "utf-8-sig"


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file opened; bytes that are no UTF-8 become surrogates, found row by row."""
    how: Any = {"errors": "surrogateescape", "newline": newline}
    with readable_file(path), path.open(encoding=encoding_of(path), **how) as file:
        yield file


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    text = whole_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: is no valid JSON ({error}).") from error


def whole_text(path: Path, most: int = WHOLE) -> str:
    """All of a text file."""
    with open_text(path) as file:
        return read_all(file, most)


def is_karpathy(content: Any) -> bool:
    """Whether a JSON file has the layout of Karpathy's `dataset_coco.json`."""
    if not isinstance(content, dict):
        return False
    images = content.get("images")
    return bool(
        isinstance(images, list)
        and images
        and isinstance(images[0], dict)
        and {"filename", "split"} <= images[0].keys()
    )


def choose_split(
    name: str, found: set[str], wanted: str | None, *, training: bool = True
) -> tuple[str, ...]:
    """The splits to read: those asked for, as in `train+restval`, or the usual ones."""
    if wanted:
        splits = tuple(part.strip() for part in wanted.split("+"))
        missing = [split for split in splits if split not in found]
        if missing:
            raise DataError(
                f"{name}: has no split {missing[0]!r}, only {', '.join(sorted(found))}."
            )
        return splits
    if len(found) == 1:
        return tuple(found)
    usual = TRAINING if training else ()
    if any(split in found for split in usual):
        return tuple(split for split in usual if split in found)
    for split in () if training else ("validation", "val", "dev", "test"):
        if split in found:
            return (split,)
    flag = "--data.split" if training else "--data.val-split"
    raise DataError(
        f"{name}: has the splits {', '.join(sorted(found))}. Name one with {flag}, or behind the "
        f"source as in {name}#split={min(found)}."
    )


def refuse_split(name: str, kind: str, settings: SourceSettings) -> None:
    """Refuse a split that would be passed over, so that nobody trains on what they test on."""
    file = settings.split_file
    if not settings.split or (file and _has_splits(file)):
        return
    neither = f", and {file} is a list without any" if file else ""
    advice = "" if file else ", or choose images with --data.split-file"
    raise ConfigError(
        f"{name}: split {settings.split!r} was asked for, but a source of kind {kind} has no "
        f"splits{neither}. Leave it out, say NAME#split=... of the source that has it{advice}."
    )


class Listed:
    """Names of images in a list, perhaps with some of their folders.

    A name of the list and one of a source mean the same image where the shorter is the end of the
    longer, folder by folder: lists and sources name different parts of the way to an image.

    >>> listed = Listed(["a/1.jpg", "2.jpg"])
    >>> [name in listed for name in ("photos/a/1.jpg", "1.jpg", "b/1.jpg", "b/2.jpg")]
    [True, True, False, True]
    """

    def __init__(self, names: Iterable[str]) -> None:
        ends = [_ends(name) for name in names]
        self.names = frozenset(of_one[0] for of_one in ends if of_one)
        self._ends = frozenset(chain.from_iterable(ends))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        ends = _ends(name)
        return bool(ends) and (ends[0] in self._ends or not self.names.isdisjoint(ends))


def _ends(name: str) -> list[str]:
    """The whole name, and what is left without its first folders."""
    same = unicodedata.normalize("NFC", name.replace("\\", "/"))
    parts = [part for part in PurePosixPath(same).parts if part != "/"]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _has_splits(split_file: Path) -> bool:
    """Whether it is Karpathy's JSON, else a list."""
    return split_file.suffix.lower() == ".json"


def read_split_file(path: Path, split: str | None, *, training: bool = True) -> Listed:
    """The images in a split: of Karpathy's JSON, or of a list with one file name a line."""
    if not _has_splits(path):
        return Listed(line.strip() for line in whole_text(path).splitlines())
    content = read_json(path)
    if not is_karpathy(content):
        raise DataError(
            f"{path}: is no split file. Give Karpathy's JSON, whose images have a filename and a "
            "split, or a .txt file with one file name a line."
        )
    images = content["images"]
    found = {str(image.get("split")) for image in images if isinstance(image, dict)}
    splits = choose_split(str(path), found, split, training=training)
    return Listed(
        f"{image.get('filepath') or ''}/{image.get('filename')}"
        for image in images
        if isinstance(image, dict) and str(image.get("split")) in splits
    )


# --------------------------------------------------------------------------------------------------
# Values with commas or semicolons in between, where fields that hold such a mark, a quote or a line
# break stand in double quotes.

Fields = Iterator[tuple[int, list[str] | str]]
"""(line number, fields) of every row, the header first; as a text, what is wrong with a row."""

QUOTING = ",;"
"""Marks between columns that fields may hold in double quotes."""
_LONGEST = 100
"""Lines that one quoted field may go on over."""


def read_quoted(lines: Iterable[str], delimiter: str) -> Fields:
    """(number of the last line, fields) of every row; a mistake costs one line.

    >>> list(read_quoted(['image,text', 'a.png,"never closed', 'b.png,one'], ","))[1:]
    [(2, 'has a double quote that is never closed. Close it, or write it as "".'), (3, ['b.png', \
    'one'])]
    """
    rest, ahead, number = iter(lines), deque[str](), 0
    while (line := ahead.popleft() if ahead else next(rest, None)) is not None:
        number += 1
        row = _quoted_row(line, delimiter)
        if row is None:
            ahead.extend(islice(rest, _LONGEST - len(ahead)))
            used, row = _closed(line, ahead, delimiter)
            number += used
            for _ in range(used):
                ahead.popleft()
        yield number, row


def _closed(line: str, following: Iterable[str], delimiter: str) -> tuple[int, list[str] | str]:
    """Over how many further lines an open quote goes on, and the row then."""
    for count, text in enumerate(following, start=1):
        line += text
        # only a quote can close it, so that long ones are not parsed anew with every line
        row = _quoted_row(line, delimiter) if '"' in text else None
        if isinstance(row, list):
            return count, row
        if row is not None:
            break
    return 0, 'has a double quote that is never closed. Close it, or write it as "".'


def _quoted_row(text: str, delimiter: str) -> list[str] | str | None:
    """The fields of a row; a text where it has a mistake, None where a quote is still open."""
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        if "field limit" in str(error):
            return f"has a field of more than {csv.field_size_limit():,} letters. Shorten it."
        return (
            "has text before or behind a field in double quotes. Put the whole field in quotes, "
            f'and write those inside as "" ({error}).'
        )


# --------------------------------------------------------------------------------------------------
# Tab-separated values, where some programs quote fields and others mean quotes as they stand.


def read_tab_separated(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    r"""(number of the last line, fields) of every row; a blank line has no fields.

    A field is quoted where it begins and ends with a double quote and holds others only in twos;
    every other double quote is part of the text. A quoted field goes on over lines that have too
    few fields to be rows of their own.

    >>> list(read_tab_separated(['image\ttext', 'a.png\t"Stop" signs', 'b.png\t"so ""be"" it"']))
    [(1, ['image', 'text']), (2, ['a.png', '"Stop" signs']), (3, ['b.png', 'so "be" it'])]
    """
    rest = iter(lines)
    ahead: deque[str] = deque()
    width: int | None = None
    number = 0
    while (line := ahead.popleft() if ahead else next(rest, None)) is not None:
        number += 1
        width = line.count("\t") if width is None else width
        last = line.rpartition("\t")[2].rstrip("\r\n")
        if last.startswith('"') and not _is_quoted(last):
            ahead.extend(islice(rest, _LONGEST - len(ahead)))
            for _ in range(_continued(line, ahead, width)):
                line += ahead.popleft()
                number += 1
        line = line.rstrip("\r\n")
        yield number, [_unquoted(field) for field in line.split("\t")] if line.strip() else []


def _continued(line: str, following: Iterable[str], width: int) -> int:
    """Over how many further lines the last field goes on; 0 where its quote is just a quote."""
    for count, text in enumerate(following, start=1):
        if text.count("\t") >= width:
            return 0
        line += text
        if _is_quoted(line.rstrip("\r\n").rpartition("\t")[2]):
            return count
    return 0


def _is_quoted(field: str) -> bool:
    """Whether a field is a quoted one, complete."""
    if len(field) < 2 or not (field.startswith('"') and field.endswith('"')):
        return False
    return '"' not in field[1:-1].replace('""', "")


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if _is_quoted(field) else field


# --------------------------------------------------------------------------------------------------
# CSV and TSV files of image paths and captions.


IMAGE_COLUMNS = (
    *("image", "image_path", "file_name", "filename", "filepath", "file_path", "path"),
    *("image_name", "img", "img_path"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "title", "sentence", "sentences", "description"),
    *("comment", "raw", "txt"),
)
BYTES_COLUMNS = ("image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "image_base64", "image_data")
RECORD_IMAGES = (*IMAGE_COLUMNS, *BYTES_COLUMNS)
RECORD_CAPTIONS = (*CAPTION_COLUMNS, "json", "conversations", "messages")
KINDS = {
    ",": "CSV table",
    "\t": "TSV table",
    ";": "CSV table with semicolons",
    "|": "table with | between the columns",
}
"""What to call a table, by what stands between its columns."""


def is_table_line(line: str) -> bool:
    """Whether a file that begins with this line may be a table with a header."""
    return line.lstrip()[:1] not in ("{", "[") and any(mark in line for mark in KINDS)


def table_kind(path: Path) -> str:
    """What to call such a table."""
    return KINDS[_delimiter(path)]


def table_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a table with a header."""
    delimiter = _delimiter(path)
    lines = _rows(path, delimiter)
    first = next(lines, (0, []))[1]
    header = [name.strip() for name in first] if isinstance(first, list) else []
    known = {*IMAGE_COLUMNS, *CAPTION_COLUMNS} & {name.lower() for name in header}
    named = known or settings.image_column or settings.caption_column
    if not named and any(Path(name).suffix.lower() in SUFFIXES for name in header):
        raise DataError(
            f"{path}: its first line looks like a pair ({listed(header)}) and must name the "
            "columns. Put a line such as image,caption before it, or, if these are names, say "
            "which by --data.image-column and --data.caption-column."
        )
    image_at = find_column(path, header, settings.image_column, IMAGE_COLUMNS, "image")
    caption_at = find_column(path, header, settings.caption_column, CAPTION_COLUMNS, "caption")
    for number, row in lines:
        where = f"{path}, line {number}"
        if isinstance(row, str):
            yield Written(where, "", (), row)
        elif len(row) == len(header):
            texts = texts_of(row[caption_at].strip())
            problem = texts if isinstance(texts, str) else None
            captions = () if isinstance(texts, str) else texts
            yield Written(where, row[image_at].strip(), captions, problem)
        elif row:
            advice = (
                f"Put captions that hold a {delimiter!r} in double quotes."
                if delimiter in QUOTING
                else "Mend or remove the row."
            )
            problem = f"{len(row)} fields, but the header has {len(header)}. {advice}"
            yield Written(where, row[0].strip(), (), problem)


def _rows(path: Path, delimiter: str) -> Fields:
    with open_text(path, newline="") as opened:
        file = lines_of(opened, TEXT)
        if delimiter in QUOTING:
            yield from read_quoted(file, delimiter)
        elif delimiter == "\t":
            yield from read_tab_separated(file)
        else:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n").split(delimiter) if line.strip() else []


def _delimiter(path: Path) -> str:
    """By the first line: others than commas only where there are none; by the name in doubt."""
    with open_text(path) as file:
        first = file.readline(TEXT)
    if path.suffix.lower() == ".tsv":
        return "\t"
    others = (mark for mark in ("|", "\t", ";") if mark in first and "," not in first)
    return next(others, ",")


def find_column(
    path: Path | str, header: list[str], wanted: str | None, known: tuple[str, ...], what: str
) -> int:
    """Position of the wanted column, or of the first known one, then in whatever letters."""
    for names in (header,) if wanted else (header, [name.lower() for name in header]):
        for name in (wanted,) if wanted else known:
            if name in names:
                return names.index(name)
    if wanted:
        near = difflib.get_close_matches(wanted, header, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{path}: has no column {wanted!r}, only {listed(header)}.{hint}")
    if not header:
        raise DataError(f"{path}: is empty. The first line must name the columns.")
    raise DataError(
        f"{path}: no {what} column among {listed(header)}; looked for "
        f"{', '.join(known)}. Name it with --data.{what}-column, or behind the source as in "
        f"NAME#{what}_column=...; in Python data.{what}_column names it of pairs that are passed."
    )


def find_columns(name: Path | str, header: list[str], settings: SourceSettings) -> tuple[str, str]:
    """Names of the image and the caption column among those of a record."""
    image = find_column(name, header, settings.image_column, RECORD_IMAGES, "image")
    caption = find_column(name, header, settings.caption_column, RECORD_CAPTIONS, "caption")
    return header[image], header[caption]


def texts_of(value: Any) -> tuple[str, ...] | str:
    """The captions in a value, or as a text what is wrong with it.

    It is a text, a list of texts, perhaps written as a text, an object that holds one as `raw` or
    the like, or a conversation, whose first answer it is.
    """
    if isinstance(value, str):
        return _written_list(value) if value.startswith("[") else (value,)
    if isinstance(value, bytes):
        return (value.decode("utf-8", errors="surrogateescape"),)
    if isinstance(value, Mapping):
        for name in ("raw", *CAPTION_COLUMNS):
            if name in value and value[name] is not None:
                return texts_of(value[name])
        return f"no caption among {listed(value) or 'nothing'}. Add one or remove it."
    if isinstance(value, Sequence):
        turns = [part for part in value if isinstance(part, Mapping) and part.keys() & _SPEAKERS]
        if turns:
            return _answer(turns)
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


_LIST = re.compile(r"""\[\s*["'].*""", re.DOTALL)
_NO_COMMA = re.compile(r"""(["'])\s+(["'])""")


def _written_list(text: str) -> tuple[str, ...] | str:
    """The captions in `["a dog", "a brown dog"]`, as JSON or as Python prints it.

    Tables have no lists, so libraries write them as texts. A text such as `[sic] a dog` is one.

    >>> _written_list("['a dog', 'a brown dog']"), _written_list("[sic] a dog")
    (('a dog', 'a brown dog'), ('[sic] a dog',))
    """
    found: Any = None
    try:
        found = parse_json(text)
    except ValueError:
        if _LIST.match(text) and _NO_COMMA.search(text):  # Python would join the two
            return (
                "has a list of captions without commas in between, as NumPy prints it. Write it "
                "as JSON."
            )
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(text)
    if isinstance(found, list) and all(isinstance(part, str | dict) for part in found):
        return texts_of(found)
    if _LIST.match(text):
        return f"has a list of captions that cannot be read: {text!r:.40}. Write it as JSON."
    return (text,)


_SPEAKERS = {"from", "role"}  # who says a turn of a conversation, as LLaVA and as chat models say


def _answer(turns: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | str:
    """The first answer of a conversation; those that follow answer questions."""
    for turn in turns:
        if (turn.get("from") or turn.get("role")) in ("gpt", "assistant"):
            said = turn.get("value") or turn.get("content")
            if isinstance(said, str):
                return (said,)
    return "has a conversation without an answer of 'gpt' or 'assistant'. Remove the row."


# --------------------------------------------------------------------------------------------------
# Flickr8k's and Flickr30k's token files: `1000268201.jpg#0<tab>A child in a pink dress .`.

_LINE = re.compile(r"(?P<image>[^\t]+?)#\d+\t(?P<caption>.*)", re.DOTALL)


def is_token_line(line: str) -> bool:
    r"""Whether a file that begins with this line is a token file.

    >>> is_token_line("1000268201_693b08cb0e.jpg#0\tA child in a pink dress .")
    True
    """
    return _LINE.match(line) is not None


def token_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a token file."""
    with open_text(path) as file:
        for number, line in enumerate(lines_of(file, TEXT), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            found = _LINE.fullmatch(line.rstrip("\r\n"))
            if found:
                yield Written(where, found["image"].strip(), (found["caption"],))
            else:
                problem = "expected 'image.jpg#0', a tab and a caption. Mend or remove the row."
                yield Written(where, "", (), problem)


# --------------------------------------------------------------------------------------------------
# COCO captions files, and Karpathy's files of images with their sentences and split.


def coco_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a COCO file, one an annotation, image by image; one where it has none."""
    content = read_json(path)
    if not is_coco(content):
        raise DataError(
            f"{path}: is no COCO captions file. Expected an object with 'images' (id, file_name) "
            "and 'annotations' (image_id, caption)."
        )
    captions: dict[str, list[tuple[int, Any]]] = {}
    for position, annotation in enumerate(content["annotations"]):
        owner = annotation.get("image_id") if isinstance(annotation, dict) else None
        captions.setdefault(_plain(owner), []).append((position, annotation))
    seen = set()
    for position, image in enumerate(content["images"]):
        where = f"{path}, images[{position}]"
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str) or "id" not in image:
            yield Written(where, "", (), "has no id or no file_name. Add them or remove it.")
            continue
        identity = _plain(image["id"])
        if identity in seen:
            problem = f"id {identity} stands at an earlier image already. Give it one of its own."
            yield Written(where, name, (), problem)
            continue
        seen.add(identity)
        annotations = captions.pop(identity, [])
        if not annotations:
            yield Written(where, name, ())
        for at, annotation in annotations:
            caption = annotation.get("caption")
            texts = (caption,) if isinstance(caption, str) else ()
            problem = (
                None if texts else f"has no caption but {caption!r:.40}. Add one or remove it."
            )
            yield Written(f"{path}, annotations[{at}]", name, texts, problem)
    for identity, annotations in captions.items():
        for at, _ in annotations:
            problem = f"image id {identity} is not among 'images'. Add the image or remove it."
            yield Written(f"{path}, annotations[{at}]", "", (), problem)


def karpathy_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """One row an image; without `split` those for training (`train`, `restval`) or validation."""
    content = read_json(path)
    if not is_karpathy(content):
        raise DataError(
            f"{path}: is no Karpathy split file. Expected an object with 'images', each with "
            "filename, split and sentences."
        )
    found = {str(image.get("split")) for image in content["images"] if isinstance(image, dict)}
    splits = choose_split(str(path), found, settings.split, training=settings.training)
    for position, image in enumerate(content["images"]):
        if not isinstance(image, dict) or image.get("split") not in splits:
            continue
        where = f"{path}, images[{position}]"
        folder, name = image.get("filepath") or "", str(image.get("filename") or "")
        sentences = image.get("sentences") or []
        if not isinstance(sentences, list):
            yield Written(where, name, (), "has sentences that are no list. Mend or remove it.")
            continue
        raw = [text.get("raw") if isinstance(text, dict) else text for text in sentences]
        texts = tuple(text for text in raw if isinstance(text, str))
        problem = None
        if len(texts) < len(raw):
            problem = "has a sentence without 'raw' text. Mend or remove it."
        yield Written(where, f"{folder}/{name}" if folder else name, texts, problem)


def is_coco(content: Any) -> bool:
    """Whether a JSON file has the layout of COCO's captions."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    )


def _plain(value: Any) -> str:
    """An id as a text: some programs write 7 on one side and "7" or 7.0 on the other."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else repr(value)
