"""Runs in the formats of other libraries, loaded there without any of our code."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from clip_refine.cli import main
from clip_refine.config import ModelConfig, named_model
from clip_refine.config.runs import RefineConfig
from clip_refine.models import load_transformers
from clip_refine.models.open_clip import load_open_clip
from clip_refine.results import BaseModelFacts, FitProbability, Provenance, read
from clip_refine.roads import export as road
from clip_refine.roads.export import FORMATS, Encoders, _push, compare_features, export
from clip_refine.roads.refine import refine
from clip_refine.roads.vector_maps import fold_vectors
from clip_refine.saving import onnx as onnx_files
from clip_refine.saving import save_model
from clip_refine.support.errors import ConfigError, FailedError, ModelError
from clip_refine.toy import ToyPairs
from clip_refine.train.state import tensor_sum
from clip_refine.vectors.files import save_peer
from clip_refine.vectors.transforms import LinearMaps
from tests.conftest import TINY, needs_onnx, write_model
from tests.models.tiny_transformers import (
    SIZE,
    write_chinese_clip,
    write_clip,
    write_sentence_clip,
    write_siglip,
)

CAPTIONS = ["a red circle", "Two small blue stars!", "word " * 100]
PETS = ["a photo of a dog", "a photo of a cat"]
every_library = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=needs_onnx if kind == "onnx" else ())
        for kind in FORMATS
        if kind != "immich"
    ],
)


def code_blocks(folder: Path, language: str) -> list[str]:
    """The lines that a model's card shows in one language, block by block."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


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


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """What PyTorch traces of one tower with the same weights is the same: four seconds each."""
    export, made = torch.onnx.export, {}

    def as_before(tower: Any, inputs: tuple[torch.Tensor], **named: Any) -> Any:
        weights = tensor_sum(tower.state_dict().values())
        key = (weights, tower.method, tower.unit, inputs[0].shape, inputs[0].dtype)
        if key not in made:
            made[key] = export(tower, inputs, **named)
        return made[key]

    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(torch.onnx, "export", as_before)
        yield


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


@every_library
def test_an_open_clip_run_for_every_library(
    run: Path, kind: str, tmp_path: Path, images, capsys, monkeypatch
):
    out = tmp_path / "exported"
    main(["export", str(run), "--to", kind, "--out", str(out)])
    said = capsys.readouterr().out
    assert re.search(r"in no dimension by more than \d\.\de[-+]\d\d \(images\)", said)
    assert "on 16 pairs of drawn pairs" in said  # pairs that were passed as objects are gone
    expected = features(load_open_clip(f"local-dir:{run / 'model'}"), images)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Before and after" in card
    source = load_open_clip(f"local-dir:{run / 'model'}")
    run_the_cards_lines(out, source, images[0], monkeypatch)
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


@torch.no_grad()
def run_the_cards_lines(folder: Path, source: Any, image: Image.Image, monkeypatch) -> list[str]:
    """As they stand, with the source's features; other people's programs in tests/parity."""
    monkeypatch.chdir(folder)
    image.save("photo.jpg", quality=100)
    shown = source.preprocess(Image.open("photo.jpg").convert("RGB")).unsqueeze(0)
    expected = (source.encode_image(shown), source.encode_text(source.tokenizer(PETS)))
    blocks = [block for block in code_blocks(folder, "python") if "import mteb" not in block]
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        found = (names["image_features"], names["text_features"])
        for theirs, ours in zip(map(torch.as_tensor, found), expected, strict=True):
            assert (theirs.norm(dim=1) - 1).abs().max() < 1e-5
            assert torch.cosine_similarity(theirs, ours.expand_as(theirs)).min() > 0.999
    return blocks


@pytest.mark.parametrize(
    "write", [write_clip, write_siglip, write_chinese_clip, write_sentence_clip]
)
def test_the_card_of_a_saved_transformers_model_runs(
    write: Any, tmp_path: Path, small_images, monkeypatch
):
    source = load_transformers(str(write(tmp_path / "base")))
    base = BaseModelFacts(name="tiny")
    save_model(source, tmp_path / "model", Provenance(version="1", made="refined", base=base))
    run_the_cards_lines(tmp_path / "model", source, small_images[0], monkeypatch)


