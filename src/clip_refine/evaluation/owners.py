"""Which caption belongs to which image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clip_refine.evaluation.chunks import row_blocks


def checked_owners(text_to_image: Tensor | None, image_count: int, text_count: int) -> Tensor:
    """The image of each caption, (M,) int64 on the CPU.

    Args:
        text_to_image: (M,) whole numbers; None where caption i describes image i.
        image_count: N.
        text_count: M.

    Raises:
        ValueError: If the shape or a number does not fit, or an image has no caption.
    """
    if text_to_image is None:
        if image_count != text_count:
            raise ValueError(
                f"{image_count} images and {text_count} captions do not pair up by row; "
                "pass text_to_image"
            )
        return torch.arange(image_count)
    owners = text_to_image.detach().cpu()
    if owners.shape != (text_count,) or owners.is_floating_point() or owners.is_complex():
        raise ValueError(
            f"text_to_image must be ({text_count},) whole numbers, one a caption; "
            f"got {tuple(owners.shape)} of {owners.dtype}"
        )
    owners = owners.long()
    if owners.min() < 0 or owners.max() >= image_count:
        raise ValueError(
            f"text_to_image must be from 0 to {image_count - 1}, "
            f"got {int(owners.min())} to {int(owners.max())}"
        )
    captions_per_image = owners.bincount(minlength=image_count)
    if not captions_per_image.all():
        image = int((captions_per_image == 0).nonzero()[0])
        raise ValueError(f"image {image} has no caption in text_to_image")
    return owners


class Captions:
    """The captions of each image, looked up by rows of images or of captions."""

    def __init__(self, owners: Tensor, image_count: int) -> None:
        """Sort them once.

        Args:
            owners: (M,) int64, from `checked_owners`.
            image_count: N.
        """
        self._owners = owners
        self._by_image = owners.argsort(stable=True)
        self._counts = owners.bincount(minlength=image_count)
        self._starts = self._counts.cumsum(0) - self._counts

    def of_images(self, images: Tensor | slice) -> Tensor:
        """(rows, P) indices of each image's captions, rising, padded with −1.

        Example:
            >>> Captions(torch.tensor([1, 0, 1]), 2).of_images(slice(0, 2)).tolist()
            [[1, -1], [0, 2]]
        """
        counts = self._counts[images]
        column = torch.arange(int(counts.max()), device=counts.device)
        position = self._starts[images][:, None] + column
        captions = self._by_image[position.clamp(max=len(self._by_image) - 1)]
        return captions.masked_fill(column >= counts[:, None], -1)

    def beside(self, rows: slice) -> Tensor:
        """(rows, P − 1) indices of the other captions of each caption's image, padded with −1.

        Example:
            >>> Captions(torch.tensor([1, 0, 1]), 2).beside(slice(0, 3)).tolist()
            [[2], [-1], [0]]
        """
        together = self.of_images(self._owners[rows])
        itself = torch.arange(rows.start, rows.stop, device=together.device)[:, None]
        others = together.masked_fill(together == itself, -1)
        return others.sort(dim=1, descending=True).values[:, :-1]

    def blocks(self, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """All images in order, some at a time, with `of_images`."""
        for rows in row_blocks(len(self._counts), chunk_size):
            yield rows, self.of_images(rows)
