"""What a source of images is to the rest of the package: small protocols."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image


class Images(Protocol):
    """What image batches need of a source.

    Where images are files or stored as files are, a source also has `image_bytes(index) -> bytes`,
    the content of image `index`, raising OSError where it is gone; see `content.image_bytes`.
    """

    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image: ...  # noqa: D102
    def image_name(self, index: int) -> str: ...  # noqa: D102


class ImageCaptions(Protocol):
    """Images with their captions, by position; every kind of source becomes one of these.

    Attributes:
        name: What to call the source in logs and tables.
        captions: `captions[i]` are the texts of image `i`, at least one.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def captions(self) -> Sequence[Sequence[str]]: ...  # noqa: D102
    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        ...

    def image_name(self, index: int) -> str:
        """What to call image `index` in a message, usually its path."""
        ...


class LabelledImages(Protocol):
    """Images with one class each and the prompts that name the classes.

    Attributes:
        name: The task's name in tables, for example `cifar10`.
        class_names: What goes into the templates, one text a class.
        templates: Prompts with one `{}` for the class name.
        labels: `labels[i]` is the position of image `i`'s class in `class_names`.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def templates(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> Sequence[int]: ...  # noqa: D102
    def __len__(self) -> int: ...
    def load_image(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB."""
        ...

    def image_name(self, index: int) -> str:
        """What to call image `index` in a message, usually its path."""
        ...
