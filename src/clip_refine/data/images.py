"""Reading image files."""

import warnings
from pathlib import Path

from PIL import Image

from clip_refine.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        DataError: The file is missing, cut off, or no image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            # metadata oddities and size warnings say nothing about the pixels; a picture over
            # twice Pillow's limit still raises DecompressionBombError
            warnings.simplefilter("ignore")
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{path}: image file not found. Check the path.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: cannot be decoded as an image ({error}). Replace it or remove its rows."
        ) from error


def check_image_file(path: Path) -> str | None:
    """What is wrong with an image file as far as its header tells, or None.

    Reads the header only, so a file that is cut off later is found when it is decoded.
    """
    try:
        with warnings.catch_warnings(), Image.open(path):
            warnings.simplefilter("ignore")
            return None
    except FileNotFoundError:
        return f"image file {path} not found. Check the path."
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{path} is not a readable image ({error}). Replace it or remove the row."
