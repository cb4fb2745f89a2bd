"""Published benchmarks of composition and of mixed search, from local files as they come."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_refine.data.pairs import StoredImages
from clip_refine.data.rows import problem_of_path
from clip_refine.support.errors import DataError, foreign
from clip_refine.support.limits import (
    LINE,
    TEXT,
    WHOLE,
    is_regular,
    leads_out,
    lines_of,
    parse_json,
    read_text,
    shown,
)


@dataclass(frozen=True)
class Compositions:
    """What is compared with what: of every image its own texts and, last, a wrong one."""

    categories: Sequence[str]  # of each image
    places: Sequence[int]  # the same number for images of one file or item, which are drawn as one
    paired: bool  # whether images 2i and 2i + 1 are described by each other's wrong text


@dataclass(frozen=True)
class Documents:
    """Queries, documents and judgements; a side that is missing is −1."""

    documents: Sequence[tuple[int, int]]  # (image, text) of each
    queries: Sequence[tuple[int, int]]  # (image, text) of each
    relevant: Sequence[Sequence[int]]  # documents of each query, at least one


@dataclass(frozen=True)
class BenchmarkImages(StoredImages):
    """Image files with texts, and how they belong together."""

    places: Sequence[Path]
    captions: Sequence[Sequence[str]]  # of each image; of documents all texts at the first image
    layout: Compositions | Documents


def read_sugarcrepe(folder: Path, images: Path) -> BenchmarkImages:
    """SugarCrepe's JSON files, one a category, or SugarCrepe++'s, with a `caption2`."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: holds no .json file. Give SugarCrepe's folder `data`.")
    paths, captions, categories = [], [], []
    for file in files:
        with foreign(DataError, f"{file}: is not valid JSON"):
            content = parse_json(read_text(file, WHOLE) if is_regular(file) else "")
        if not isinstance(content, dict | list):
            raise DataError(f"{file}: expected a list of entries or an object of them.")
        for number, row in enumerate(content.values() if isinstance(content, dict) else content):
            texts = _texts(file, number, row, ("filename", "caption", "negative_caption"))
            more = _texts(file, number, row, ("caption2",)) if "caption2" in row else ()
            paths.append(_image(file, number, texts[0], images))
            captions.append((texts[1], *more, texts[2]))
            categories.append(file.stem)
    if len({len(texts) for texts in captions}) > 1:
        raise DataError(
            f"{folder}: some entries have a caption2, others none. SugarCrepe and SugarCrepe++ are "
            "two sources; keep them in folders of their own."
        )
    places = _numbers(paths)
    return BenchmarkImages(paths, captions, Compositions(categories, places, paired=False))


