"""COCO captions files, and Karpathy's files of images with their sentences and split."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_refine.data.rows import ReadOptions, Row
from clip_refine.data.sources.paths import Written, file_rows
from clip_refine.data.sources.split_files import choose_split, is_karpathy, read_json
from clip_refine.errors import DataError

COCO = "COCO captions"
KARPATHY = "Karpathy split file"


def coco_rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    """The rows of a COCO captions file: one an annotation, image by image.

    Images without annotations come as rows without captions.

    Raises:
        DataError: The file cannot be read or is no such file.
    """
    content = read_json(path)
    if not is_coco(content):
        raise DataError(
            f"{path}: is no COCO captions file. Expected an object with 'images' (id, file_name) "
            "and 'annotations' (image_id, caption)."
        )
    return file_rows(path, _coco_written(path, content), options)


def karpathy_rows(path: Path, options: ReadOptions, *, training: bool) -> Iterator[Row]:
    """The rows of a Karpathy split file: one an image.

    Without `options.split` the training splits (`train` and `restval`) or the validation split.

    Raises:
        DataError: The file cannot be read, is no such file, or has no such split.
    """
    content = read_json(path)
    if not is_karpathy(content):
        raise DataError(
            f"{path}: is no Karpathy split file. Expected an object with 'images', each with "
            "filename, split and sentences."
        )
    found = {str(image.get("split")) for image in content["images"] if isinstance(image, dict)}
    splits = choose_split(str(path), found, options.split, training=training)
    return file_rows(path, _karpathy_written(path, content, splits), options)


def is_coco(content: Any) -> bool:
    """Whether a JSON file has the layout of COCO's captions."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    )


def _coco_written(path: Path, content: Any) -> Iterator[Written]:
    captions: dict[Any, list[tuple[int, Any]]] = {}
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
            problem = f"id {identity!r} stands at an earlier image already. Give it one of its own."
            yield Written(where, name, (), problem)
            continue
        seen.add(identity)
        annotations = captions.pop(identity, [])
        if not annotations:
            yield Written(where, name, ())
        for at, annotation in annotations:
            yield _annotation(f"{path}, annotations[{at}]", name, annotation)
    for identity, annotations in captions.items():
        for at, _ in annotations:
            problem = f"image id {identity!r} is not among 'images'. Add the image or remove it."
            yield Written(f"{path}, annotations[{at}]", "", (), problem)


def _annotation(where: str, name: str, annotation: Any) -> Written:
    caption = annotation.get("caption")
    if isinstance(caption, str):
        return Written(where, name, (caption,))
    return Written(where, name, (), f"has no caption but {caption!r:.40}. Add one or remove it.")


def _karpathy_written(path: Path, content: Any, splits: tuple[str, ...]) -> Iterator[Written]:
    for position, image in enumerate(content["images"]):
        if not isinstance(image, dict) or image.get("split") not in splits:
            continue
        where = f"{path}, images[{position}]"
        folder, name = image.get("filepath") or "", str(image.get("filename") or "")
        sentences = image.get("sentences") or []
        raw = [text.get("raw") if isinstance(text, dict) else text for text in sentences]
        texts = tuple(text for text in raw if isinstance(text, str))
        problem = None
        if len(texts) < len(raw):
            problem = "has a sentence without 'raw' text. Mend or remove it."
        yield Written(where, f"{folder}/{name}" if folder else name, texts, problem)


def _plain(value: Any) -> Any:
    """Something hashable."""
    return value if isinstance(value, int | str | float | None) else repr(value)
