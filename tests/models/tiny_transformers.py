"""Tiny random Transformers models with tokenizers made here, as folders."""

import json
import string
from pathlib import Path

import open_clip
import torch

SIZE = 32
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 16,
}
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_IMAGES = {
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
}


def clip_tokenizer(length: int = 77):
    """CLIP's own tokenizer, from the vocabulary that open_clip bundles."""
    from transformers import CLIPTokenizer

    bundled = open_clip.SimpleTokenizer()
    merges = sorted(bundled.bpe_ranks, key=bundled.bpe_ranks.__getitem__)
    vocabulary = {
        token.replace("<start_of_text>", "<|startoftext|>").replace(
            "<end_of_text>", "<|endoftext|>"
        ): number
        for token, number in bundled.encoder.items()
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def word_tokenizer(*, padding: str = "</s>", masked: bool = False, length: int = 16):
    """Lower-cased letters, each a token, with an end token: the shape of SigLIP's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["</s>", "<unk>", "<pad>", *string.ascii_lowercase, *string.digits, " "]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=padding,
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
    )


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPModel with CLIP's own tokenizer, features of norm about 1."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(seed)
    text = {**_TEXT, "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPProcessor(CLIPImageProcessor(**_IMAGES), clip_tokenizer())
    processor.save_pretrained(folder)
    return folder


def write_siglip(folder: Path, *, seed: int = 0) -> Path:
    """A SiglipModel, whose text tower looks at its padding."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    torch.manual_seed(seed)
    text = {**_TEXT, "max_position_embeddings": 16, "vocab_size": 64, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config=_VISION)
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-10.0)
    model.save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    SiglipProcessor(images, word_tokenizer()).save_pretrained(folder)
    return folder


def write_chinese_clip(folder: Path, *, seed: int = 0) -> Path:
    """A ChineseCLIPModel: a BERT text tower, which needs the attention mask."""
    from transformers import (
        ChineseCLIPConfig,
        ChineseCLIPImageProcessor,
        ChineseCLIPModel,
        ChineseCLIPProcessor,
    )

    torch.manual_seed(seed)
    text = {**_TEXT, "max_position_embeddings": 32, "vocab_size": 64}
    config = ChineseCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    ChineseCLIPModel(config).save_pretrained(folder)
    tokenizer = word_tokenizer(padding="<pad>", masked=True, length=32)
    images = ChineseCLIPImageProcessor(**_IMAGES)
    ChineseCLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_sentence_clip(folder: Path, *, seed: int = 0) -> Path:
    """The same CLIPModel as sentence-transformers keeps it."""
    write_clip(folder / "0_CLIPModel", seed=seed)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel"}
    kind = "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps([{**module, "type": kind}]), encoding="utf-8")
    (folder / "config_sentence_transformers.json").write_text("{}", encoding="utf-8")
    return folder
