"""Files that say which images belong to which split."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from clip_refine.errors import DataError

TRAINING = ("train", "restval")
"""Karpathy's `restval` is what nearly everybody trains on, too."""


def read_json(path: Path) -> Any:
    """The content of a JSON file; bytes that are no UTF-8 become surrogates, found row by row.

    Raises:
        DataError: It cannot be read or is no JSON.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
        return json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no valid JSON ({error}).") from error


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
    """The splits to read: those asked for, as in `train+restval`, or the usual ones.

    Raises:
        DataError: There is no such split, or it is not clear which to take.
    """
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
    raise DataError(
        f"{name}: has the splits {', '.join(sorted(found))}. Name one with --data.split, or behind "
        f"the source as in {name}#split={min(found)}."
    )


def read_split_file(path: Path, split: str | None) -> frozenset[str]:
    """File names of the images in a split: of Karpathy's JSON, or of a list with one a line.

    Raises:
        DataError: It cannot be read, holds neither, or has no such split.
    """
    if path.suffix.lower() != ".json":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Check the path.") from error
        return frozenset(PurePosixPath(line.strip()).name for line in lines if line.strip())
    content = read_json(path)
    if not is_karpathy(content):
        raise DataError(
            f"{path}: is no split file. Give Karpathy's JSON, whose images have a filename and a "
            "split, or a .txt file with one file name a line."
        )
    images = content["images"]
    splits = choose_split(str(path), {str(image.get("split")) for image in images}, split)
    return frozenset(
        PurePosixPath(str(image.get("filename"))).name
        for image in images
        if image.get("split") in splits
    )
