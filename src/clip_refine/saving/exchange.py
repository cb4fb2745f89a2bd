"""open_clip's models in Transformers' format: weights, settings, tokenizers, files."""

import gzip
import json
import re
import string
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from torch import Tensor

from clip_refine.models import OpenClipEncoder
from clip_refine.models.encoder import files_of, save_weights
from clip_refine.models.transformers import SentenceFolder
from clip_refine.support.errors import ModelError

# --------------------------------------------------------------------------------------------------
# CLIP's byte-pair vocabulary, as open_clip ships it, in the files that Transformers reads.


START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCABULARY_SIZE = 49_408
_MERGES = CLIP_VOCABULARY_SIZE - 2 * 256 - 2  # bytes alone and at a word's end, start and end


def clip_merges() -> list[str]:
    """The merges in their order, two symbols a line; the file holds more than CLIP uses."""
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return lines[1 : _MERGES + 1]


def clip_vocabulary() -> dict[str, int]:
    """Symbol → id: bytes, bytes at a word's end, merged symbols, start and end of text.

    >>> vocabulary = clip_vocabulary()
    >>> vocabulary[START], vocabulary[END], len(vocabulary)
    (49406, 49407, 49408)
    """
    symbols = list(bytes_to_unicode().values())
    symbols += [f"{symbol}</w>" for symbol in symbols]
    symbols += [merge.replace(" ", "") for merge in clip_merges()]
    return {symbol: number for number, symbol in enumerate([*symbols, START, END])}


def write_clip_tokenizer(folder: Path, *, context_length: int, added: Sequence[str] = ()) -> None:
    """Write what `CLIPTokenizer.from_pretrained(folder)` reads; `added` are more special tokens.

    Padding is end-of-text, as in OpenAI's folders; the features do not depend on it, because
    nothing behind the first end-of-text is looked at.
    """
    vocabulary = json.dumps(clip_vocabulary(), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *clip_merges()])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    special: dict[str, Any] = dict.fromkeys(("eos_token", "pad_token", "unk_token"), END)
    special |= {"bos_token": START, "additional_special_tokens": [*added]}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "do_lower_case": True,
        **special,
    }
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", special)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    try:
        from transformers import AutoTokenizer
    except ImportError:  # then without tokenizer.json, which libraries outside Python read
        return
    with warnings.catch_warnings():  # of tokenizers 0.22, that it reads the two files itself
        warnings.simplefilter("ignore", DeprecationWarning)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


# --------------------------------------------------------------------------------------------------
# One table of names that reads both ways: which tensors of two libraries hold the same weights.


State = Mapping[str, Tensor]
Names = tuple[str, ...]
Reshape = Callable[[Tensor], Tensor]


class Converted(NamedTuple):
    """A model in the terms of the other library."""

    config: dict[str, Any]  # open_clip's `model_cfg`, or what Transformers calls `config.json`
    state: dict[str, Tensor]  # its weights by that library's names


@dataclass(frozen=True)
class Link:
    """The same weights under the names of both libraries."""

    # one name, or several whose tensors together are the other side's, in this order
    open_clip: tuple[str, ...]
    transformers: tuple[str, ...]  # the same for Transformers
    # how open_clip's tensor differs: `transposed`, `batched` (a leading 1 more), `scalar` (0-d
    # where Transformers' has one element), or not at all
    shape: Literal["same", "transposed", "batched", "scalar"] = "same"
    # relative lengths of open_clip's tensors where they are several; equal ones if empty
    shares: tuple[int, ...] = ()


def link(open_clip: str, transformers: str, shape: Any = "same") -> Link:
    """One tensor on either side."""
    return Link((open_clip,), (transformers,), shape)


