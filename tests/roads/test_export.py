"""Runs in the formats of other libraries, loaded there without any of our code."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from clip_refine.cli import main
from clip_refine.config import ModelConfig
from clip_refine.config.runs import RefineConfig
from clip_refine.models import load_transformers
from clip_refine.models.open_clip import load_open_clip
from clip_refine.roads import export as road
from clip_refine.roads.export import FORMATS, Encoders, compare_features, export
from clip_refine.roads.refine import refine
from clip_refine.roads.vector_maps import fold_vectors
from clip_refine.support.errors import ModelError
from clip_refine.toy import ToyPairs
from clip_refine.vectors.files import save_peer
from clip_refine.vectors.maps import LinearMaps
from tests.models.tiny_transformers import SIZE, write_clip

CAPTIONS = ["a red circle", "Two small blue stars!", "word " * 100]


@pytest.fixture(scope="module")
def images(held_out: ToyPairs) -> list[Image.Image]:
    return [held_out.load_image(index) for index in range(3)]


def refined(model: str, folder: Path, pairs: ToyPairs, held_out: ToyPairs) -> Path:
    config = RefineConfig.model_validate(
        {
            "model": {"name": model},
            "train": {"batch_size": 32, "learning_rate": 1e-3, "precision": "fp32"},
            "loss": {"feature_scale": "as-is"},
            "out": folder,
        }
    )
    refine(config, train_pairs=pairs, held_out=held_out)
    return folder


@pytest.fixture(scope="module")
def run(tiny_name: str, pairs, held_out, tmp_path_factory) -> Path:
    """An open_clip model, refined."""
    return refined(tiny_name, tmp_path_factory.mktemp("runs") / "ours", pairs, held_out)


@pytest.fixture(scope="module")
def transformers_run(pairs, held_out, tmp_path_factory) -> Path:
    """A Transformers model, refined."""
    base = write_clip(tmp_path_factory.mktemp("base") / "tiny-clip")
    return refined(str(base), tmp_path_factory.mktemp("runs") / "theirs", pairs, held_out)


@torch.no_grad()
def features(model, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.stack([model.preprocess(image) for image in images])
    return model.encode_image(pixels), model.encode_text(model.tokenizer(CAPTIONS))


@torch.no_grad()
def in_open_clip(folder: Path, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    name = f"local-dir:{folder}"
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    clip.eval()
    pixels = torch.stack([preprocess(image) for image in images])
    return clip.encode_image(pixels), clip.encode_text(open_clip.get_tokenizer(name)(CAPTIONS))


@torch.no_grad()
def in_transformers(folder: Path, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    model.eval()
    pixels = processor(images=images, return_tensors="pt")
    tokens = processor(text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    return (
        model.get_image_features(**pixels).pooler_output,
        model.get_text_features(**tokens).pooler_output,
    )


def in_sentence_transformers(folder: Path, images: list[Image.Image]):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(images, convert_to_tensor=True), model.encode(
        CAPTIONS, convert_to_tensor=True
    )


def assert_same(found, expected, tolerance: float = 1e-5) -> None:
    for theirs, ours in zip(found, expected, strict=True):
        assert (theirs - ours).abs().max() <= tolerance * max(1.0, float(ours.abs().max()))


def test_open_clip_refine_open_clip(run: Path, tiny_name: str, images):
    after = in_open_clip(run / "model", images)
    assert_same(after, features(load_open_clip(f"local-dir:{run / 'model'}"), images), 1e-6)
    before = in_open_clip(Path(tiny_name.removeprefix("local-dir:")), images)
    assert (after[0] - before[0]).abs().max() > 1e-3  # it was refined


@pytest.mark.parametrize("kind", FORMATS)
def test_an_open_clip_run_for_every_library(run: Path, kind: str, tmp_path: Path, images, capsys):
    out = tmp_path / "exported"
    main(["export", str(run), "--to", kind, "--out", str(out)])
    said = capsys.readouterr().out
    assert re.search(r"differ by at most \de-\d\d|differ by at most \d\.\de[-+]\d\d", said)
    assert "on 16 pairs of drawn pairs" in said  # pairs that were passed as objects are gone
    expected = features(load_open_clip(f"local-dir:{run / 'model'}"), images)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Before and after" in card
    match kind:
        case "open_clip":
            assert_same(in_open_clip(out, images), expected)
        case "transformers":
            assert_same(in_transformers(out, images), expected)
            assert "from transformers import" in card
            assert_same(features(load_transformers(str(out)), images), expected)
        case "sentence-transformers":
            assert_same(in_sentence_transformers(out, images), expected)
            assert_same(in_transformers(out, images), expected)  # the same folder
        case _:
            assert_same(in_onnxruntime(out, images), expected, 1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folded_model_gives_mapped_features_in_every_library(
    kind: str, tiny_name: str, tmp_path: Path, images
):
    before = features(load_open_clip(tiny_name), images)
    generator = torch.Generator().manual_seed(0)
    dim = before[0].shape[1]
    maps = LinearMaps(*(torch.eye(dim) + torch.randn(2, dim, dim, generator=generator) / 4), 1, 1)
    save_peer(maps, tmp_path / "maps")
    fold_vectors(tmp_path / "maps", ModelConfig(name=tiny_name), tmp_path / "model")
    out = tmp_path / "exported"
    export(str(tmp_path / "model"), to=kind, out=out)
    libraries = (in_open_clip, in_transformers, in_sentence_transformers, in_onnxruntime)
    found = dict(zip(FORMATS, libraries, strict=True))[kind](out, images)
    for theirs, raw, matrix in zip(found, before, (maps.image_map, maps.text_map), strict=True):
        mapped = raw.double() @ matrix.double().T
        assert (theirs - mapped).norm() <= 1e-6 * mapped.norm()


def test_an_export_may_be_replaced_and_its_numbers_are_json(run: Path, tmp_path: Path, capsys):
    out = tmp_path / "exported"
    check = asdict(export(str(run), to="transformers", out=out))
    again = ["--to", "transformers", "--out", str(out), "--overwrite", "--json"]
    main(["export", str(run / "model"), *again])
    assert json.loads(capsys.readouterr().out) == {**check, "out": str(out)}


def in_onnxruntime(folder: Path, images: list[Image.Image]):
    from onnxruntime import InferenceSession
    from transformers import AutoTokenizer

    settings = json.loads((folder / "onnx_config.json").read_text())
    shape = settings["image"]["preprocessing"]["open_clip"]
    preprocess = open_clip.image_transform(
        shape["size"], is_train=False, mean=shape["mean"], std=shape["std"]
    )
    pixels = np.stack([preprocess(image).numpy() for image in images])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = settings["text"]["shape"][1]
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length)
    image_tower = InferenceSession(folder / settings["image"]["file"])
    text_tower = InferenceSession(folder / settings["text"]["file"])
    tokens = np.array(ids["input_ids"], dtype=np.int64)
    one = text_tower.run(None, {"input_ids": tokens[:1]})[0]  # any batch
    texts = text_tower.run(None, {"input_ids": tokens})[0]
    assert np.allclose(one[0], texts[0], atol=1e-5)
    return torch.from_numpy(image_tower.run(None, {"pixel_values": pixels})[0]), torch.from_numpy(
        texts
    )


@pytest.fixture(scope="module")
def small_images(images) -> list[Image.Image]:
    """Of the model's own size: the two libraries' bicubic filters round a few pixels otherwise."""
    return [image.resize((SIZE, SIZE)) for image in images]


def test_a_transformers_run_is_saved_for_both_libraries(transformers_run: Path, small_images):
    images = small_images
    folder = transformers_run / "model"
    theirs = in_transformers(folder, images)
    assert_same(in_sentence_transformers(folder, images), theirs)
    assert_same(in_open_clip(folder, images), theirs)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "with transformers" in card
    assert "with open\\_clip" in card
    headers = []
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        with safe_open(folder / name, "pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]


@pytest.mark.parametrize("kind", ["open_clip", "transformers", "sentence-transformers"])
def test_a_transformers_run_for_every_library(
    transformers_run: Path, kind: str, tmp_path: Path, small_images
):
    images = small_images
    out = tmp_path / "exported"
    check = export(str(transformers_run), to=kind, out=out)
    assert check.passed
    expected = in_transformers(transformers_run / "model", images)
    load = {
        "open_clip": in_open_clip,
        "transformers": in_transformers,
        "sentence-transformers": in_sentence_transformers,
    }
    assert_same(load[kind](out, images), expected)


def test_the_weights_say_where_they_come_from(run: Path, tiny_name: str):
    scores = json.loads((run / "scores.json").read_text())
    stated = scores["recipe"]["provenance"]
    assert stated == json.loads((run / "model" / "provenance.json").read_text())
    with safe_open(run / "model" / "open_clip_model.safetensors", "pt") as file:
        header = file.metadata()
    assert header["base_model"] == Path(tiny_name).name
    assert header["recipe"] == scores["recipe"]["name"] == "clip-refine"
    assert header["clip_refine_version"] == stated["version"]
    assert header["data_fingerprint"] == stated["train"]["fingerprint"]
    assert str(Path(tiny_name).parent) not in json.dumps(header) + json.dumps(stated)


def test_the_sample_is_the_runs_held_out_pairs(table: Path, tiny_name: str, tmp_path: Path):
    data = ("--data.train", str(table), "--data.val", str(table), "--train.batch-size", "32")
    main(["refine", "--model.name", tiny_name, *data, "--out", str(tmp_path / "run")])
    check = export(str(tmp_path / "run"), to="transformers", out=tmp_path / "hf")
    assert (check.pairs, check.count) == ("captions.csv", 16)
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "Refined on captions.csv: 64 images, 192 captions" in card
    assert str(tmp_path) not in card


def test_a_difference_is_refused_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch, capsys):
    def shifted(folder: Path, kind: str, model) -> Encoders:
        source = load_open_clip(f"local-dir:{run / 'model'}")
        return Encoders(
            lambda these: features(source, these)[0],
            lambda texts: source.encode_text(source.tokenizer(texts)) + 1e-3,
        )

    monkeypatch.setattr(road, "load_back", shifted)
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["export", str(run), "--to", "transformers", "--out", str(out)])
    assert re.search(r"other features than .*\(images\) and .*e-0\d \(texts\)", read_error(capsys))
    assert list(tmp_path.iterdir()) == []


def read_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_features_that_are_no_numbers_do_not_pass(tiny, pairs: ToyPairs):
    nothing = Encoders(
        lambda these: torch.full((len(these), 16), torch.nan),
        lambda texts: torch.full((len(texts), 16), torch.nan),
    )
    assert not compare_features(tiny, nothing, pairs, tolerance=1.0).passed


def test_a_timm_tower_goes_to_onnx_only(shared: Path, tmp_path: Path):
    folder = shared / "models" / "photo-clip"
    if not folder.is_dir():
        pytest.skip("../shared/models/photo-clip is not on this machine: it is not published")
    with pytest.raises(ModelError, match=r"image tower is timm's tf_efficientnet_lite0.*--to onnx"):
        export(str(folder), to="transformers", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "onnx"], "nowhere"),
        (["toy", "--to", "onnx", "--out", "."], "exists already"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--out", str(tmp_path / "out"), *arguments])
    assert message in read_error(capsys)


def test_an_untrained_model_is_called_converted(tiny_name: str, tmp_path: Path):
    export(tiny_name, to="transformers", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "the weights were not trained" in card
    assert "Before and after" not in card
