"""One row of a source: where its image is, what its captions are, whether it is good."""

import glob
import json
import os
import random
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, Protocol

from PIL import Image

from clip_refine.config import DataConfig
from clip_refine.data.images import (
    check_image,
    check_image_file,
    decode_image,
    is_clutter,
    open_image,
)
from clip_refine.support.console import remark
from clip_refine.support.errors import ConfigError, DataError
from clip_refine.support.limits import (
    FILES,
    WHOLE,
    is_regular,
    leads_out,
    parse_json,
    read_all,
)

# --------------------------------------------------------------------------------------------------
# A row of a source as its reader gives it, and the places where an image can be.


class StoredImage(Hashable, Protocol):
    """An image that lies inside something larger; its text is what to call it in a message."""

    def read(self) -> bytes:
        """The content of the image file."""
        ...


ImagePlace = Path | StoredImage


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


@dataclass(frozen=True, slots=True, eq=False)
class ImageInMemory:
    """An image whose content was read with its row."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """The content of the image file."""
        return self.content


def load_place(place: ImagePlace) -> Image.Image:
    """The image there, in RGB."""
    if isinstance(place, Path):
        return open_image(place)
    return decode_image(place.read(), str(place))


def read_place(place: ImagePlace) -> bytes:
    """The content of the image file there."""
    return place.read_bytes() if isinstance(place, Path) else place.read()


# --------------------------------------------------------------------------------------------------
# Whether the image of a row can be used: the header, and the end that a cut-off file lacks.


_TAIL = 64


def image_problem(place: ImagePlace, *, decode: bool = False) -> str | None:
    """What is wrong with an image, or None.

    Reads the header and the last bytes; what does not end as its format should is decoded to be
    sure, since many sound files have something behind their end.
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
# What happens to bad rows: the one place that decides, for every kind of source.


LISTED = 10
"""Bad rows that a message shows."""
ENOUGH = 200
"""Rows of a stream after which a share of bad ones means something."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        where: File and row.
        problem: What is wrong and what to do.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class BadRowPolicy:
    """What to do about bad rows.

    Attributes:
        skip: Go on without them instead of stopping.
        limit: Share of bad rows above which to stop all the same, 0-1.
    """

    skip: bool = False
    limit: float = 0.05


class BadRows:
    """The bad rows of one source, and of how many rows in all."""

    def __init__(self, source: str, policy: BadRowPolicy) -> None:
        self.source = source
        self.policy = policy
        self.found: list[BadRow] = []
        self.total = 0

    def add(self, where: str, problem: str) -> None:
        """Put a row on the list."""
        self.found.append(BadRow(where, problem))

    def settle(self, *, say: bool = True) -> None:
        """All rows were seen: stop, or go on without the bad ones."""
        if not self.found:
            return
        if not self.policy.skip:
            raise DataError(f"{self._listed()}\n{self.source}: {self._counted()}. {self._advice()}")
        if self.share > self.policy.limit:
            raise DataError(f"{self._listed()}\n{self._too_many()}")
        if say:
            remark(
                f"{self.source}: {self._counted()} and skipped, the first: {self.found[0]}",
                "yellow",
            )

    def settle_so_far(self) -> None:
        """A stream goes on: stop at the first bad row, or when they are too many."""
        if not self.found:
            return
        if not self.policy.skip:
            raise DataError(
                f"{self._listed()}\n{self.source}: a bad row in a stream. Mend it, or pass "
                "--data.skip-bad to go on without such rows."
            )
        if self.total >= ENOUGH and self.share > self.policy.limit:
            raise DataError(f"{self._listed()}\n{self._too_many()}")

    @property
    def share(self) -> float:
        """Of the rows seen, 0-1."""
        return len(self.found) / max(1, self.total)

    def _listed(self) -> str:
        """Rows with what is wrong with them; what several have in common stands once."""
        by_advice: dict[str, dict[str, list[str]]] = {}
        for row in self.found[:LISTED]:
            fact, _, advice = row.problem.partition(". ")
            by_advice.setdefault(advice, {}).setdefault(fact, []).append(row.where)
        lines = []
        for advice, facts in by_advice.items():
            own = [f"{_places(where)}: {fact}" for fact, where in facts.items()]
            if advice:
                own = [f"{line}." for line in own]
                own = [*own, advice] if len(own) > 1 else [f"{own[0]} {advice}"]
            lines += own
        more = len(self.found) - LISTED
        return "\n".join(lines + [f"... and {more:,} more bad rows."] * (more > 0))

    def _counted(self) -> str:
        return f"{len(self.found):,} of {self.total:,} rows are bad ({self.share:.1%})"

    def _advice(self) -> str:
        if self.share <= self.policy.limit:
            return "Mend them, or pass --data.skip-bad to go on without them."
        if self.share == 1 and all(" not found" in row.problem for row in self.found):
            return "Where the images lie elsewhere, name their folder with --data.image-folder."
        return (
            "Mend them: --data.skip-bad goes on without bad rows only up to "
            f"{self.policy.limit:.1%} of all (--data.max-bad)."
        )

    def _too_many(self) -> str:
        return (
            f"{self.source}: {self._counted()}, more than the {self.policy.limit:.1%} that "
            "--data.skip-bad lets pass. Look at them, or raise --data.max-bad."
        )


def _places(rows: Sequence[str]) -> str:
    """Rows of one file by their numbers, others by their names.

    >>> _places(["a.csv, line 2", "a.csv, line 5"]), _places(["pairs[0]", "pairs[1]"])
    ('a.csv, line 2, 5', 'pairs[0, 1]')
    """
    found = [re.fullmatch(r"(.*[ \[])(\d+)(\]?)", row) for row in rows]
    parts = [one.groups() for one in found if one]
    if len(parts) == len(rows) and len({(head, tail) for head, _, tail in parts}) == 1:
        head, _, tail = parts[0]
        return f"{head}{', '.join(number for _, number, _ in parts)}{tail}"
    return ", ".join(rows)


def write_skipped(skipped: Sequence[BadRow], path: Path) -> None:
    """One JSON object a line: `where` and `problem`. Writes nothing where nothing was skipped."""
    if skipped:
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in skipped]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def skipped_rows(sources: Iterable[Any]) -> list[BadRow]:
    """What was skipped in these sources, each row once."""
    rows = [row for source in sources for row in source.skipped]
    return list(dict.fromkeys(rows))