def layer_links(open_clip: str, transformers: str, *, bias: bool = True) -> list[Link]:
    """The weight, and the bias, of a layer that both libraries have."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [link(f"{open_clip}.{kind}", f"{transformers}.{kind}") for kind in kinds]


_RESHAPE: dict[str, tuple[Reshape, Reshape]] = {  # from open_clip's tensor, and back
    "same": (lambda whole: whole, lambda whole: whole),
    "transposed": (lambda whole: whole.T, lambda whole: whole.T),
    "batched": (lambda whole: whole.squeeze(0), lambda whole: whole.unsqueeze(0)),
    "scalar": (lambda whole: whole.reshape(1), lambda whole: whole.reshape(())),
}


def renamed(
    links: Iterable[Link], state: State, *, to: Literal["open_clip", "transformers"]
) -> dict[str, Tensor]:
    """Weights by the other library's names; those not split or joined share memory with `state`."""
    ways = [
        (each.open_clip, each.transformers, (), _RESHAPE[each.shape][0])
        if to == "transformers"
        else (each.transformers, each.open_clip, each.shares, _RESHAPE[each.shape][1])
        for each in links
    ]
    expected = {name for names, *_ in ways for name in names}
    missing, left_over = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or left_over:
        raise ModelError(
            f"the weights do not fit their settings: {len(missing)} are missing"
            + (f" (the first is {missing[0]})" if missing else "")
            + f", {len(left_over)} are left over"
            + (f" (the first is {left_over[0]})" if left_over else "")
            + "."
        )
    found: dict[str, Tensor] = {}
    for before, after, shares, reshape in ways:
        parts = [state[name] for name in before]
        whole = reshape(parts[0] if len(parts) == 1 else torch.cat(parts))
        shares = shares or (1,) * len(after)
        unit = len(whole) // sum(shares) if len(after) > 1 else 0
        pieces = whole.split([unit * share for share in shares]) if unit else (whole,)
        found |= dict(zip(after, pieces, strict=True))
    return found


# --------------------------------------------------------------------------------------------------
# Preprocessing: open_clip's `preprocess_cfg` and Transformers' `preprocessor_config.json`.


_RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def preprocessing_to_transformers(
    preprocess_config: Mapping[str, Any], *, processor: str
) -> dict[str, Any]:
    """The settings of an image processor that does what open_clip's inference transform does."""
    size, mode = preprocess_config["size"], preprocess_config["resize_mode"]
    height, width = (size, size) if isinstance(size, int) else size
    whole = {"height": height, "width": width}
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise ModelError(
            f"Transformers' {processor}ImageProcessor cannot resize by {mode!r} to "
            f"{height} x {width}. Export --to onnx, or use open_clip's format."
        )
    crops = {"do_center_crop": True, "crop_size": whole} if mode == "shortest" else {}
    return {
        "image_processor_type": f"{processor}ImageProcessor",
        "processor_class": f"{processor}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if mode == "shortest" else whole,
        "resample": _RESAMPLE[preprocess_config["interpolation"]],
        "do_center_crop": False,
        **crops,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_config["mean"]),
        "image_std": list(preprocess_config["std"]),
    }


