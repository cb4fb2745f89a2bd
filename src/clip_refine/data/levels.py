"""Preprocessed pixels as the 8-bit levels that they were before they were normalised, and back."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clip_refine.data.content import fingerprint
from clip_refine.errors import DataError

Preprocess = Callable[[Image.Image], Tensor]
LEVELS = 256
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SIDE = 32


@dataclass(frozen=True, eq=False)
class Levels:
    """What a preprocessing makes of each of the 256 levels of each channel.

    It is measured on even images, so that nothing needs to be known of the preprocessing, and
    `encode` checks every pixel of every image: what is decoded is what was encoded, bit by bit.

    Attributes:
        values: (3, 256) float32, rising.
        size: Height and width of preprocessed images.
    """

    values: NDArray[np.float32]
    size: tuple[int, int]

    @classmethod
    def of(cls, preprocess: Preprocess) -> "Levels":
        """Measure a preprocessing.

        Raises:
            DataError: It does more to levels than to move each of them to a value of its own.
        """
        even = [Image.new("RGB", (_SIDE, _SIDE), (level,) * 3) for level in range(LEVELS)]
        shape = preprocess(even[0]).shape
        values = torch.empty(3, LEVELS)
        for level, image in enumerate(even):
            pixels = preprocess(image)
            if pixels.shape != shape or len(shape) != 3 or shape[0] != 3:
                raise _inexact(f"gives pixels of shape {tuple(pixels.shape)}")
            if pixels.dtype != torch.float32:
                raise _inexact(f"gives {pixels.dtype}")
            values[:, level] = pixels.amax((1, 2))
            if not torch.equal(values[:, level], pixels.amin((1, 2))):
                raise _inexact("turns an even image into an uneven one")
        if not (values.diff(dim=1) > 0).all():
            raise _inexact("gives two levels one value, or falling ones")
        return cls(values.numpy(), (shape[1], shape[2]))

    def encode(self, pixels: Tensor, name: str) -> NDArray[np.uint8]:
        """(3, H, W) float32 → uint8 levels.

        Raises:
            DataError: A pixel is no level, or the size is another.
        """
        if tuple(pixels.shape[1:]) != self.size:
            raise _inexact(f"makes {name} {tuple(pixels.shape)}, others (3, *{self.size})")
        found = pixels.numpy()
        levels = np.empty(found.shape, np.uint8)
        for channel, values in enumerate(self.values):
            nearest = np.searchsorted(values, found[channel]).clip(max=LEVELS - 1)
            levels[channel] = nearest
        if not np.array_equal(self._values_of(levels), found):
            raise _inexact(f"gives pixels of {name} values between the 8-bit levels")
        return levels

    def decode(self, levels: NDArray[np.uint8]) -> Tensor:
        """(3, H, W) uint8 levels → the float32 pixels that they were encoded from."""
        return torch.from_numpy(self._values_of(levels))

    def _values_of(self, levels: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = np.empty(levels.shape, np.float32)
        for channel, values in enumerate(self.values):
            np.take(values, levels[channel], out=pixels[channel], mode="clip")
        return pixels


def preprocess_fingerprint(preprocess: Preprocess) -> str:
    """Of what a preprocessing says of itself and of what it makes of a sample.

    Two functions may have one name, so the name is not enough.
    """
    sample = preprocess(probe_image()).detach().cpu().contiguous().flatten()
    said = _ADDRESS.sub("", repr(preprocess)).encode()
    return fingerprint(said, sample.view(torch.uint8).numpy().tobytes())


def probe_image() -> Image.Image:
    """The same coloured noise every time, neither square nor small."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(LEVELS, (240, 320, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _inexact(what: str) -> DataError:
    return DataError(
        f"data.cache-images: the model's preprocessing {what}, so its pixels cannot be kept as "
        "8-bit levels and read back unchanged. Leave --data.cache-images out."
    )
