"""Images → pixels: decoded at the size that is needed, or read from the cache."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data.images import DECODING, decode_image
from clip_refine.data.pairs import Images, fingerprint, image_bytes
from clip_refine.support.cache import RowCache
from clip_refine.support.console import Bar, console
from clip_refine.support.errors import DataError, FailedError
from clip_refine.support.folder import check_room, size_text
from clip_refine.support.process import end_with_parent

# --------------------------------------------------------------------------------------------------
# Preprocessed pixels as the 8-bit levels that they were before they were normalised, and back.


Preprocess = Callable[[Image.Image], Tensor]
LEVELS = 256
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SIDE = 32


@dataclass(frozen=True, eq=False)
class Levels:
    """What a preprocessing makes of each of the 256 levels of each channel.

    It is measured on even images, so that nothing needs to be known of the preprocessing, and
    `encode` checks every pixel of every image: what is decoded is what was encoded, bit by bit.
    """

    values: NDArray[np.float32]  # (3, 256) float32, rising
    size: tuple[int, int]  # height and width of preprocessed images

    @classmethod
    def of(cls, preprocess: Preprocess) -> "Levels":
        """Measure a preprocessing."""
        even = [Image.new("RGB", (_SIDE, _SIDE), (level,) * 3) for level in range(LEVELS)]
        shape = preprocess(even[0]).shape
        values = torch.empty(3, LEVELS)
        for level, image in enumerate(even):
            pixels = preprocess(image)
            if pixels.shape != shape or len(shape) != 3 or shape[0] != 3:
                raise _inexact(f"gives pixels of shape {tuple(pixels.shape)}")
            if pixels.dtype != torch.float32:
                raise _inexact(f"gives {pixels.dtype}")
            values[:, level] = pixels.amax((1, 2))
            if not torch.equal(values[:, level], pixels.amin((1, 2))):
                raise _inexact("turns an even image into an uneven one")
        if not (values.diff(dim=1) > 0).all():
            raise _inexact("gives two levels one value, or falling ones")
        return cls(values.numpy(), (shape[1], shape[2]))

    def encode(self, pixels: Tensor, name: str) -> NDArray[np.uint8]:
        """(3, H, W) float32 → uint8 levels."""
        if tuple(pixels.shape[1:]) != self.size:
            raise _inexact(f"makes {name} {tuple(pixels.shape)}, others (3, *{self.size})")
        found = pixels.numpy()
        levels = np.empty(found.shape, np.uint8)
        for channel, values in enumerate(self.values):
            nearest = np.searchsorted(values, found[channel]).clip(max=LEVELS - 1)
            levels[channel] = nearest
        if not np.array_equal(self._values_of(levels), found):
            raise _inexact(f"gives pixels of {name} values between the 8-bit levels")
        return levels

    def decode(self, levels: NDArray[np.uint8]) -> Tensor:
        """(3, H, W) uint8 levels → the float32 pixels that they were encoded from."""
        return torch.from_numpy(self._values_of(levels))

    def _values_of(self, levels: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = np.empty(levels.shape, np.float32)
        for channel, values in enumerate(self.values):
            np.take(values, levels[channel], out=pixels[channel], mode="clip")
        return pixels


def preprocess_fingerprint(preprocess: Preprocess) -> str:
    """Of what a preprocessing says of itself and makes of a sample, as two may have one name."""
    sample = preprocess(probe_image()).detach().cpu().contiguous().flatten()
    said = _ADDRESS.sub("", repr(preprocess)).encode()
    return fingerprint(said, sample.view(torch.uint8).numpy().tobytes())


def probe_image() -> Image.Image:
    """The same coloured noise every time, neither square nor small."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(LEVELS, (240, 320, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _inexact(what: str) -> DataError:
    return DataError(
        f"data.cache-images: the model's preprocessing {what}, so its pixels cannot be kept as "
        "8-bit levels and read back unchanged. Leave --data.cache-images out."
    )


# --------------------------------------------------------------------------------------------------
# Work on every image of a source, in worker processes where there are many.


FEW = 256
"""Images for which no worker processes are started."""
_CHUNK = 16
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Each(Dataset[Item]):
    make: Callable[[int], Item]

    def __getitem__(self, index: int) -> Item:
        return self.make(index)


def in_parallel(
    make: Callable[[int], Item], count: int, title: str, *, workers: int, visible: bool
) -> Iterator[Item]:
    """What `make` gives for each of so many positions, in order, with a progress bar."""
    loader: DataLoader[Any] = DataLoader(
        _Each(make),
        sampler=range(count),
        batch_size=_CHUNK,
        collate_fn=list,
        num_workers=workers if count >= FEW else 0,
        worker_init_fn=end_with_parent,
    )
    each = (item for chunk in whole(loader) for item in chunk)
    yield from Bar(title, count, visible=visible, transient=True).over(each)


def whole(loader: DataLoader[Item]) -> Iterator[Item]:
    """What a loader gives; a worker process that dies is one clear error."""
    try:
        yield from loader
    except (RuntimeError, MemoryError) as error:
        killed = "DataLoader worker" in str(error) and "exited unexpectedly" in str(error)
        if not killed and not isinstance(error, MemoryError):
            raise
        what = "was killed" if killed else "ran out of memory"
        raise FailedError(
            f"a process that decodes images {what}, most often because all processes together need "
            "more memory than there is. Use fewer --train.workers (--workers), or a smaller "
            "--train.batch-size."
        ) from error


# --------------------------------------------------------------------------------------------------
# The one way from an image of a source to the pixels that the model takes.


