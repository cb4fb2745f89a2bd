"""Every setting, its default and its range. The defaults are the paper's and live only here.

The same groups and names serve as YAML keys, Python arguments and command-line flags:
`train: {batch_size: 256}`, `TrainConfig(batch_size=256)`, `--train.batch-size 256`.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clip_refine.errors import ConfigError
from clip_refine.recipes import RECIPES

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16", "bf16-image", "bf16-text"]


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


Settings = TypeVar("Settings", bound=_Settings)


class ModelConfig(_Settings):
    """The model to start from."""

    name: str = "ViT-B-32"
    """An open_clip architecture, `local-dir:FOLDER`, `hf-hub:ORG/NAME`, or `toy`."""
    pretrained: str | None = None
    """Weights for an architecture: a tag such as `openai`, or a path to .pt/.safetensors.
    Without it: `openai` where the architecture has that tag."""


class DataConfig(_Settings):
    """The captioned images. Paths in a file are relative to that file."""

    train: str | None = None
    """Pairs to refine on: a .csv or .tsv file with an image and a caption column, or `toy`."""
    val: str | None = None
    """Pairs for the before/after numbers. Without it a part of `train` is held out."""
    image_column: str | None = None
    """Column of the image paths. Without it: image, file_name, filepath, ... as found."""
    caption_column: str | None = None
    """Column of the captions. Without it: caption, text, title, ... as found."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the training images held out (at least 100) where `val` is not given."""


class TrainConfig(_Settings):
    """One epoch of training."""

    epochs: Count = 1
    """Passes over the training pairs."""
    batch_size: Annotated[int, Field(ge=2)] = 512
    """Pairs a step, over all processes together."""
    learning_rate: Positive = 1e-6
    """AdamW's learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine down to zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay."""
    decay: Literal["all", "matrices"] = "all"
    """What is decayed: every weight (the paper), or none of biases, norms and logit_scale."""
    clip_norm: Positive | None = None
    """Gradients are scaled down to this total norm where they exceed it."""
    logit_scale: Literal["frozen", "trained"] = "frozen"
    """The default objective does not use the logit scale, so it stays as it is."""
    normalization_statistics: Literal["frozen", "updated"] = "frozen"
    """Running statistics of BatchNorm layers. Updating them moves the student off its teacher."""
    precision: Precision = "auto"
    """bf16 autocast over float32 weights, for both towers or one. auto measures each tower."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images. Without it: 0 on a CPU, up to 8 beside a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


class LossConfig(_Settings):
    """The objective: a weighted sum of losses. `recipe` sets several of these at once."""

    rafa_weight: NonNegative = 1.0
    """Weight of random feature alignment."""
    hycd_weight: NonNegative = 1.0
    """Weight of hybrid contrastive-distillation."""
    contrastive_weight: NonNegative = 0.0
    """Weight of the symmetric contrastive loss."""
    contrastive_normalize: bool = True
    """Contrastive: on unit features; off for raw ones, as the paper's baseline has it."""
    contrastive_scale: Positive | None = None
    """Contrastive and m2-mix: factor on similarities, 100 or 14.3. Without it: the model's own."""
    alignment_weight: NonNegative = 0.0
    """Weight of the mean squared distance between image and text."""
    anchor_weight: NonNegative = 0.0
    """Weight of the mean squared distance to the teacher's features."""
    m2_mix_weight: NonNegative = 0.0
    """Weight of the contrastive loss with mixed features as hard negatives."""
    logit_distillation_weight: NonNegative = 0.0
    """Weight of the mean squared distance to the teacher's similarities."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """HyCD: share of the true pairs in the target; the rest is the teacher's softmax."""
    temperature: Positive | None = 1.0
    """HyCD: similarities are divided by it. None: 1 / the model's own logit scale."""
    normalize: bool = False
    """HyCD: compare unit features (with `temperature` None or about 0.01) instead of raw ones."""
    rafa_reduction: Literal["mean", "sum"] = "mean"
    """RaFA: `mean` over batch and dimension (as released), or the paper's half sum."""

    rafa_decay: Literal["none", "linear"] = "none"
    """RaFA: its weight stays, or falls linearly to zero over the run."""
    references: Literal["shared", "independent"] = "shared"
    """RaFA: one reference for both sides of a pair (the method), or one each (its ablation)."""
    feature_scale: Literal["auto", "as-is", "canonical"] = "auto"
    """as-is: raw features as the model gives them (the paper). canonical: trained at the paper's
    norms, HyCD on unit features. auto: canonical where norms are far from the paper's."""

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "LossConfig":
        names = [name for name in type(self).model_fields if name.endswith("_weight")]
        if not any(getattr(self, name) for name in names):
            raise ValueError("every weight is 0, so there is nothing to minimise; set one above 0")
        return self


