"""A source of image files for tests."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_refine.data.images import open_image
from clip_refine.toy import ToyPairs


@dataclass(frozen=True)
class Files:
    """Image files with a caption each."""

    paths: tuple[Path, ...]
    name: str = "files"

    @property
    def captions(self) -> list[tuple[str]]:
        return [(f"picture {index}",) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int) -> Image.Image:
        return open_image(self.paths[index])

    def image_name(self, index: int) -> str:
        return str(self.paths[index])

    def image_bytes(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def drawn_files(folder: Path, count: int, *, size: tuple[int, int] = (60, 48)) -> Files:
    """Drawn scenes as JPEG files."""
    folder.mkdir(exist_ok=True)
    drawn = ToyPairs("drawn-files", size=count)
    paths = []
    for index in range(count):
        path = folder / f"{index:03}.jpg"
        drawn.load_image(index).resize(size).save(path, quality=95)
        paths.append(path)
    return Files(tuple(paths))


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()
