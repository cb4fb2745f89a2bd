"""A model's name → its tokenizer, without its weights where that is possible."""

from typing import Any

import open_clip

from clip_refine.build.loading import build_model, model_source
from clip_refine.config import ModelConfig
from clip_refine.errors import ModelError
from clip_refine.models.open_clip_loading import quiet_open_clip


def build_tokenizer(config: ModelConfig) -> Any:
    """What turns texts into tokens for this model.

    Raises:
        ModelError: The model or its tokenizer cannot be found or loaded.
    """
    architecture = config.name.replace("/", "-")
    is_open_clip = model_source(config.name)[0] == "open_clip"
    if not is_open_clip or architecture not in open_clip.list_models():
        return build_model(config).tokenizer
    try:
        with quiet_open_clip():
            return open_clip.get_tokenizer(architecture)
    except (OSError, ImportError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{config.name}: its tokenizer could not be loaded: {reason} Name another model, or "
            "leave --model.name out to count as OpenAI's CLIP does."
        ) from error
