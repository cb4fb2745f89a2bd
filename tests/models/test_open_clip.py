"""Loading, encoding and saving open_clip models."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cosine_similarity

from clip_refine.models import DualEncoder, OpenClipEncoder, Teacher, load_open_clip
from clip_refine.models.open_clip import text_tower
from clip_refine.support.errors import ModelError
from tests.conftest import TINY, write_model

TEXTS = ["a red circle", "a small blue star in the upper left on a white background", "dog"]
CUSTOM = {**TINY, "custom_text": True}
EOS_POOLED = {
    **CUSTOM,
    "text_cfg": {**TINY["text_cfg"], "pool_type": "eos", "eos_id": 49407, "proj_bias": True},
}
NOT_CAUSAL = {**CUSTOM, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": True}}
LAST_POOLED = {**CUSTOM, "text_cfg": {**TINY["text_cfg"], "pool_type": "last"}}
CLASS_TOKEN = {**CUSTOM, "text_cfg": {**TINY["text_cfg"], "embed_cls": True}}


def encoder(folder: Path, config: dict) -> OpenClipEncoder:
    return load_open_clip(write_model(folder, config))


def test_it_is_a_dual_encoder_in_evaluation_mode(tiny: OpenClipEncoder):
    assert isinstance(tiny, DualEncoder)
    assert not any(module.training for module in tiny.modules())


def test_features_are_stock_open_clips(tiny: OpenClipEncoder, tiny_name: str):
    stock, _, _ = open_clip.create_model_and_transforms(tiny_name)
    stock.eval()
    pixels = torch.randn(2, 3, 48, 48)
    tokens = open_clip.get_tokenizer(tiny_name)(TEXTS)
    assert torch.equal(tiny.encode_image(pixels), stock.encode_image(pixels))
    assert torch.allclose(
        tiny.encode_text(tiny.tokenizer(TEXTS)), stock.encode_text(tokens), atol=1e-6
    )
    assert float(tiny.logit_scale.detach()) == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.parametrize("config", [TINY, CUSTOM, EOS_POOLED])
def test_text_is_cut_where_that_is_exact(tmp_path: Path, config: dict):
    model = encoder(tmp_path, config)
    assert model.text_cut is not None
    tokens, full = model.tokenizer(TEXTS), model.full_length_tokenizer(TEXTS)
    assert tokens.shape == (3, 16)  # 13 tokens, rounded up to a multiple of 8
    assert torch.allclose(model.encode_text(tokens), model.clip.encode_text(full), atol=1e-6)
    assert torch.allclose(model.encode_text(full), model.clip.encode_text(full), atol=1e-6)


def test_gradients_are_the_same_with_and_without_the_cut(tiny: OpenClipEncoder):
    gradients = []
    for tokens, encode in (
        (tiny.tokenizer(TEXTS), tiny.encode_text),
        (tiny.full_length_tokenizer(TEXTS), tiny.clip.encode_text),
    ):
        tiny.zero_grad()
        encode(tokens).square().sum().backward()
        tower = text_tower(tiny.clip)
        gradients.append(tower.positional_embedding.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("config", [NOT_CAUSAL, LAST_POOLED, CLASS_TOKEN])
def test_text_keeps_its_length_where_a_cut_would_change_features(tmp_path: Path, config: dict):
    model = encoder(tmp_path, config)
    assert model.text_cut is None
    assert model.tokenizer(TEXTS).shape == (3, 32)
    assert model.encode_text(model.tokenizer(TEXTS)).shape == (3, 16)


def test_a_cut_that_open_clip_no_longer_allows_is_given_up_and_said(
    tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As a version of it would that looks at the last place, or pads in front."""
    encode = open_clip.CLIP.encode_text
    monkeypatch.setattr(
        open_clip.CLIP,
        "encode_text",
        lambda self, text, normalize=False: encode(self, text, normalize) * text.shape[1],
    )
    other = OpenClipEncoder(
        tiny.clip, tiny.preprocess, tiny.full_length_tokenizer, tiny.model_config
    )
    assert other.text_cut is None
    assert other.tokenizer(TEXTS).shape == (3, 32)
    assert "Texts are encoded at their full length of 32 tokens" in capsys.readouterr().err


def test_an_end_that_is_also_the_padding_is_kept(tiny: OpenClipEncoder):
    """As in Transformers' CLIP tokenizers, where nothing but the first end tells the end."""

    def padded(texts: list[str]) -> torch.Tensor:
        tokens = tiny.full_length_tokenizer(texts)
        return torch.where(tokens == 0, 49407, tokens)

    other = OpenClipEncoder(tiny.clip, tiny.preprocess, padded, tiny.model_config)
    for length in range(1, 12):
        texts = ["dog " * length]
        cut, full = other.tokenizer(texts), padded(texts)
        assert cut.shape[1] < 32
        assert torch.allclose(other.encode_text(cut), tiny.clip.encode_text(full), atol=1e-6)


def test_a_text_that_fills_the_context(tiny: OpenClipEncoder):
    long = ["word " * 100, "short"]
    assert tiny.tokenizer(long).shape == (2, 32)
    assert torch.allclose(
        tiny.encode_text(tiny.tokenizer(long)),
        tiny.clip.encode_text(tiny.full_length_tokenizer(long)),
        atol=1e-6,
    )


