"""Fingerprints of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_refine.data import Subset
from clip_refine.data.pairs import pairs_fingerprint
from clip_refine.toy import ToyPairs


@dataclass
class Files:
    name: str
    paths: list[Path]
    captions: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.paths)

    def load_image(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def image_name(self, index: int) -> str:
        return str(self.paths[index])


def files(folder: Path, size: int = 8) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{name}.png" for name in "ab"]
    for path in paths:
        Image.new("RGB", (size, size)).save(path)
    return paths


def test_folder_and_order_do_not_matter_and_content_does(tmp_path: Path):
    captions = (("a dog",), ("a cat", "a pet"))
    here, there = files(tmp_path / "here"), files(tmp_path / "there")
    large = files(tmp_path / "large", 64)
    first = pairs_fingerprint(Files("one.csv", here, captions))
    assert len(first) == 32
    assert pairs_fingerprint(Files("two.csv", there, captions)) == first
    backwards = Files("three.csv", there[::-1], captions[::-1])
    assert pairs_fingerprint(backwards) == first
    others = [
        Files("a", large, captions),
        Files("b", here, captions[::-1]),
        Files("c", here[:1], captions[:1]),
        Files("d", here, (("a dog", "a cat"), ("a pet",))),
    ]
    assert first not in {pairs_fingerprint(other) for other in others}


def test_drawn_pairs_have_one_too():
    pairs = ToyPairs("content", size=6)
    part = Subset(pairs, [3, 1], "part")
    assert pairs_fingerprint(part) == pairs_fingerprint(Subset(pairs, [1, 3], "other"))
    assert pairs_fingerprint(part) != pairs_fingerprint(pairs)
