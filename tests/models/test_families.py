"""Families of open_clip, small and random: one refine step, saved, loaded again."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clip_refine.config.runs import RefineConfig
from clip_refine.models import OpenClipEncoder, Teacher, load_open_clip
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog, TowerPrecision
from tests.conftest import PREPROCESS, TINY, needs
from tests.models.tiny_transformers import word_tokenizer

Config = dict[str, Any]
TEXT: Config = TINY["text_cfg"]
WORDS = {"context_length": 16, "vocab_size": 64, "hf_tokenizer_name": "in the folder"}
SMALL_TEXT = {"width": 16, "heads": 2, "layers": 2}


def timm(name: str, size: int, text: Config = TEXT, **vision: Any) -> Config:
    """A timm image tower as open_clip's configurations have it, over a small text tower."""
    tower = {"timm_model_name": name, "image_size": size, **vision}
    return {"embed_dim": 16, "custom_text": True, "vision_cfg": tower, "text_cfg": text}


def hugging_face(folder: Path, config: Any, **text: Any) -> Config:
    """A Hugging Face text tower whose configuration lies in a folder."""
    config.save_pretrained(folder / "tower")
    names = {"hf_model_name": str(folder / "tower"), **WORDS}
    return {**TINY, "text_cfg": {**names, "hf_proj_type": "linear", **text}}


def xlm_roberta(folder: Path) -> Config:
    from transformers import XLMRobertaConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = XLMRobertaConfig(
        vocab_size=64, intermediate_size=32, max_position_embeddings=40, pad_token_id=2, **sizes
    )
    return hugging_face(folder, config, hf_pooler_type="mean_pooler")


def mt5(folder: Path) -> Config:
    from transformers import MT5Config

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = MT5Config(vocab_size=64, pad_token_id=2, decoder_start_token_id=2, **sizes)
    return hugging_face(folder, config, hf_pooler_type="mean_pooler")


def nllb(folder: Path) -> Config:
    from transformers import M2M100Config

    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    config = M2M100Config(
        vocab_size=64, d_model=16, max_position_embeddings=40, pad_token_id=2, **sizes
    )
    return hugging_face(folder, config, hf_pooler_type="cls_pooler")


SIGLIP: Config = {
    **timm("test_vit3", 160, {**WORDS, **SMALL_TEXT}, timm_pool="map", timm_proj="none"),
    "embed_dim": 96,  # test_vit3's own width, since SigLIP has no projection
    "init_logit_bias": -10,
}
SIGLIP["text_cfg"] |= {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
COCA: Config = {
    **TINY,
    "custom_text": True,
    "vision_cfg": {
        **TINY["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
CLIPA: Config = {
    **TINY,
    "vision_cfg": {
        **TINY["vision_cfg"],
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
    },
    "text_cfg": {**WORDS, **SMALL_TEXT, "pool_type": "last", "no_causal_mask": True},
}
RESNET: Config = {
    **TINY,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
}
FAMILIES: dict[str, Config | Callable[[Path], Config]] = {
    "ViT": TINY,
    "quick-GELU": {**TINY, "quick_gelu": True},
    "CustomTextCLIP": {**TINY, "custom_text": True},
    "ModifiedResNet": RESNET,
    "ConvNeXt": timm("test_convnext", 64, timm_pool="", timm_proj="linear"),
    "EfficientNet": timm("test_efficientnet", 64, timm_pool="avg", timm_proj="mlp"),
    "EVA": timm("eva02_tiny_patch14_224", 224, timm_pool="token", timm_proj=None),
    "PE": timm("vit_pe_core_tiny_patch16_384", 384, timm_pool="map", timm_proj=None),
    "MobileCLIP": timm(
        "fastvit_mci0", 64, {**TEXT, "no_causal_mask": True}, timm_pool="avg", timm_proj=None
    ),
    "SigLIP": SIGLIP,
    "CLIPA": CLIPA,
    "CoCa": COCA,
    "XLM-RoBERTa text": xlm_roberta,
    "MT5 text": mt5,
    "NLLB text": nllb,
}


WITH_BATCH_NORM = ("ModifiedResNet", "EfficientNet", "MobileCLIP")


def write_family(folder: Path, config: Config) -> str:
    """An open_clip folder with random weights; its `local-dir:` name."""
    if "hf_tokenizer_name" in config["text_cfg"]:
        needs("transformers", "hf")
        word_tokenizer(padding="<pad>").save_pretrained(folder)
    size = config["vision_cfg"]["image_size"]
    settings = {"model_cfg": config, "preprocess_cfg": {"size": size, **PREPROCESS}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
    name = f"local-dir:{folder}"
    torch.manual_seed(0)
    logging.disable(logging.ERROR)
    clip = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    logging.disable(logging.NOTSET)
    OpenClipEncoder(clip, None, open_clip.get_tokenizer(name), config).save(folder)
    return name


def features(model: OpenClipEncoder, pairs: ToyPairs) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in range(2)])
        tokens = model.tokenizer([pairs.captions[index][0] for index in range(2)])
        return model.encode_image(pixels), model.encode_text(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_refined_saved_and_loaded(family: str, tmp_path: Path):
    config = FAMILIES[family]
    if not isinstance(config, dict):
        needs("transformers", "hf")
        config = config(tmp_path)
    model = load_open_clip(write_family(tmp_path, config))
    pairs = ToyPairs("families", size=4)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = RefineConfig.model_validate(
        {"train": {"batch_size": 4, "learning_rate": 1e-3, "device": "cpu"}}
    )
    accelerator = build.build_accelerator("cpu")
    student = build.build_student(model, settings, accelerator.device)
    teacher = Teacher(student)
    with build.build_part(settings, student, accelerator):
        trainer = build.build_trainer(
            settings,
            student,
            teacher,
            TowerPrecision.from_name("fp32"),
            StandardNormal(),
            accelerator,
            steps=1,
        )
        batches = build.build_batches(settings, pairs, model, accelerator)
        with StepLog(tmp_path / "log.jsonl") as log:
            trainer.train(batches, steps=1, log=log)
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert math.isfinite(record["loss_total"])
    assert record["gradient_norm"] > 0
    assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)
    assert not torch.equal(features(model, pairs)[1], teacher_text(teacher, model, pairs))
    statistics = {name for name in before if "running_" in name}
    assert bool(statistics) == (family in WITH_BATCH_NORM)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in statistics)

    model.save(tmp_path / "saved")
    again = load_open_clip(f"local-dir:{tmp_path / 'saved'}")
    for ours, loaded in zip(features(model, pairs), features(again, pairs), strict=True):
        assert torch.allclose(ours, loaded, atol=1e-5)
    assert again.logit_scale.shape == ()


def teacher_text(teacher: Teacher, model: OpenClipEncoder, pairs: ToyPairs) -> torch.Tensor:
    return teacher.encode_text(model.tokenizer([pairs.captions[index][0] for index in range(2)]))


def test_siglips_bias_and_tokenizer(tmp_path: Path):
    model = load_open_clip(write_family(tmp_path, SIGLIP))
    assert model.logit_bias is not None
    assert float(model.logit_bias.detach()) == -10
    assert model.text_cut is None
    tokens = model.tokenizer(["A Dog.", "a dog"])
    assert tokens.shape == (2, 16)
    assert torch.equal(tokens[0], tokens[1])  # SigLIP lower-cases and drops punctuation
