"""Images and captions → batches of pixels and tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data.pairs import ImageCaptions
from clip_refine.errors import DataError

Preprocess = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class Images(Protocol):
    """What image batches need of a source."""

    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image: ...  # noqa: D102
    def image_name(self, index: int) -> str: ...  # noqa: D102


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
        """Shuffle the images and draw one caption for each."""
        counts = torch.tensor([len(texts) for texts in pairs.captions])
        order = torch.randperm(len(pairs), generator=generator)
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

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images = images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | DataError]:
        # Returned, not raised: a worker process would bury the message in a traceback.
        try:
            return index, self.preprocess(self.images.load_image(index))
        except DataError as error:
            return index, error


def _stack(items: list[tuple[int, Tensor | DataError]]) -> tuple[list[int], Tensor | DataError]:
    pixels = []
    for _, image in items:
        if isinstance(image, DataError):
            return [], image
        pixels.append(image)
    return [index for index, _ in items], torch.stack(pixels)


@dataclass(frozen=True)
class _StackPairs:
    """Collate function of training batches; a class so that worker processes can receive it."""

    pairs: ImageCaptions
    caption_choice: Sequence[int]
    tokenizer: Tokenizer

    def __call__(self, items: list[tuple[int, Tensor | DataError]]) -> PairBatch | DataError:
        indices, pixels = _stack(items)
        if isinstance(pixels, DataError):
            return pixels
        captions = self.pairs.captions
        texts = [captions[index][self.caption_choice[index]] for index in indices]
        return PairBatch(pixels, self.tokenizer(texts), indices)


def pair_batches(
    pairs: ImageCaptions,
    plan: EpochPlan,
    *,
    batch_size: int,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[PairBatch]:
    """The training batches of one epoch.

    Args:
        pairs: Where images and captions come from.
        plan: Order and captions of this epoch.
        batch_size: Pairs a step over all processes.
        preprocess: PIL image → (3, H, W).
        tokenizer: Texts → (B, L).
        workers: Processes that decode; 0 decodes in this one. The pairs are the same for any.
        pin_memory: Page-lock the batches for faster copies to a GPU.
        rank: This process's number.
        processes: How many processes share each batch.

    Yields:
        One `PairBatch` a step with this process's share of the pairs.

    Raises:
        DataError: An image cannot be decoded.
    """
    loader: DataLoader[Any] = DataLoader(
        _PreprocessedImages(pairs, preprocess),
        batch_sampler=plan.batches(batch_size, rank=rank, processes=processes),
        collate_fn=_StackPairs(pairs, plan.caption_choice, tokenizer),
        num_workers=workers,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def image_batches(
    images: Images,
    *,
    batch_size: int,
    preprocess: Preprocess,
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
    )
    for _, pixels in loader:
        if isinstance(pixels, DataError):
            raise pixels
        yield pixels
