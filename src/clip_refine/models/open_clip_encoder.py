"""open_clip models as dual encoders, and how they are saved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import save_file
from torch import Tensor, nn

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
