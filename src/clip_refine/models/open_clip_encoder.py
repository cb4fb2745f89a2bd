"""open_clip models as dual encoders: loading by name, tag, path or folder, and saving."""

import difflib
import json
import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_refine.errors import ModelError
from clip_refine.models.text_length import CuttingTokenizer, detect_text_cut, text_tower

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


class OpenClipEncoder(nn.Module):
    """An open_clip model behind the `DualEncoder` protocol.

    Attributes:
        clip: The open_clip model itself.
        preprocess: Its inference transform.
        tokenizer: Its tokenizer; rows end with the longest text where that is exact.
        model_config: open_clip's `model_cfg`, which rebuilds the architecture.
        full_length_tokenizer: Its tokenizer as open_clip made it.
        text_cut: How text is cut, None where the tower always needs full length.
    """

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
        self.tokenizer = CuttingTokenizer(tokenizer, self.text_cut) if self.text_cut else tokenizer

    @property
    def logit_scale(self) -> Tensor:
        """0-d factor on cosines."""
        return self.clip.logit_scale.exp().squeeze()

    @property
    def logit_bias(self) -> Tensor | None:
        """0-d offset of SigLIP-type models, None for others."""
        bias = getattr(self.clip, "logit_bias", None)
        return None if bias is None else bias.squeeze()

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
        return self.text_cut.encode(text_tower(self.clip), tokens)

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
            name: (tensor.float() if tensor.is_floating_point() else tensor)
            .detach()
            .cpu()
            .contiguous()
            .clone()  # safetensors refuses tensors that share memory
            for name, tensor in self.clip.state_dict().items()
        }
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", **(metadata or {})})
        # safetensors lets only the owner read its files
        (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)
        if hasattr(self.full_length_tokenizer, "save_pretrained"):
            self.full_length_tokenizer.save_pretrained(str(folder))


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
        pretrained = _resolve_pretrained(name, pretrained)
    elif pretrained:
        raise ModelError(
            f"model.pretrained {pretrained!r} does not go with {name!r}, which names its own "
            "weights. Leave --model.pretrained out."
        )
    elif schema == "local-dir" and not (Path(identifier) / CONFIG_FILE).is_file():
        raise ModelError(f"{identifier}: no {CONFIG_FILE} there. Give an open_clip model's folder.")
    try:
        return _create(name, schema, pretrained)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{pretrained or name}: could not be loaded: it holds more than weights, and other "
            "objects are not unpickled because they can run code. Save it as .safetensors, or save "
            "its state_dict only."
        ) from error
    except ImportError as error:
        raise ModelError(
            f"{name}: needs a package that is not installed ({error}). Install it with pip."
        ) from error
    except StopIteration as error:
        raise ModelError(f"{pretrained or name}: holds no weights. Give a state dict.") from error
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(_why_not_loaded(name, schema, pretrained, error)) from error


def _create(name: str, schema: str | None, pretrained: str | None) -> OpenClipEncoder:
    architecture = name if schema else name.replace("/", "-")
    # A tag's weights were trained with their own activation; open_clip only warns where it differs.
    tag_config = {} if schema else open_clip.get_pretrained_cfg(architecture, pretrained or "")
    quick_gelu = bool(tag_config.get("quick_gelu", False))
    logging.disable(logging.ERROR)  # open_clip and the Hub client log what ModelError says once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clip, _, preprocess = open_clip.create_model_and_transforms(
                architecture,
                pretrained=pretrained,
                precision="fp32",
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
                weights_only=True,
            )
            tokenizer = open_clip.get_tokenizer(architecture)
    finally:
        logging.disable(logging.NOTSET)
    model_config = open_clip.get_model_config(architecture) or {}
    if quick_gelu:
        model_config["quick_gelu"] = True
    return OpenClipEncoder(clip, preprocess, tokenizer, model_config)


def _resolve_pretrained(name: str, pretrained: str | None) -> str:
    """The tag or path to load for an architecture."""
    architecture = name.replace("/", "-")
    architectures = open_clip.list_models()
    if architecture not in architectures:
        near = difflib.get_close_matches(architecture, architectures, n=3, cutoff=0.5)
        raise ModelError(
            f"model.name {name!r}: no such open_clip architecture."
            + (f" Did you mean {', '.join(near)}?" if near else "")
            + " A folder is written local-dir:FOLDER, a Hub model hf-hub:ORG/NAME."
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


def _why_not_loaded(name: str, schema: str | None, pretrained: str | None, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = f"{name} ({pretrained})" if pretrained else name
    if "TorchScript" in str(error):
        return (
            f"{what}: is a TorchScript archive, which holds code besides weights. For OpenAI's "
            "models pass --model.pretrained openai; for your own save its state_dict()."
        )
    if schema == "hf-hub" or (schema is None and not Path(pretrained or "").is_file()):
        return (
            f"{what}: could not be loaded: {reason} If there is no network here, download the "
            "weights elsewhere and give their path with --model.pretrained or local-dir:FOLDER."
        )
    return f"{what}: could not be loaded: {reason} Do the weights belong to this architecture?"
