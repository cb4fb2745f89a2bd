"""Pairs → batches of pixels and tokens; images decoded at the size that is needed, or cached."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data.images import DECODING, decode_image
from clip_refine.data.pairs import (
    ImageCaptions,
    Images,
    Mixing,
    as_pairs,
    fingerprint,
    image_bytes,
)
from clip_refine.data.streams import WHOLE, Stream, StreamedPair, WatchedStream
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

    def find(self, name: str, *, as_levels: bool = False) -> Tensor | None:
        """(3, H, W) pixels of an image, or their levels, None where they are not kept."""
        row = self.rows.get(name)
        levels = None if row is None else self.store.sound(row)
        if levels is None:
            return None
        return torch.from_numpy(levels.copy()) if as_levels else self.levels.decode(levels)


@dataclass(frozen=True, eq=False)
class PixelReader:
    """Reads cached pixels where there are some, else decodes and preprocesses.

    Attributes:
        preprocess: PIL image → (3, H, W).
        side: Large JPEGs may be decoded down to this many pixels a side; None for full size.
        cached: What need not be decoded.
        as_levels: Whether that is given as the uint8 levels which are kept, a quarter of the bytes.
    """

    preprocess: Preprocess
    side: int | None = None
    cached: CachedPixels | None = None
    as_levels: bool = False

    def __call__(self, images: Images, index: int) -> Tensor:
        """(3, H, W) pixels of one image.

        Raises:
            DataError: It cannot be decoded.
        """
        name = images.image_name(index)
        found = self.cached and self.cached.find(name, as_levels=self.as_levels)
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


# --------------------------------------------------------------------------------------------------
# Which pairs an epoch uses, in which order.


@dataclass(frozen=True)
class EpochPlan:
    """Which pairs an epoch uses, in which order: a function of the seed and the epoch only.

    Attributes:
        order: Positions of the images, shuffled.
        caption_choice: For each image (by position) which of its captions is used.
    """

    order: Sequence[int]
    caption_choice: Sequence[int]

    @classmethod
    def draw(cls, pairs: ImageCaptions, *, generator: torch.Generator) -> "EpochPlan":
        """Shuffle the images and draw one caption for each.

        Of a weighted mixture each source gives its share, so that images come more than once or
        not at all.
        """
        counts = torch.tensor([len(texts) for texts in pairs.captions])
        mixing = as_pairs(pairs).mixing
        if mixing is None:
            order = torch.randperm(len(pairs), generator=generator)
        else:
            order = mixed_order(mixing, generator=generator)
        uniform = torch.rand(len(pairs), generator=generator, dtype=torch.float64)
        return cls(order.tolist(), (uniform * counts).long().tolist())

    def batches(self, batch_size: int, *, rank: int = 0, processes: int = 1) -> list[list[int]]:
        """This process's share of every full batch; an incomplete last batch is left out.

        `batch_size` counts the pairs of all processes; shares are consecutive, so that features
        gathered in rank order are in the order of the whole batch.
        """
        share = batch_size // processes
        starts = range(0, len(self.order) - batch_size + 1, batch_size)
        return [
            list(self.order[start + rank * share : start + (rank + 1) * share]) for start in starts
        ]


def mixed_order(mixing: Mixing, *, generator: torch.Generator) -> torch.Tensor:
    """As many positions as there are images, shuffled, each group with its share of them.

    >>> order = mixed_order(([0, 0, 1, 1, 1, 1], [2, 1]), generator=torch.Generator())
    >>> sorted((order < 2).tolist())
    [False, False, True, True, True, True]
    """
    groups = torch.tensor(mixing[0])
    chosen = []
    for number, share in enumerate(_shares(mixing)):
        members = (groups == number).nonzero().flatten()
        while share:
            drawn = members[torch.randperm(len(members), generator=generator)[:share]]
            chosen.append(drawn)
            share -= len(drawn)
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=generator)]


def _shares(mixing: Mixing) -> list[int]:
    """Pairs of each group in an epoch, by largest remainders; groups without images get none."""
    groups, weights = mixing
    sizes = [0] * len(weights)
    for group in groups:
        sizes[group] += 1
    usable = [weight if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    exact = [len(groups) * weight / sum(usable) for weight in usable]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for number in by_remainder[: len(groups) - sum(shares)]:
        shares[number] += 1
    return shares


# --------------------------------------------------------------------------------------------------
# Captions of the same words that say something else.


_LINKS = "a|an|the|and|or|with|by|near|beside|next|to"
"""Words that say the same of both their sides, or nothing."""
_LINK = re.compile(_LINKS)
_BREAK = re.compile(
    rf"{_LINKS}|of|in|on|at|from|for|as|into|onto|over|under|above|below|behind|between|inside|"
    "outside|around|across|along|through|against|up|down|off|out|is|are|was|were|be|been|has|have|"
    "had|there|this|that|these|those|it|its|his|her|their|he|she|they|who|which|some|while|where|"
    r"not|no|very|\w{3,}ing"
)
"""What no phrase goes beyond: these, and participles."""
_WORD = re.compile(r"(\w+(?:['’-]\w+)*)")


def swap_words(caption: str, seed: int) -> str | None:
    """A wrong caption of the same words: two of them change places. None where none can.

    They are the last words of two phrases, or the first ones where both have more, so that a noun
    mostly stands for a noun; a phrase is what stands between function words, participles (-ing) and
    punctuation, in English. Where the phrases are only linked and would become each other, as in "a
    cat and a dog", they say the same in either order and stay. One caption and seed always give the
    same. Source: the swaps of FSC-CLIP (Oh et al., EMNLP 2024, arXiv 2410.05210) and CLIC (Peleg et
    al., NeurIPS 2025, arXiv 2505.24424), by this rule instead of a parser.

    >>> swap_words("a red circle on a blue square", seed=0)
    'a red square on a blue circle'
    >>> swap_words("a red circle", seed=0), swap_words("a cat and a dog", seed=0)
    (None, None)
    """
    pieces = _WORD.split(caption)  # words at odd places, what stands between them at even ones
    lower = [piece.casefold() for piece in pieces]
    phrases: list[list[int]] = [[]]
    for index in range(1, len(pieces), 2):
        stops = _BREAK.fullmatch(lower[index])
        if stops or pieces[index - 1].strip():
            phrases.append([])
        if not stops:
            phrases[-1].append(index)
    choices: list[tuple[int, int]] = []
    for one, other in combinations(filter(None, phrases), 2):
        breaks = filter(_BREAK.fullmatch, lower[one[-1] + 2 : other[0] : 2])
        linked = all(map(_LINK.fullmatch, breaks))  # also over the phrases between, as in a list
        for end in (-1, 0) if min(len(one), len(other)) > 1 else (-1,):
            i, j = one[end], other[end]
            beside = [[lower[k] for k in side if k not in (i, j)] for side in (one, other)]
            if lower[i] != lower[j] and not (linked and beside[0] == beside[1]):
                choices.append((i, j))
    if not choices:
        return None
    i, j = random.Random(f"{seed} {caption}").choice(choices)
    pieces[i], pieces[j] = pieces[j], pieces[i]
    return "".join(pieces)


# --------------------------------------------------------------------------------------------------
# One loader for all: the sampler names images and captions, worker processes decode.


Tokenizer = Callable[[list[str]], Tensor]
IMAGES_AHEAD = 4096
"""Preprocessed images that worker processes hold ready; 2.5 GB at 224 pixels a side."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs as the model takes them; row i of each belongs to one pair.

    Attributes:
        pixels: (B, 3, H, W) preprocessed images.
        tokens: (B, L) token ids of one caption an image.
        indices: Positions of the images in their source.
        wrong_tokens: (B, L) token ids of the captions with two words exchanged, the same as in
            `tokens` where none could be; None where nobody asks for such.
        values: (3, 256) what the levels of each channel stand for, where `pixels` are uint8 levels
            on their way to a GPU.
    """

    pixels: Tensor
    tokens: Tensor
    indices: Sequence[int]
    wrong_tokens: Tensor | None = None
    values: Tensor | None = None

    def to(self, device: torch.device) -> "PairBatch":
        """The batch on another device, copied while the GPU still works where it can be."""
        moved = self._each(lambda side: side.to(device, non_blocking=True))
        if moved.values is None:
            return moved
        channels = zip(moved.values, moved.pixels.unbind(dim=1), strict=True)
        pixels = torch.stack([value[levels.int()] for value, levels in channels], dim=1)
        return replace(moved, pixels=pixels, values=None)

    def pin_memory(self) -> "PairBatch":
        """The batch in page-locked memory (called by the loader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, moved: Callable[[Tensor], Tensor]) -> "PairBatch":
        some = {"wrong_tokens": self.wrong_tokens, "values": self.values}
        there = {name: moved(side) for name, side in some.items() if side is not None}
        return replace(self, pixels=moved(self.pixels), tokens=moved(self.tokens), **there)


