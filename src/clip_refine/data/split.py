"""Part of a source, and a seeded split into training and held-out images."""

from collections.abc import Sequence

import torch
from PIL import Image

from clip_refine.data.bad_rows import BadRow
from clip_refine.data.content import image_bytes
from clip_refine.data.every_caption import EveryCaption
from clip_refine.data.mixture import Mixing, Mixture, mixing_of
from clip_refine.data.pairs import ImageCaptions
from clip_refine.errors import DataError

MINIMUM_HELD_OUT = 100


class Subset:
    """Some images of a source with all their captions.

    Attributes:
        source: Where the images are.
        indices: Positions in `source`.
        name: What to call this part.
        captions: The texts of each image in this part.
    """

    def __init__(self, source: ImageCaptions, indices: Sequence[int], name: str) -> None:
        self.source = source
        self.indices = indices
        self.name = name
        captions = source.captions
        self.captions = [captions[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` of this part, in RGB."""
        return self.source.load_image(self.indices[index])

    def image_name(self, index: int) -> str:
        """Image `index` of this part, as its source calls it."""
        return self.source.image_name(self.indices[index])

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image file, None where the source has none."""
        return image_bytes(self.source, self.indices[index])

    @property
    def mixing(self) -> Mixing | None:
        """What an epoch takes from where."""
        mixing = mixing_of(self.source)
        return mixing and ([mixing[0][index] for index in self.indices], mixing[1])

    @property
    def skipped(self) -> Sequence[BadRow]:
        """Rows that were left out of the source."""
        return getattr(self.source, "skipped", ())


def hold_out(
    source: ImageCaptions, *, fraction: float, seed: int
) -> tuple[Subset | EveryCaption, Subset]:
    """Split by image, so that no held-out image has a caption in training.

    In a mixture images of one name are one image, of which only one copy is held out.

    Args:
        source: At least 200 images.
        fraction: Share of the images to hold out; never fewer than 100.
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
    held_out = max(MINIMUM_HELD_OUT, round(fraction * len(source)))
    if held_out > len(source) // 2:
        raise DataError(
            f"{source.name}: {len(source)} images, too few to hold {held_out} of them out for the "
            "before/after numbers. Give evaluation pairs of their own with --data.val."
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, others = order[:held_out], order[held_out:]
    if _is_mixed(source):
        chosen, others = _by_name(source, order, held_out)
    return (
        Subset(source, sorted(others), f"{source.name} (training part)"),
        Subset(source, sorted(chosen), f"{source.name} (held-out part)"),
    )


def _is_mixed(source: ImageCaptions) -> bool:
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, Mixture)


def _by_name(
    source: ImageCaptions, order: Sequence[int], count: int
) -> tuple[list[int], list[int]]:
    """Held-out and training positions, where several sources may have captions of one image."""
    names = {index: source.image_name(index) for index in order}
    held_out: dict[str, int] = {}
    for index, name in names.items():
        if len(held_out) == count:
            break
        held_out.setdefault(name, index)
    return list(held_out.values()), [i for i in order if names[i] not in held_out]
