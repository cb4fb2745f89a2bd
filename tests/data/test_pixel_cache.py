"""Cached pixels: the same bits as decoded ones, shared, never stale, safe with two writers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clip_refine.config import override
from clip_refine.config.runs import EvaluateConfig, RefineConfig
from clip_refine.data import PixelReader, image_batches
from clip_refine.data import loader as pixel_cache
from clip_refine.data import with_cached_pixels as cached
from clip_refine.data.loader import EpochPlan, Levels, pair_batches
from clip_refine.models import OpenClipEncoder
from clip_refine.roads.evaluate import evaluate
from clip_refine.roads.refine import refine
from clip_refine.support.errors import DataError, OutputError
from clip_refine.toy import ToyPairs
from tests.data.files import Files, drawn_files

SHAPE = (3, 48, 48)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return drawn_files(tmp_path / "images", 12)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all images that are decoded for the cache."""
    names: list[str] = []
    encode = Levels.encode

    def counted(levels: Levels, pixels: Tensor, name: str) -> NDArray[np.uint8]:
        names.append(Path(name).name)
        return encode(levels, pixels, name)

    monkeypatch.setattr(Levels, "encode", counted)
    return names


def pixels(images: Files, reader: PixelReader) -> Tensor:
    return torch.cat(list(image_batches(images, batch_size=5, preprocess=reader)))


def test_what_is_read_back_is_what_was_decoded(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path, decoded: list[str]
):
    reader = PixelReader(tiny.preprocess, 100)
    expected = pixels(files, reader)
    first = cached(reader, [files], tmp_path / "cache")
    assert len(decoded) == 12
    for path in files.paths:
        path.rename(path.with_suffix(".gone"))  # no reading of images behind the cache's back
    assert torch.equal(pixels(files, first), expected)
    loaded = image_batches(files, batch_size=5, preprocess=first, workers=2)
    assert torch.equal(torch.cat(list(loaded)), expected)


@pytest.mark.parametrize("drawn", [False, True])
def test_levels_travel_as_bytes_and_become_the_same_pixels(
    drawn: bool, files: Files, tiny: OpenClipEncoder, tmp_path: Path
):
    """As beside a GPU; with an image that is no file, and so not cached, the loader decodes all."""
    reader = PixelReader(tiny.preprocess)
    kept = cached(reader, [files], tmp_path / "cache")
    name = files.image_name(1)
    if drawn:
        assert kept.cached
        del kept.cached.rows[name]  # pyright: ignore[reportIndexIssue]
    plan = EpochPlan(range(12), [0] * 12)
    more = {"batch_size": 4, "tokenizer": tiny.tokenizer}
    expected = list(pair_batches(files, plan, preprocess=reader, **more))
    found = list(pair_batches(files, plan, preprocess=replace(kept, as_levels=True), **more))
    bytes_at_once = [batch.pixels.dtype == torch.uint8 for batch in found]
    assert bytes_at_once == [not drawn, True, True]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.to(torch.device("cpu")).pixels, other.pixels)
        assert torch.equal(one.tokens, other.tokens)


def test_later_runs_decode_only_what_is_new(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path, decoded: list[str]
):
    reader = PixelReader(tiny.preprocess)
    cached(reader, [files], tmp_path)
    decoded.clear()
    cached(reader, [files], tmp_path)
    assert decoded == []
    files.load_image(3).rotate(90).save(files.paths[7])
    again = cached(reader, [Files(files.paths[5:])], tmp_path)
    assert decoded == ["007.jpg"]
    assert torch.equal(pixels(files, again), pixels(files, reader))


def test_other_preprocessing_has_other_pixels(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path, decoded: list[str]
):
    def mirrored(image: Image.Image) -> Tensor:
        return tiny.preprocess(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))

    for reader in (
        PixelReader(tiny.preprocess),
        PixelReader(mirrored),
        PixelReader(tiny.preprocess, 20),
    ):
        assert torch.equal(pixels(files, cached(reader, [files], tmp_path)), pixels(files, reader))
    assert len(decoded) == 36
    assert len(list(tmp_path.glob("*/rows"))) == 3


