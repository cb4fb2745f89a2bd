"""Views of images with captions: a part, every caption, a mixture, and the seeded split."""

import bisect
import itertools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image

from clip_refine.data.bad_rows import skipped_rows
from clip_refine.data.pairs import ImageCaptions, ImageSource, PairSource, as_pairs, image_groups
from clip_refine.support.errors import DataError

# --------------------------------------------------------------------------------------------------
# Views: the images of other sources, fewer, more often or together.


class _View(PairSource):
    """Asks everything about an image of the source that has it."""

    @abstractmethod
    def _at(self, index: int) -> tuple[PairSource, int]:
        """Which source has image `index`, and where."""

    def origin(self, index: int) -> tuple[ImageSource, int]:
        """Where image `index` is stored, whatever views lie between."""
        source, position = self._at(index)
        return source.origin(position)

    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        source, position = self._at(index)
        return source.load_image(position)

    def image_name(self, index: int) -> str:
        """Image `index` as its source calls it."""
        source, position = self._at(index)
        return source.image_name(position)

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image's file, None where the source has none."""
        source, position = self._at(index)
        return source.image_bytes(position)


class _Chosen(_View):
    """Images of one source by their positions there."""

    def __init__(self, source: ImageCaptions, indices: Sequence[int]) -> None:
        self.source = as_pairs(source)
        self.indices = indices
        self.skipped = self.source.skipped
        if self.source.mixing is not None:
            group_of, weights = self.source.mixing
            self.mixing = [group_of[index] for index in indices], weights

    def _at(self, index: int) -> tuple[PairSource, int]:
        return self.source, self.indices[index]


class Subset(_Chosen):
    """Some images of a source with all their captions.

    Attributes:
        source: Where the images are.
        indices: Positions in `source`.
        name: What to call this part.
        captions: The texts of each image in this part.
    """

    def __init__(self, source: ImageCaptions, indices: Sequence[int], name: str) -> None:
        super().__init__(source, indices)
        self.name = name
        captions = self.source.captions
        self.captions = [captions[index] for index in indices]


class EveryCaption(_Chosen):
    """A source in which each image stands once for each of its captions.

    Attributes:
        source: Where images and captions are.
        image_of: For each pair the position of its image in `source`.
        name: What to call it.
        captions: One text a pair.
    """

    def __init__(self, source: ImageCaptions) -> None:
        source = as_pairs(source)
        counted = list(enumerate(source.captions))
        self.image_of = [image for image, texts in counted for _ in texts]
        super().__init__(source, self.image_of)
        self.name = source.name
        self.captions = [(text,) for _, texts in counted for text in texts]


class Mixture(_View):
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
        self.sources = tuple(map(as_pairs, sources))
        self.weights = tuple(weights)
        self.name = " + ".join(source.name for source in self.sources)
        self.captions = [texts for source in self.sources for texts in source.captions]
        self.group_of = [n for n, source in enumerate(self.sources) for _ in range(len(source))]
        self.skipped = skipped_rows(self.sources)
        if weights:
            self.mixing = (self.group_of, self.weights)
        sizes = [len(source) for source in self.sources]
        self._starts = [0, *itertools.accumulate(sizes[:-1])]

    def _at(self, index: int) -> tuple[PairSource, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


# --------------------------------------------------------------------------------------------------
# A seeded split into training and held-out images.


MINIMUM_HELD_OUT = 100
"""Images; of so many, one is a whole point of recall@1."""


def hold_out(
    source: ImageCaptions, *, fraction: float, seed: int
) -> tuple[Subset | EveryCaption, Subset]:
    """Split by what the images hold, so that none is both held out and trained on.

    Images of one content, as sources of a mixture may have them, are one image, of which only one
    copy is held out and none is trained on.

    Args:
        source: At least 200 different images.
        fraction: Share of the different images to hold out; never fewer than 100.
        seed: Same seed, same split.

    Returns:
        Training part and held-out part, each in the order of the source. Of `EveryCaption` the
        training part has every caption again, the held-out part the images with all captions.

    Raises:
        DataError: Less than half of the images would be left to train on.
    """
    if isinstance(source, EveryCaption):
        training, held_out = hold_out(source.source, fraction=fraction, seed=seed)
        return EveryCaption(training), held_out
    source = as_pairs(source)
    (groups,) = image_groups(source)
    different = len(set(groups))
    count = max(MINIMUM_HELD_OUT, round(fraction * different))
    if count > different // 2:
        raise DataError(
            f"{source.name}: {different} images, too few to hold {count} of them out for the "
            "before/after numbers. Give evaluation pairs of their own with --data.val."
        )
    chosen: dict[int, int] = {}  # group → its copy that comes first
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if len(chosen) == count:
            break
        chosen.setdefault(groups[index], index)
    others = [index for index, group in enumerate(groups) if group not in chosen]
    return (
        Subset(source, others, f"{source.name} (training part)"),
        Subset(source, sorted(chosen.values()), f"{source.name} (held-out part)"),
    )
