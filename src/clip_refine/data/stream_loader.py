"""Streamed pairs → batches of pixels and tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data.loader import PairBatch, Tokenizer, batches_ahead
from clip_refine.data.reader import PixelReader, Preprocess
from clip_refine.data.streams import Stream, StreamedPair
from clip_refine.errors import DataError


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
