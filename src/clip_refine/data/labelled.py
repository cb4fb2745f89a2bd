"""Images with labels: their classes, right and wrong texts, or what is relevant to a query."""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from clip_refine.data.datasets import ImageInTable, image_of, undecoded
from clip_refine.data.images import find_images, is_clutter, say_others, to_rgb
from clip_refine.data.pairs import ImageSource, StoredImages
from clip_refine.data.rows import Listed, problem_of_path
from clip_refine.support.console import remark
from clip_refine.support.errors import DataError, foreign
from clip_refine.support.limits import (
    LINE,
    TEXT,
    WHOLE,
    is_regular,
    leads_out,
    lines_of,
    parse_json,
    parse_yaml,
    read_text,
    shown,
)

# --------------------------------------------------------------------------------------------------
# The names of classes: how a source has them, made readable, or from a list of the user's.


OPEN_CLIP = "open_clip"
_SHOWN = 4  # classes that are named where the order of a list is said


def readable(name: str, naming: str) -> str:
    """A folder's name as one would write it: "001.Black_footed_Bird" is Black footed Bird."""
    if naming == "numbered":
        name = re.sub(r"^\d+[.\-_ ]+", "", name)
    if naming == "camel-case":
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return name.replace("_", " ").replace("/", " ").strip()


def choose_names(
    own: Sequence[str], asked: str | Sequence[str] | Mapping[str, str] | None, *, naming: str
) -> tuple[tuple[str, ...], str]:
    """The class names to put into prompts, and what to call this list in the results."""
    names, how = _named(own, asked, naming)
    say_same_names(names, own)
    return names, how


def say_same_names(names: Sequence[str], own: Sequence[str]) -> None:
    """Say which classes cannot be told apart, because they are called the same."""
    same: dict[str, list[str]] = defaultdict(list)
    for name, folder in zip(names, own, strict=True):
        same[name].append(folder)
    for name, folders in same.items():
        if len(folders) > 1:
            remark(
                f"{len(folders)} classes are called {name!r} ({', '.join(folders)}) and cannot be "
                "told apart: every image of them is taken for the first.",
                "yellow",
            )


def _named(
    own: Sequence[str], asked: str | Sequence[str] | Mapping[str, str] | None, naming: str
) -> tuple[tuple[str, ...], str]:
    if asked is None:
        how = "the source's own" + ("" if naming == "plain" else f", {naming}")
        return tuple(readable(name, naming) for name in own), how
    if asked == OPEN_CLIP:
        from open_clip import IMAGENET_CLASSNAMES

        return _in_order(IMAGENET_CLASSNAMES, own, "open_clip IMAGENET_CLASSNAMES")
    where = asked if isinstance(asked, str) else "the suite's"
    given: Any = read_texts(Path(asked)) if isinstance(asked, str) else asked
    if isinstance(given, Mapping):
        missing = [name for name in own if name not in given]
        if missing:
            raise DataError(
                f"class names ({where}): {missing[0]!r} is not among them ({len(missing)} of "
                f"{len(own)} missing). Name every class of the source."
            )
        return tuple(str(given[name]) for name in own), where
    return _in_order(given, own, where)


def read_texts(path: Path) -> Any:
    """A list of texts, or a mapping, from a .txt (one a line), .yaml or .json file."""
    try:
        is_yaml = path.suffix.lower() not in (".txt", ".json")
        text = read_text(path, TEXT if is_yaml else WHOLE)
        if path.suffix.lower() == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        found = parse_yaml(text) if is_yaml else parse_json(text)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Give a .txt file with one text a line, or .yaml "
            "or .json with a list."
        ) from error
    texts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: expected a list of texts or a mapping to texts.")
    return found


def _in_order(names: Sequence[str], own: Sequence[str], where: str) -> tuple[tuple[str, ...], str]:
    """A list of names for classes in their order, which is said since it may not be the list's."""
    if len(names) != len(own):
        raise DataError(
            f"class names ({where}): {len(names)} names for {len(own)} classes, of which the first "
            f"is {own[0]!r}. Give one a class, in their order."
        )
    pairs = [f"{folder} = {name}" for folder, name in zip(own, names, strict=True)]
    shown = pairs if len(pairs) <= _SHOWN else [*pairs[: _SHOWN - 1], "...", pairs[-1]]
    remark(f"Class names ({where}) in this order: {', '.join(shown)}.")
    return tuple(names), where


# --------------------------------------------------------------------------------------------------
# Folders of images sorted by class, for zero-shot classification.