@needs_onnx
def test_an_onnx_card_pads_as_a_text_tower_was_trained_that_sees_padding(
    tmp_path: Path, images, monkeypatch
):
    """Of CLIP's tokenizer with a token more, too."""
    from transformers import AutoTokenizer

    more = {"no_causal_mask": True, "vocab_size": 49409}
    text = {
        **TINY["text_cfg"],
        **more,
        "tokenizer_kwargs": {"additional_special_tokens": ["<box>"]},
    }
    name = write_model(tmp_path / "base", {**TINY, "text_cfg": text, "custom_text": True})
    export(name, to="onnx", out=tmp_path / "out")
    source = load_open_clip(name)
    run_the_cards_lines(tmp_path / "out", source, images[0], monkeypatch)
    ids = AutoTokenizer.from_pretrained(".")("a <box> of cats")["input_ids"]
    assert ids == source.full_length_tokenizer("a <box> of cats")[0][: len(ids)].tolist()
    assert 49408 in ids


@every_library
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
    found = dict(zip(FORMATS, libraries, strict=False))[kind](out, images)
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
    assert "With transformers" in card
    assert "With open\\_clip" in card
    headers = []
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        with safe_open(folder / name, "pt") as file:
            headers.append(file.metadata())
    sums = [header.pop("clip_refine_sha256") for header in headers]
    assert sums[0] != sums[1]  # of each file itself; all else is the same
    assert headers[0] == headers[1]


