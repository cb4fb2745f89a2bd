"""One model's features of images and captions, searched by text or image."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from clip_refine.data.pairs import Images
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.chunks import unit_rows


@dataclass(frozen=True)
class Hit:
    """Something that was found.

    Attributes:
        rank: 1 is first.
        image: Position of the image, None for a caption.
        caption: The text, None for an image.
        cosine: With the query.
    """

    rank: int
    image: int | None
    caption: str | None
    cosine: float


class SearchIndex:
    """Unit features of one model.

    Attributes:
        embedder: The model and how to feed it.
        image_unit: (N, d).
        text_unit: (M, d), M may be 0.
        captions: The M texts.
    """

    def __init__(self, embedder: Embedder, images: Images, captions: list[str], name: str) -> None:
        """Encode everything once.

        Args:
            embedder: The model.
            images: What is searched.
            captions: What is searched, too, in a mixed index.
            name: Of the model, for the progress bar.

        Raises:
            DataError: An image cannot be read.
        """
        self.embedder = embedder
        self.captions = captions
        self.image_unit = unit_rows("images", embedder.images(images, f"{name}: images"))
        self.text_unit = self.image_unit[:0]
        if captions:
            self.text_unit = unit_rows("captions", embedder.texts(captions, f"{name}: captions"))

    def by_text(self, query: str, *, mixed: bool, count: int) -> list[Hit]:
        """The nearest to a text, first the nearest.

        Args:
            query: The text.
            mixed: Whether captions are searched, too; those that are the query itself are not.
            count: How many.
        """
        model = self.embedder.model
        with torch.no_grad():
            tokens = model.tokenizer([query]).to(self.embedder.device)
            features = model.encode_text(tokens).float().cpu()
        return self._nearest(features, mixed=mixed, count=count, but=query)

    def by_image(self, query: Image.Image, *, mixed: bool, count: int) -> list[Hit]:
        """The nearest to an image; arguments as in `by_text`."""
        model = self.embedder.model
        with torch.no_grad():
            pixels = model.preprocess(query.convert("RGB"))[None].to(self.embedder.device)
            features = model.encode_image(pixels).float().cpu()
        return self._nearest(features, mixed=mixed, count=count)

    def _nearest(
        self, query: Tensor, *, mixed: bool, count: int, but: str | None = None
    ) -> list[Hit]:
        unit = unit_rows("query", query)[0]
        cosines = self.image_unit @ unit
        if mixed:
            of_captions = self.text_unit @ unit
            same = torch.tensor([text == but for text in self.captions], dtype=torch.bool)
            cosines = torch.cat([cosines, of_captions.masked_fill(same, -torch.inf)])
        best = cosines.topk(min(count, len(cosines)))
        return [
            self._hit(rank, position, cosine)
            for rank, (position, cosine) in enumerate(
                zip(best.indices.tolist(), best.values.tolist(), strict=True), start=1
            )
            if cosine > -2
        ]

    def _hit(self, rank: int, position: int, cosine: float) -> Hit:
        if position < len(self.image_unit):
            return Hit(rank, position, None, cosine)
        return Hit(rank, None, self.captions[position - len(self.image_unit)], cosine)
