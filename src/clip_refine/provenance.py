"""Where a saved model comes from: plain data without local paths, beside the weights."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelFacts(_Facts):
    """The model that was started from.

    Attributes:
        name: What to call it: `ViT-B-32 (openai)`, a Hub name, or a folder's last part.
        hub_id: Its name on the Hugging Face Hub, where it is known.
        licence: The Hub's identifier of its licence, where its folder names one.
    """

    name: str
    hub_id: str | None = None
    licence: str | None = None


class DataFacts(_Facts):
    """Pairs of image and captions.

    Attributes:
        name: The file's or data set's name.
        images: How many.
        captions: How many they have together.
        fingerprint: 32 hexadecimal digits, see `clip_refine.data.content.pairs_fingerprint`; of a
            stream those of its first pairs.
    """

    name: str
    images: int
    captions: int
    fingerprint: str


class Provenance(_Facts):
    """Everything that a model's card and the header of its weights say.

    Attributes:
        version: Of clip-refine.
        made: How the model came about.
        base: The model that was started from.
        recipe: The named objective of a refinement, or how else the weights were made.
        train: What it was refined on.
        held_out: What it was measured on.
        settings: Name → value of what matters to repeat it.
    """

    version: str
    made: Literal["refined", "interpolated", "converted"]
    base: BaseModelFacts
    recipe: str | None = None
    train: DataFacts | None = None
    held_out: DataFacts | None = None
    settings: Mapping[str, str | int | float | bool] = {}

    def header(self) -> dict[str, str]:
        """Texts for a safetensors header: version, base, recipe, data and its fingerprint."""
        texts = {
            "clip_refine_version": self.version,
            "made": self.made,
            "base_model": self.base.name,
            "base_hub_id": self.base.hub_id,
            "recipe": self.recipe,
        }
        if self.train:
            texts |= {"data": self.train.name, "data_fingerprint": self.train.fingerprint}
        return {name: text for name, text in texts.items() if text is not None}
