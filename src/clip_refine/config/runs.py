"""What one run of each verb depends on."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clip_refine.config.groups import (
    Count,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    NonNegative,
    PriorConfig,
    SettingsGroup,
    TrainConfig,
)
from clip_refine.recipes import RECIPES


class RefineConfig(SettingsGroup):
    """Everything one run of `clip-refine refine` depends on."""

    recipe: str = "clip-refine"
    """A named objective, which sets several of `loss`; other `loss` flags win. One of clip-refine,
    clip-refine-paper, balanced, hycd, self-kd, hycd+align, rafa, contrastive, contrastive-raw,
    contrastive+anchor, m2-mix, feature-distillation, logit-distillation."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    interpolate: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None
    """Keep weights between the model (0) and its refinement (1): often most of the gain and less of
    the loss. auto: the best of tenths on a tenth of the training images, which are held out."""
    out: Path = Path("runs/refine")
    """Folder for the results; it must not exist yet."""
    log: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send steps and scores to a tracker; tensorboard's files go to `out`/tensorboard."""
    report: bool = True
    """Write report.html, and report.json from which `clip-refine report` makes it again."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the held-out split, the order, the captions drawn and the references."""
    overwrite: bool = False
    """Replace `out` where it exists, once the new run is complete."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_recipe(cls, values: Any) -> Any:
        """Settings of `loss` that are not given come from the recipe."""
        if not isinstance(values, dict):
            return values
        loss = values.get("loss", {})
        given = loss.model_dump(exclude_unset=True) if isinstance(loss, LossConfig) else loss
        return {
            **values,
            "loss": {**recipe_settings(values.get("recipe", "clip-refine")), **given},
        }


class EvaluateConfig(SettingsGroup):
    """Everything one run of `clip-refine evaluate` depends on."""

    suite: str | None = None
    """Tasks to measure instead of `data` and `evaluation`: paper, quick, toy, or a .yaml file."""
    data_root: Path | None = None
    """suite: where its images are. Without it: beside its file, or here."""
    models: tuple[str, ...] = ()
    """suite: models side by side, each as for `model.name`, with a tag as in ViT-B-32@openai. A
    run's folder means its base and its model. Differences are taken from the first."""
    prompts: str | None = None
    """suite: one prompt set for all its tasks: paper, short, openai-imagenet, simple-imagenet, or
    a file."""
    missing: Literal["stop", "skip"] = "stop"
    """suite: stop with a list of what is not there, or leave those tasks out."""
    download: bool = False
    """suite: let torchvision fetch the datasets that it can."""
    cache: Path | None = None
    """suite: folder for features, which later runs reuse. Without it:
    $XDG_CACHE_HOME/clip-refine."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images. Without it: 0 on a CPU, up to 8 beside a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    out: Path | None = None
    """JSON file for the numbers."""
    save_features: Path | None = None
    """.safetensors file for the raw features, which `clip-refine posthoc` reads."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the held-out split; give the one a run was refined with."""
    overwrite: bool = False
    """Replace `out` and `save_features` where they exist."""


class PosthocConfig(SettingsGroup):
    """What training-free peers are fitted with."""

    neighbours: Count = 128
    """nnn: an item's bias is its mean similarity to so many of the nearest reference queries."""
    alpha: NonNegative = 0.75
    """nnn: the share of that mean that is taken off the item's scores."""
    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """modality-shift: the share of the gap between the centroids that is closed."""


def recipe_settings(name: Any) -> dict[str, Any]:
    """What a recipe sets in `loss`.

    Raises:
        ValueError: There is no such recipe; near ones are named.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(str(name), RECIPES, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(RECIPES)}."
    raise ValueError(f"recipe {name!r}: there is no such recipe.{hint}")


def demo_config(*, out: Path, seed: int, overwrite: bool) -> RefineConfig:
    """The toy world's settings: a small model and few pairs need larger steps than the paper's."""
    return RefineConfig(
        model=ModelConfig(name="toy"),
        data=DataConfig(train="toy"),
        train=TrainConfig(batch_size=128, learning_rate=3e-4),
        evaluation=EvaluationConfig(zero_shot=("toy",)),
        out=out,
        seed=seed,
        overwrite=overwrite,
    )