class _Asked(NamedTuple):
    """An image of a source by its position, and the caption that goes with it."""

    number: int
    caption: str = ""


_Item = tuple[int, str, Tensor | DataError]


class _Decoder(Dataset[_Item]):
    """Turns what the sampler hands out into pixels.

    A streamed pair brings its image along, so one process reads and shuffles, and worker processes
    only decode: the order is the same for any number of them.
    """

    def __init__(self, images: Any, preprocess: Preprocess | PixelReader | None) -> None:
        self.images = images  # None for a stream
        if preprocess is not None and not isinstance(preprocess, PixelReader):
            preprocess = PixelReader(preprocess)
        self.read = preprocess

    def __getitem__(self, asked: _Asked | StreamedPair) -> _Item:
        if self.read is None:
            return asked.number, asked.caption, torch.empty(0)
        streamed = isinstance(asked, StreamedPair)
        images, index = (asked, 0) if streamed else (self.images, asked.number)
        try:
            return asked.number, asked.caption, self.read(images, index)
        except DataError as error:
            # Returned, not raised: a worker process would bury the message in a traceback.
            return asked.number, asked.caption, error


@dataclass(frozen=True)
class _Stack:
    """Collate function; a class so that worker processes can receive it."""

    tokenizer: Tokenizer | None
    swap_seed: int | None
    levels: Levels | None = None  # of cached pixels that come as such

    def __call__(self, items: list[_Item]) -> PairBatch | DataError:
        pixels = []
        for _, _, image in items:
            if isinstance(image, DataError):
                return image
            pixels.append(image)
        captions, wrong = [caption for _, caption, _ in items], None
        numbers = [number for number, _, _ in items]
        if self.swap_seed is not None:
            captions += [swap_words(caption, self.swap_seed) or caption for caption in captions]
        tokens = self.tokenizer(captions) if self.tokenizer else torch.empty(len(items), 0)
        if self.swap_seed is not None:  # of one length, as they were read together
            tokens, wrong = tokens.chunk(2)
        values = self.levels and torch.from_numpy(self.levels.values)
        if self.levels and any(image.dtype != torch.uint8 for image in pixels):
            values = None  # some are not cached, so that all are decoded here
            pixels = [
                self.levels.decode(image.numpy()) if image.dtype == torch.uint8 else image
                for image in pixels
            ]
        return PairBatch(torch.stack(pixels), tokens, numbers, wrong, values)


