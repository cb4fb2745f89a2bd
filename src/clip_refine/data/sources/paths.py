"""Where the images of an annotation file are."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath, PureWindowsPath

from clip_refine.data.rows import ImagePlace, ReadOptions, Row
from clip_refine.data.sources.split_files import read_split_file
from clip_refine.errors import DataError

IMAGE_FOLDERS = (
    *("images", "Images", "image", "imgs", "jpg", "train2014", "val2014", "train2017", "val2017"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Images", "flickr8k_images"),
    *("flickr30k_images", "flickr30k-images", "Flickr30k_images", "flickr30k_images/Images"),
    *("flickr30k_images/flickr30k_images", "coco", "coco2014", "coco2017"),
)
"""Folders beside an annotation file, or beside its folder, in which its images are looked for."""
_TRIED = 20


def find_image_folder(file: Path, written: Iterable[str], options: ReadOptions) -> Path:
    """The folder where relative image paths start.

    Args:
        file: The annotation file.
        written: Some image paths as it has them.
        options: `image_folder` is taken as it is.

    Returns:
        The first of the file's own folder and those it is likely to be that has one of the images;
        the file's own folder where none has.

    Raises:
        DataError: The folder that was asked for is missing.
    """
    if options.image_folder is not None:
        if not options.image_folder.is_dir():
            raise DataError(f"{options.image_folder}: no such folder. Check --data.image-folder.")
        return options.image_folder
    here = file.parent
    stem = file.stem.removeprefix("captions_").removeprefix("dataset_")
    near = [here, here / stem, here.parent / stem, here.parent / "images" / stem]
    near += [folder / name for name in IMAGE_FOLDERS for folder in (here, here.parent)]
    near.append(here.parent)
    names = [name for name in islice(written, _TRIED) if not problem_of_path(name)]
    for folder in near:
        if any((folder / name).is_file() for name in names):
            return folder
    return here


def problem_of_path(written: str) -> str | None:
    """Why an image path of an annotation file is not followed, or None."""
    if not written:
        return "names no image. Name one or remove the row."
    if "://" in written or written.startswith("data:"):
        return f"{written!r:.80} is an address, not a path. Download the images first."
    pure = (PurePosixPath(written), PureWindowsPath(written))
    if any(path.is_absolute() or path.drive for path in pure):
        return (
            f"{written!r} is an absolute path. Make it relative to the images' folder, or pass "
            "--data.allow-outside."
        )
    if any(".." in path.parts for path in pure):
        return f"{written!r} leads out of its folder by '..'. Pass --data.allow-outside if meant."
    return None


@dataclass(frozen=True, slots=True)
class Written:
    """A row as an annotation file has it.

    Attributes:
        where: What to call it in a message.
        image: The image's path as written, or its place where it is no file of its own.
        captions: Its texts.
        problem: What the reader found wrong with it.
    """

    where: str
    image: str | ImagePlace
    captions: tuple[str, ...]
    problem: str | None = None


def file_rows(file: Path, written: Iterable[Written], options: ReadOptions) -> Iterator[Row]:
    """Rows whose images are files, with the paths resolved and the split chosen.

    Raises:
        DataError: The images' folder or the split file is bad.
    """
    chosen = read_split_file(options.split_file, options.split) if options.split_file else None
    rows = iter(written)
    first = list(islice(rows, _TRIED))
    names = [row.image for row in first if isinstance(row.image, str)]
    folder = find_image_folder(file, names, options)
    for row in chain(first, rows):
        if not isinstance(row.image, str):
            yield Row(row.where, row.image, row.captions, row.problem)
            continue
        if chosen is not None and PurePosixPath(row.image).name not in chosen:
            continue
        problem = row.problem or _problem_of_path(row.image, options)
        image = None if problem else folder / row.image
        yield Row(row.where, image, row.captions, problem)


def _problem_of_path(written: str, options: ReadOptions) -> str | None:
    allowed = options.allow_outside and written and "://" not in written
    problem = None if allowed else problem_of_path(written)
    if problem is None and ("\0" in written or not _is_encodable(written)):
        return f"{written!r} is no file name. Mend it or remove the row."
    return problem


def _is_encodable(written: str) -> bool:
    try:
        os.fsencode(written)
    except UnicodeEncodeError:
        return False
    return True
