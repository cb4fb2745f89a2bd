"""Pairs → batches of pixels and tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data.pairs import ImageCaptions, Images, mixed_order, mixing_of
from clip_refine.data.pixels import PixelReader, Preprocess
from clip_refine.data.streams import Stream, StreamedPair
from clip_refine.errors import DataError

# --------------------------------------------------------------------------------------------------
# Images and captions → batches of pixels and tokens.


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
    """

    pixels: Tensor
    tokens: Tensor
    indices: Sequence[int]

    def to(self, device: torch.device) -> "PairBatch":
        """The batch on another device, copied while the GPU still works where it can be."""
        return PairBatch(
            self.pixels.to(device, non_blocking=True),
            self.tokens.to(device, non_blocking=True),
            self.indices,
        )

    def pin_memory(self) -> "PairBatch":
        """The batch in page-locked memory (called by the loader)."""
        return PairBatch(self.pixels.pin_memory(), self.tokens.pin_memory(), self.indices)


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
        mixing = mixing_of(pairs)
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


class _PreprocessedImages(Dataset[tuple[int, Tensor | DataError]]):
    """Decoded and preprocessed images; what cannot be decoded comes back as its error."""

    def __init__(self, images: Images, preprocess: Preprocess | PixelReader) -> None:
        self.images = images
        is_reader = isinstance(preprocess, PixelReader)
        self.read = preprocess if is_reader else PixelReader(preprocess)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | DataError]:
        # Returned, not raised: a worker process would bury the message in a traceback.
        try:
            return index, self.read(self.images, index)
        except DataError as error:
            return index, error


def _stack(items: list[tuple[int, Tensor | DataError]]) -> tuple[list[int], Tensor | DataError]:
    pixels = []
    for _, image in items:
        if isinstance(image, DataError):
            return [], image
        pixels.append(image)
    return [index for index, _ in items], torch.stack(pixels)


class _DrawnPairs(Dataset[tuple[tuple[int, Tensor | DataError], int]]):
    """Preprocessed images, each beside the number of the caption that was drawn for it."""

    def __init__(self, images: _PreprocessedImages) -> None:
        self.images = images

    def __getitem__(self, drawn: tuple[int, int]) -> tuple[tuple[int, Tensor | DataError], int]:
        index, choice = drawn
        return self.images[index], choice


@dataclass(frozen=True)
class _StackPairs:
    """Collate function of training batches; a class so that worker processes can receive it."""

    pairs: ImageCaptions
    tokenizer: Tokenizer

    def __call__(
        self, items: list[tuple[tuple[int, Tensor | DataError], int]]
    ) -> PairBatch | DataError:
        indices, pixels = _stack([image for image, _ in items])
        if isinstance(pixels, DataError):
            return pixels
        captions = self.pairs.captions
        choices = [choice for _, choice in items]
        texts = [captions[index][choice] for index, choice in zip(indices, choices, strict=True)]
        return PairBatch(pixels, self.tokenizer(texts), indices)


class PairLoader:
    """Training batches of epoch after epoch; its worker processes live as long as it does."""

    def __init__(
        self,
        pairs: ImageCaptions,
        *,
        batch_size: int,
        preprocess: Preprocess | PixelReader,
        tokenizer: Tokenizer,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Prepare to read.

        Args:
            pairs: Where images and captions come from.
            batch_size: Pairs a step over all processes.
            preprocess: PIL image → (3, H, W), or the reader that applies it.
            tokenizer: Texts → (B, L).
            workers: Processes that decode; 0 decodes in this one. The pairs are the same for any.
            pin_memory: Page-lock the batches for faster copies to a GPU.
            rank: This process's number.
            processes: How many processes share each batch.
        """
        self._share = (batch_size, rank, processes)
        self._drawn: list[list[tuple[int, int]]] = []
        self._loader: DataLoader[Any] = DataLoader(
            _DrawnPairs(_PreprocessedImages(pairs, preprocess)),
            batch_sampler=self._drawn,
            collate_fn=_StackPairs(pairs, tokenizer),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=batches_ahead(batch_size // processes, workers),
        )

    def epoch(self, plan: EpochPlan) -> Iterator[PairBatch]:
        """One `PairBatch` a step with this process's share of the pairs.

        Raises:
            DataError: An image cannot be decoded.
        """
        batch_size, rank, processes = self._share
        choice = plan.caption_choice
        self._drawn[:] = [
            [(index, choice[index]) for index in batch]
            for batch in plan.batches(batch_size, rank=rank, processes=processes)
        ]
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def pair_batches(pairs: ImageCaptions, plan: EpochPlan, **settings: Any) -> Iterator[PairBatch]:
    """The training batches of one epoch; settings and errors as those of `PairLoader`."""
    return PairLoader(pairs, **settings).epoch(plan)


def batches_ahead(batch_size: int, workers: int) -> int | None:
    """Batches that each worker process holds ready: up to 4, fewer where batches are large.

    >>> batches_ahead(512, 8), batches_ahead(128, 2), batches_ahead(128, 0)
    (1, 4, None)
    """
    return max(1, min(4, IMAGES_AHEAD // (batch_size * workers))) if workers else None


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
    loader: DataLoader[Any] = DataLoader(
        _PreprocessedImages(images, preprocess),
        batch_size=batch_size,
        collate_fn=_stack,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=batches_ahead(batch_size, workers),
    )
    for _, pixels in loader:
        if isinstance(pixels, DataError):
            raise pixels
        yield pixels


# --------------------------------------------------------------------------------------------------
# Streamed pairs → batches of pixels and tokens.


class _Decoded(Dataset[tuple[int, str, Tensor | DataError]]):
    """Turns what the sampler hands out into pixels; it holds nothing itself.

    So one process reads and shuffles, and worker processes only decode: the order is the same for
    any number of them.
    """

    def __init__(self, reader: PixelReader) -> None:
        self.reader = reader

    def __getitem__(self, index: Any) -> tuple[int, str, Tensor | DataError]:
        pair: StreamedPair = index
        try:
            return pair.number, pair.caption, self.reader(pair, 0)
        except DataError as error:
            return pair.number, pair.caption, error


@dataclass(frozen=True)
class _Stack:
    """Collate function; a class so that worker processes can receive it."""

    tokenizer: Tokenizer

    def __call__(self, items: list[tuple[int, str, Tensor | DataError]]) -> PairBatch | DataError:
        pixels = []
        for _, _, image in items:
            if isinstance(image, DataError):
                return image
            pixels.append(image)
        tokens = self.tokenizer([caption for _, caption, _ in items])
        return PairBatch(torch.stack(pixels), tokens, [number for number, _, _ in items])


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
) -> Iterator[PairBatch]:
    """Batches of a stream, which begins anew where it ends.

    Every process reads the whole stream and keeps its share of each batch, so the pairs are the
    same for any number of processes, and none is used twice in a pass.

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

    Yields:
        One `PairBatch` a step; its indices count the pairs of the stream.

    Raises:
        DataError: The source cannot be read or has bad rows, or an image cannot be decoded.
    """
    share = batch_size // processes
    pairs = stream.pairs(seed=seed)

    def shares() -> Iterator[list[StreamedPair]]:
        for _ in range(steps):
            yield list(islice(pairs, batch_size))[rank * share : (rank + 1) * share]

    reader = preprocess if isinstance(preprocess, PixelReader) else PixelReader(preprocess)
    loader: DataLoader[Any] = DataLoader(
        _Decoded(reader),
        batch_sampler=shares(),  # pyright: ignore[reportArgumentType]
        collate_fn=_Stack(tokenizer),
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=batches_ahead(share, workers),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
