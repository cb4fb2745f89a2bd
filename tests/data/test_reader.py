"""One way from images to pixels, whatever stands behind it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_refine.data import EpochPlan, PairLoader, PixelReader, Subset, image_batches
from clip_refine.data.loader import batches_ahead, side_to_keep
from clip_refine.data.pairs import image_bytes, image_fingerprint
from clip_refine.models import OpenClipEncoder
from clip_refine.support.errors import DataError
from clip_refine.toy import ToyPairs
from tests.data.files import Files, drawn_files


@pytest.fixture
def photos(tmp_path: Path) -> Files:
    """Some larger than the model needs, and one that is no JPEG."""
    large = drawn_files(tmp_path / "large", 3, size=(512, 448))
    small = drawn_files(tmp_path / "small", 2)
    png = tmp_path / "scene.png"
    large.load_image(0).save(png)
    return Files((*large.paths, *small.paths, png))


def test_large_jpegs_are_decoded_smaller_and_others_as_they_are(
    photos: Files, tiny: OpenClipEncoder
):
    side = side_to_keep(tiny.preprocess)
    assert side == 159
    reader = PixelReader(tiny.preprocess, side)
    assert [reader.load(photos, index).size for index in range(6)] == [
        *[(256, 224)] * 3,
        *[(60, 48)] * 2,
        (512, 448),
    ]
    whole = torch.stack([tiny.preprocess(photos.load_image(index)) for index in range(6)])
    (read,) = image_batches(photos, batch_size=6, preprocess=reader)
    assert (read - whole).abs().mean() < 0.05  # of values that span about 4
    assert not torch.equal(read[0], whole[0])
    assert torch.equal(read[3:], whole[3:])
    (full,) = image_batches(photos, batch_size=6, preprocess=PixelReader(tiny.preprocess))
    assert torch.equal(full, whole)


def test_the_content_of_images_through_a_subset(photos: Files):
    part = Subset(photos, [4, 0], "part")
    assert image_bytes(part, 1) == photos.paths[0].read_bytes()
    assert image_fingerprint(part, 0) == image_fingerprint(photos, 4)
    drawn = Subset(ToyPairs("drawn", size=3), [2], "part")
    assert image_bytes(drawn, 0) is None
    assert image_fingerprint(drawn, 0) == image_fingerprint(drawn.source, 2)
    photos.paths[4].unlink()
    with pytest.raises(DataError, match=r"004?1?.jpg: cannot be read \(No such file"):
        image_bytes(part, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_stay_for_the_next_epoch(
    pairs: ToyPairs, tiny: OpenClipEncoder, workers: int
):
    settings = {"batch_size": 24, "preprocess": tiny.preprocess, "tokenizer": tiny.tokenizer}
    loader = PairLoader(pairs, workers=workers, **settings)
    started = set()
    for seed in (1, 2):
        plan = EpochPlan.draw(pairs, generator=torch.Generator().manual_seed(seed))
        batches = list(loader.epoch(plan))
        alone = list(PairLoader(pairs, **settings).epoch(plan))
        for batch, expected in zip(batches, alone, strict=True):
            assert batch.indices == expected.indices
            assert torch.equal(batch.pixels, expected.pixels)
            assert torch.equal(batch.tokens, expected.tokens)
        if workers:
            started |= {worker.pid for worker in loader._loader._iterator._workers}
    assert len(started) == workers


def test_workers_do_not_hold_more_than_memory_allows():
    assert batches_ahead(4096, 8) == 1
    assert batches_ahead(16, 2) == 4
    assert batches_ahead(16, 0) is None


def test_preprocessing_of_another_shape_sets_its_own_size():
    def wide(image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, 32, 100)

    assert side_to_keep(wide) == 331
    assert side_to_keep(lambda image: torch.zeros(7)) is None
