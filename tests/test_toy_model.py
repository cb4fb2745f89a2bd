import dataclasses
import json

import open_clip
import pytest
import torch
from safetensors import safe_open
from tools.pretrain_toy import PretrainConfig, images_of, model_config, pixels_of

from clip_refine.toy import ToyClasses, ToyPairs, model_directory

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def packaged():
    name = f"local-dir:{model_directory()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def test_files_are_small_and_in_half_precision():
    assert sum(file.stat().st_size for file in model_directory().iterdir()) <= 12e6
    with safe_open(model_directory() / "open_clip_model.safetensors", "pt") as weights:
        kinds = {name: weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
        metadata = weights.metadata()
    # the file names the script as it was called then; its settings are still the script's own
    assert metadata["made_by"] == "python -m clip_refine.toy.pretrain"
    assert json.loads(metadata["config"]) == dataclasses.asdict(PretrainConfig())
    assert kinds.pop("logit_scale") == torch.float32
    assert set(kinds.values()) == {torch.float16}


def test_architecture_is_what_the_script_makes():
    saved = json.loads((model_directory() / "open_clip_config.json").read_text(encoding="utf-8"))
    assert saved == model_config(PretrainConfig().embed_dim)


def test_logit_scale_is_exactly_100(packaged):
    model, _, _ = packaged
    assert model.logit_scale.exp().item() == pytest.approx(100, abs=1e-4)


@torch.no_grad()
def test_zero_shot_over_64_classes(packaged):
    model, preprocess, tokenizer = packaged
    task = ToyClasses("toy_colour_shape", 320)
    pixels = torch.stack([preprocess(task.load_image(index)) for index in range(len(task))])
    assert pixels.shape == (320, 3, 48, 48)
    prompts = tokenizer([task.templates[0].format(name) for name in task.class_names])
    class_unit = model.encode_text(prompts, normalize=True)
    guesses = (model.encode_image(pixels) @ class_unit.T).argmax(dim=1)
    assert (guesses == torch.tensor(task.labels)).float().mean() >= 0.5


@torch.no_grad()
def test_raw_norms_and_gap_are_those_of_a_real_clip(packaged):
    """Raw norms near 10 are what makes CLIP-Refine's similarities sharp; the gap is its subject."""
    model, preprocess, tokenizer = packaged
    pairs = ToyPairs("val", 256)
    pixels = torch.stack([preprocess(pairs.load_image(index)) for index in range(len(pairs))])
    image_features = model.encode_image(pixels)
    text_features = model.encode_text(tokenizer([texts[0] for texts in pairs.captions]))
    assert image_features.norm(dim=1).mean() == pytest.approx(10, abs=0.2)
    assert text_features.norm(dim=1).mean() == pytest.approx(10, abs=0.2)
    image_unit = torch.nn.functional.normalize(image_features)
    text_unit = torch.nn.functional.normalize(text_features)
    assert 0.8 <= (image_unit.mean(dim=0) - text_unit.mean(dim=0)).norm() <= 1.3


@torch.no_grad()
def test_quick_pixels_are_those_of_the_models_own_preprocessing(packaged):
    """Pre-training turns whole arrays into pixels; it must be what users of the model get."""
    _, preprocess, _ = packaged
    pairs = ToyPairs("val", 5)
    expected = torch.stack([preprocess(pairs.load_image(index)) for index in range(5)])
    torch.testing.assert_close(pixels_of(images_of(pairs)), expected)
