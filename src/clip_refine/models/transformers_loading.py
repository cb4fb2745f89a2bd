"""Transformers and sentence-transformers models by folder or Hub name."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_refine.errors import ModelError
from clip_refine.models.sentence_folder import SentenceFolder
from clip_refine.models.transformers_encoder import TransformersEncoder, quiet_transformers

INSTALL = "pip install 'clip-refine[hf]'"


@dataclass(frozen=True)
class ProcessorParts:
    """Stands in for the processor of a model that has none of its own.

    Attributes:
        image_processor: Transformers' image processor.
        tokenizer: Transformers' tokenizer.
    """

    image_processor: Any
    tokenizer: Any

    def save_pretrained(self, folder: Path) -> None:
        """Write the files of both."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_transformers(name: str) -> TransformersEncoder:
    """Load a dual encoder of Transformers or sentence-transformers with float32 weights.

    Args:
        name: A folder, or a name on the Hugging Face Hub.

    Raises:
        ModelError: It cannot be found, is no dual encoder, lacks weights, would need code from its
            folder, or the extra `[hf]` is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{name}: needs Transformers. Install it with {INSTALL}.") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers that decode are forks
    try:
        with quiet_transformers():
            sentence_folder = SentenceFolder.find(name)
            where: dict[str, Any] = {"trust_remote_code": False}
            if sentence_folder and sentence_folder.module:
                where["subfolder"] = sentence_folder.module
            _check_kind(name, transformers.AutoConfig.from_pretrained(name, **where))
            loaded = transformers.AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **where
            )
            processor = _load_processor(name, where)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{name}: needs a package that is not installed ({reason}). Install it with pip."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(_why_not_loaded(name, error)) from error
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights of {type(model).__name__} are missing or do not fit, "
            f"the first is {missing[0]}. Do config and weights belong together?"
        )
    for parameter in model.parameters():
        # out of the mapped file, where weights lie as they fall and kernels round accordingly
        parameter.data = parameter.data.clone()
    return TransformersEncoder(model, processor, sentence_folder=sentence_folder)


def _load_processor(name: str, where: dict[str, Any]) -> Any:
    """The processor, or image processor and tokenizer where the model has no joint one."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(name, **where)
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return processor
    return ProcessorParts(
        transformers.AutoImageProcessor.from_pretrained(name, **where),
        transformers.AutoTokenizer.from_pretrained(name, **where),
    )


def _check_kind(name: str, config: Any) -> None:
    """Refuse before the weights are read what cannot work with them."""
    from transformers import MODEL_MAPPING

    if config.model_type == "siglip2":
        raise ModelError(
            f"{name}: a NaFlex SigLIP 2, whose images differ in shape, so that they cannot be "
            "stacked. Use a fixed-resolution one, such as google/siglip2-base-patch16-224."
        )
    kind = MODEL_MAPPING.get(type(config), None)
    lacking = [
        method
        for method in ("get_image_features", "get_text_features")
        if not hasattr(kind, method)
    ]
    if lacking:
        raise ModelError(
            f"{name}: a {config.model_type} model is no dual encoder: it has no "
            f"{' and no '.join(lacking)}. Give a CLIP- or SigLIP-type model."
        )


def _why_not_loaded(name: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"{name}: is built by code in its own folder, which is never run here. Wrap it in a "
            "DualEncoder of your own and pass --model.factory."
        )
    if Path(name).exists():
        return f"{name}: could not be loaded: {reason}"
    return (
        f"{name}: could not be loaded: {reason} If there is no network here, download the model "
        "elsewhere and give its folder."
    )
