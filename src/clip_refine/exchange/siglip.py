"""SigLIP: open_clip's `CustomTextCLIP` with timm's trunk → Transformers' `SiglipModel`.

Both are Zhai et al.'s architecture (SigLIP, ICCV 2023, arXiv 2303.15343): a vision transformer that
is pooled by attention, a text tower that sees its padding and is pooled at the last place.
"""

from collections.abc import Mapping
from typing import Any

import open_clip

from clip_refine.errors import ModelError
from clip_refine.exchange.clip import BLOCK_FLAGS, block_links, tower_config
from clip_refine.exchange.links import (
    Converted,
    Link,
    State,
    attention_links,
    layer_links,
    link,
    to_transformers,
)

_TRUNK = "visual.trunk"
_IMAGE, _TEXT = "vision_model", "text_model"


def is_siglip(model_config: Mapping[str, Any]) -> bool:
    """Whether an open_clip architecture has a text tower and a pooling like SigLIP's."""
    vision, text = model_config["vision_cfg"], model_config["text_cfg"]
    return bool(
        vision.get("timm_model_name")
        and vision.get("timm_pool") == "map"
        and text.get("no_causal_mask")
        and text.get("pool_type") == "last"
    )


def siglip_to_transformers(model_config: Mapping[str, Any], state: State, trunk: Any) -> Converted:
    """An open_clip SigLIP as `transformers.SiglipModel`.

    Args:
        model_config: open_clip's `model_cfg`, of which `is_siglip` is true.
        state: The model's state dict.
        trunk: timm's module, whose sizes its name alone does not tell.

    Returns:
        `config.json` and weights; the features are the same functions.

    Raises:
        ModelError: The architecture has parts that `SiglipModel` has not.
    """
    text = open_clip.CLIPTextCfg(**model_config["text_cfg"])
    problems = _why_not(text, trunk)
    if problems:
        raise ModelError(
            f"this model cannot become a Transformers SiglipModel: {'; '.join(problems)}. Export "
            "it --to onnx, or use it in open_clip's format."
        )
    block = trunk.blocks[0]
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "num_channels": 3,
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": trunk.norm.eps,
    }
    text_config = {
        **tower_config(text, model_config["embed_dim"], text.heads, quick=False),
        "model_type": "siglip_text_model",
        "projection_size": model_config["embed_dim"],
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
    }
    del text_config["projection_dim"]
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "dtype": "float32",
        "vision_config": vision_config,
        "text_config": text_config,
    }
    return Converted(config, to_transformers(_links(len(trunk.blocks), text.layers), state))


def _why_not(text: Any, trunk: Any) -> list[str]:
    problems = []
    size, patch = trunk.patch_embed.img_size, trunk.patch_embed.patch_size
    if size[0] != size[1] or patch[0] != patch[1]:
        problems.append("its images or patches are not square")
    pool = trunk.attn_pool
    if type(pool).__name__ != "AttentionPoolLatent" or pool.latent_len != 1:
        problems.append(f"its image tower is pooled by {type(pool).__name__}")
    elif pool.num_heads != trunk.blocks[0].attn.num_heads:
        problems.append("its pooling has other heads than its blocks")
    if not text.proj_bias or text.proj_type != "linear":
        problems.append("its text tower does not end in a linear layer with a bias")
    on = [flag for flag in ("embed_cls", "ls_init_value", *BLOCK_FLAGS) if getattr(text, flag)]
    return problems + [f"its text tower is built with {flag}" for flag in on]


def _activation(layer: Any) -> str:
    tanh = getattr(layer, "approximate", "none") == "tanh" or type(layer).__name__ == "GELUTanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def _links(image_layers: int, text_layers: int) -> list[Link]:
    pool, head = f"{_TRUNK}.attn_pool", f"{_IMAGE}.head"
    links = [
        link("logit_scale", "logit_scale", "scalar"),
        link("logit_bias", "logit_bias", "scalar"),
        link(f"{_TRUNK}.pos_embed", f"{_IMAGE}.embeddings.position_embedding.weight", "batched"),
        *layer_links(f"{_TRUNK}.patch_embed.proj", f"{_IMAGE}.embeddings.patch_embedding"),
        *layer_links(f"{_TRUNK}.norm", f"{_IMAGE}.post_layernorm"),
        link(f"{pool}.latent", f"{head}.probe"),
        *layer_links(f"{pool}.proj", f"{head}.attention.out_proj"),
        *layer_links(f"{pool}.norm", f"{head}.layernorm"),
        *layer_links(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *layer_links(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
        *layer_links("text.token_embedding", f"{_TEXT}.embeddings.token_embedding", bias=False),
        link("text.positional_embedding", f"{_TEXT}.embeddings.position_embedding.weight"),
        *block_links("text.transformer", _TEXT, text_layers),
        *layer_links("text.ln_final", f"{_TEXT}.final_layer_norm"),
        *layer_links("text.text_projection", f"{_TEXT}.head"),
    ]
    for kind in ("weight", "bias"):  # timm's query stands alone, key and value together
        names = (f"{pool}.q.{kind}", f"{pool}.kv.{kind}")
        links.append(Link(names, (f"{head}.attention.in_proj_{kind}",), shares=(1, 2)))
    for layer in range(image_layers):
        ours, theirs = f"{_TRUNK}.blocks.{layer}", f"{_IMAGE}.encoder.layers.{layer}"
        links += attention_links(f"{ours}.attn.qkv.", f"{theirs}.self_attn")
        for mine, other in (
            ("attn.proj", "self_attn.out_proj"),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            links += layer_links(f"{ours}.{mine}", f"{theirs}.{other}")
    return links
