"""CLIP weights, settings, tokenizer and preprocessing between open_clip and Transformers."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clip_refine.saving.exchange import (
    clip_to_open_clip,
    clip_to_transformers,
    preprocessing_to_open_clip,
    preprocessing_to_transformers,
    write_clip_tokenizer,
)
from clip_refine.support.errors import ModelError
from tests.conftest import TINY

EOS = 49407
TEXTS = ["a red circle", "", "word " * 80, "two dogs, one cat!"]


def with_towers(**both: object) -> dict:
    return {
        **TINY,
        "vision_cfg": {**TINY["vision_cfg"], **both},
        "text_cfg": {**TINY["text_cfg"], **both},
    }


VARIANTS = {
    "plain": TINY,
    "quick-gelu": {**TINY, "quick_gelu": True},
    "custom text": {**TINY, "custom_text": True},
    "tanh and another epsilon": with_towers(
        act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-3}
    ),
    "another mlp": with_towers(mlp_ratio=4.3637),
    "eos pooling": {
        **TINY,
        "custom_text": True,
        "text_cfg": {**TINY["text_cfg"], "pool_type": "eos", "eos_id": EOS},
    },
}


def build(config: dict) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    settings = {name: value for name, value in config.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    torch.manual_seed(0)
    clip = kind(**settings).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            # biases and norms away from 0 and 1, activations out of their linear part
            parameter.add_(0.3 * torch.randn_like(parameter))
    return clip


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_features_are_the_same_there_and_back(config: dict):
    from transformers import CLIPConfig, CLIPModel

    clip = build(config)
    pixels = torch.randn(3, 3, 48, 48)
    tokens = open_clip.SimpleTokenizer(context_length=32)(TEXTS)
    images, texts = clip.encode_image(pixels), clip.encode_text(tokens)

    there = clip_to_transformers(config, clip.state_dict(), eos_id=EOS)
    theirs = CLIPModel(CLIPConfig(**there.config)).eval()
    theirs.load_state_dict(there.state)
    assert_close(theirs.get_image_features(pixels).pooler_output, images)
    assert_close(theirs.get_text_features(tokens).pooler_output, texts)
    assert theirs.logit_scale == clip.logit_scale

    back = clip_to_open_clip(theirs.config.to_dict(), theirs.state_dict())
    again = open_clip.CLIP(**back.config).eval()
    again.load_state_dict(back.state)
    assert_close(again.encode_image(pixels), images)
    assert_close(again.encode_text(tokens), texts)
    if config is TINY:
        assert back.config == TINY


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.norm(dim=-1).mean()


@torch.no_grad()
def test_a_wrong_activation_would_be_noticed():
    config = {**TINY, "quick_gelu": True}
    clip, other = build(config), build(TINY)
    pixels = torch.randn(3, 3, 48, 48)
    with pytest.raises(AssertionError):
        assert_close(other.encode_image(pixels), clip.encode_image(pixels))


@pytest.mark.parametrize(
    ("vision", "text", "more", "message"),
    [
        ({"timm_model_name": "vit_tiny"}, {}, {}, "image tower is timm's vit_tiny"),
        ({"layers": (1, 1, 1, 1)}, {}, {}, "image tower is a ResNet"),
        ({}, {"hf_model_name": "roberta"}, {}, "text tower is Transformers' roberta"),
        ({"pool_type": "avg"}, {}, {}, "image tower is pooled by 'avg'"),
        ({"qk_norm": True}, {}, {}, "image tower is built with qk_norm"),
        ({}, {"no_causal_mask": True}, {}, "text tower is built with no_causal_mask"),
        ({}, {"pool_type": "last"}, {}, "text tower is pooled by 'last'"),
        ({}, {"pool_type": "eos", "eos_id": 5}, {}, "end-of-text token is not where"),
        ({}, {}, {"init_logit_bias": -10.0}, "it has a logit bias"),
        ({}, {}, {"multimodal_cfg": {}}, "it is built with multimodal_cfg"),
        ({"image_size": (48, 96)}, {}, {}, "not square"),
    ],
)
def test_what_has_no_like_in_transformers(vision: dict, text: dict, more: dict, message: str):
    config = {
        **TINY,
        "vision_cfg": {**TINY["vision_cfg"], **vision},
        "text_cfg": {**TINY["text_cfg"], **text},
        **more,
    }
    with pytest.raises(ModelError, match=message) as refused:
        clip_to_transformers(config, {}, eos_id=EOS)
    assert "--to onnx" in str(refused.value)


def test_weights_that_do_not_fit_are_named():
    state = {**build(TINY).state_dict(), "extra": torch.zeros(1)}
    del state["visual.proj"]
    with pytest.raises(ModelError, match=r"visual\.proj.*extra"):
        clip_to_transformers(TINY, state, eos_id=EOS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder, context_length=32)
    return CLIPTokenizerFast.from_pretrained(folder)


SAME = [
    "a photo of a dog",
    "A Photo OF a DOG!!",
    "  spaces\t and\nnew lines ",
    "café naïve Straße ÉCOLE",
    "cafe\u0301 with a combining accent",
    "😀 emoji 👩‍👩‍👧 family 🏳️‍🌈",
    "it's don't we'RE I'LL 'quoted'",
    "12345 3.14 1/2 x²",
    "word " * 80,
    "",
    "日本語 テキスト العربية हिन्दी",
    "a\u00a0b\u200bc",
    "a_b-c/d@e#f ...!?",
    "Ω ohm and K kelvin",
]
CLEANED = [
    "Tom &amp; Jerry &lt;3",
    "mojibake â€œquotedâ€\x9d",
    "“curly” quotes ‘x’",
    "ﬁne ligature",
    "full width ＡＢＣ",
    "\x07 control",
]


def ids_up_to_the_end(row: list[int]) -> list[int]:
    return row[: row.index(EOS) + 1]


@pytest.mark.parametrize("text", [*SAME, *map(open_clip.tokenizer.basic_clean, CLEANED)])
def test_token_ids_are_the_same(tokenizer, text: str):
    ours = open_clip.SimpleTokenizer(context_length=32)([text])[0].tolist()
    theirs = tokenizer([text], truncation=True, padding="max_length")["input_ids"][0]
    assert len(theirs) == 32
    assert ids_up_to_the_end(theirs) == ids_up_to_the_end(ours)


@pytest.mark.parametrize("text", CLEANED)
def test_what_only_open_clip_cleans(tokenizer, text: str):
    """Documented in docs/models.md; the tests above show that nothing else differs."""
    ours = open_clip.SimpleTokenizer(context_length=32)([text])[0].tolist()
    assert tokenizer([text])["input_ids"][0] != ids_up_to_the_end(ours)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_there_and_back(mode: str):
    settings = {
        "size": 48,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "resize_mode": mode,
    }
    there = preprocessing_to_transformers(settings, processor="CLIP")
    assert preprocessing_to_open_clip(json.loads(json.dumps(there))) == settings


def test_preprocessing_without_a_like(tmp_path: Path):
    settings = {"size": 48, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    with pytest.raises(ModelError, match="'longest'"):
        preprocessing_to_transformers({**settings, "resize_mode": "longest"}, processor="CLIP")
    theirs = preprocessing_to_transformers(
        {**settings, "resize_mode": "shortest"}, processor="CLIP"
    )
    with pytest.raises(ModelError, match="cannot do what this image processor does"):
        preprocessing_to_open_clip({**theirs, "crop_size": {"height": 32, "width": 32}})