def test_wrong_image_size_is_refused(tiny: OpenClipEncoder):
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(48, 48\)"):
        tiny.encode_image(torch.zeros(1, 3, 32, 32))


def test_saved_folder_is_float32_and_loads_in_stock_open_clip(
    tiny: OpenClipEncoder, tmp_path: Path
):
    with torch.no_grad():
        tiny.clip.logit_scale.fill_(math.log(100))
    tiny.half()
    tiny.save(tmp_path / "model", metadata={"recipe": "test"})
    with safe_open(tmp_path / "model" / "open_clip_model.safetensors", "pt") as file:
        assert file.metadata()["recipe"] == "test"
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    tiny.float()
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    stock.eval()
    pixels = torch.randn(2, 3, 48, 48)
    assert torch.equal(stock.encode_image(pixels), tiny.encode_image(pixels))
    assert stock.visual.preprocess_cfg["mean"] == [0.5] * 3
    assert str(preprocess) == str(tiny.preprocess)
    mode = (tmp_path / "model" / "open_clip_model.safetensors").stat().st_mode
    assert mode == (tmp_path / "model" / "open_clip_config.json").stat().st_mode


def test_logit_scale_survives_saving(tiny: OpenClipEncoder, tmp_path: Path):
    with torch.no_grad():
        tiny.clip.logit_scale.fill_(math.log(100))
    tiny.save(tmp_path)
    again = load_open_clip(f"local-dir:{tmp_path}")
    assert float(again.logit_scale.detach()) == pytest.approx(100, abs=1e-4)


def test_weights_from_a_path(tiny: OpenClipEncoder, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", dict(TINY))
    torch.save({"state_dict": tiny.clip.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = load_open_clip("tiny-arch", str(tmp_path / "checkpoint.pt"))
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(loaded.encode_image(pixels), tiny.encode_image(pixels))


def test_a_tags_own_activation_is_used(tiny: OpenClipEncoder, tmp_path: Path, monkeypatch):
    """OpenAI's weights want QuickGELU also under an architecture's name without it."""
    path = tmp_path / "weights.pt"
    torch.save(tiny.clip.state_dict(), path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", dict(TINY))
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-arch", {"openai": {"quick_gelu": True, "url": "x"}}
    )
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(path))
    loaded = load_open_clip("tiny-arch")
    assert loaded.model_config["quick_gelu"] is True
    loaded.save(tmp_path / "saved")
    again = load_open_clip(f"local-dir:{tmp_path / 'saved'}")
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(again.encode_image(pixels), loaded.encode_image(pixels))
    assert not torch.allclose(again.encode_image(pixels), tiny.encode_image(pixels))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch):
    class Boom:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", dict(TINY))
    torch.save({"state_dict": Boom()}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match="more than weights"):
        load_open_clip("tiny-arch", str(tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-31", None, "no such open_clip architecture. Did you mean ViT-B-32"),
        ("ViT-B-32", "opnai", "neither a file nor a tag of ViT-B-32. Did you mean openai"),
        ("ViT-B-16-SigLIP", None, r"say which weights.*webli"),
        ("local-dir:nowhere", None, "nowhere: no open_clip_config.json there"),
        ("local-dir:nowhere", "openai", "does not go with"),
        ("local-dir:", None, "Empty path"),
    ],
)
def test_what_cannot_be_loaded(name: str, pretrained: str | None, message: str):
    with pytest.raises(ModelError, match=message):
        load_open_clip(name, pretrained)


def test_folder_without_weights_and_weights_that_do_not_fit(tiny: OpenClipEncoder, tmp_path: Path):
    tiny.save(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Do the weights belong"):
        load_open_clip(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_open_clip(f"local-dir:{tmp_path}")


def test_teacher_cannot_be_woken(tiny: OpenClipEncoder):
    teacher = Teacher(tiny)
    parent = torch.nn.Module()
    parent.teacher = teacher
    parent.train().requires_grad_(True)
    assert not list(parent.parameters())
    assert not any(module.training for module in teacher.encoder.modules())
    assert not any(parameter.requires_grad for parameter in teacher.encoder.parameters())
    assert not teacher.encode_image(torch.randn(1, 3, 48, 48)).requires_grad
    tokens = tiny.tokenizer(TEXTS)
    with torch.no_grad():
        before = teacher.encode_text(tokens)
        for parameter in tiny.parameters():
            parameter.add_(0.1)
    assert torch.equal(teacher.encode_text(tokens), before)
    assert not torch.equal(tiny.encode_text(tokens), before)


def test_photo_clip_of_the_shared_folder(shared: Path):
    folder = shared / "models" / "photo-clip"
    if not folder.is_dir():
        pytest.skip("../shared/models/photo-clip is not on this machine: it is not published")
    model = load_open_clip(f"local-dir:{folder}")
    assert float(model.logit_scale.detach()) == pytest.approx(100, abs=1e-3)
    assert model.text_cut is not None
    full = model.full_length_tokenizer(TEXTS)
    difference = model.encode_text(model.tokenizer(TEXTS)) - model.clip.encode_text(full)
    assert difference.abs().max() <= 1e-6
    pixels = torch.randn(2, 3, 224, 224)
    in_training_mode = model.clip.train().encode_image(pixels)
    model.clip.eval()
    # why normalisation statistics stay frozen: batch statistics are another function
    assert cosine_similarity(in_training_mode, model.encode_image(pixels)).max() < 0.99