@dataclass(frozen=True)
class ClassFolders(StoredImages):
    """Image files with one class each.

    Attributes:
        name: The folder's name, which names the task.
        class_names: The sub-folders' names in alphabetical order, numbers in theirs, underscores
            as spaces.
        templates: Prompts with one `{}` for the class name.
        paths: One path an image.
        labels: `labels[i]` is the position of `paths[i]`'s class in `class_names`.
    """

    name: str
    class_names: Sequence[str]
    templates: Sequence[str]
    paths: Sequence[Path]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def place_of(self, index: int) -> Path:
        """Where image `index` is."""
        return self.paths[index]


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders in alphabetical order, or by their numbers where all are numbers."""
    found = [path for path in folder.iterdir() if path.is_dir() and not is_clutter(Path(path.name))]
    if all(path.name.isdecimal() for path in found):
        return sorted(found, key=lambda path: (int(path.name), path.name))
    return sorted(found)


def read_class_folders(
    folder: Path, *, templates: Sequence[str], links: bool = False
) -> ClassFolders:
    """Read `folder/CLASS/image.jpg`; a class may be a link, its images only with `links`.

    Raises:
        DataError: The folder is missing, has fewer than two sub-folders, or an empty one.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give one with a sub-folder for each class.")
    classes = class_folders(folder)
    if len(classes) < 2:
        raise DataError(
            f"{folder}: has {len(classes)} sub-folders, expected one for each of 2 or more classes."
        )
    paths: list[Path] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, directory in enumerate(classes):
        images, more = find_images(directory, links=links)
        others += more
        if not images:
            raise DataError(f"{directory}: class folder without images. Add some or remove it.")
        paths += images
        labels += [label] * len(images)
    say_others(folder, others)
    names = tuple(directory.name.replace("_", " ") for directory in classes)
    if templates:
        say_same_names(names, [directory.name for directory in classes])
    return ClassFolders(
        name=folder.resolve().name,
        class_names=names,
        templates=tuple(templates),
        paths=tuple(paths),
        labels=tuple(labels),
    )


# --------------------------------------------------------------------------------------------------
# Images with classes from torchvision's datasets, rows of tables and archives, and CUB's lists.


_GIVES_PATHS = frozenset(
    {"DTD", "EuroSAT", "FGVCAircraft", "Flowers102", "Food101", "ImageNet", "SUN397"}
    | {"StanfordCars"}
)
"""Datasets of torchvision that take a `loader`, so that their paths are known without decoding."""
_LABELS = ("targets", "labels", "y", "_labels")
"""Where the others keep their classes."""


