"""Sources that are text: CSV, TSV, JSONL, token files, COCO annotations → rows."""

import ast
import base64
import binascii
import csv
import difflib
import json
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clip_refine.data.rows import (
    ImageInMemory,
    OpenRows,
    Row,
    SourceSettings,
    StoredImage,
    Written,
    choose_split,
    encoding_of,
    file_rows,
    is_karpathy,
    open_text,
    read_json,
    readable_file,
)
from clip_refine.support.errors import DataError
from clip_refine.support.limits import LINE, TEXT, lines_of, listed, parse_json

Fields = Iterator[tuple[int, list[str] | str]]
"""(line number, fields) of every row, the header first; as a text, what is wrong with a row."""


# --------------------------------------------------------------------------------------------------
# Values with commas or semicolons in between, where fields that hold such a mark, a quote or a line
# break stand in double quotes.


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


# --------------------------------------------------------------------------------------------------
# Records of named values, as JSONL, Parquet and datasets hold them → image and captions.


BYTES_COLUMNS = ("image_bytes", "bytes", "jpg", "jpeg", "png", "webp", "image_base64", "image_data")
RECORD_IMAGES = (*IMAGE_COLUMNS, *BYTES_COLUMNS)
RECORD_CAPTIONS = (*CAPTION_COLUMNS, "json", "conversations", "messages")
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


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


def image_of(value: Any, *, encoded: bool = False) -> bytes | str | None:
    """The image in a value: the content of its file, its path, or None."""
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


def find_columns(name: Path | str, header: list[str], settings: SourceSettings) -> tuple[str, str]:
    """Names of the image and the caption column among those of a record."""
    image = find_column(name, header, settings.image_column, RECORD_IMAGES, "image")
    caption = find_column(name, header, settings.caption_column, RECORD_CAPTIONS, "caption")
    return header[image], header[caption]


def record_row(
    where: str,
    record: Mapping[str, Any],
    columns: tuple[str, str],
    place: Callable[[bytes], StoredImage],
) -> Written:
    """A record's image and captions as a row; `place` says where an image with content is."""
    image_column, caption_column = columns
    captions = texts_of(record.get(caption_column))
    if isinstance(captions, str):
        return Written(where, "", (), captions)
    image = record.get(image_column)
    try:
        found = image_of(image, encoded=image_column in BYTES_COLUMNS)
    except ValueError as error:
        return Written(where, "", captions, f"{error} Mend it or remove the row.")
    if isinstance(found, bytes):
        name = image.get("path") if isinstance(image, Mapping) else None
        return Written(where, place(found), captions, name=name or None)
    return Written(where, found or "", captions)


# --------------------------------------------------------------------------------------------------
# JSON lines: one object a line, with an image path or base64 content and captions.


@dataclass(frozen=True, slots=True)
class ImageInLine:
    """An image whose content stands in a line, read again when it is needed."""

    path: Path
    line: int
    start: int
    column: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    def read(self) -> bytes:
        """The content of the image file."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = image_of(json.loads(file.readline())[self.column], encoded=True)
        if not isinstance(content, bytes):
            raise OSError(f"{self} changed while it was in use")
        return content


def jsonl_stream(
    name: str, files: Sequence[str], settings: SourceSettings
) -> tuple[OpenRows, int | None]:
    """Passes over .jsonl files, which do not tell how many rows they have."""

    def read(file: str) -> Iterator[Row]:
        return file_rows(Path(file), jsonl_rows(Path(file), settings), settings)

    return in_any_order(files, read), None


def in_any_order(files: Sequence[str], read: Callable[[str], Iterator[Row]]) -> OpenRows:
    """Passes that read file after file."""

    def begin(generator: random.Random | None) -> list[Callable[[], Iterator[Row]]]:
        order = list(files)
        if generator is not None:
            generator.shuffle(order)
        return [partial(read, file) for file in order]

    return begin


def jsonl_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a .jsonl file."""
    columns: tuple[str, str] | None = None
    start = 0
    with readable_file(path):
        encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        raise DataError(f"{path}: is UTF-16. Save it as UTF-8.")
    with readable_file(path), path.open("rb") as file:
        for number, line in enumerate(lines_of(file, LINE), start=1):
            where, here = f"{path}, line {number}", start
            start += len(line)
            if not line.strip():
                continue
            record = _record(line)
            if isinstance(record, str):
                yield Written(where, "", (), record)
                continue
            if columns is None:
                columns = find_columns(path, list(record), settings)
            place = ImageInLine(path, number, here, columns[0])
            yield record_row(where, record, columns, lambda _, place=place: place)


def json_list_rows(path: Path, settings: SourceSettings) -> Iterator[Written]:
    """The rows of a JSON file that is a list of objects, as LLaVA's are."""
    records = read_json(path)
    if not is_json_list(records):
        raise DataError(f"{path}: is no list of JSON objects with an image and captions each.")
    names = dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)
    columns = find_columns(path, list(names), settings)
    for position, record in enumerate(records):
        where = f"{path}, [{position}]"
        if not isinstance(record, dict):
            problem = f"is no JSON object but {record!r:.40}. Mend or remove the row."
            yield Written(where, "", (), problem)
            continue
        yield record_row(
            where, record, columns, lambda content, where=where: ImageInMemory(where, content)
        )


def is_json_list(content: Any) -> bool:
    """Whether a JSON file is a list of objects."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def _record(line: bytes) -> dict[str, Any] | str:
    """The object of a line; or, as a text, what is wrong."""
    try:
        record = parse_json(line.decode("utf-8-sig", errors="surrogateescape"))
    except ValueError as error:
        return f"is no JSON ({error}). Mend or remove the row."
    if not isinstance(record, dict):
        return f"is no JSON object but {record!r:.40}. Mend or remove the row."
    return record


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