def test_size_and_place_are_said_before(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reader = PixelReader(tiny.preprocess)
    cached(reader, [files], tmp_path)
    said = capsys.readouterr().err
    assert "Caching the pixels of 12 images: 83 kB in " in said
    assert str(tmp_path) in said
    assert "are free" in said
    cached(reader, [files], tmp_path)
    assert capsys.readouterr().err == ""


def test_too_little_room(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("clip_refine.support.folder.SPARE", 10**18)
    with pytest.raises(OutputError, match=r"12 images take 83 kB, but only .*--data.cache-folder"):
        cached(PixelReader(tiny.preprocess), [files], tmp_path)


def test_a_folder_that_cannot_be_written(files: Files, tiny: OpenClipEncoder, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be read .*--data.cache-folder"):
        cached(PixelReader(tiny.preprocess), [files], tmp_path / "file")


def test_one_bad_image_stops_and_what_was_written_stays(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path, decoded: list[str], monkeypatch
):
    monkeypatch.setattr(pixel_cache, "_BATCH", 4)
    whole = files.paths[9].read_bytes()
    files.paths[9].write_bytes(whole[:300])
    with pytest.raises(DataError, match="009.jpg"):
        cached(PixelReader(tiny.preprocess), [files], tmp_path)
    files.paths[9].write_bytes(whole)
    decoded.clear()
    cached(PixelReader(tiny.preprocess), [files], tmp_path)
    assert decoded == ["008.jpg", "009.jpg", "010.jpg", "011.jpg"]


def test_drawn_images_and_two_images_of_one_name_are_not_cached(
    tiny: OpenClipEncoder, tmp_path: Path, files: Files
):
    class Numbered(Files):
        def image_name(self, index: int) -> str:
            return str(index)

    one, other = Numbered(files.paths[:6]), Numbered(files.paths[5:])
    reader = cached(PixelReader(tiny.preprocess), [one, other, ToyPairs("x", size=2)], tmp_path)
    assert reader.cached
    assert list(reader.cached.rows) == ["6"]
    for images in (one, other):
        assert torch.equal(pixels(images, reader), pixels(images, PixelReader(tiny.preprocess)))


def test_a_drawn_image_is_not_taken_for_a_file_of_its_name(
    files: Files, tiny: OpenClipEncoder, tmp_path: Path
):
    class Drawn(ToyPairs):
        def image_name(self, index: int) -> str:
            return str(files.paths[index])

    drawn = Drawn("x", size=2)
    reader = cached(PixelReader(tiny.preprocess), [files, drawn], tmp_path)
    assert torch.equal(reader(drawn, 0), tiny.preprocess(drawn.load_image(0)))


INEXACT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "blurred": (lambda pixels: pixels.lerp(pixels.roll(1, -1), 0.3), "between the 8-bit levels"),
    "half precision": (lambda pixels: pixels.half(), "gives torch.float16"),
    "coarse": (lambda pixels: (pixels * 8).round(), "gives two levels one value"),
    "one channel": (lambda pixels: pixels[:1], r"gives pixels of shape \(1, 48, 48\)"),
    "framed": (lambda pixels: torch.nn.functional.pad(pixels, (1, 1)), "even image into an uneven"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_preprocessing_that_cannot_be_kept_exactly_is_refused(
    name: str, files: Files, tiny: OpenClipEncoder, tmp_path: Path
):
    change, message = INEXACT[name]
    reader = PixelReader(lambda image: change(tiny.preprocess(image)))
    with pytest.raises(DataError, match=f"{message}.*Leave --data.cache-images out"):
        cached(reader, [files], tmp_path)


def test_levels_are_exact_for_any_normalisation():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, SHAPE, generator=generator, dtype=torch.uint8)
    mean, std = torch.tensor([0.48, 0.45, 0.4])[:, None, None], 0.27
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())

    def preprocess(drawn: Image.Image) -> Tensor:
        shown = torch.from_numpy(np.array(drawn.resize((48, 48)))).permute(2, 0, 1)
        return shown.float().div(255).sub(mean).div(std)

    levels = Levels.of(preprocess)
    assert levels.size == (48, 48)
    assert np.array_equal(levels.encode(preprocess(picture), "x"), image.numpy())
    assert torch.equal(levels.decode(image.numpy()), preprocess(picture))


@pytest.fixture
def config(tiny_name: str, table: Path, tmp_path: Path) -> RefineConfig:
    classes = tmp_path / "classes"
    for name, colour in (("red", "red"), ("blue", "blue")):
        (classes / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (50, 60), colour).save(classes / name / f"{number}.png")
    return RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "data": {"train": str(table), "val": str(table), "cache_folder": tmp_path / "cache"},
            "train": {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "epochs": 2},
            "evaluation": {"zero_shot": [str(classes)]},
            "out": tmp_path / "plain",
        }
    )


def test_a_run_with_the_cache_is_the_run_without(
    config: RefineConfig, tmp_path: Path, decoded: list[str]
):
    def steps(folder: Path) -> list[dict[str, float]]:
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines]

    plain = refine(config)
    with_cache = override(config, data={"cache_images": True}, out=tmp_path / "cached")
    scores = refine(with_cache)
    assert len(decoded) == 64 + 2  # training and held-out images are the same, the classes' twins
    assert scores.after == plain.after
    assert scores.before == plain.before
    assert steps(tmp_path / "cached") == steps(tmp_path / "plain")
    assert len(steps(tmp_path / "plain")) == 8
    decoded.clear()
    settings = {"model": config.model, "data": with_cache.data, "evaluation": config.evaluation}
    assert evaluate(EvaluateConfig(**settings)).retrieval == plain.before.retrieval
    assert decoded == []
