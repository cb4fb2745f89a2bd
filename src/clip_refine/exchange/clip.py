"""CLIP with a vision transformer: open_clip's `CLIP`, `CustomTextCLIP`; Transformers' `CLIPModel`.

Both are Radford et al.'s architecture (CLIP, ICML 2021, arXiv 2103.00020). They differ in names, in
whether query, key and value stand in one matrix, and in which way a projection lies.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import open_clip

from clip_refine.errors import ModelError
from clip_refine.exchange.links import (
    Converted,
    Link,
    State,
    attention_links,
    layer_links,
    link,
    to_open_clip,
    to_transformers,
)

EPSILON = 1e-5
"""Both libraries' default of their layer norms."""
BLOCK_FLAGS = (
    "qk_norm",
    "scaled_cosine_attn",
    "scale_heads",
    "scale_attn_inner",
    "scale_attn",
    "scale_fc",
)
_VISION_EXTRAS = ("timm_model_name", "attentional_pool", "no_ln_pre", "ls_init_value")
_TEXT_EXTRAS = ("hf_model_name", "embed_cls", "no_causal_mask", "proj_bias", "ls_init_value")
_SETTINGS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_NEUTRAL = {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"}


def clip_to_transformers(
    model_config: Mapping[str, Any], state: State, *, eos_id: int
) -> Converted:
    """An open_clip model as `transformers.CLIPModel`.

    Args:
        model_config: open_clip's `model_cfg`.
        state: The model's state dict.
        eos_id: The tokenizer's end-of-text id. `CLIPModel` pools at its first place in a text, and
            so does open_clip: the highest id of a text (`argmax`), or its own `eos_id`.

    Returns:
        `config.json` and weights; the features are the same functions.

    Raises:
        ModelError: The architecture has parts that `CLIPModel` has not; they are named.
    """
    problems = why_no_clip_model(model_config, eos_id)
    if problems:
        raise ModelError(
            f"this model cannot become a Transformers CLIPModel: {'; '.join(problems)}. Export it "
            "--to onnx, or use it in open_clip's format, which every run saves."
        )
    vision = open_clip.CLIPVisionCfg(**model_config["vision_cfg"])
    text = open_clip.CLIPTextCfg(**model_config["text_cfg"])
    quick = bool(model_config.get("quick_gelu"))
    embed_dim = model_config["embed_dim"]
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": embed_dim,
        "vision_config": {
            **tower_config(vision, embed_dim, vision.width // vision.head_width, quick=quick),
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "image_size": _side(vision.image_size),
            "patch_size": _side(vision.patch_size),
        },
        "text_config": {
            **tower_config(text, embed_dim, text.heads, quick=quick),
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": eos_id - 1,
            "eos_token_id": eos_id,
            "pad_token_id": eos_id,
        },
    }
    prefix = "text." if "text.positional_embedding" in state else ""
    links = _links(model_config["vision_cfg"].get("layers", 12), text.layers, prefix)
    scalar = {**state, "logit_scale": state["logit_scale"].reshape(())}
    return Converted(config, to_transformers(links, scalar))


def clip_to_open_clip(config: Mapping[str, Any], state: State) -> Converted:
    """A `transformers.CLIPModel` as open_clip's `CLIP`.

    Args:
        config: Its `config.to_dict()`, complete, with `vision_config` and `text_config`.
        state: Its state dict.

    Returns:
        open_clip's `model_cfg` and weights; the features are the same functions.

    Raises:
        ModelError: open_clip cannot build this architecture.
    """
    vision, text = config["vision_config"], config["text_config"]
    if vision["hidden_act"] != text["hidden_act"]:
        raise ModelError(
            f"the towers have two activations, {vision['hidden_act']} and {text['hidden_act']}; "
            "open_clip's CLIP has one for both."
        )
    model_config = {
        "embed_dim": config["projection_dim"],
        **({"quick_gelu": True} if vision["hidden_act"] == "quick_gelu" else {}),
        "vision_cfg": {
            **_tower_settings(vision),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": {
            **_tower_settings(text),
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_pooling(text),
        },
    }
    links = _links(vision["num_hidden_layers"], text["num_hidden_layers"], "")
    positions = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    weights = {name: tensor for name, tensor in state.items() if name not in positions}
    return Converted(model_config, to_open_clip(links, weights))


def why_no_clip_model(model_config: Mapping[str, Any], eos_id: int) -> list[str]:
    """What an open_clip architecture has that `CLIPModel` has not; nothing where it converts."""
    unknown = set(model_config) - _SETTINGS - _NEUTRAL
    problems = [f"it is built with {name}" for name in sorted(unknown)]
    if model_config.get("init_logit_bias") is not None:
        problems.append("it has a logit bias")
    vision = open_clip.CLIPVisionCfg(**model_config["vision_cfg"])
    text = open_clip.CLIPTextCfg(**model_config["text_cfg"])
    if vision.timm_model_name:
        problems.append(f"its image tower is timm's {vision.timm_model_name}")
    elif not isinstance(vision.layers, int):
        problems.append("its image tower is a ResNet")
    if text.hf_model_name:
        problems.append(f"its text tower is Transformers' {text.hf_model_name}")
    if problems:
        return problems
    sides = (vision.image_size, vision.patch_size)
    if any(isinstance(side, list | tuple) and side[0] != side[1] for side in sides):
        problems.append("its images or patches are not square")
    if vision.pool_type != "tok":
        problems.append(f"its image tower is pooled by {vision.pool_type!r}")
    if text.pool_type not in ("argmax", "eos"):
        problems.append(f"its text tower is pooled by {text.pool_type!r}")
    elif eos_id == 2 or (text.pool_type == "eos" and text.eos_id != eos_id):
        problems.append("its end-of-text token is not where CLIPModel looks for it")
    if text.proj_type != "linear":
        problems.append("its text tower has no projection")
    for tower, cfg, extras in (("image", vision, _VISION_EXTRAS), ("text", text, _TEXT_EXTRAS)):
        on = [name for name in (*extras, *BLOCK_FLAGS) if asdict(cfg)[name]]
        problems += [f"its {tower} tower is built with {name}" for name in on]
        if set(cfg.act_kwargs or {}) - {"approximate"} or set(cfg.norm_kwargs or {}) - {"eps"}:
            problems.append(f"its {tower} tower has an unusual activation or norm")
    return problems


def tower_config(cfg: Any, embed_dim: int, heads: int, *, quick: bool) -> dict[str, Any]:
    """What Transformers' settings of an open_clip transformer have in common."""
    tanh = (cfg.act_kwargs or {}).get("approximate") == "tanh"
    activation = "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu"
    return {
        "hidden_size": cfg.width,
        "intermediate_size": int(cfg.width * cfg.mlp_ratio),
        "projection_dim": embed_dim,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "layer_norm_eps": (cfg.norm_kwargs or {}).get("eps", EPSILON),
    }


def _tower_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config["hidden_size"]
    settings = {"width": width, "layers": config["num_hidden_layers"]}
    ratio = config["intermediate_size"] / width
    if int(width * ratio) != config["intermediate_size"]:  # open_clip rounds down
        ratio += 0.5 / width
    if ratio != 4:
        settings["mlp_ratio"] = ratio
    if config["layer_norm_eps"] != EPSILON:
        settings["norm_kwargs"] = {"eps": config["layer_norm_eps"]}
    match config["hidden_act"]:
        case "gelu" | "quick_gelu":
            pass
        case "gelu_pytorch_tanh":
            settings["act_kwargs"] = {"approximate": "tanh"}
        case other:
            raise ModelError(f"open_clip has no activation {other!r}.")
    return settings


def _pooling(text: Mapping[str, Any]) -> dict[str, Any]:
    """Where open_clip finds the end of a text; the highest id is what it looks for by default."""
    eos_id = text["eos_token_id"]  # 2 stands for the highest id, too, in old configurations
    if eos_id in (2, text["vocab_size"] - 1):
        return {}
    return {"pool_type": "eos", "eos_id": eos_id}


def _side(size: Any) -> int:
    return size[0] if isinstance(size, list | tuple) else size


def _links(vision_layers: int, text_layers: int, text_prefix: str) -> list[Link]:
    image, text = "vision_model", "text_model"
    return [
        link("logit_scale", "logit_scale"),
        link("visual.class_embedding", f"{image}.embeddings.class_embedding"),
        link("visual.conv1.weight", f"{image}.embeddings.patch_embedding.weight"),
        link("visual.positional_embedding", f"{image}.embeddings.position_embedding.weight"),
        *layer_links("visual.ln_pre", f"{image}.pre_layrnorm"),  # Transformers' own spelling
        *block_links("visual.transformer", image, vision_layers),
        *layer_links("visual.ln_post", f"{image}.post_layernorm"),
        link("visual.proj", "visual_projection.weight", "transposed"),
        *layer_links(
            f"{text_prefix}token_embedding", f"{text}.embeddings.token_embedding", bias=False
        ),
        link(f"{text_prefix}positional_embedding", f"{text}.embeddings.position_embedding.weight"),
        *block_links(f"{text_prefix}transformer", text, text_layers),
        *layer_links(f"{text_prefix}ln_final", f"{text}.final_layer_norm"),
        link(f"{text_prefix}text_projection", "text_projection.weight", "transposed"),
    ]


def block_links(open_clip_tower: str, transformers_tower: str, layers: int) -> list[Link]:
    """The layers of one of open_clip's own transformers."""
    links = []
    for layer in range(layers):
        ours = f"{open_clip_tower}.resblocks.{layer}"
        theirs = f"{transformers_tower}.encoder.layers.{layer}"
        links += attention_links(f"{ours}.attn.in_proj_", f"{theirs}.self_attn")
        for mine, other in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            links += layer_links(f"{ours}.{mine}", f"{theirs}.{other}")
    return links
