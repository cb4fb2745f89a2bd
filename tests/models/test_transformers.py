"""Transformers and sentence-transformers folders: in, refined, out."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from clip_refine.config import ModelConfig
from clip_refine.config.runs import RefineConfig
from clip_refine.models import DualEncoder, Teacher, load_transformers
from clip_refine.roads import build
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ModelError
from clip_refine.toy import ToyPairs
from tests.conftest import needs
from tests.models import tiny_transformers as tiny

needs("transformers", "hf")
TEXTS = ["a red circle", "A small blue star in the upper left on a white background", "dog"]
WRITERS = {
    "clip": tiny.write_clip,
    "siglip": tiny.write_siglip,
    "chinese-clip": tiny.write_chinese_clip,
    "sentence-clip": tiny.write_sentence_clip,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return {kind: write(base / kind) for kind, write in WRITERS.items()}


@pytest.fixture
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40, 60, 3), (32, 32, 3), (90, 33, 3)]
    return [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def stock_features(folder: Path, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a Transformers user computes, written as its documentation has it."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    padding = (
        {"padding": "max_length", "max_length": 16}
        if model.config.model_type == "siglip"
        else {"padding": True}
    )
    text = processor.tokenizer(TEXTS, truncation=True, return_tensors="pt", **padding)
    with torch.no_grad():
        return (
            model.get_image_features(
                **processor.image_processor(images=images, return_tensors="pt")
            ).pooler_output,
            model.get_text_features(**text).pooler_output,
        )


def our_features(
    model: DualEncoder, images: list[Image.Image]
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(image) for image in images])
        return model.encode_image(pixels), model.encode_text(model.tokenizer(TEXTS))


@pytest.mark.parametrize("kind", WRITERS)
def test_features_are_stock_transformers(folders, images, kind: str):
    folder = folders[kind]
    model = load_transformers(str(folder))
    assert isinstance(model, DualEncoder)
    assert not any(module.training for module in model.modules())
    inner = folder / "0_CLIPModel" if kind == "sentence-clip" else folder
    for ours, stock in zip(our_features(model, images), stock_features(inner, images), strict=True):
        assert torch.allclose(ours, stock, atol=1e-5)


def test_pixels_are_the_image_processors_own(folders, images):
    from transformers import AutoImageProcessor

    stock = AutoImageProcessor.from_pretrained(folders["clip"])
    model = load_transformers(str(folders["clip"]))
    for image in images:
        pixels = stock(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(model.preprocess(image), pixels)
        assert pixels.shape == (3, tiny.SIZE, tiny.SIZE)


def test_text_is_cut_only_where_that_is_exact(folders):
    shapes = {}
    for kind in WRITERS:
        model = load_transformers(str(folders[kind]))
        shapes[kind] = tuple(model.tokenizer(["a dog", "dog"]).shape)
        long = model.tokenizer(["word " * 200])
        assert long.shape[1] == model.tokenizer.context_length
        assert model.encode_text(long).isfinite().all()
    # SigLIP's tower looks at its padding
    assert shapes == {
        "clip": (2, 8),
        "siglip": (2, 16),
        "chinese-clip": (2, 8),
        "sentence-clip": (2, 8),
    }


def test_a_padded_text_has_the_features_it_has_alone(folders):
    for kind in WRITERS:
        model = load_transformers(str(folders[kind]))
        together = model.encode_text(model.tokenizer(TEXTS))
        alone = torch.cat([model.encode_text(model.tokenizer([text])) for text in TEXTS])
        assert torch.allclose(together, alone, atol=1e-5)


def test_scale_and_bias(folders):
    clip, siglip = (load_transformers(str(folders[kind])) for kind in ("clip", "siglip"))
    assert float(clip.logit_scale.detach()) == pytest.approx(1 / 0.07, rel=1e-3)
    assert clip.logit_bias is None
    assert float(siglip.logit_scale.detach()) == pytest.approx(np.exp(2.0))
    assert siglip.logit_bias is not None
    assert siglip.logit_scale.shape == siglip.logit_bias.shape == ()
    assert float(siglip.logit_bias.detach()) == -10


@pytest.mark.parametrize("kind", WRITERS)
def test_folder_to_refined_folder(
    folders, images, kind: str, tmp_path: Path, pairs: ToyPairs, held_out: ToyPairs
):
    config = RefineConfig.model_validate(
        {
            "model": {"name": str(folders[kind])},
            "train": {"batch_size": 32, "learning_rate": 1e-3, "precision": "fp32"},
            "out": tmp_path / "run",
        }
    )
    scores = refine(config, train_pairs=pairs, held_out=held_out)
    assert scores.recipe["steps"] == 2
    refined = build.build_model(ModelConfig(name=str(tmp_path / "run")))  # the run's own folder
    base = load_transformers(str(folders[kind]))
    saved = tmp_path / "run" / "model"
    inner = saved / "0_CLIPModel" if kind == "sentence-clip" else saved
    stock = stock_features(inner, images)
    for ours, theirs, before in zip(
        our_features(refined, images), stock, our_features(base, images), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(ours, before, atol=1e-3)
    with safe_open(inner / "model.safetensors", "pt") as file:
        assert file.metadata()["base_model"] == folders[kind].name


@pytest.mark.parametrize("kind", ["clip", "sentence-clip"])
def test_sentence_transformers_loads_what_was_saved(folders, images, kind: str, tmp_path: Path):
    sentence_transformers = needs("sentence_transformers", "hf")
    model = load_transformers(str(folders[kind]))
    with torch.no_grad():
        model.model.text_projection.weight.mul_(1.5)
    model.save(tmp_path / "saved", metadata={"recipe": "test"})
    stock = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    image_features, text_features = our_features(model, images)
    encoded = [
        torch.from_numpy(stock.encode(items, show_progress_bar=False)) for items in (images, TEXTS)
    ]
    assert torch.allclose(encoded[0], image_features, atol=1e-5)
    assert torch.allclose(encoded[1], text_features, atol=1e-5)


def test_the_small_files_of_a_sentence_transformers_folder_are_kept(folders, tmp_path: Path):
    load_transformers(str(folders["sentence-clip"])).save(tmp_path)
    for name in ("modules.json", "config_sentence_transformers.json"):
        assert (tmp_path / name).read_bytes() == (folders["sentence-clip"] / name).read_bytes()


def test_a_teacher_is_a_copy(folders):
    model = load_transformers(str(folders["clip"]))
    teacher = Teacher(model)
    tokens = model.tokenizer(TEXTS)
    before = teacher.encode_text(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(teacher.encode_text(tokens), before)


def copy_with(folder: Path, out: Path, name: str, **changes: object) -> Path:
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    content = json.loads((out / name).read_text())
    (out / name).write_text(json.dumps({**content, **changes}))
    return out


def test_what_cannot_be_loaded(folders, tmp_path: Path):
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    clip = folders["clip"]
    remote = copy_with(
        clip, tmp_path / "remote", "config.json", model_type="mine", auto_map={"AutoConfig": "x.Y"}
    )
    other = copy_with(clip, tmp_path / "other", "config.json", projection_dim=8)
    missing = copy_with(clip, tmp_path / "missing", "config.json")
    (missing / "tokenizer.json").unlink()
    (missing / "tokenizer_config.json").unlink()
    naflex = copy_with(clip, tmp_path / "naflex", "config.json", model_type="siglip2")
    for folder, message in {
        tmp_path / "vit": "a vit model is no dual encoder: it has no get_image_features",
        remote: "code in its own folder, which is never run",
        other: "weights of CLIPModel are missing or do not fit|could not be loaded",
        missing: "its tokenizer knows 2 tokens, its text tower 49408",
        naflex: "NaFlex",
    }.items():
        with pytest.raises(ModelError, match=message):
            build.build_model(ModelConfig(name=str(folder)))
    with pytest.raises(ModelError, match="If there is no network here"):
        build.build_model(ModelConfig(name="transformers:nobody/nothing"))


def test_weights_that_are_not_all_there(folders, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = copy_with(folders["clip"], tmp_path / "part", "config.json")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of CLIPModel are missing.*text_projection"):
        load_transformers(str(folder))
