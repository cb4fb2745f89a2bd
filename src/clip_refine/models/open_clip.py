"""open_clip's models: loading by name or folder, encoding, saving."""

import difflib
import json
import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn
from torch.func import functional_call

from clip_refine.config import check_architecture
from clip_refine.models.checkpoints import (
    CheckpointFile,
    needs_code,
    no_code_of_models,
    open_checkpoint,
    read_json,
    weights_in,
)
from clip_refine.models.encoder import (
    OPEN_CLIP,
    PROBES,
    check_weights,
    count_tokens,
    cut_columns,
    hold_any,
    same_features,
    save_weights,
)
from clip_refine.support.console import remark
from clip_refine.support.errors import ModelError, first_line
from clip_refine.support.limits import LAYERS, LETTERS, too_many_layers

# --------------------------------------------------------------------------------------------------
# open_clip's text towers. A causal one that is pooled at the end-of-text token never looks behind
# it, so the padding behind a batch's longest text can go. What is left goes through open_clip's own
# code, with position table and attention mask as long as the text. Whether that is the same
# function is not read off the architecture but tried.


@dataclass(frozen=True)
class TextCut:
    """Where the padding of open_clip's tokens begins."""

    padding: int  # the id behind a text's end
    kept: int  # padding that is left: 1 where it is the end-of-text token, else 0

    def lengths(self, tokens: Tensor) -> Tensor:
        """Of (B, L) tokens, with what is kept behind each."""
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        last = ((tokens != self.padding) * places).amax(dim=1)
        return (last + self.kept).clamp(1, tokens.shape[1])

    def cut(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, L')."""
        return cut_columns(tokens, int(self.lengths(tokens).max()))


class _TextFeatures(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, normalize=False)  # CoCa would, unasked


def text_tower(clip: nn.Module) -> Any:
    """The module that holds the text tower's embeddings, transformer and projection."""
    return getattr(clip, "text", clip)


def encode_cut(clip: Any, tokens: Tensor) -> Tensor:
    """(B, L') → (B, d) raw features of an open_clip model whose texts may be cut."""
    tower, length = text_tower(clip), tokens.shape[1]
    features = _TextFeatures(clip)
    if length == len(tower.positional_embedding):
        return features(tokens)
    prefix = "clip" if tower is clip else "clip.text"
    sliced = {
        f"{prefix}.positional_embedding": tower.positional_embedding[:length],
        f"{prefix}.attn_mask": tower.attn_mask[:length, :length],
    }
    return functional_call(features, sliced, (tokens,), tie_weights=False)


@torch.no_grad()
def detect_text_cut(clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> TextCut | None:
    """How to cut a model's texts, or None where that would change their features."""
    tower = text_tower(clip)
    if any(getattr(tower, name, None) is None for name in ("positional_embedding", "attn_mask")):
        return None  # it sees its padding, or is another library's
    tokens = tokenizer(PROBES).to(tower.positional_embedding.device)
    expected = _TextFeatures(clip)(tokens)
    for kept in (0, 1):
        cut = TextCut(int(tokens[0, -1]), kept)
        try:
            # each alone, at exactly its length: rounded up, some padding would be left
            found = [
                encode_cut(clip, row[None, :length])
                for row, length in zip(tokens, cut.lengths(tokens).tolist(), strict=True)
            ]
        except RuntimeError:  # the lengths of its parts do not fit: something is appended to texts
            break
        if same_features(torch.cat(found), expected):
            return cut
    remark(
        f"Texts are encoded at their full length of {tokens.shape[1]} tokens: cut to their own, "
        "this model's features would be others."
    )
    return None


# --------------------------------------------------------------------------------------------------
# open_clip models as dual encoders, and how they are saved.


CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True)
class OpenClipTokenizer:
    """Texts → (B, L') ids, L' that of the longest text where this is exact."""

    tokenizer: Any  # open_clip's own, which makes the context length of any text
    text_cut: TextCut | None = None

    def __call__(self, texts: list[str]) -> Tensor:
        """B texts → (B, L') ids."""
        tokens = self.tokenizer(self._begin(texts))
        return tokens if self.text_cut is None else self.text_cut.cut(tokens)

    def _begin(self, texts: Sequence[str]) -> list[str]:
        """As much of each as can matter: a word takes the square of its length in time."""
        most = LETTERS * self.context_length if self.context_length else None
        return [text[:most] for text in texts]

    def lengths(self, tokens: Tensor) -> Tensor | None:
        """(B,) tokens of each text that features depend on; None where those are all."""
        return None if self.text_cut is None else self.text_cut.lengths(tokens)

    @property
    def context_length(self) -> int | None:
        """Tokens that the model reads."""
        known = isinstance(self.tokenizer, SimpleTokenizer | HFTokenizer)
        return self.tokenizer.context_length if known else None

    def token_counts(self, texts: Sequence[str]) -> list[int] | None:
        """Tokens of each text with start and end, before it is cut."""
        match self.tokenizer:
            case SimpleTokenizer():
                return [len(self.tokenizer.encode(text)) + 2 for text in self._begin(texts)]
            case HFTokenizer():
                cleaned = [self.tokenizer.clean_fn(text) for text in self._begin(texts)]
                return count_tokens(self.tokenizer.tokenizer, cleaned)
            case _:
                return None

    def are_special(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text, cleaned as open_clip does, holds a special token."""
        match self.tokenizer:
            case SimpleTokenizer(decoder=names, all_special_ids=ids):
                cleaned = [self.tokenizer.clean_fn(text).lower() for text in texts]
                return hold_any(cleaned, [names[number] for number in ids])
            case HFTokenizer(tokenizer=own):
                cleaned = [self.tokenizer.clean_fn(text) for text in texts]
                return hold_any(cleaned, own.all_special_tokens)
            case _:
                return [False] * len(texts)


class OpenClipEncoder(nn.Module):
    """An open_clip model behind the `DualEncoder` protocol.

    Attributes:
        clip: The open_clip model itself.
        preprocess: Its inference transform.
        tokenizer: Its tokenizer; rows end with the longest text where that is exact.
        model_config: open_clip's `model_cfg`, which rebuilds the architecture.
        full_length_tokenizer: Its tokenizer as open_clip made it.
        text_cut: How text is cut, None where the tower always needs full length.
        format: Which library loads what `save` writes.
    """

    format = OPEN_CLIP

    def __init__(
        self, clip: nn.Module, preprocess: Any, tokenizer: Any, model_config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.preprocess = preprocess
        self.model_config = model_config
        self.full_length_tokenizer = tokenizer
        self.eval()  # open_clip hands models out in train mode
        self.text_cut = detect_text_cut(clip, tokenizer)
        self.tokenizer = OpenClipTokenizer(tokenizer, self.text_cut)

    @property
    def logit_scale(self) -> Tensor:
        """0-d factor on cosines."""
        return self.clip.logit_scale.exp().squeeze()

    @property
    def logit_bias(self) -> Tensor | None:
        """0-d offset of SigLIP-type models, None for others."""
        bias = getattr(self.clip, "logit_bias", None)
        return None if bias is None else bias.squeeze()

    @property
    def padding_is_free(self) -> bool:
        """Whether any ids may stand behind a text's end."""
        return self.text_cut is not None

    def preprocessing(self) -> dict[str, Any]:
        """What `preprocess` does, as open_clip writes it down."""
        return {"open_clip": open_clip.get_model_preprocess_cfg(self.clip)}

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, d) raw image features.

        Raises:
            ValueError: The pixels are not of the size that the model was made for.
        """
        size = getattr(self.clip.visual, "image_size", None)
        expected = (size, size) if isinstance(size, int) else tuple(size) if size else None
        if expected and tuple(pixels.shape[-2:]) != expected:
            raise ValueError(
                f"pixels are {tuple(pixels.shape[-2:])}, but the image tower takes {expected}; "
                "use the model's own preprocess"
            )
        return self.clip.encode_image(pixels, normalize=False)  # CoCa would, unasked

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) → (B, d) raw text features; L is the context length, or less where cut."""
        if self.text_cut is None:
            return self.clip.encode_text(tokens, normalize=False)
        return encode_cut(self.clip, tokens)

    def add_projection(self) -> None:
        """End an image tower that has no linear layer at its end, such as SigLIP's, in one.

        It is the identity, so that features stay; `timm_proj: linear` holds it in the model's
        folder. Nothing is done to other towers, nor where open_clip would not load the result.
        """
        vision: dict[str, Any] = self.model_config["vision_cfg"]
        visual: Any = self.clip.visual
        if not isinstance(visual, TimmModel) or vision.get("timm_proj") != "none":
            return
        dim, size = self.model_config["embed_dim"], cast(Any, visual.image_size)
        try:
            tower: Any = TimmModel(
                vision["timm_model_name"],
                dim,
                image_size=size,
                pool=vision.get("timm_pool", "avg"),
                proj="linear",
            )
            tower.load_state_dict({**visual.state_dict(), "head.proj.weight": torch.eye(dim)})
        except (RuntimeError, AssertionError, TypeError, ValueError):
            return
        visual.head.add_module("proj", tower.head.proj.to(self.clip.logit_scale.device))
        self.model_config = {**self.model_config, "vision_cfg": {**vision, "timm_proj": "linear"}}

    def save(self, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write an open_clip folder that `local-dir:` loads, weights in float32.

        Args:
            folder: Created where missing.
            metadata: Texts for the safetensors header.
        """
        folder.mkdir(parents=True, exist_ok=True)
        preprocess_config = open_clip.get_model_preprocess_cfg(self.clip)
        config = {"model_cfg": self.model_config, "preprocess_cfg": preprocess_config}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in self.clip.state_dict().items()
        }
        save_weights(weights, folder / WEIGHTS_FILE, {"format": "pt", **(metadata or {})})
        if hasattr(self.full_length_tokenizer, "save_pretrained"):
            self.full_length_tokenizer.save_pretrained(str(folder))


# --------------------------------------------------------------------------------------------------
# open_clip models by name, tag, path or folder.


def load_open_clip(name: str, pretrained: str | None = None) -> OpenClipEncoder:
    """Load an open_clip model in evaluation mode with float32 weights.

    Args:
        name: An architecture (`ViT-B-32`), `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        pretrained: For an architecture: a tag, or a path to a .pt or .safetensors file. None takes
            the tag `openai` where the architecture has it.

    Raises:
        ModelError: Unknown architecture or tag (near ones are named), missing file or folder,
            weights that do not fit, or a download that failed.
    """
    try:
        schema, identifier = parse_model_name(name)
    except ValueError as error:
        raise ModelError(f"model.name {name!r}: {error}") from error
    if schema is None:
        pretrained = resolve_pretrained(name, pretrained)
    elif pretrained:
        raise ModelError(
            f"model.pretrained {pretrained!r} does not go with {name!r}, which names its own "
            "weights. Leave --model.pretrained out."
        )
    elif schema == "local-dir" and not (Path(identifier) / CONFIG_FILE).is_file():
        raise ModelError(f"{identifier}: no {CONFIG_FILE} there. Give an open_clip model's folder.")
    if schema == "local-dir":
        _check_settings(Path(identifier) / CONFIG_FILE)
    if schema == "hf-hub":
        path = _hub_weights(name, identifier)
    else:
        path = weights_in(Path(identifier)) if schema else Path(pretrained or "")
    if path is None or not path.is_file():
        return _create(name, pretrained)
    with open_checkpoint(path) as checkpoint:
        if schema != "local-dir":  # whose folder has checksums
            check_weights(path)
        return _create(name, None, checkpoint)


def load_weights_file(path: Path) -> tuple[OpenClipEncoder, str]:
    """Load a file of weights whose names and shapes tell the architecture.

    Args:
        path: OpenAI's TorchScript archive, a checkpoint of open_clip's trainer, or a state dict as
            .pt or .safetensors.

    Returns:
        The model, and what was recognised, as a part of a sentence.

    Raises:
        ModelError: The file is damaged, or its architecture cannot be told.
    """
    with open_checkpoint(path) as checkpoint:
        check_weights(path)
        config = openai_config(checkpoint.shapes) if checkpoint.is_openai else None
        if config is None:
            architecture, recognised = infer_architecture(checkpoint)
            return _create(architecture, None, checkpoint), recognised
        with TemporaryDirectory() as folder:
            settings = {"model_cfg": config, "preprocess_cfg": {}}
            (Path(folder) / CONFIG_FILE).write_text(json.dumps(settings), encoding="utf-8")
            model = _create(f"local-dir:{folder}", None, checkpoint)
        vision = config["vision_cfg"]
        return model, (
            f"OpenAI's weights, with QuickGELU: {vision['layers']} layers for images of "
            f"{vision['image_size']} pixels, {config['embed_dim']} dimensions"
        )


def _hub_weights(name: str, identifier: str) -> Path:
    """The file of weights that open_clip takes of a model of the Hub, downloaded."""
    try:
        with quiet_open_clip():
            return Path(download_pretrained_from_hf(identifier))
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelError(_why_not_loaded(name, None, None, error)) from error


def _create(
    name: str, pretrained: str | None, checkpoint: CheckpointFile | None = None
) -> OpenClipEncoder:
    """What open_clip makes, with its errors in our words."""
    brings_weights = name.startswith(("local-dir:", "hf-hub:"))
    shown = str(checkpoint.path) if checkpoint and not brings_weights else pretrained
    try:
        return _build(name, pretrained, checkpoint)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{shown or name}: could not be loaded: it holds more than weights, and other "
            "objects are not unpickled because they can run code. Save it as .safetensors, or save "
            "its state_dict only."
        ) from error
    except ImportError as error:
        raise ModelError(
            f"{name}: needs a package that is not installed ({error}). Install it with pip."
        ) from error
    except StopIteration as error:
        raise ModelError(f"{shown or name}: holds no weights. Give a state dict.") from error
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # settings and weights can make anything of it fail
        raise ModelError(_why_not_loaded(name, shown, checkpoint, error)) from error


def _build(name: str, pretrained: str | None, checkpoint: CheckpointFile | None) -> OpenClipEncoder:
    schema = parse_model_name(name)[0]
    architecture = name if schema else name.replace("/", "-")
    # A tag's weights were trained with their own activation; open_clip only warns where it differs.
    tag_config = {} if schema else open_clip.get_pretrained_cfg(architecture, pretrained or "")
    quick_gelu = bool(tag_config.get("quick_gelu", False))
    by_path = checkpoint if schema is None else None
    if by_path and not (open_clip.get_model_config(architecture) or {}).get("quick_gelu"):
        quick_gelu = _has_quick_gelu(by_path)
    with quiet_open_clip():
        if schema == "hf-hub":
            found = download_pretrained_from_hf(parse_model_name(name)[1], filename=CONFIG_FILE)
            _check_settings(Path(found))
        clip: Any
        clip, _, preprocess = open_clip.create_model_and_transforms(
            architecture,
            pretrained=pretrained,
            precision="fp32",
            force_quick_gelu=quick_gelu,
            load_weights=checkpoint is None,
            pretrained_text=False,  # a text tower's own ones, which are in the whole model's
            require_pretrained=checkpoint is None,
            weights_only=True,
            **(_usual_preprocess(architecture) if by_path else {}),
        )
        if checkpoint:
            _check_positions(clip, checkpoint)
            open_clip.load_checkpoint(clip, str(checkpoint.readable), weights_only=True)
        tokenizer = open_clip.get_tokenizer(architecture)
    model_config = open_clip.get_model_config(architecture) or {}
    if quick_gelu:
        model_config["quick_gelu"] = True
    return OpenClipEncoder(clip, preprocess, tokenizer, model_config)


# What a model's own settings may hand on to constructors of open_clip, Transformers and PyTorch.
_ALLOWED = {
    "tokenizer_kwargs": {
        *("clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens")
    },
    "act_kwargs": {"approximate"},
    "norm_kwargs": {"eps"},
    # what open_clip 4 hands on besides; 3 knows neither
    "timm_model_kwargs": {
        *("patch_size", "pos_embed_grid_size", "swiglu_mlp", "mlp_ratio", "attn_pool_mlp_ratio"),
        *("embed_dim", "depth", "num_heads"),
    },
    "hf_model_config": {"max_position_embeddings"},
}


def _check_settings(path: Path) -> None:
    """Refuse settings of a model's folder that reach further than they need to."""
    settings = read_json(path)
    model = settings.get("model_cfg") if isinstance(settings, dict) else None
    if not isinstance(model, dict):
        raise ModelError(f"{path}: has no settings under 'model_cfg'. Copy the model again.")
    if name := too_many_layers(model):
        raise ModelError(f"{path}: model_cfg.{name} asks for more than {LAYERS} layers.")
    for tower in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        group = model.get(tower, {})
        if not isinstance(group, dict) or (tower not in model and tower != "multimodal_cfg"):
            raise ModelError(f"{path}: has no settings under {tower!r}. Copy the model again.")
        for name, allowed in _ALLOWED.items():
            given = group.get(name) or {}
            unknown = sorted(given.keys() - allowed) if isinstance(given, dict) else [""]
            if unknown:
                what = f"{name}.{unknown[0]}" if unknown[0] else name
                raise ModelError(
                    f"{path}: model_cfg.{tower}.{what} is not handed on to another library. "
                    f"Allowed: {', '.join(sorted(allowed))}. Take it out if you trust the rest."
                )
        if ":" in str(group.get("timm_model_name")):  # timm's hf-hub: and local-dir:
            raise ModelError(
                f"{path}: model_cfg.{tower}.timm_model_name {group['timm_model_name']!r} names a "
                "model elsewhere. Allowed: an architecture of timm."
            )


def _has_quick_gelu(checkpoint: CheckpointFile) -> bool:
    """Whether a file's weights need an activation that their shapes do not show."""
    run = named_by_run(checkpoint)
    if checkpoint.is_openai:
        why = "they are OpenAI's"
    elif run and (open_clip.get_model_config(run) or {}).get("quick_gelu"):
        why = f"their run is called {run}"
    else:
        return False
    remark(f"{checkpoint.path}: its weights are used with QuickGELU, since {why}.")
    return True


def _check_positions(clip: Any, checkpoint: CheckpointFile) -> None:
    """Refuse position tables of another length, which open_clip resizes without a word."""
    for name, table in clip.state_dict().items():
        given = checkpoint.shapes.get(name) or checkpoint.shapes.get(name.removeprefix("text."))
        if name.endswith("positional_embedding") and given and given[0] != len(table):
            what = "image size" if name.startswith("visual.") else "context length"
            raise ValueError(
                f"{name} has {given[0]} positions in the file and {len(table)} in this model, "
                f"whose {what} is another one."
            )


def _usual_preprocess(architecture: str) -> dict[str, Any]:
    """What all published weights of an architecture agree on, since a file does not say it."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    settings = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    names = ("mean", "std", "interpolation", "resize_mode")
    found = {name: [tag.get(name) for tag in settings] for name in names}
    return {
        f"image_{name}": values[0]
        for name, values in found.items()
        if values and values[0] is not None and all(value == values[0] for value in values)
    }


def resolve_pretrained(name: str, pretrained: str | None) -> str:
    """The tag or path to load for an architecture."""
    check_architecture(name, open_clip.list_models())
    architecture = name.replace("/", "-")
    if not _is_dual(open_clip.get_model_config(architecture) or {}):
        raise ModelError(
            f"model.name {name!r}: open_clip's model for sound, or for captions alone. Give one "
            "with an image tower and a text tower."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        if "openai" in tags:
            return "openai"
        raise ModelError(
            f"model.pretrained: say which weights of {name} to load: a tag "
            f"({', '.join(tags) or 'it has none'}) or a path to a .pt or .safetensors file."
        )
    if open_clip.is_pretrained_cfg(architecture, pretrained) or Path(pretrained).is_file():
        return pretrained
    near = difflib.get_close_matches(pretrained, tags, n=3, cutoff=0.4)
    raise ModelError(
        f"model.pretrained {pretrained!r}: neither a file nor a tag of {name}."
        + (f" Did you mean {', '.join(near)}?" if near else f" Tags: {', '.join(tags) or 'none'}.")
    )


def _why_not_loaded(
    name: str, shown: str | None, checkpoint: CheckpointFile | None, error: Exception
) -> str:
    if needs_code(error):
        return (
            f"{name}: needs Python code that comes with a model, which is never run here. Wrap the "
            "model in a DualEncoder of your own and pass --model.factory."
        )
    failed = f"{f'{name} ({shown})' if shown else name}: could not be loaded: {_reason(error)}"
    if checkpoint and shown:
        fitting = fitting_architectures(checkpoint.shapes)
        known = fitting and name.replace("/", "-") not in fitting
        belong = f"They are weights of {' or '.join(fitting)}." if known else ""
        return f"{failed} {belong or 'Do they belong to this model?'}"
    if checkpoint or name.startswith("local-dir:"):
        return f"{failed} Do the weights belong to this architecture?"
    return (
        f"{failed} If there is no network here, download the weights elsewhere and give their path "
        "with --model.pretrained or local-dir:FOLDER."
    )


def _reason(error: Exception) -> str:
    """The first line of an error; of PyTorch's about weights that do not fit, which they are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) < 2 or not lines[0].startswith("Error(s) in loading state_dict"):
        return first_line(error)
    reasons = []
    for line in lines[1:3]:
        names = re.findall('"(.+?)"', line)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        start = line.partition(":")[0]
        reasons.append(f"{start}: {', '.join(names[:3])}{more}." if names else line)
    return " ".join(reasons)


# --------------------------------------------------------------------------------------------------
# Which open_clip architecture a set of weights belongs to, by names and shapes.


Shapes = Mapping[str, tuple[int, ...]]
_FREE = ("logit_scale", "logit_bias")  # 0-d or (1,), and a bias that is missing is made
_IGNORED = ("position_ids",)


def named_by_run(checkpoint: CheckpointFile) -> str:
    """The architecture that open_clip's trainer named a run after, "" where it did not."""
    named = re.search(r"model_(.+?)-lr_", checkpoint.run_name)
    return named.group(1) if named else ""


def infer_architecture(checkpoint: CheckpointFile) -> tuple[str, str]:
    """The name of the only architecture of open_clip with these weights, and how it was found."""
    found = fitting_architectures(checkpoint.shapes)
    if len(found) == 1:
        return found[0], f"weights of {found[0]}"
    run = named_by_run(checkpoint)
    quick = [name for name in found if name.endswith("-quickgelu")]
    if run in found:
        said = f"weights of {run}, as their run is called"
        if quick and run not in quick:
            said += (
                ", with GELU. A run that began with OpenAI's weights has QuickGELU under the same "
                f"name: then say --model.name {quick[0]} --model.pretrained {checkpoint.path}"
            )
        return run, said
    if not found:
        raise ModelError(
            f"{checkpoint.path}: no architecture of open_clip that can be built here has these "
            f"{len(checkpoint.shapes)} weights. Say which it is: --model.name ARCHITECTURE "
            f"--model.pretrained {checkpoint.path}"
        )
    raise ModelError(
        f"{checkpoint.path}: its weights fit {' and '.join(found)}, which differ in "
        + ("activation (OpenAI's, MetaCLIP's and DFN's are quickgelu)" if quick else "settings")
        + f". Say which it is: --model.name {found[0]} --model.pretrained {checkpoint.path}"
    )


def fitting_architectures(shapes: Shapes) -> list[str]:
    """All architectures of open_clip whose weights have these names and shapes."""
    expected = _comparable(shapes)
    return [
        name
        for name in open_clip.list_models()
        if _may_fit(open_clip.get_model_config(name) or {}, shapes)
        and _comparable(_shapes_of(name)) == expected
    ]


def openai_config(shapes: Shapes) -> dict[str, Any] | None:
    """open_clip's `model_cfg` for weights named as OpenAI's, None for other names.

    The numbers of layers, widths and sizes all show in the shapes; heads are 64 wide everywhere.
    """
    try:
        text_width = shapes["ln_final.weight"][0]
        return {
            "embed_dim": shapes["text_projection"][1],
            "quick_gelu": True,
            "vision_cfg": _vision_config(shapes),
            "text_cfg": {
                "context_length": shapes["positional_embedding"][0],
                "vocab_size": shapes["token_embedding.weight"][0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": _count(shapes, r"transformer\.resblocks\.(\d+)\."),
            },
        }
    except (KeyError, IndexError):
        return None


def _vision_config(shapes: Shapes) -> dict[str, Any]:
    if "visual.proj" in shapes:  # a vision transformer
        positions = shapes["visual.positional_embedding"][0]
        width, _, _, patch_size = shapes["visual.conv1.weight"]
        layers: Any = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
    else:  # a ResNet
        positions = shapes["visual.attnpool.positional_embedding"][0]
        width, patch_size = shapes["visual.layer1.0.conv1.weight"][0], None
        layers = [_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    grid = round((positions - 1) ** 0.5)
    size = grid * (patch_size or 32)  # a ResNet halves the image five times
    return {"image_size": size, "layers": layers, "width": width, "patch_size": patch_size}


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match.group(1) for name in shapes if (match := re.match(pattern, name))})


def _is_dual(config: Mapping[str, Any]) -> bool:
    """Whether open_clip makes two towers of this; 4 also has models for sound and generation."""
    generates = config.keys() & {"genlip_cfg", "genlap_cfg"}
    return {"vision_cfg", "text_cfg"} <= config.keys() and not generates


def _may_fit(config: dict[str, Any], shapes: Shapes) -> bool:
    """What the settings say without building the model, which takes a moment for each."""
    if not _is_dual(config):
        return False
    text, vision = config["text_cfg"], config["vision_cfg"]
    own_tower = any(name.startswith("text.") for name in shapes)
    if "hf_model_name" in text:
        return own_tower and "text.token_embedding.weight" not in shapes
    prefix = "text." if own_tower else ""
    vocabulary = shapes.get(f"{prefix}token_embedding.weight")
    expected = (text.get("vocab_size", 49408), text.get("width", 512))
    timm = "timm_model_name" in vision
    return (
        own_tower == bool(config.get("custom_text"))
        and vocabulary == expected
        and _count(shapes, rf"{prefix}transformer\.resblocks\.(\d+)\.") == text.get("layers", 12)
        and timm == any(name.startswith("visual.trunk.") for name in shapes)
        and ("multimodal_cfg" in config) == any(name.startswith("text_decoder.") for name in shapes)
    )


def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an architecture, built without memory for its weights."""
    with quiet_open_clip():
        try:
            with torch.device("meta"):
                model = open_clip.create_model(name, pretrained_text=False, device="meta")
        except (OSError, ImportError, RuntimeError, ValueError):  # needs the Hub or a package
            return {}
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _comparable(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, shape in shapes.items()
        if name not in _FREE and not name.endswith(_IGNORED)
    }


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Without a model's own code, and what open_clip and the Hub log: a `ModelError` says it."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), no_code_of_models():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
