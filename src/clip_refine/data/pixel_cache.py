"""Images that are decoded once and then read from disk, by every epoch and every run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from torch.utils.data import Dataset

from clip_refine.console import console
from clip_refine.data.content import fingerprint, image_bytes
from clip_refine.data.images import DECODING, decode_image
from clip_refine.data.levels import Levels, preprocess_fingerprint
from clip_refine.data.pairs import Images
from clip_refine.data.parallel import in_parallel
from clip_refine.data.pixel_store import PixelStore, size_text
from clip_refine.data.reader import CachedPixels, PixelReader
from clip_refine.errors import DataError

_BATCH = 64
"""Images that are written in one go."""
_Place = tuple[Images, int]


def with_cached_pixels(
    reader: PixelReader,
    sources: Sequence[Images],
    folder: Path,
    *,
    workers: int = 0,
    visible: bool = True,
) -> PixelReader:
    """A reader that has the pixels of all images on disk; those that are not there are added.

    Rows are kept by the content of the image file, so that a changed image is decoded anew and all
    others are read. Drawn images, which are no files, stay as they are.

    Args:
        reader: How images are decoded and preprocessed; what is read back is the same bit by bit.
        sources: Whose images will be asked for.
        folder: One sub-folder for each preprocessing is made there.
        workers: Processes that decode.
        visible: Whether to say what is done.

    Raises:
        DataError: An image cannot be decoded, or the preprocessing cannot be undone exactly.
        OutputError: The folder cannot be written, or the disk has too little room.
    """
    levels = Levels.of(reader.preprocess)
    store = PixelStore(folder / _key(reader, levels), (3, *levels.size))
    named, places = _contents(sources, workers, visible)
    if any(key not in (known := store.known()) for key in places):
        with store.writing():
            known = store.known()  # another run may have added them meanwhile
            missing = [place for key, place in places.items() if key not in known]
            free = store.check_room(len(missing))
            if visible and missing:
                console.print(
                    f"Caching the pixels of {len(missing):,} images: "
                    f"{size_text(len(missing) * store.row_bytes)} in {store.folder}, where "
                    f"{size_text(free)} are free.",
                    markup=False,
                    soft_wrap=True,
                )
            store.add(_encoded(reader, levels, missing, workers, visible))
    known = store.known()
    rows = {name: known[key] for name, key in named.items() if key in known}
    return replace(reader, cached=CachedPixels(levels, store, rows))


def _key(reader: PixelReader, levels: Levels) -> str:
    """Everything besides the image file that its pixels follow from."""
    return fingerprint(
        preprocess_fingerprint(reader.preprocess).encode(),
        levels.values.tobytes(),
        f"{reader.side} {DECODING} {PIL.__version__}".encode(),
    )


class _Fingerprints(Dataset[tuple[str, str | DataError | None]]):
    """The name of each image and what its file holds; None where it is no file."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, str | DataError | None]:
        name = self.images.image_name(index)
        try:
            data = image_bytes(self.images, index)
        except DataError as error:
            return name, error
        return name, None if data is None else fingerprint(data)


class _EncodedImages(Dataset[tuple[str, NDArray[np.uint8] | DataError]]):
    """The content and the levels of images."""

    def __init__(self, reader: PixelReader, levels: Levels, places: Sequence[_Place]) -> None:
        self.reader = reader
        self.levels = levels
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, NDArray[np.uint8] | DataError]:
        images, at = self.places[index]
        name = images.image_name(at)
        try:
            # once more, since the file may have changed since it was looked up
            data = image_bytes(images, at) or b""
            image = decode_image(data, name, side=self.reader.side)
            return fingerprint(data), self.levels.encode(self.reader.preprocess(image), name)
        except DataError as error:
            return name, error


def _contents(
    sources: Sequence[Images], workers: int, visible: bool
) -> tuple[dict[str, str], dict[str, _Place]]:
    """Image name → content, and content → where one such image is.

    Names that stand for two contents, or also for an image that is no file, are left out, so that
    no image is taken for another.
    """
    named: dict[str, str] = {}
    places: dict[str, _Place] = {}
    ambiguous: set[str] = set()
    for images in sources:
        if not hasattr(images, "image_bytes"):
            ambiguous.update(images.image_name(index) for index in range(len(images)))
            continue
        found = _over(_Fingerprints(images), workers, "Looking images up", visible)
        for index, (name, key) in enumerate(found):
            if key is None:
                ambiguous.add(name)
                continue
            if named.setdefault(name, key) != key:
                ambiguous.add(name)
            places.setdefault(key, (images, index))
    return {name: key for name, key in named.items() if name not in ambiguous}, places


def _encoded(
    reader: PixelReader, levels: Levels, places: Sequence[_Place], workers: int, visible: bool
) -> Iterator[dict[str, NDArray[np.uint8]]]:
    dataset = _EncodedImages(reader, levels, places)
    found = _over(dataset, workers, "Caching pixels", visible)
    while batch := dict(islice(found, _BATCH)):
        yield batch


def _over(dataset: Any, workers: int, title: str, visible: bool) -> Iterator[tuple[str, Any]]:
    """The items of a dataset in order.

    Raises:
        DataError: An item is one.
    """
    count = len(dataset)
    for name, item in in_parallel(dataset, count, title, workers=workers, visible=visible):
        if isinstance(item, DataError):
            raise item
        yield name, item