@pytest.mark.parametrize("kind", ["open_clip", "transformers", "sentence-transformers"])
def test_a_transformers_run_for_every_library(
    transformers_run: Path, kind: str, tmp_path: Path, small_images, monkeypatch
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
    source = load_transformers(str(transformers_run / "model"))
    run_the_cards_lines(out, source, images[0], monkeypatch)


@needs_onnx
def test_an_onnx_card_makes_pixels_that_open_clip_cannot(tmp_path: Path, images, monkeypatch):
    """Resized to 36 and cut to 32, which its settings have no word for."""
    base, out = write_clip(tmp_path / "base"), tmp_path / "out"
    settings = json.loads((base / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"shortest_edge": SIZE + 4}
    (base / "processor_config.json").write_text(json.dumps(settings))
    export(str(base), to="onnx", out=out)
    stated = json.loads((out / "onnx_config.json").read_text())["image"]["preprocessing"]
    assert list(stated) == ["transformers"]
    run_the_cards_lines(out, load_transformers(str(base)), images[0], monkeypatch)


def test_the_weights_say_where_they_come_from(run: Path, tiny_name: str):
    scores = json.loads((run / "scores.json").read_text())
    stated = scores["recipe"]["provenance"]
    beside = json.loads((run / "model" / "provenance.json").read_text())
    for side in ("before", "after", "difference"):
        assert beside["scores"][side] == scores[side]
    assert beside | {"scores": None} == stated
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
        (["toy", "--to", "onnx", "--no-private"], "goes with --push-to-hub YOU/NAME"),
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


@pytest.mark.parametrize("tag", ["openai", "some one/weights.pt"])
def test_a_card_names_no_folder_of_weights(tag: str, tmp_path: Path, monkeypatch):
    """Of `ARCHITECTURE@TAG`, which is no model on the Hub, either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some one").mkdir()
    (tmp_path / "some one" / "weights.pt").touch()
    provenance = road._origin(named_model(f"ViT-B-32@{tag}"), None)
    assert provenance.base.name == f"ViT-B-32 ({Path(tag).name})"
    hub_id = "timm/vit_base_patch32_clip_224.openai"
    assert provenance.base.hub_id == (hub_id if tag == "openai" else None)


@needs_onnx
def test_immich_reads_its_own_layout(run: Path, tmp_path: Path, images, monkeypatch):
    """Only what immich's machine learning reads: its names, 32-bit ids, unit features."""
    from onnxruntime import InferenceSession

    out = tmp_path / "immich"
    export(str(run), to="immich", out=out)
    settings = json.loads((out / "config.json").read_text())
    assert settings["text_cfg"]["context_length"] == 32
    pixels = json.loads((out / "visual" / "preprocess_cfg.json").read_text())
    assert {"size", "mean", "std", "interpolation", "resize_mode"} <= set(pixels)
    assert (out / "textual" / "tokenizer.json").is_file()
    assert "pad_token" in json.loads((out / "textual" / "tokenizer_config.json").read_text())
    visual = InferenceSession(out / "visual" / "model.onnx")
    textual = InferenceSession(out / "textual" / "model.onnx")
    (image_input,), (text_input,) = visual.get_inputs(), textual.get_inputs()
    assert (image_input.name, image_input.type) == ("image", "tensor(float)")
    assert (text_input.name, text_input.type) == ("text", "tensor(int32)")
    source = load_open_clip(f"local-dir:{run / 'model'}")
    expected = features(source, images)
    sized = torch.stack([source.preprocess(image) for image in images]).numpy()
    ids = source.full_length_tokenizer(CAPTIONS).numpy().astype(np.int32)
    found = (visual.run(None, {"image": sized})[0], textual.run(None, {"text": ids})[0])
    for theirs, ours in zip(map(torch.from_numpy, found), expected, strict=True):
        assert (theirs - torch.nn.functional.normalize(ours, dim=1)).abs().max() < 1e-5
    run_the_cards_lines(out, source, images[0], monkeypatch)


def test_immich_takes_no_transformers_model(transformers_run: Path, tmp_path: Path):
    base = transformers_run / "model"
    (base / "open_clip_config.json").rename(base / "aside")
    try:
        with pytest.raises(ModelError, match="--to open_clip, and that folder --to immich"):
            export(str(base), to="immich", out=tmp_path / "out")
    finally:
        (base / "aside").rename(base / "open_clip_config.json")


@needs_onnx
@pytest.mark.parametrize(("precision", "largest"), [("fp16", 1e-3), ("int8", 5e-2)])
def test_smaller_weights_with_their_measured_difference(
    run: Path, precision: str, largest: float, tmp_path: Path
):
    export(str(run), to="onnx", out=tmp_path / "fp32")
    check = export(str(run), to="onnx", precision=precision, out=tmp_path / precision)
    stated = json.loads((tmp_path / precision / "onnx_config.json").read_text())
    assert stated["precision"] == precision
    assert stated["check"]["image_difference"] == check.image_difference
    assert stated["check"]["text_difference"] == check.text_difference
    assert 1e-7 < check.image_difference < largest
    assert (
        json.loads((tmp_path / precision / "provenance.json").read_text())["precision"] == precision
    )
    card = (tmp_path / precision / "README.md").read_text()
    assert f"Weights are stored in {precision}: on {check.count} pairs" in card
    assert f"{check.text_difference:.1e} (texts)" in card
    assert "The scores below are of the model's own" in card
    assert not (tmp_path / precision / "threshold.json").exists()
    assert "Weights are stored" not in (tmp_path / "fp32" / "README.md").read_text()
    text = [(tmp_path / kind / "text.onnx").stat().st_size for kind in ("fp32", precision)]
    assert text[1] < 0.6 * text[0]


@needs_onnx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_weights_beside_the_graph_are_listed_and_needed(
    run: Path, precision: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(onnx_files, "_LARGEST", 0)
    out = tmp_path / "out"
    export(str(run), to="onnx", precision=precision, out=out)
    settings = json.loads((out / "onnx_config.json").read_text())
    assert settings["text"]["external_data"] == ["text.onnx.data"]
    assert {path.name for path in out.glob("*.onnx*")} == {
        "image.onnx",
        "image.onnx.data",
        "text.onnx",
        "text.onnx.data",
    }
    assert "text.onnx.data" in (out / "SHA256SUMS").read_text()
    (out / "text.onnx.data").unlink()
    with pytest.raises(ModelError, match="its weights are in text.onnx.data, which is not beside"):
        onnx_files.external_files(out / "text.onnx")


def test_smaller_weights_are_onnx_only(tmp_path: Path):
    with pytest.raises(ConfigError, match="--precision int8: not with --to transformers"):
        export("toy", to="transformers", precision="int8", out=tmp_path / "out")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload asks for; files go to `Hub.files`."""

    files: dict[str, bytes]
    asked: list[str]
    refuses = False

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        body, here = self.body(), f"http://{self.headers['Host']}"
        self.asked.append(f"{self.headers.get('Authorization')} {self.path}")
        if self.refuses:
            self.answer({"error": "You have no right to this"}, status=403)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{here}/you/model", "id": "you/model"})
        elif "/preupload/" in self.path:
            large = ".safetensors"
            self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{here}/lfs/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    stored = self.files.pop(line["value"]["oid"])
                    self.files[line["value"]["path"]] = stored
            self.answer({"commitUrl": f"{here}/you/model/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"error": self.path}, status=404)

    def do_PUT(self) -> None:
        self.files[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.answer({"siblings": [], "id": "you/model"}, status=200)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "files", {}, raising=False)
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def push(run: Path, out: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """By the command line, since the Hub's address is read when Python starts."""
    command = ("export", run, "--to", "open_clip", "--push-to-hub", "you/model", "--out", out)
    # its own storage protocol is not stood in for, only the plain one
    plain = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    set_ = {**os.environ, **plain, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_1"}
    return subprocess.run(
        [sys.executable, "-m", "clip_refine", *map(str, command)],
        env=set_,
        capture_output=True,
        text=True,
    )


def test_what_goes_to_the_hub(run: Path, hub: str, tmp_path: Path):
    out = tmp_path / "out"
    ran = push(run, out, hub)
    assert ran.returncode == 0, ran.stderr
    assert "you/model on the Hub" in ran.stdout
    inside = [path for path in out.rglob("*") if path.is_file()]
    kept = {str(path.relative_to(out)): path.read_bytes() for path in inside}
    assert Hub.files == kept
    assert {"README.md", "provenance.json", "open_clip_model.safetensors"} <= set(kept)
    assert "hf download you/model" in (out / "README.md").read_text(encoding="utf-8")
    assert all(line.startswith("Bearer hf_1 ") for line in Hub.asked if "/api/repos" in line)


def test_what_the_hub_refuses_is_said(run: Path, hub: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Hub, "refuses", True)
    ran = push(run, tmp_path / "out", hub)
    assert ran.returncode == 1
    assert "you/model: the Hub did not take it (" in ran.stderr
    assert "tries again." in ran.stderr
    assert (tmp_path / "out" / "README.md").is_file()


def test_whatever_an_upload_fails_by_is_said_with_where_the_export_is(tmp_path: Path, monkeypatch):
    class ConnectError(Exception):  # of the HTTP library of the day
        pass

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(FailedError, match=r"not take it \(Name or service .* export is in .*here;"):
        _push(tmp_path / "here", "you/model", private=False)


def test_who_may_push_is_asked_first(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for name, message in (("you/model", "needs a token"), ("a/b/c", "--push-to-hub a/b/c: ")):
        with pytest.raises(ConfigError, match=message):
            export("toy", to="open_clip", out=tmp_path / "out", push_to_hub=name)
    assert not (tmp_path / "out").exists()


def test_an_export_of_an_export_keeps_what_was_measured(run: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    with_threshold = shutil.copytree(run, tmp_path / "run")
    fit = FitProbability(
        slope=20.0,
        intercept=-5.0,
        calibration_error=0.1,
        reliability=(),
        cutoffs={},
        images=(20, 20),
        nonsense=0,
    )
    fit.write(with_threshold / "model" / "threshold.json")
    export(str(with_threshold), to="open_clip", out=first)
    export(f"local-dir:{first}", to="open_clip", out=second)
    for folder in (first, second):
        card = (folder / "README.md").read_text()
        assert "## Before and after" in card
        assert "| image to text R@1 |" in card
        assert read(FitProbability, folder / "threshold.json") == fit
    assert str(run) not in (second / "provenance.json").read_text()
