"""The one way from an image of a source to the pixels that the model takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from clip_refine.data.content import image_bytes
from clip_refine.data.images import decode_image
from clip_refine.data.levels import Levels
from clip_refine.data.pairs import Images
from clip_refine.data.pixel_store import PixelStore

Preprocess = Callable[[Image.Image], Tensor]
RESERVE = 3.3
"""A JPEG that is decoded smaller keeps so many times the model's pixels a side. 2.75 times the size
that it is resized to was enough; of that preprocessing may cut an eighth off. See docs/log.md."""


@dataclass(frozen=True, eq=False)
class CachedPixels:
    """Preprocessed pixels of some images, kept as 8-bit levels.

    Attributes:
        levels: What the levels stand for.
        store: Where they are.
        rows: Image name → its row there.
    """

    levels: Levels
    store: PixelStore
    rows: Mapping[str, int]

    def find(self, name: str) -> Tensor | None:
        """(3, H, W) pixels of an image, None where they are not kept."""
        row = self.rows.get(name)
        return None if row is None else self.levels.decode(self.store.row(row))


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
    """The `side` of a `PixelReader` for a preprocessing; None where it makes no (3, H, W).

    >>> from torchvision.transforms import PILToTensor, Compose, Resize
    >>> side_to_keep(Compose([Resize((64, 64)), PILToTensor()]))
    212
    """
    shape = preprocess(Image.new("RGB", (64, 64))).shape
    return round(RESERVE * max(shape[1:])) + 1 if len(shape) == 3 else None