def preprocessing_to_open_clip(image_processor: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` for an image processor's `to_dict()`."""
    size = dict(image_processor["size"])
    if "shortest_edge" in size:
        edge, crop = size["shortest_edge"], image_processor.get("crop_size") or {}
        fits = image_processor.get("do_center_crop") and set(crop.values()) == {edge}
        mode, side = "shortest", edge
    else:
        fits = not image_processor.get("do_center_crop")
        mode, side = "squash", [size["height"], size["width"]]
        side = side[0] if side[0] == side[1] else side
    names = {number: name for name, number in _RESAMPLE.items()}
    interpolation = names.get(int(image_processor["resample"]))
    steps = ("do_resize", "do_rescale", "do_normalize")
    if not fits or interpolation is None or not all(image_processor.get(step) for step in steps):
        raise ModelError(
            "open_clip's transform cannot do what this image processor does: it resizes, crops the "
            "same size from the centre or squashes, and normalises."
        )
    return {
        "size": side,
        "mean": list(image_processor["image_mean"]),
        "std": list(image_processor["image_std"]),
        "interpolation": interpolation,
        "resize_mode": mode,
    }


# --------------------------------------------------------------------------------------------------
# CLIP with a vision transformer: open_clip's `CLIP`, `CustomTextCLIP`; Transformers' `CLIPModel`.
#
# Both are Radford et al.'s architecture (CLIP, ICML 2021, arXiv 2103.00020). They differ in names,
# in whether query, key and value stand in one matrix, and in which way a projection lies.


EPSILON = 1e-5  # both libraries' default of their layer norms
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
    """An open_clip model as `transformers.CLIPModel`."""
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
            **tower_config(vision, vision.width // vision.head_width, quick=quick),
            "model_type": "clip_vision_model",
            "projection_dim": embed_dim,
            "num_channels": 3,
            "image_size": _side(vision.image_size),
            "patch_size": _side(vision.patch_size),
        },
        "text_config": {
            **tower_config(text, text.heads, quick=quick),
            "model_type": "clip_text_model",
            "projection_dim": embed_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": eos_id - 1,
            "eos_token_id": eos_id,
            "pad_token_id": eos_id,
        },
    }
    prefix = "text." if "text.positional_embedding" in state else ""
    links = _clip_links(model_config["vision_cfg"].get("layers", 12), text.layers, prefix)
    scalar = {**state, "logit_scale": state["logit_scale"].reshape(())}
    return Converted(config, renamed(links, scalar, to="transformers"))


def clip_to_open_clip(config: Mapping[str, Any], state: State) -> Converted:
    """A `transformers.CLIPModel` as open_clip's `CLIP`."""
    vision, text = config["vision_config"], config["text_config"]
    if vision["hidden_act"] != text["hidden_act"]:
        raise ModelError(
            f"the towers have two activations, {vision['hidden_act']} and {text['hidden_act']}; "
            "open_clip's CLIP has one for both."
        )
    model_config: dict[str, Any] = {
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
        },
    }
    eos_id = text["eos_token_id"]
    # open_clip looks for the highest id by default, which 2 means, too, in old configurations
    if eos_id not in (2, text["vocab_size"] - 1):
        model_config["text_cfg"] |= {"pool_type": "eos", "eos_id": eos_id}
    links = _clip_links(vision["num_hidden_layers"], text["num_hidden_layers"], "")
    positions = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    weights = {name: tensor for name, tensor in state.items() if name not in positions}
    return Converted(model_config, renamed(links, weights, to="open_clip"))


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


def tower_config(cfg: Any, heads: int, *, quick: bool) -> dict[str, Any]:
    """What Transformers' settings of an open_clip transformer have in common."""
    tanh = (cfg.act_kwargs or {}).get("approximate") == "tanh"
    activation = "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu"
    return {
        "hidden_size": cfg.width,
        "intermediate_size": int(cfg.width * cfg.mlp_ratio),
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


def _side(size: Any) -> int:
    return size[0] if isinstance(size, list | tuple) else size


def _clip_links(vision_layers: int, text_layers: int, text_prefix: str) -> list[Link]:
    image, text = "vision_model", "text_model"
    return [
        link("logit_scale", "logit_scale"),
        link("visual.class_embedding", f"{image}.embeddings.class_embedding"),
        link("visual.conv1.weight", f"{image}.embeddings.patch_embedding.weight"),
        link("visual.positional_embedding", f"{image}.embeddings.position_embedding.weight"),
        *layer_links("visual.ln_pre", f"{image}.pre_layrnorm"),  # Transformers' own spelling
        *block_links("visual.transformer.resblocks", image, vision_layers),
        *layer_links("visual.ln_post", f"{image}.post_layernorm"),
        link("visual.proj", "visual_projection.weight", "transposed"),
        *layer_links(
            f"{text_prefix}token_embedding", f"{text}.embeddings.token_embedding", bias=False
        ),
        link(f"{text_prefix}positional_embedding", f"{text}.embeddings.position_embedding.weight"),
        *block_links(f"{text_prefix}transformer.resblocks", text, text_layers),
        *layer_links(f"{text_prefix}ln_final", f"{text}.final_layer_norm"),
        link(f"{text_prefix}text_projection", "text_projection.weight", "transposed"),
    ]


def block_links(
    open_clip_layers: str,
    transformers_tower: str,
    layers: int,
    *,
    qkv: str = "attn.in_proj_",
    parts: Names = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"),
) -> list[Link]:
    """The layers of a transformer; by default one of open_clip's own."""
    theirs = ("self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    links = []
    for layer in range(layers):
        ours, other = f"{open_clip_layers}.{layer}", f"{transformers_tower}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):  # one matrix in open_clip and timm, three in Transformers
            three = tuple(f"{other}.self_attn.{name}_proj.{kind}" for name in "qkv")
            links.append(Link((f"{ours}.{qkv}{kind}",), three))
        for mine, name in zip(parts, theirs, strict=True):
            links += layer_links(f"{ours}.{mine}", f"{other}.{name}")
    return links


# --------------------------------------------------------------------------------------------------
# SigLIP: open_clip's `CustomTextCLIP` with timm's trunk → Transformers' `SiglipModel`.
#
# Both are Zhai et al.'s architecture (SigLIP, ICCV 2023, arXiv 2303.15343): a vision transformer
# that is pooled by attention, a text tower that sees its padding and is pooled at the last place.


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
    """An open_clip SigLIP as `transformers.SiglipModel`."""
    text = open_clip.CLIPTextCfg(**model_config["text_cfg"])
    problems = _why_not(text, trunk)
    if model_config["vision_cfg"].get("timm_proj") != "none":  # as `vectors fold` adds it
        problems.append(
            "its image tower ends in a linear layer, for which SiglipModel has no place"
        )
    if problems:
        raise ModelError(
            f"this model cannot become a Transformers SiglipModel: {'; '.join(problems)}. Export "
            "it --to onnx, or use it in open_clip's format."
        )
    block = trunk.blocks[0]
    act = block.mlp.act
    tanh = getattr(act, "approximate", "none") == "tanh" or type(act).__name__ == "GELUTanh"
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "num_channels": 3,
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": trunk.norm.eps,
    }
    text_config = {
        **tower_config(text, text.heads, quick=False),
        "model_type": "siglip_text_model",
        "projection_size": model_config["embed_dim"],
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
    }
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "dtype": "float32",
        "vision_config": vision_config,
        "text_config": text_config,
    }
    links = _siglip_links(len(trunk.blocks), text.layers)
    return Converted(config, renamed(links, state, to="transformers"))


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


def _siglip_links(image_layers: int, text_layers: int) -> list[Link]:
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
        *block_links("text.transformer.resblocks", _TEXT, text_layers),
        *layer_links("text.ln_final", f"{_TEXT}.final_layer_norm"),
        *layer_links("text.text_projection", f"{_TEXT}.head"),
    ]
    for kind in ("weight", "bias"):  # timm's query stands alone, key and value together
        names = (f"{pool}.q.{kind}", f"{pool}.kv.{kind}")
        links.append(Link(names, (f"{head}.attention.in_proj_{kind}",), shares=(1, 2)))
    timm_parts = ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")
    return links + block_links(
        f"{_TRUNK}.blocks", _IMAGE, image_layers, qkv="attn.qkv.", parts=timm_parts
    )


# --------------------------------------------------------------------------------------------------
# open_clip's tokenizers of other models than CLIP.


def can_clean(tokenizer: Any) -> bool:
    """Whether what an open_clip tokenizer does can be written as one of Transformers."""
    inner = getattr(tokenizer, "tokenizer", None)
    known = hasattr(inner, "backend_tokenizer")
    return known and not (tokenizer.strip_sep_token or tokenizer.tokenizer_mode)


def write_cleaning_tokenizer(encoder: OpenClipEncoder, folder: Path) -> None:
    """Write a Transformers tokenizer of an open_clip model, with open_clip's cleaning inside.

    open_clip lower-cases and strips punctuation before it asks the tokenizer (`canonicalize`, as
    SigLIP was trained); here the tokenizer does so itself. ftfy and HTML entities stay outside.
    """
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    ours: Any = encoder.full_length_tokenizer
    if not can_clean(ours):
        raise ModelError("its tokenizer is used in a way that Transformers does not know.")
    inner: Any = ours.tokenizer
    settings = encoder.model_config["text_cfg"].get("tokenizer_kwargs") or {}
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    steps = _cleaning(settings.get("clean", "whitespace"))
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    special = {
        name: getattr(inner, name)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if getattr(inner, name) is not None
    }
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=ours.context_length,
        model_input_names=["input_ids"],  # SigLIP looks at its padding
        padding_side=inner.padding_side,
        **special,
    ).save_pretrained(folder)


def _cleaning(kind: str) -> list[Any]:
    """open_clip's cleaning functions as steps of a tokenizer."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if kind == "canonicalize":
        punctuation = "[" + re.escape(string.punctuation.replace("_", "")) + "]"
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(punctuation), "")]
    if kind in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


# --------------------------------------------------------------------------------------------------
# A model in the files that Transformers and sentence-transformers load.


def write_transformers(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained` load."""
    folder.mkdir(parents=True, exist_ok=True)
    match files_of(model).format:
        case "transformers":
            plain = model.sentence_folder
            model.sentence_folder = None
            model.save(folder, metadata=header)
            model.sentence_folder = plain
        case "open_clip" if is_siglip(model.model_config):
            trunk = model.clip.visual.trunk
            converted = siglip_to_transformers(model.model_config, _state(model), trunk)
            _write(converted, model, folder, header, processor="Siglip")
            write_cleaning_tokenizer(model, folder)
        case "open_clip":
            _write_clip(model, folder, header)
        case _:
            raise ModelError(
                f"a {type(model).__name__} has no like in Transformers. Export it --to onnx."
            )


def write_sentence_transformers(model: Any, folder: Path, header: Mapping[str, str]) -> None:
    """Write what `SentenceTransformer(folder)` and Transformers load; features are raw."""
    write_transformers(model, folder, header)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    SentenceFolder.beside_transformers(pad_to_context=kind != "clip").write(folder)


def _write_clip(encoder: OpenClipEncoder, folder: Path, header: Mapping[str, str]) -> None:
    tokenizer = encoder.full_length_tokenizer
    standard = (
        isinstance(tokenizer, open_clip.SimpleTokenizer)
        and tokenizer.vocab_size == CLIP_VOCABULARY_SIZE
    )
    eos_id = tokenizer.eot_token_id if standard else -1  # other obstacles are named first
    converted = clip_to_transformers(encoder.model_config, _state(encoder), eos_id=eos_id)
    if not standard:
        raise ModelError("its tokenizer is not CLIP's own, which CLIPProcessor uses.")
    _write(converted, encoder, folder, header, processor="CLIP")
    write_clip_tokenizer(folder, context_length=encoder.model_config["text_cfg"]["context_length"])


def _state(encoder: OpenClipEncoder) -> dict[str, Tensor]:
    state = encoder.clip.state_dict()
    return {name: tensor.detach().float().cpu() for name, tensor in state.items()}


def _write(
    converted: Converted,
    encoder: OpenClipEncoder,
    folder: Path,
    header: Mapping[str, str],
    *,
    processor: str,
) -> None:
    config, state = converted
    preprocessing = preprocessing_to_transformers(
        open_clip.get_model_preprocess_cfg(encoder.clip), processor=processor
    )
    for name, content in (("config", config), ("preprocessor_config", preprocessing)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    save_weights(state, folder / "model.safetensors", {"format": "pt", **header})