RESERVE = 3.3
"""A JPEG that is decoded smaller keeps so many times the model's pixels a side. 2.75 times the size
that it is resized to was enough; of that preprocessing may cut an eighth off. See docs/log.md."""


@dataclass(frozen=True, eq=False)
class CachedPixels:
    """Preprocessed pixels of some images, kept as 8-bit levels."""

    levels: Levels  # what the levels stand for
    store: RowCache  # where they are: (3, H, W) uint8
    rows: Mapping[str, int]  # image name → its row there

    def find(self, name: str) -> Tensor | None:
        """(3, H, W) pixels of an image, None where they are not kept."""
        row = self.rows.get(name)
        levels = None if row is None else self.store.sound(row)
        return None if levels is None else self.levels.decode(levels)


@dataclass(frozen=True, eq=False)
class PixelReader:
    """Reads cached pixels where there are some, else decodes and preprocesses.

    Attributes:
        preprocess: PIL image → (3, H, W).
        side: Large JPEGs may be decoded down to this many pixels a side; None for full size.
        cached: What need not be decoded.
    """

    preprocess: Preprocess
    side: int | None = None
    cached: CachedPixels | None = None

    def __call__(self, images: Images, index: int) -> Tensor:
        """(3, H, W) pixels of one image.

        Raises:
            DataError: It cannot be decoded.
        """
        found = self.cached and self.cached.find(images.image_name(index))
        if found is not None:
            return found
        return self.preprocess(self.load(images, index))

    def load(self, images: Images, index: int) -> Image.Image:
        """One image in RGB, a large JPEG not in full size where `side` allows that.

        Raises:
            DataError: It cannot be decoded.
        """
        data = None if self.side is None else image_bytes(images, index)
        if data is None:
            return images.load_image(index)
        return decode_image(data, images.image_name(index), side=self.side)


def side_to_keep(preprocess: Preprocess) -> int | None:
    """The `side` of a `PixelReader` for a preprocessing; None where it makes no (3, H, W)."""
    shape = preprocess(Image.new("RGB", (64, 64))).shape
    return round(RESERVE * max(shape[1:])) + 1 if len(shape) == 3 else None


# --------------------------------------------------------------------------------------------------
# Images that are decoded once and then read from disk, by every epoch and every run.


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
    place = folder / _key(reader, levels)
    store = RowCache(place, flag="--data.cache-folder")
    named, places = _contents(sources, workers, visible)
    names = list(places)
    if store.missing(names):
        with store.writing():
            # asked again, since another run may have added them meanwhile
            missing = [places[names[position]] for position in store.missing(names)]
            row_bytes = 3 * levels.size[0] * levels.size[1]
            free = check_room(
                place,
                len(missing) * row_bytes,
                f"pixels of {len(missing):,} images",
                "Make room, choose another --data.cache-folder, or leave --data.cache-images out.",
            )
            if visible and missing:
                console.print(
                    f"Caching the pixels of {len(missing):,} images: "
                    f"{size_text(len(missing) * row_bytes)} in {place}, where "
                    f"{size_text(free)} are free.",
                    markup=False,
                    soft_wrap=True,
                )
            make = partial(_encoded, reader, levels, missing)
            encoded = _over(make, len(missing), workers, "Caching pixels", visible)
            while batch := dict(islice(encoded, _BATCH)):
                store.add(list(batch), np.stack(list(batch.values())))
    known = store.known()
    rows = {name: known[key] for name, key in named.items() if key in known}
    # opened anew, since the run has no more use for the list of all that are known
    opened = RowCache(place, flag=store.flag)
    return replace(reader, cached=CachedPixels(levels, opened, rows))


def _key(reader: PixelReader, levels: Levels) -> str:
    """Everything besides the image file that its pixels follow from."""
    return fingerprint(
        preprocess_fingerprint(reader.preprocess).encode(),
        levels.values.tobytes(),
        f"{reader.side} {DECODING} {PIL.__version__}".encode(),
    )


def _looked_up(images: Images, index: int) -> tuple[str, str | DataError | None]:
    """The name of an image and what its file holds; None where it is no file."""
    name = images.image_name(index)
    try:
        data = image_bytes(images, index)
    except DataError as error:
        return name, error
    return name, None if data is None else fingerprint(data)


def _encoded(
    reader: PixelReader, levels: Levels, places: Sequence[_Place], index: int
) -> tuple[str, NDArray[np.uint8] | DataError]:
    """The content and the levels of an image."""
    images, at = places[index]
    name = images.image_name(at)
    try:
        # once more, since the file may have changed since it was looked up
        data = image_bytes(images, at) or b""
        image = decode_image(data, name, side=reader.side)
        return fingerprint(data), levels.encode(reader.preprocess(image), name)
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
        make = partial(_looked_up, images)
        found = _over(make, len(images), workers, "Looking images up", visible)
        for index, (name, key) in enumerate(found):
            if key is None:
                ambiguous.add(name)
                continue
            if named.setdefault(name, key) != key:
                ambiguous.add(name)
            places.setdefault(key, (images, index))
    return {name: key for name, key in named.items() if name not in ambiguous}, places


def _over(
    make: Callable[[int], Any], count: int, workers: int, title: str, visible: bool
) -> Iterator[tuple[str, Any]]:
    """The items in order; the first that cannot be read stops them."""
    for name, item in in_parallel(make, count, title, workers=workers, visible=visible):
        if isinstance(item, DataError):
            raise item
        yield name, item
