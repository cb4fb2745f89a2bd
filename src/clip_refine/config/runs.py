"""What each verb is told: groups of settings, recipes over them, files of them."""

import difflib
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from clip_refine.config.settings import (
    LINEAR_RECIPES,
    RECIPES,
    Count,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LossConfig,
    ModelConfig,
    NonNegative,
    Positive,
    PriorConfig,
    SettingsGroup,
    TrainConfig,
    explain,
    named_model,
    no_end,
)
from clip_refine.support.errors import ConfigError
from clip_refine.support.limits import parse_yaml, read_text, shown

# --------------------------------------------------------------------------------------------------
# What one run of each verb depends on.


class RefineConfig(SettingsGroup):
    """Everything one run of `clip-refine refine` depends on."""

    recipe: str = Field(
        default="clip-refine",
        description="A named objective, which sets several of `loss`; other `loss` flags win. One "
        f"of {', '.join(RECIPES)}.",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guard: GuardConfig = GuardConfig()
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
    resume: str | None = None
    """Go on where a run stopped: its folder, or auto for that of `out`, where auto begins anew if
    there is nothing to go on from."""
    overwrite: bool = False
    """Replace `out` where it exists, once the new run is complete."""
    dry_run: bool = False
    """Say pairs, steps, time, memory and what is trained, from a step that is measured, and stop
    there."""

    def check_there(self) -> None:
        """Refuse by a ConfigError a stream that does not tell its end, before libraries load."""
        if (name := self.data.endless) and self.train.steps is None:
            raise no_end(name, self.train.batch_size)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_recipe(cls, values: Any) -> Any:
        """Settings of `loss` that are not given come from the recipe."""
        if not isinstance(values, dict):
            return values
        loss = values.get("loss", {})
        given = loss.model_dump(exclude_unset=True) if isinstance(loss, LossConfig) else loss
        if not isinstance(given, dict):
            return values  # so that the check of its own says what it is
        train = values.get("train")
        parts = train if isinstance(train, dict) else {}
        trained = parts.get("parameters", getattr(train, "parameters", "all"))
        own = recipe_settings(values.get("recipe", "clip-refine"), trained)
        return {**values, "loss": {**own, **given}}


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
    save_threshold: Path | None = None
    """JSON file, best beside the model, for how a cosine becomes the probability that a pair fits,
    and the thresholds for `precision` and `false_positive_rate`."""
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """save_threshold: share of true pairs among those let through, true and wrong being as many."""
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """save_threshold: share of wrong pairs that are let through."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the held-out split; give the one a run was refined with."""
    overwrite: bool = False
    """Replace `out`, `save_features` and `save_threshold` where they exist."""


def refuse_idle(config: EvaluateConfig) -> None:
    """Refuse settings that this call would not heed: a suite's without one, others beside one."""
    of_suite = ("data_root", "models", "prompts", "missing", "download", "cache")
    why = {
        "save_features": "does not go with --suite, which keeps them in --cache.",
        "save_threshold": "goes with one model on --data.val, not with --suite.",
        **dict.fromkeys(
            ("data", "evaluation.zero_shot", "evaluation.template"),
            "does not go with --suite, whose file names sources, tasks and prompts.",
        ),
        **({"model": "does not go with --models. Name it there."} if config.models else {}),
    }
    if config.suite is None:
        advice = "belongs to a suite. Name one with --suite, or leave it out."
        why = dict.fromkeys(of_suite, advice)
    if config.save_threshold is None:
        advice = "belongs to --save-threshold. Give that, too, or leave it out."
        why |= dict.fromkeys(("precision", "false_positive_rate"), advice)
    for name, reason in why.items():
        given = attrgetter(name)
        if given(config) != given(EvaluateConfig()):
            raise ConfigError(f"--{name.replace('_', '-')} {reason}")


PEER_NAMES = (
    *("mean-centring", "distribution-normalisation", "nnn", "modality-shift"),
    *("fold", "standardise", "realign"),
)
"""What `posthoc fit` can fit; the formulas stand in `vectors/transforms.py`, under these names."""


class PosthocConfig(SettingsGroup):
    """What training-free peers are fitted with."""

    neighbours: Count = 128
    """nnn: an item's bias is its mean similarity to so many of the nearest reference queries."""
    alpha: NonNegative = 0.75
    """nnn: the share of that mean that is taken off the item's scores."""
    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """modality-shift: the share of the gap between the centroids that is closed."""
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """fold: the share of the component along each modality's mean that is taken out."""


class VectorsConfig(SettingsGroup):
    """What maps of stored vectors are learnt with."""

    recipe: str = "centred"
    """A named objective, as for `refine --recipe`; centred folds the means out first."""
    owner: str | None = None
    """Column of .parquet, or of clip-retrieval's metadata, that says which image a row is of."""
    steps: Count = 60
    """Steps of the optimiser."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Pairs a step; all there are where there are fewer."""
    learning_rate: Positive = 3e-4
    """AdamW's learning rate."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled decay of what was learnt: toward the start, not toward zero."""
    rank: Count | None = None
    """Rank of what is added to the start. Without it: full."""
    rafa_weight: NonNegative | None = None
    """Weight of random feature alignment. Without it: the recipe's."""
    interpolate: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = None
    """Keep maps between the start (0; the fold, for centred) and what was learnt (1). auto: the
    best of tenths on a tenth of the images that are learnt from, which are held out."""
    logit_scale: Positive = 100.0
    """The factor on cosines of the model that made the vectors."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the images that is not learnt from but measured on."""
    resamples: Count = 1000
    """Of the bootstrap over held-out images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 42
    """Of the split, the order, the captions drawn and the references."""


def recipe_settings(name: Any, parameters: str) -> dict[str, Any]:
    """What a recipe sets in `loss` where `train.parameters` are those.

    A ValueError names near ones where there is none.
    """
    if name in RECIPES:
        linear = LINEAR_RECIPES.get(name, {}) if parameters == "projections" else {}
        return {**RECIPES[name], **linear}
    near = difflib.get_close_matches(str(name), RECIPES, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(RECIPES)}."
    raise ValueError(f"recipe {name!r}: there is no such recipe.{hint}")


def demo_config(
    *, out: Path, seed: int, overwrite: bool, recipe: str = "clip-refine"
) -> RefineConfig:
    """The toy world's settings: a small model and few pairs need larger steps than the paper's."""
    config = RefineConfig(
        model=ModelConfig(name="toy"),
        data=DataConfig(train="toy"),
        train=TrainConfig(batch_size=128, learning_rate=3e-4),
        evaluation=EvaluationConfig(zero_shot=("toy",)),
        out=out,
        seed=seed,
        overwrite=overwrite,
    )
    return with_recipe(config, recipe)


# --------------------------------------------------------------------------------------------------
# The settings of `clip-refine compare`: those of a refinement, and what is to be compared.


GRID = (0.3, 1.0, 3.0)
"""The learning rates tried by default, as multiples of `train.learning_rate`."""


class CompareConfig(SettingsGroup):
    """Everything one run of `clip-refine compare` depends on."""

    recipes: tuple[str, ...] = ("clip-refine", "contrastive", "contrastive+anchor")
    """Recipes to train, as for `refine --recipe`; the untouched model always stands beside."""
    seeds: Count = 3
    """Runs of each recipe, with `seed`, `seed` + 1, ... for order, captions and references."""
    peers: tuple[str, ...] = (
        "mean-centring",
        "distribution-normalisation",
        "nnn",
        "modality-shift",
    )
    """Training-free peers on the untouched model; several in order as in mean-centring+nnn."""
    combine: tuple[str, ...] = ()
    """Peers on a recipe's result, as in clip-refine+mean-centring."""
    sweep: tuple[str, ...] = ()
    """Ablations: every recipe once for each value, as in "loss.alpha=0,0.25,0.5". Any setting of
    train, loss and prior, and data.fraction for a part of the pairs; several one at a time."""
    learning_rates: tuple[Positive, ...] | Literal["auto"] = ()
    """Tried for every recipe with the first seed, the best on held-out training pairs is taken.
    Without it: 0.3, 1 and 3 times train.learning-rate. One value: no choice. auto: powers of ten
    around that up to where a rate harms, then half powers beside the best: up to 9 trainings a
    recipe instead of 3, so it is not the default."""
    selection_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training images (at least 100) that no recipe is trained on: peers are fitted
    and learning rates chosen there."""
    models: tuple[str, ...] = ()
    """More models for the same table, untouched and with every recipe and peer, since another base
    may be worth more than refining this one: as for `model.name`, and ARCH@TAG. Without `model`
    the first of them takes its place."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    prior: PriorConfig = PriorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resamples: Count = 1000
    """Bootstrap resamples of the held-out images."""
    out: Path = Path("runs/compare")
    """Folder for the results; a comparison that stopped there goes on."""
    cache: Path | None = None
    """Folder for the teacher's features, and for pixels where data.cache-folder names none.
    Without it: $XDG_CACHE_HOME/clip-refine."""
    save_models: bool = False
    """Keep every refined model in `out`/models."""
    report: bool = True
    """Write report.html; `clip-refine report` makes it again."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 42
    """First seed; also of the held-out and the selection split and of the bootstrap."""
    overwrite: bool = False
    """Start again where `out` exists."""
    dry_run: bool = False
    """Say pairs, steps, time, memory and what is trained, from a step that is measured, and stop
    there."""

    @model_validator(mode="before")
    @classmethod
    def _first_of_the_models(cls, values: Any) -> Any:
        """`models` alone are all that is compared; nobody asked for the default beside them."""
        models = values.get("models") if isinstance(values, dict) else None
        if not isinstance(models, list | tuple) or not models or "model" in values:
            return values
        return {**values, "model": named_model(str(models[0])), "models": models[1:]}

    @model_validator(mode="after")
    def _rates_are_chosen_for_all(self) -> "CompareConfig":
        if self.train.learning_rate == "auto":
            raise ValueError(
                "train.learning_rate auto is for a single run; compare has --learning-rates auto, "
                "and tune searches --rates"
            )
        if self.train.save_every != TrainConfig.model_fields["save_every"].get_default():
            raise ValueError(
                "train.save_every is for a single run; a comparison keeps each training that is "
                "complete, and begins the one it was in again"
            )
        return self

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates that every recipe tries, rising."""
        auto = self.learning_rates == "auto"
        factors = (0.1, 1.0, 10.0) if auto else GRID
        default = tuple(float(f"{factor * self.train.rate:.6g}") for factor in factors)
        given = () if self.learning_rates == "auto" else self.learning_rates
        return tuple(sorted(set(given or default)))

    @property
    def run_seeds(self) -> range:
        """One seed a run."""
        return range(self.seed, self.seed + self.seeds)

    def refinement(self) -> RefineConfig:
        """The settings that all runs share, as those of a refinement."""
        groups = ("model", "data", "train", "loss", "prior", "evaluation", "seed", "out")
        return RefineConfig(**{name: getattr(self, name) for name in groups})


class TuneConfig(CompareConfig):
    """Everything one run of `clip-refine tune` depends on: settings of `compare`, and these."""

    recipes: tuple[str, ...] = ("clip-refine", "balanced", "centred")
    """Recipes to choose among."""
    trials: Count = 20
    """Settings to try; most end after a quarter or a half of the training pairs."""
    rates: tuple[Positive, Positive] = (1e-7, 1e-3)
    """The range of learning rates."""
    weights: tuple[Positive, Positive] = (0.1, 10.0)
    """The range of factors on the recipe's weight of RaFA and of the anchor."""
    peers: tuple[str, ...] = ()
    resamples: Count = 10
    guard: NonNegative = 0.01
    """How much top-1 of any of `evaluation.zero_shot`, and what is measured on `bystanders`, may
    fall, in absolute terms."""
    bystanders: str | None = None
    """Other images that the model shall not forget: a folder of classes (top-1), or captioned
    images (mean R@1 of the first 1,000)."""
    out: Path = Path("runs/tune")
    """Folder for the results; a search that stopped there goes on."""

    @model_validator(mode="after")
    def _only_what_a_search_uses(self) -> "TuneConfig":
        unused = ("seeds", "sweep", "combine", "models", "learning_rates", "save_models", "report")
        for name in unused:
            if getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(
                    f"{name} belongs to compare, a search does not use it; leave it out"
                )
        return self


RUNS = frozenset(
    {"recipes", "seeds", "peers", "combine", "sweep", "models", "learning_rates", "out", "cache"}
    | {"save_models", "report", "overwrite", "dry_run", "trials", "rates", "weights", "guard"}
)
"""Settings that say which runs there are or where they go; they do not change a run's numbers."""


# --------------------------------------------------------------------------------------------------
# Settings to and from YAML, changed and explained.


Settings = TypeVar("Settings", bound=SettingsGroup)


def load_config(kind: type[Settings], path: Path) -> Settings:
    """Read `kind` from a YAML file; a ConfigError says what in it is missing, unknown or bad."""
    try:
        values = parse_yaml(read_text(path)) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check --config.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as 'seed: 42', got {shown(values)}.")
    try:
        config = kind.model_validate(values)
        return config.model_copy(update=_without_factories(config, path))
    except ValidationError as error:
        raise ConfigError(explain(error, where=f"{path}: ")) from error


def _without_factories(config: SettingsGroup, path: Path) -> dict[str, Any]:
    """What to replace so that a file, which may be another's, does not say what is imported."""
    named = [name for name in getattr(config, "models", ()) if name.startswith("factory:")]
    if named:
        raise ConfigError(
            f"{path}: models: {named[0]} is imported only where the command line names it: "
            f"--models {named[0]}."
        )
    model = getattr(config, "model", None)
    if isinstance(model, ModelConfig) and model.factory:
        return {"model": as_recorded(model)}
    return {}


def as_recorded(model: ModelConfig) -> ModelConfig:
    """A model as a file names it: a function that makes it is known by name and not called."""
    return model.model_copy(update={"factory": None})


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML, in the order of the fields; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: Settings, **changes: Any) -> Settings:
    """A validated copy, some settings replaced: `override(config, seed=1, train={"epochs": 2})`."""
    values = config.model_dump()
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def unused_settings(config: RefineConfig) -> dict[str, str]:
    """Settings that differ from their default and change nothing in this run, each with why.

    >>> unused_settings(RefineConfig(train=TrainConfig(blocks=3)))
    {'train.blocks': 'train.parameters is all'}
    """
    loss, train, data, prior = config.loss, config.train, config.data, config.prior
    trained = {"image-tower": ("image",), "text-tower": ("text",)}
    towers = trained.get(train.parameters, ("image", "text"))
    own_rates = all(getattr(train, f"{tower}_learning_rate") for tower in towers)
    softmax_only = "loss.contrastive_weight is 0"
    hycd = "" if loss.hycd_weight else "loss.hycd_weight is 0"
    teacher = "" if loss.logit_distillation_weight else hycd
    rafa = "" if loss.rafa_weight else "loss.rafa_weight is 0"
    contrastive = "" if loss.contrastive_weight else softmax_only
    scales = "" if loss.m2_mix_weight else contrastive
    has_scale = prior.kind in ("standard_normal", "uniform")
    fixed_scale = loss.contrastive_scale or loss.contrastive_scale_end
    of_ours = (loss.contrastive_weight or loss.m2_mix_weight) and not fixed_scale
    learns_scale = of_ours or loss.own_weight
    of_parameters = f"train.parameters is {train.parameters}"
    lora = "" if train.parameters == "lora" else of_parameters
    canonical = loss.feature_scale == "canonical"
    why = {
        "loss.alpha": hycd,
        "loss.temperature": teacher,
        "loss.normalize": teacher,
        "loss.positives": ""
        if loss.m2_mix_weight
        or (loss.contrastive_weight and loss.contrastive_form == "sigmoid")
        or (loss.contrastive_weight and loss.false_negatives == "masked")
        or train.dropout == "on"
        else "equal captions have equal features, so a softmax over them has the same gradient",
        "loss.negatives": contrastive,
        "loss.false_negatives": scales,
        "loss.rafa_reduction": rafa,
        "loss.rafa_decay": rafa,
        "loss.references": rafa,
        "loss.contrastive_form": contrastive,
        "loss.contrastive_normalize": contrastive,
        "loss.contrastive_scale": scales,
        "loss.contrastive_scale_end": scales,
        "loss.alignment_normalize": "" if loss.alignment_weight else "loss.alignment_weight is 0",
        "loss.fold_text": "" if loss.fold_text != loss.fold else "loss.fold is the same",
        "loss.anchor_shift": "" if loss.anchor_weight else "loss.anchor_weight is 0",
        "prior.kind": rafa,
        "prior.scale": rafa or ("" if has_scale else f"prior.kind is {prior.kind}"),
        "train.epochs": f"train.steps is {train.steps}" if train.steps else "",
        "train.learning_rate": "what is trained has a rate of its own"
        if own_rates and not (learns_scale and train.logit_scale == "trained")
        else "",
        "train.image_learning_rate": of_parameters if train.parameters == "text-tower" else "",
        "train.text_learning_rate": of_parameters if train.parameters == "image-tower" else "",
        "train.blocks": "" if train.parameters == "last-blocks" else of_parameters,
        "train.lora_rank": lora,
        "train.lora_alpha": lora,
        "train.logit_scale": "" if learns_scale else "no loss here looks at it",
        **{
            f"guard.{name}": "" if config.guard.every else "guard.every is not given"
            for name in ("bound", "then", "pairs", "bystanders", "images")
        },
        "data.shuffle_buffer": "" if data.streaming else "data.streaming is off",
        "data.own_files": "" if data.streaming else "data.streaming is off",
        "data.val_fraction": "data.val is given" if data.val else "",
        "data.max_bad": "" if data.skip_bad else "data.skip_bad is off",
    }
    if canonical and loss.temperature is None:  # as it is written when canonical was chosen
        why["loss.temperature"] = why["loss.normalize"] = ""
    unused = {}
    for name, reason in why.items():
        group, _, setting = name.partition(".")
        default = type(getattr(config, group)).model_fields[setting].get_default()
        if reason and getattr(getattr(config, group), setting) != default:
            unused[name] = reason
    return unused


def with_recipe(config: RefineConfig, name: str) -> RefineConfig:
    """`config` with another recipe: all of `loss` is the recipe's, the other groups stay."""
    try:
        loss = LossConfig(**recipe_settings(name, config.train.parameters)).model_dump()
        return override(config, recipe=name, loss=loss)
    except ValueError as error:
        raise ConfigError(str(error)) from error
