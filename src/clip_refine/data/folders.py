"""Folders of images sorted by class, for zero-shot classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_refine.data.images import SUFFIXES, open_image
from clip_refine.errors import DataError


@dataclass(frozen=True)
class ClassFolders:
    """Image files with one class each.

    Attributes:
        name: The folder's name, which names the task.
        class_names: The sub-folders' names in alphabetical order, underscores as spaces.
        templates: Prompts with one `{}` for the class name.
        paths: One path an image.
        labels: `labels[i]` is the position of `paths[i]`'s class in `class_names`.
    """

    name: str
    class_names: Sequence[str]
    templates: Sequence[str]
    paths: Sequence[Path]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int) -> Image.Image:
        """Image `index` in RGB.

        Raises:
            DataError: The file is gone or cannot be decoded.
        """
        return open_image(self.paths[index])

    def image_name(self, index: int) -> str:
        """The image's path."""
        return str(self.paths[index])

    def image_bytes(self, index: int) -> bytes:
        """The content of the image's file.

        Raises:
            OSError: It is gone.
        """
        return self.paths[index].read_bytes()


def read_class_folders(folder: Path, *, templates: Sequence[str]) -> ClassFolders:
    """Read `folder/CLASS/image.jpg`.

    Raises:
        DataError: The folder is missing, has fewer than two sub-folders, or an empty one.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give one with a sub-folder for each class.")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DataError(
            f"{folder}: has {len(classes)} sub-folders, expected one for each of 2 or more classes."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, directory in enumerate(classes):
        images = sorted(p for p in directory.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not images:
            raise DataError(f"{directory}: class folder without images. Add some or remove it.")
        paths += images
        labels += [label] * len(images)
    return ClassFolders(
        name=folder.resolve().name,
        class_names=tuple(directory.name.replace("_", " ") for directory in classes),
        templates=tuple(templates),
        paths=tuple(paths),
        labels=tuple(labels),
    )
