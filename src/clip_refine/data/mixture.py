"""Several sources as one, and which of their images an epoch uses how often."""

import bisect
import itertools
from collections.abc import Sequence

import torch
from PIL import Image

from clip_refine.data.bad_rows import BadRow, skipped_rows
from clip_refine.data.content import image_bytes
from clip_refine.data.pairs import ImageCaptions


class Mixture:
    """The images of several sources, one source behind the other.

    Without weights an epoch uses every image once. With weights it has as many pairs, of which each
    source gives its share: one that has too few images begins anew, so that some come twice or more
    often, and one that has too many gives another part of them each epoch.

    Attributes:
        sources: What is mixed.
        name: All their names.
        captions: The texts of each image.
        group_of: For each image the number of its source.
        weights: One a source, or none.
    """

    def __init__(self, sources: Sequence[ImageCaptions], weights: Sequence[float] = ()) -> None:
        """Mix.

        Args:
            sources: At least one.
            weights: As many positive numbers; only their ratios count.

        Raises:
            ValueError: There are weights, but not one for each source.
        """
        if weights and len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources")
        self.sources = tuple(sources)
        self.weights = tuple(weights)
        self.name = " + ".join(source.name for source in sources)
        self.captions = [texts for source in sources for texts in source.captions]
        self.group_of = [number for number, one in enumerate(sources) for _ in range(len(one))]
        sizes = [len(source) for source in sources]
        self._starts = [0, *itertools.accumulate(sizes[:-1])]

    def __len__(self) -> int:
        return len(self.captions)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, in RGB."""
        source, position = self._at(index)
        return source.load_image(position)

    def image_name(self, index: int) -> str:
        """Image `index` as its source calls it."""
        source, position = self._at(index)
        return source.image_name(position)

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image file, None where the source has none."""
        return image_bytes(*self._at(index))

    @property
    def skipped(self) -> list[BadRow]:
        """Rows that were left out of the sources."""
        return skipped_rows(self.sources)

    @property
    def mixing(self) -> "Mixing | None":
        """What an epoch takes from where; None where it takes every image once."""
        return (self.group_of, self.weights) if self.weights else None

    def _at(self, index: int) -> tuple[ImageCaptions, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


Mixing = tuple[Sequence[int], Sequence[float]]
"""For each image the number of its group, and for each group its weight."""


def mixing_of(pairs: ImageCaptions) -> Mixing | None:
    """What an epoch of these pairs takes from where; None where it takes every image once."""
    return getattr(pairs, "mixing", None)


def mixed_order(mixing: Mixing, *, generator: torch.Generator) -> torch.Tensor:
    """As many positions as there are images, shuffled, each group with its share of them.

    Within a group every image comes equally often, or once more than others.

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
