"""Every caption with its image as a pair of its own."""

from collections.abc import Sequence

from PIL import Image

from clip_refine.data.bad_rows import BadRow
from clip_refine.data.content import image_bytes
from clip_refine.data.mixture import Mixing, mixing_of
from clip_refine.data.pairs import ImageCaptions


class EveryCaption:
    """A source in which each image stands once for each of its captions.

    Attributes:
        source: Where images and captions are.
        image_of: For each pair the position of its image in `source`.
        name: What to call it.
        captions: One text a pair.
    """

    def __init__(self, source: ImageCaptions) -> None:
        self.source = source
        counted = list(enumerate(source.captions))
        self.image_of = [image for image, texts in counted for _ in texts]
        self.captions = [(text,) for _, texts in counted for text in texts]
        self.name = source.name

    def __len__(self) -> int:
        return len(self.image_of)

    def load_image(self, index: int) -> Image.Image:
        """The image of pair `index`, in RGB."""
        return self.source.load_image(self.image_of[index])

    def image_name(self, index: int) -> str:
        """The image of pair `index`, as its source calls it."""
        return self.source.image_name(self.image_of[index])

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image file, None where the source has none."""
        return image_bytes(self.source, self.image_of[index])

    @property
    def skipped(self) -> Sequence[BadRow]:
        """Rows that were left out of the source."""
        return getattr(self.source, "skipped", ())

    @property
    def mixing(self) -> Mixing | None:
        """What an epoch takes from where."""
        mixing = mixing_of(self.source)
        return mixing and ([mixing[0][image] for image in self.image_of], mixing[1])
