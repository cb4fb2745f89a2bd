"""Decoding large JPEGs smaller: what it changes and what it saves. `python benchmarks/draft.py`.

Drift is the cosine between the features of an image decoded in full and decoded smaller. Large
photographs that may be kept beside the code are rare, so there are two stand-ins: the model's image
tower at fewer pixels, which makes ordinary photographs large for it, and sheets of many photographs
side by side at their own resolution. Needs an image tower that takes any size for the first.
"""

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torchvision import transforms

from clip_refine.data import PixelReader, with_cached_pixels
from clip_refine.data.images import decode_image
from clip_refine.data.loader import side_to_keep
from clip_refine.models import OpenClipEncoder, load_open_clip

CELL = (480, 320)
Decode = Callable[[bytes, int], Image.Image]


def full(data: bytes, size: int) -> Image.Image:
    return decode_image(data, "benchmark")


def ours(data: bytes, size: int, factor: int) -> Image.Image:
    return decode_image(data, "benchmark", side=factor * size)


def pillow(data: bytes, size: int, factor: int) -> Image.Image:
    """As `Image.draft` has it: rounded sides, and no more pixels than asked for."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (factor * size, factor * size))
    return image.convert("RGB")


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def even(photo: Image.Image) -> Image.Image:
    """With sides that can be halved three times."""
    return photo.crop((0, 0, photo.width // 8 * 8, photo.height // 8 * 8))


def sheet(photos: list[Image.Image], side: int) -> Image.Image:
    result = Image.new("RGB", (side * CELL[0], side * CELL[1]))
    for cell in range(side * side):
        part = random.choice(photos).crop((0, 0, *CELL))
        result.paste(part, (cell % side * CELL[0], cell // side * CELL[1]))
    return result


@torch.no_grad()
def features(model: OpenClipEncoder, images: list[Image.Image], size: int) -> torch.Tensor:
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(size), transforms.ToTensor()]
    preprocess = transforms.Compose([*steps, transforms.Normalize([0.498] * 3, [0.502] * 3)])
    pixels = torch.stack([preprocess(image) for image in images])
    return torch.cat([model.clip.encode_image(part, normalize=True) for part in pixels.split(20)])


def drift(model: OpenClipEncoder, name: str, data: list[bytes], size: int) -> None:
    whole = [full(item, size) for item in data]
    expected = features(model, whole, size)
    ways: dict[str, Decode] = {
        "ours, 3 times": lambda item, size: ours(item, size, 3),
        "ours, 2 times": lambda item, size: ours(item, size, 2),
        "draft, 2 times": lambda item, size: pillow(item, size, 2),
        "draft, 1 time": lambda item, size: pillow(item, size, 1),
    }
    for way, decode in ways.items():
        images = [decode(item, size) for item in data]
        smaller = [i for i, image in enumerate(images) if image.size != whole[i].size]
        if not smaller:
            continue
        found = features(model, [images[i] for i in smaller], size)
        cosines = (found * expected[smaller]).sum(-1)
        print(
            f"{name}, {size} pixels, {way}: {len(smaller)} of {len(data)} smaller, cosine min "
            f"{cosines.min():.5f} median {cosines.median():.5f}, {int((cosines < 0.999).sum())} "
            "below .999",
            flush=True,
        )


def speed(model: OpenClipEncoder, name: str, data: list[bytes], rounds: int) -> None:
    """Decoding and preprocessing, and reading from the cache, each against full decoding."""
    side = side_to_keep(model.preprocess)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(len(data))]
        for path, item in zip(paths, data, strict=True):
            path.write_bytes(item)
        source = Files(paths)
        plain = PixelReader(model.preprocess)
        cached = with_cached_pixels(plain, [source], Path(folder) / "cache", visible=False)
        readers = {"smaller": PixelReader(model.preprocess, side), "cached": cached}
        ratios: dict[str, list[float]] = {way: [] for way in readers}
        for number in range(rounds + 1):
            slow = seconds(plain, source)
            for way, reader in readers.items():
                ratio = slow / seconds(reader, source)
                ratios[way] += [ratio] if number else []  # the first round warms up
    for way, values in ratios.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(
            f"{name}: {slow / len(data) * 1000:.1f} ms an image in full; {way} "
            f"{middle:.1f} times as fast ({low:.1f}-{high:.1f})",
            flush=True,
        )


class Files:
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int) -> Image.Image:
        return decode_image(self.image_bytes(index), self.image_name(index))

    def image_name(self, index: int) -> str:
        return str(self.paths[index])

    def image_bytes(self, index: int) -> bytes:
        return self.paths[index].read_bytes()


def seconds(reader: PixelReader, source: Files) -> float:
    start = time.perf_counter()
    for index in range(len(source)):
        reader(source, index)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="../shared/models/photo-clip")
    parser.add_argument("--photos", type=Path, default=Path("../shared/data/originals"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    model = load_open_clip(f"local-dir:{options.model}")
    files = [path.read_bytes() for path in sorted(options.photos.glob("*.jpg"))]
    photos = [full(item, 0) for item in files]
    trimmed = [jpeg(even(photo)) for photo in photos]
    sheets = {side: [jpeg(sheet(photos, side)) for _ in range(30)] for side in (2, 3, 5, 8)}
    for size in (48, 56, 64, 72, 80, 96):
        drift(model, "photographs", files, size)
        drift(model, "photographs with even sides", trimmed, size)
    for side, data in sheets.items():
        drift(model, f"sheets of {side * CELL[0]} x {side * CELL[1]}", data, 224)
    speed(model, "photographs of about 500 x 375", files, options.rounds)
    for side, data in sheets.items():
        name = f"sheets of {side * CELL[0]} x {side * CELL[1]}"
        speed(model, name, data[:10], options.rounds)


if __name__ == "__main__":
    main()
