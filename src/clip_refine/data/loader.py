"""Pairs → batches of pixels and tokens."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data.pairs import ImageCaptions, Images, Mixing, as_pairs
from clip_refine.data.pixels import PixelReader, Preprocess, whole
from clip_refine.data.streams import Stream, StreamedPair, WatchedStream
from clip_refine.support.errors import DataError
from clip_refine.support.process import end_with_parent

Tokenizer = Callable[[list[str]], Tensor]
IMAGES_AHEAD = 4096
"""Preprocessed images that worker processes hold ready; 2.5 GB at 224 pixels a side."""

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


@dataclass(frozen=True)
class PairBatch:
    """Pairs as the model takes them; row i of each belongs to one pair.

    Attributes:
        pixels: (B, 3, H, W) preprocessed images.
        tokens: (B, L) token ids of one caption an image.
        indices: Positions of the images in their source.
        wrong_tokens: (B, L) token ids of the captions with two words exchanged, the same as in
            `tokens` where none could be; None where nobody asks for such.
    """

    pixels: Tensor
    tokens: Tensor
    indices: Sequence[int]
    wrong_tokens: Tensor | None = None

    def to(self, device: torch.device) -> "PairBatch":
        """The batch on another device, copied while the GPU still works where it can be."""
        return self._each(lambda side: side.to(device, non_blocking=True))

    def pin_memory(self) -> "PairBatch":
        """The batch in page-locked memory (called by the loader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, moved: Callable[[Tensor], Tensor]) -> "PairBatch":
        wrong = self.wrong_tokens
        sides = moved(self.pixels), moved(self.tokens)
        return PairBatch(*sides, self.indices, None if wrong is None else moved(wrong))


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
        return PairBatch(torch.stack(pixels), tokens, numbers, wrong)


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
    return DataLoader(
        _Decoder(images, preprocess),
        batch_sampler=asked,  # pyright: ignore[reportArgumentType]
        collate_fn=_Stack(tokenizer, swap_seed),
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
        swap_seed: Seed of the words that are exchanged in `wrong_tokens`; None for no such.
        done: Batches that were made already; it goes on behind them.

    Yields:
        One `PairBatch` a step; its indices count the pairs of the stream.

    Raises:
        DataError: The source cannot be read, has bad rows or fewer pairs than a batch, or an image
            cannot be decoded.
    """
    share = batch_size // processes
    pairs = stream.pairs(seed=seed, at_least=batch_size, skip=done * batch_size)

    def shares() -> Iterator[list[StreamedPair]]:
        for _ in range(done, steps):
            yield list(islice(pairs, batch_size))[rank * share : (rank + 1) * share]
        if isinstance(stream, WatchedStream):
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