@dataclass(frozen=True)
class IndexedImages(ImageSource):
    """Images with one class each in something that is asked by position."""

    name: str  # where they are from
    class_names: Sequence[str]  # as the source has them
    labels: Sequence[int]  # `labels[i]` is the position of image `i`'s class in `class_names`
    fetch: Callable[[int], Image.Image]  # gives image `i`

    def __len__(self) -> int:
        return len(self.labels)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` in RGB."""
        try:
            return to_rgb(self.fetch(index))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.image_name(index)}: cannot be decoded as an image ({error}). Get the "
                "data set again."
            ) from error

    def image_name(self, index: int) -> str:
        """The source and the position."""
        return f"{self.name}[{index}]"


class ImageOfRow(ImageInTable):
    """An image in a table of `datasets`, or a file that it found for a row."""

    __slots__ = ()

    def read(self) -> bytes:
        """The content of the image file."""
        import fsspec

        found = image_of(self.table[self.row][self.column])
        if isinstance(found, bytes):
            return found
        with fsspec.open(str(found), "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class LabelledRows(StoredImages):
    """Images with one class each in a table; members as those of `IndexedImages`."""

    name: str
    class_names: Sequence[str]
    labels: Sequence[int]
    places: Sequence[ImageOfRow]  # where each image is


@dataclass(frozen=True)
class _First:
    """The image of a pair; a class so that other processes get it."""

    pairs: Any

    def __call__(self, index: int) -> Image.Image:
        return self.pairs[index][0]


def read_torchvision(
    dataset: str, root: Path, *, split: str | None, download: bool = False
) -> ClassFolders | IndexedImages:
    """A dataset by its class in `torchvision.datasets`."""
    from torchvision import datasets

    options: dict[str, Any] = {}
    if dataset.startswith("CIFAR"):
        options["train"] = split == "train"
    elif split is not None:
        options["split"] = split
    if dataset in _GIVES_PATHS:
        options["loader"] = Path
    if dataset != "ImageNet":
        options["download"] = download
    try:
        found = getattr(datasets, dataset)(root, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{root}: torchvision's {dataset} cannot be read ({error}). Lay it out as torchvision "
            "does, or pass --download."
        ) from error
    classes = getattr(found, "classes", None) or found.categories
    names = tuple(name if isinstance(name, str) else name[0] for name in classes)
    title = f"{dataset} {split}" if split else dataset
    if dataset in _GIVES_PATHS:
        rows = [found[index] for index in range(len(found))]
        return ClassFolders(
            title, names, (), tuple(path for path, _ in rows), tuple(label for _, label in rows)
        )
    labels = next((getattr(found, key) for key in _LABELS if hasattr(found, key)), None)
    if labels is None:
        labels = [found[index][1] for index in range(len(found))]
    return IndexedImages(title, names, tuple(int(label) for label in labels), _First(found))


def read_cub(folder: Path, *, split: str) -> ClassFolders:
    """CUB-200-2011 by its own lists."""
    columns: dict[str, list[str]] = {}
    for name in ("classes", "images", "image_class_labels", "train_test_split"):
        path = folder / f"{name}.txt"
        try:
            lines = read_text(path, WHOLE).splitlines()
            columns[name] = [line.split(maxsplit=1)[1].strip() for line in lines if line.strip()]
        except (OSError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}: cannot be read as a list of CUB-200-2011 ({error}). Unpack "
                "CUB_200_2011.tgz again."
            ) from error
    images, labels = columns["images"], columns["image_class_labels"]
    is_train = columns["train_test_split"]
    if not len(images) == len(labels) == len(is_train):
        raise DataError(
            f"{folder}: its lists have {len(images)}, {len(labels)} and {len(is_train)} images. "
            "Unpack CUB_200_2011.tgz again."
        )
    wanted = "1" if split == "train" else "0"
    chosen = [index for index, mark in enumerate(is_train) if mark == wanted]
    return ClassFolders(
        f"CUB-200-2011 {split}",
        tuple(columns["classes"]),
        (),
        tuple(folder / "images" / images[index] for index in chosen),
        tuple(int(labels[index]) - 1 for index in chosen),
    )


def read_listed_folders(folder: Path, only: Path | None) -> ClassFolders:
    """Class folders with the names as they are, and perhaps only the images of a list."""
    found = read_class_folders(folder, templates=())
    found = replace(found, class_names=tuple(path.name for path in class_folders(folder)))
    if only is None:
        return found
    try:
        lines = read_text(only, WHOLE).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{only}: cannot be read as a list of images ({error}).") from error
    listed = Listed(_without_ending(Path(line.split()[0])) for line in lines if line.strip())
    names = [_without_ending(path.relative_to(folder)) for path in found.paths]
    kept = [index for index, name in enumerate(names) if name in listed]
    if not kept:
        raise DataError(
            f"{only}: none of its {len(listed)} images is in {folder}. Both must have the same "
            "names, without endings."
        )
    return replace(
        found,
        paths=tuple(found.paths[index] for index in kept),
        labels=tuple(found.labels[index] for index in kept),
    )


def _without_ending(path: Path) -> str:
    """Frames of a video are not called as the video is, up to this."""
    return path.with_suffix("").as_posix()


def read_labelled_rows(
    path: str, *, split: str, subset: str | None, image: str, label: str
) -> LabelledRows:
    """Rows of Parquet or WebDataset files or of a dataset on the Hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if path.startswith("hf:"):
            rows = load_dataset(path.removeprefix("hf:"), subset, split=split)
        else:
            kind, files = _files(Path(path))
            rows = load_dataset(kind, data_files={split: files}, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}).") from error
    columns: Any = rows.features or {}
    for column in (image, label):
        if column not in columns:
            raise DataError(f"{path}: has no column {column!r}, only {', '.join(columns)}.")
    values = rows.select_columns([label])[label][:]
    names = getattr(columns[label], "names", None)
    _check_labels(path, label, values, len(names) if names else None)
    if names is None:
        names = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        place = {name: position for position, name in enumerate(names)}
        values = [place[value] for value in values]
    rows = undecoded(rows)
    missing = rows.data.column(image).is_null().to_pylist()
    if any(missing):
        raise DataError(
            f"{path}: column {image!r} has no image in {sum(missing):,} of {len(rows):,} rows, the "
            f"first row {missing.index(True)}. Remove them."
        )
    places = [ImageOfRow(rows, row, image, path) for row in range(len(rows))]
    return LabelledRows(path, tuple(map(str, names)), tuple(values), places)


def _check_labels(path: str, column: str, values: Sequence[Any], classes: int | None) -> None:
    """One class each, of two or more; -1 is what test splits have whose labels are kept secret."""
    for row, value in enumerate(values):
        fits = isinstance(value, int | str) and (not isinstance(value, int) or value >= 0)
        if not fits or (classes is not None and isinstance(value, int) and value >= classes):
            raise DataError(
                f"{path}: row {row} has {value!r:.40} in column {column!r}, which is no class. An "
                "image has one, a text or a number from 0 on; -1 and None stand for labels that "
                "are missing or kept secret."
            )
    if len(set(values)) < 2:
        raise DataError(
            f"{path}: column {column!r} has {len(set(values))} class in {len(values):,} rows. Give "
            "two classes or more."
        )


def _files(folder: Path) -> tuple[str, list[str]]:
    for kind, ending in (("parquet", "parquet"), ("webdataset", "tar")):
        found = sorted(folder.rglob(f"*.{ending}"))
        files = [str(file) for file in found if not is_clutter(file.relative_to(folder))]
        if files:
            return kind, files
    raise DataError(f"{folder}: has no .parquet or .tar file. Put some there.")


# --------------------------------------------------------------------------------------------------
# Published benchmarks of composition and of mixed search, from local files as they come.


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