class PriorConfig(_Settings):
    """The distribution of RaFA's random references."""

    kind: Literal[
        "standard_normal",
        "uniform",
        "gaussian_image",
        "gaussian_text",
        "gaussian_both",
        "fixed",
        "norm_matched",
    ] = "standard_normal"
    """standard_normal: N(0, scale I). uniform: the same variance, evenly spread. gaussian_*: mean
    and deviation of the model's own features. fixed: one vector for all. norm_matched: N(0, s I)
    with the mean norm of the model's own features."""
    scale: NonNegative = 1.0
    """Variance of every dimension (the paper's beta). 0 pulls every feature to the origin."""


class EvaluationConfig(_Settings):
    """How the before/after numbers are taken; always in float32."""

    zero_shot: tuple[str, ...] = ()
    """Zero-shot tasks: folders with one sub-folder of images a class, or `toy`."""
    template: str = "a photo of a {}."
    """Prompt for the class names of those folders; `{}` stands for the name."""
    batch_size: Count = 256
    """Images or captions encoded at a time."""

    @field_validator("template")
    @classmethod
    def _has_a_place_for_the_name(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError(f"{template!r} has no {{}} for the class name")
        return template


class RefineConfig(_Settings):
    """Everything one run of `clip-refine refine` depends on."""

    recipe: str = "clip-refine"
    """A named objective, which sets several of `loss`; other `loss` flags win. One of clip-refine,
    clip-refine-paper, hycd, self-kd, hycd+align, rafa, contrastive, contrastive-raw,
    contrastive+anchor, m2-mix, feature-distillation, logit-distillation, balanced."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    out: Path = Path("runs/refine")
    """Folder for the results; it must not exist yet."""
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
            "loss": {**_recipe_settings(values.get("recipe", "clip-refine")), **given},
        }


class EvaluateConfig(_Settings):
    """Everything one run of `clip-refine evaluate` depends on."""

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


class PosthocConfig(_Settings):
    """What training-free peers are fitted with."""

    neighbours: Count = 128
    """nnn: an item's bias is its mean similarity to so many of the nearest reference queries."""
    alpha: NonNegative = 0.75
    """nnn: the share of that mean that is taken off the item's scores."""
    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """modality-shift: the share of the gap between the centroids that is closed."""


def _recipe_settings(name: Any) -> dict[str, Any]:
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(str(name), RECIPES, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(RECIPES)}."
    raise ValueError(f"recipe {name!r}: there is no such recipe.{hint}")


def with_recipe(config: RefineConfig, name: str) -> RefineConfig:
    """`config` with another recipe; its other settings stay, those of `loss` are the recipe's.

    Raises:
        ConfigError: There is no such recipe; near ones are named.
    """
    try:
        return override(config, recipe=name, loss=_recipe_settings(name))
    except ValueError as error:
        raise ConfigError(str(error)) from error


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


def load_config(kind: type[Settings], path: Path) -> Settings:
    """Read `kind` from a YAML file.

    Raises:
        ConfigError: The file is missing, is no YAML mapping, or holds an unknown or bad setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML. {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as 'seed: 42', got {values!r:.60}.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, where=f"{path}: ")) from error


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML, in the order of the fields; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: Settings, **changes: Any) -> Settings:
    """A validated copy with some settings replaced.

    Args:
        config: What to start from.
        changes: Settings by name; for a group a dict of those to replace in it, as in
            `override(config, seed=1, train={"epochs": 2})`.

    Raises:
        ConfigError: A setting does not exist or is out of range.
    """
    values = config.model_dump()
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def explain(error: ValidationError, *, where: str = "") -> str:
    """A validation error in one line a problem: setting, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}{name}: there is no such setting. `--help` lists them.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            shown = "" if isinstance(given, dict | BaseModel) else f", got {given!r}"
            lines.append(f"{where}{name}: {message}{shown}.")
    return "\n".join(lines)