def _loader(
    images: Images | None,
    asked: Iterable[Sequence[_Asked | StreamedPair]],
    *,
    batch_size: int,
    preprocess: Preprocess | PixelReader | None,
    tokenizer: Tokenizer | None,
    workers: int,
    swap_seed: int | None = None,
    **options: Any,
) -> DataLoader[Any]:
    """Decodes and stacks the batches that are asked for; those of a stream need no `images`."""
    reader = preprocess if isinstance(preprocess, PixelReader) else None
    levels = reader.cached.levels if reader and reader.as_levels and reader.cached else None
    return DataLoader(
        _Decoder(images, preprocess),
        batch_sampler=asked,  # pyright: ignore[reportArgumentType]
        collate_fn=_Stack(tokenizer, swap_seed, levels),
        num_workers=workers,
        prefetch_factor=batches_ahead(batch_size, workers),
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # else each epoch draws from the one that dropout draws from
        **options,
    )


def _decoded(loader: DataLoader[Any]) -> Iterator[PairBatch]:
    """The batches; the first image that cannot be decoded stops them."""
    for batch in whole(loader):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def batches_ahead(batch_size: int, workers: int) -> int | None:
    """Batches that each worker process holds ready: up to 4, fewer where batches are large."""
    return max(1, min(4, IMAGES_AHEAD // (batch_size * workers))) if workers else None


# --------------------------------------------------------------------------------------------------
# Listed pairs, images alone, and streams as batches.


class PairLoader:
    """Training batches of epoch after epoch; its worker processes live as long as it does."""

    def __init__(
        self,
        pairs: ImageCaptions,
        *,
        batch_size: int,
        preprocess: Preprocess | PixelReader | None,
        tokenizer: Tokenizer,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        processes: int = 1,
        swap_seed: int | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            pairs: Where images and captions come from.
            batch_size: Pairs a step over all processes.
            preprocess: PIL image → (3, H, W), or the reader that applies it; None where nobody
                looks at images, which then are not read, and pixels are (B, 0).
            tokenizer: Texts → (B, L).
            workers: Processes that decode; 0 decodes in this one. The pairs are the same for any.
            pin_memory: Page-lock the batches for faster copies to a GPU.
            rank: This process's number.
            processes: How many processes share each batch.
            swap_seed: Seed of the words that are exchanged in `wrong_tokens`; None for no such.
        """
        self._share = (batch_size, rank, processes)
        self._pairs = pairs
        self._asked: list[list[_Asked]] = []  # filled anew each epoch, for the same processes
        self._loader = _loader(
            pairs,
            self._asked,
            batch_size=batch_size // processes,
            preprocess=preprocess,
            tokenizer=tokenizer,
            workers=workers,
            pin_memory=pin_memory,
            swap_seed=swap_seed,
            persistent_workers=workers > 0,
        )

    def epoch(self, plan: EpochPlan, *, skip: int = 0) -> Iterator[PairBatch]:
        """One `PairBatch` a step with this process's share of the pairs, but for the first `skip`.

        Raises:
            DataError: There are fewer pairs than a batch, or an image cannot be decoded.
        """
        batch_size, rank, processes = self._share
        captions, choice = self._pairs.captions, plan.caption_choice
        if len(plan.order) < batch_size:  # epoch after epoch without a batch would never end
            raise DataError(
                f"{self._pairs.name}: {len(plan.order)} pairs, fewer than a batch of {batch_size}. "
                "Give more pairs or a smaller --train.batch-size."
            )
        self._asked[:] = [
            [_Asked(index, captions[index][choice[index]]) for index in batch]
            for batch in plan.batches(batch_size, rank=rank, processes=processes)[skip:]
        ]
        yield from _decoded(self._loader)


def pair_batches(pairs: ImageCaptions, plan: EpochPlan, **settings: Any) -> Iterator[PairBatch]:
    """The training batches of one epoch; settings and errors as those of `PairLoader`."""
    return PairLoader(pairs, **settings).epoch(plan)


def image_batches(
    images: Images,
    *,
    batch_size: int,
    preprocess: Preprocess | PixelReader,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """All images in order as (B, 3, H, W).

    Raises:
        DataError: An image cannot be decoded.
    """
    starts = range(0, len(images), batch_size)
    asked = (
        [_Asked(i) for i in range(len(images))[start : start + batch_size]] for start in starts
    )
    loader = _loader(
        images,
        asked,
        batch_size=batch_size,
        preprocess=preprocess,
        tokenizer=None,
        workers=workers,
        pin_memory=pin_memory,
    )
    for batch in _decoded(loader):
        yield batch.pixels


def stream_batches(
    stream: Stream,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    preprocess: Preprocess | PixelReader,
    tokenizer: Tokenizer,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    processes: int = 1,
    swap_seed: int | None = None,
    done: int = 0,
    own_files: bool = False,
) -> Iterator[PairBatch]:
    """Batches of a stream, which begins anew where it ends.

    Every process reads the whole stream and keeps its share of each batch, so the pairs are the
    same for any number of processes, and none is used twice in a pass. With `own_files` each reads
    its share of the files, which is less to read and another order for another number of them.

    Args:
        stream: Where pairs come from.
        seed: Of order and captions.
        steps: Batches to make.
        batch_size: Pairs a step over all processes.
        preprocess: PIL image → (3, H, W), or the reader that applies it.
        tokenizer: Texts → (B, L).
        workers: Processes that decode; 0 decodes in this one. The pairs are the same for any.
        pin_memory: Page-lock the batches for faster copies to a GPU.
        rank: This process's number.
        processes: How many processes share each batch.
        swap_seed: Seed of the words that are exchanged in `wrong_tokens`; None for no such.
        done: Batches that were made already; it goes on behind them.
        own_files: Whether this process reads its share of the files instead of all.

    Yields:
        One `PairBatch` a step; its indices count the pairs of the stream, no two alike.

    Raises:
        DataError: The source cannot be read, has bad rows or fewer pairs than a batch, or an image
            cannot be decoded.
    """
    share = batch_size // processes
    own = own_files and processes > 1
    taken, of = (share, (rank, processes)) if own else (batch_size, WHOLE)
    pairs = stream.pairs(seed=seed, at_least=taken, skip=done * taken, share=of)

    def shares() -> Iterator[list[StreamedPair]]:
        for _ in range(done, steps):
            drawn = list(islice(pairs, taken))
            if own:  # whose numbers every process counts for itself
                yield [replace(pair, number=pair.number * processes + rank) for pair in drawn]
            else:
                yield drawn[rank * share : (rank + 1) * share]
        if isinstance(stream, WatchedStream) and not own:
            stream.warn()

    loader = _loader(
        None,
        shares(),
        batch_size=share,
        preprocess=preprocess,
        tokenizer=tokenizer,
        workers=workers,
        pin_memory=pin_memory,
        swap_seed=swap_seed,
    )
    yield from _decoded(loader)