def read_winoground(folder: Path) -> BenchmarkImages:
    """Winoground's `examples.jsonl` with `images/NAME.png`; its `collapsed_tag` is the category."""
    file = folder / "examples.jsonl"
    paths, captions, categories = [], [], []
    for number, row in enumerate(_lines(file)):
        fields = ("image_0", "image_1", "caption_0", "caption_1")
        first, second, *texts = _texts(file, number, row, fields)
        for name, own in ((first, texts), (second, texts[::-1])):
            name = name if Path(name).suffix else f"{name}.png"
            paths.append(_image(file, number, name, folder / "images"))
            captions.append(tuple(own))
            categories.append(str(row.get("collapsed_tag", "")))
    places = [index // 2 for index in range(len(paths))]
    return BenchmarkImages(paths, captions, Compositions(categories, places, paired=True))


def read_mixbench(folder: Path) -> BenchmarkImages:
    """A subset of MixBench: image paths from here or above, judgements for all queries."""
    paths: list[Path] = []
    texts: list[str] = []
    sides: dict[str, dict[str, tuple[int, int]]] = {}
    for name, key in (("queries.jsonl", "query_id"), ("mixed_corpus.jsonl", "corpus_id")):
        file = folder / name
        rows = sides[key] = {}
        for number, row in enumerate(_lines(file)):
            (identity,) = _texts(file, number, row, (key,))
            image, text = (
                _texts(file, number, row, (side,))[0] if row.get(side) else None
                for side in ("image", "text")
            )
            if image is None and text is None:
                raise DataError(
                    f"{file}, row {number + 1}: has neither `text` nor `image`. Give it one."
                )
            if image is not None:
                paths.append(_image(file, number, image, folder, folder.parent))
            if text is not None:
                texts.append(text)
            rows[identity] = (
                -1 if image is None else len(paths) - 1,
                -1 if text is None else len(texts) - 1,
            )
    queries, documents = sides["query_id"], sides["corpus_id"]
    if not paths:
        raise DataError(f"{folder}: names no image at all, so there is nothing mixed to search.")
    relevant = _judgements(folder / "qrels" / "qrels.tsv", queries, documents)
    layout = Documents(list(documents.values()), list(queries.values()), relevant)
    return BenchmarkImages(paths, [tuple(texts), *[()] * (len(paths) - 1)], layout)


def _judgements(
    file: Path, queries: Mapping[str, Any], documents: Mapping[str, Any]
) -> list[list[int]]:
    """The relevant documents of every query, by number."""
    number_of = {name: number for number, name in enumerate(documents)}
    found: dict[str, list[int]] = {name: [] for name in queries}
    with _opened(file, TEXT) as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t")):
            query, document = row.get("query_id"), row.get("corpus_id")
            if query not in found or document not in number_of:
                raise DataError(
                    f"{file}, row {number + 2}: expected a query_id and a corpus_id of the other "
                    f"files, got {shown(query)} and {shown(document)}. Take all three from one "
                    "subset."
                )
            if float(row.get("score") or 1) > 0:
                found[query].append(number_of[document])
    empty = [name for name, own in found.items() if not own]
    if empty:
        raise DataError(
            f"{file}: nothing is relevant for query {shown(empty[0])} ({len(empty)} such). Take "
            "the file that belongs to queries.jsonl, or leave those queries out."
        )
    return list(found.values())


@contextmanager
def _opened(file: Path, most: int) -> Iterator[Iterator[str]]:
    """The lines of a file, none longer than `most` letters."""
    with foreign(DataError, f"{file}: cannot be read"):
        if not is_regular(file):
            raise ValueError("is no file but a folder, a pipe or a device")
        with file.open(encoding="utf-8", newline="") as opened:
            yield lines_of(opened, most)


def _lines(file: Path) -> list[Any]:
    rows = []
    with _opened(file, LINE) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                with foreign(DataError, f"{file}, row {number}: is not valid JSON"):
                    rows.append(parse_json(line))
    return rows


def _texts(file: Path, number: int, row: Any, fields: Sequence[str]) -> list[str]:
    """Those fields of a row, which must all be there."""
    missing = [name for name in fields if not isinstance(row, dict) or row.get(name) in (None, "")]
    if missing:
        raise DataError(
            f"{file}, row {number + 1}: has no `{missing[0]}`; expected {', '.join(fields)}."
        )
    for name in fields:
        if not isinstance(row[name], str | int):
            raise DataError(f"{file}, row {number + 1}: `{name}` is {shown(row[name])}, no text.")
    return [str(row[name]) for name in fields]


def _image(file: Path, number: int, name: str, *folders: Path) -> Path:
    """The first of the folders' files of this name, which must lie inside one of them."""
    outside = Path(name).is_absolute() or ".." in Path(name).parts
    problem = f"{shown(name)} leads out of its folder." if outside else None
    if problem := problem or problem_of_path(name, allow_outside=True):
        raise DataError(f"{file}, row {number + 1}: {problem}")
    tried = [folder / name for folder in folders]
    for path in tried:
        if path.is_file():
            if all(leads_out(path, folder) for folder in folders):
                raise DataError(
                    f"{file}, row {number + 1}: {path} is a link out of its folder. Copy it there."
                )
            return path
    raise DataError(
        f"{file}, row {number + 1}: its image is not there, neither as "
        f"{' nor as '.join(map(str, tried))}. Lay the images out like that."
    )


def _numbers(values: Sequence[Path]) -> list[int]:
    """The same number for the same value, by first place."""
    known = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [known[value] for value in values]
