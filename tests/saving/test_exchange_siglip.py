"""SigLIP from open_clip to Transformers: weights, tokenizer, and the whole way out."""

from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.roads.export import export
from clip_refine.saving.exchange import siglip_to_transformers
from clip_refine.support.errors import ModelError
from clip_refine.toy import ToyPairs
from tests.models.tiny_transformers import word_tokenizer
from tests.roads.test_export import run_the_cards_lines

NAME = "vit_nano_siglip_for_tests"
CONFIG = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": NAME,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 64,
        "hf_tokenizer_name": "words",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 16,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}
TEXTS = ["a red circle", "Two_small, blue STARS!", "  (a) \t b's  ", "x" * 40]


def nano(pretrained: bool = False, **settings) -> VisionTransformer:
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    known = {name: settings[name] for name in ("num_classes", "global_pool") if name in settings}
    return VisionTransformer(**{**shape, "class_token": False, "norm_layer": None, **known})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A tiny SigLIP in open_clip's files."""
    entrypoints = timm.models._registry._model_entrypoints
    entrypoints[NAME] = nano
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    settings = {name: value for name, value in CONFIG.items() if name != "custom_text"}
    clip = open_clip.CustomTextCLIP(**settings).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    open_clip.set_model_preprocess_cfg(
        clip,
        {
            "size": 32,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    )
    word_tokenizer().save_pretrained(folder)
    tokenizer = open_clip.tokenizer.HFTokenizer(
        str(folder), context_length=16, clean="canonicalize"
    )
    OpenClipEncoder(clip, None, tokenizer, CONFIG).save(folder)
    yield folder
    del entrypoints[NAME]


@torch.no_grad()
def test_the_whole_way_out(folder: Path, tmp_path: Path, held_out: ToyPairs, monkeypatch):
    from transformers import AutoModel, AutoProcessor

    images = [held_out.load_image(index).resize((32, 32)) for index in range(3)]
    source = load_open_clip(f"local-dir:{folder}")
    pixels = torch.stack([source.preprocess(image) for image in images])
    expected = source.encode_image(pixels), source.encode_text(source.tokenizer(TEXTS))

    assert export(str(folder), to="transformers", out=tmp_path / "hf").passed
    model = AutoModel.from_pretrained(tmp_path / "hf").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    pixels = processor(images=images, return_tensors="pt")
    assert type(model).__name__ == "SiglipModel"
    tokens = processor(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    found = (
        model.get_image_features(**pixels).pooler_output,
        model.get_text_features(**tokens).pooler_output,
    )
    for theirs, ours in zip(found, expected, strict=True):
        assert (theirs - ours).abs().max() <= 1e-5 * ours.norm(dim=-1).mean()
    assert model.logit_bias.item() == source.clip.logit_bias.item()
    assert model.logit_scale.item() == source.clip.logit_scale.item()
    run_the_cards_lines(tmp_path / "hf", source, images[0], monkeypatch)


@pytest.mark.parametrize(
    "kind", ["open_clip", *(["onnx", "immich"] if find_spec("onnxscript") else [])]
)
def test_the_cards_of_other_ways_out_run(
    folder: Path, kind: str, tmp_path: Path, held_out: ToyPairs, monkeypatch
):
    from transformers import AutoTokenizer

    export(str(folder), to=kind, out=tmp_path / "out")
    source = load_open_clip(f"local-dir:{folder}")
    image = held_out.load_image(0).resize((32, 32))
    run_the_cards_lines(tmp_path / "out", source, image, monkeypatch)
    if kind == "onnx":  # which cleans texts as open_clip does
        ids = AutoTokenizer.from_pretrained(".")(TEXTS, padding="max_length", truncation=True)
        assert ids["input_ids"] == source.full_length_tokenizer(TEXTS).tolist()


def test_for_sentence_transformers(folder: Path, tmp_path: Path, held_out: ToyPairs, monkeypatch):
    from sentence_transformers import SentenceTransformer

    export(str(folder), to="sentence-transformers", out=tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    source = load_open_clip(f"local-dir:{folder}")
    with torch.no_grad():
        expected = source.encode_text(source.tokenizer(TEXTS))
    assert torch.allclose(model.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5)
    image: Image.Image = held_out.load_image(0)
    assert model.encode([image]).shape == (1, 32)
    run_the_cards_lines(tmp_path / "st", source, image.resize((32, 32)), monkeypatch)


def test_what_has_no_like_in_transformers(folder: Path):
    source = load_open_clip(f"local-dir:{folder}")
    trunk = source.clip.visual.trunk
    text = {**CONFIG["text_cfg"], "proj_bias": False, "qk_norm": True}
    with pytest.raises(ModelError, match=r"bias; its text tower is built with qk_norm.*--to onnx"):
        siglip_to_transformers({**CONFIG, "text_cfg": text}, {}, trunk)
    with pytest.raises(ModelError, match="the weights do not fit their settings"):
        siglip_to_transformers(CONFIG, {}, trunk)
