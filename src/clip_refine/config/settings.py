"""Every setting of a run once, in groups: its default, range and sentence of help."""

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from clip_refine.support.errors import ConfigError, DataError, ModelError
from clip_refine.support.limits import shown

# --------------------------------------------------------------------------------------------------
# Named objectives: what each row of the paper's tables and each of its critics sets.


_HYCD_ONLY = {"rafa_weight": 0.0}
_CONTRASTIVE_ONLY = {"rafa_weight": 0.0, "hycd_weight": 0.0, "contrastive_weight": 1.0}
_NOTHING_YET = {"rafa_weight": 0.0, "hycd_weight": 0.0}

RECIPES: dict[str, dict[str, Any]] = {
    "clip-refine": {},
    "clip-refine-paper": {"feature_scale": "as-is"},
    "balanced": {
        **_HYCD_ONLY,
        "anchor_weight": 20.0,
        "anchor_shift": 0.25,
        "feature_scale": "canonical",
    },
    "centred": {**_HYCD_ONLY, "fold": 1.0, "feature_scale": "canonical"},
    "hycd": _HYCD_ONLY,
    "self-kd": {**_HYCD_ONLY, "alpha": 0.0},
    "hycd+align": {**_HYCD_ONLY, "alignment_weight": 1.0},
    "rafa": {"hycd_weight": 0.0},
    "contrastive": _CONTRASTIVE_ONLY,
    "contrastive-raw": {**_CONTRASTIVE_ONLY, "contrastive_normalize": False},
    "rising-temperature": {**_CONTRASTIVE_ONLY, "contrastive_scale_end": 20.0},
    "contrastive+anchor": {**_CONTRASTIVE_ONLY, "anchor_weight": 1.0},
    "modgap": {
        **_CONTRASTIVE_ONLY,
        "alignment_weight": 1.0,
        "alignment_normalize": True,
        "centroid_uniformity_weight": 1.0,
    },
    "contrastive+covariance": {**_CONTRASTIVE_ONLY, "covariance_weight": 100.0},
    "centred-contrastive": {**_CONTRASTIVE_ONLY, "fold": 1.0, "feature_scale": "canonical"},
    "m2-mix": {**_CONTRASTIVE_ONLY, "m2_mix_weight": 1.0},
    "feature-distillation": {**_NOTHING_YET, "anchor_weight": 1.0},
    "logit-distillation": {**_NOTHING_YET, "logit_distillation_weight": 1.0},
    "own": {**_NOTHING_YET, "own_weight": 1.0},
}
"""Settings of `loss` that differ from its defaults."""

LINEAR_RECIPES: dict[str, dict[str, Any]] = {
    "centred": {"rafa_weight": 1.0},
    "centred-contrastive": {"rafa_weight": 1.0},
}
"""What a recipe sets otherwise where only linear maps of features are trained: RaFA turns them. A
whole tower answers it behind the fold with smaller norms (docs/results/photo-centred.md)."""


# --------------------------------------------------------------------------------------------------
# The groups of settings, each with its range and a sentence of help.


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16", "bf16-image", "bf16-text"]


_LINES = 10  # problems that one message shows


def explain(error: ValidationError, *, where: str = "", group: str = "") -> str:
    """A validation error in one line a problem: setting, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        parts = filter(None, (group, *(f"{part!s:.60}" for part in problem["loc"])))
        name = ".".join(parts) or "settings"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}{name}: there is no such setting. `--help` lists them.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            got = "" if isinstance(given, dict | BaseModel) else f", got {shown(given)}"
            lines.append(f"{where}{name}: {message}{got}.")
    more = [f"... and {len(lines) - _LINES:,} more."] * (len(lines) > _LINES)
    return "\n".join(lines[:_LINES] + more)


class _Explaining(type(BaseModel)):
    """What is wrong in `DataConfig(...)` is a ConfigError that names it as a file's would be."""

    if not TYPE_CHECKING:  # which would no longer know the settings

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise ConfigError(explain(error, group=cls.group)) from None


class SettingsGroup(BaseModel, metaclass=_Explaining):
    """Frozen; unknown names are refused, and field docstrings are the command line's help."""

    group: ClassVar[str] = ""  # what it is called among a run's settings

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Help is wrapped for the terminal, not where the lines of the docstring end."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())


SCHEMAS = ("transformers", "local-dir", "factory")
"""What may stand before the colon of a model's name, each with a case in `build.build_model`."""


class ModelConfig(SettingsGroup):
    """The model to start from."""

    group: ClassVar[str] = "model"

    name: str = "ViT-B-32"
    """An open_clip architecture, or ARCHITECTURE@TAG with the tag or file of `pretrained`; the
    folder of an open_clip, Transformers or sentence-transformers model or of a run; a file of
    weights; a model of the Hub, `hf-hub:ORG/NAME` (open_clip) or `transformers:ORG/NAME`; or
    `toy`."""
    pretrained: str | None = None
    """Weights for an architecture: a tag such as `openai`, or a path to .pt or .safetensors; for
    `factory` a run, its model/ or a .safetensors file. Without it: `openai` where the architecture
    has that tag, or what `factory` gives."""
    factory: str | None = None
    """A function of your own that makes the model, `package.module:function`, instead of a name.
    The module may lie in the current folder. Only the command line can name it, no file."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, values: Any) -> Any:
        """`ARCHITECTURE@TAG` is two settings; records show `name`, so it tells of a factory."""
        if not isinstance(values, dict):
            return values
        if (factory := values.get("factory")) is not None:
            return {**values, "name": f"factory:{factory}"}
        name = values.get("name")
        # whether it is there a Path cannot say of any text
        if not isinstance(name, str) or os.path.exists(name):
            return values
        architecture, at, tag = name.partition("@")
        dashed = architecture.replace("/", "-")
        # open_clip takes a slash for it, too
        if dashed != architecture and dashed in _architectures():
            architecture, values = dashed, {**values, "name": f"{dashed}{at}{tag}"}
        is_two = architecture and tag and not set(architecture) & set(":/\\")
        if is_two and not values.get("pretrained"):
            return {**values, "name": architecture, "pretrained": tag}
        return values

    def check_there(self) -> None:
        """Refuse by a ModelError what names nothing here, before a library is loaded for it."""
        if self.factory and self.pretrained and not os.path.exists(self.pretrained):
            raise ModelError(
                f"{self.pretrained}: cannot be read (No such file or directory). For a factory "
                f"pretrained is a run, its model/ or a .safetensors file.{_near(self.pretrained)}"
            )
        schema, _, place = self.name.partition(":")
        if schema == "local-dir":
            if not os.path.isdir(place):
                raise ModelError(
                    f"{place}: no such folder. Give an open_clip model's folder.{_near(place)}"
                )
        elif schema in ("toy", "hf-hub", *SCHEMAS) or os.path.exists(self.name):
            return  # no hub is asked
        else:
            check_architecture(self.name, _architectures())

    @property
    def title(self) -> str:
        """The model in a word, as `ViT-B-32@openai`."""
        return f"{self.name}@{self.pretrained}" if self.pretrained else self.name

    @property
    def place(self) -> str:
        """What may be its folder: of a factory's model that of the weights, else its title."""
        return (self.factory and self.pretrained) or self.title


def named_model(word: str) -> ModelConfig:
    """What a word of the command line says of a model.

    A name, `ARCHITECTURE@TAG`, `factory:MODULE:FUNCTION`, or that with weights behind an `@`.

    >>> named_model("ViT-B-32@openai"), named_model("factory:mine:make@runs/a").pretrained
    (ModelConfig(name='ViT-B-32', pretrained='openai', factory=None), 'runs/a')
    """
    if not word.startswith("factory:"):
        return ModelConfig(name=word)
    factory, _, weights = word.removeprefix("factory:").partition("@")
    return ModelConfig(factory=factory, pretrained=weights or None)


_OF_ONE = ("split", "split_file", "image_column", "caption_column")
"""Settings of `data` that say how `train` is read; `val_split` and so on say it of `val`."""


def check_architecture(name: str, known: Sequence[str]) -> None:
    """Refuse by a ModelError an architecture that open_clip does not know, with near ones."""
    architecture = name.replace("/", "-")
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5)
        raise ModelError(
            f"model.name {name!r}: no such open_clip architecture."
            + (f" Did you mean {', '.join(near)}?" if near else "")
            + f" There is no folder or file of this name either.{_near(name)} A model of the Hub "
            "is written hf-hub:ORG/NAME (open_clip) or transformers:ORG/NAME."
        )


def _near(path: str) -> str:
    """What there is beside a path that is not there, and called nearly so."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3, cutoff=0.75)
    except (OSError, ValueError):
        return ""
    return f" Did you mean {', '.join(os.path.join(folder, one) for one in near)}?" * bool(near)


def _plain(source: str) -> str:
    """A source of pairs without the settings behind its `#`."""
    return source if os.path.exists(source) else source.rpartition("#")[0] or source


def no_end(name: str, batch_size: int) -> ConfigError:
    """Of pairs that do not tell how many there are, where nobody says how many steps to take."""
    return ConfigError(
        f"train.steps is missing: {name} does not tell how many pairs it has. Say how many steps "
        f"of {batch_size} pairs to take, as in --train.steps 200."
    )


def check_path(path: str | Path, more: str = "") -> None:
    """Refuse by a DataError what is not there; `more` is what to do besides."""
    if not os.path.exists(path):
        raise DataError(
            f"{path}: cannot be read (No such file or directory). Check the path."
            f"{_near(str(path))}{more}"
        )


def _architectures() -> list[str]:
    """Those that open_clip knows, by its files where importing it would take seconds."""
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"].list_models()
    found = importlib.util.find_spec("open_clip")
    places = found.submodule_search_locations if found else None
    return [path.stem for at in places or () for path in Path(at, "model_configs").glob("*.json")]


class DataConfig(SettingsGroup):
    """The captioned images: docs/data.md shows every kind of source."""

    group: ClassVar[str] = "data"

    train: str | tuple[str, ...] | None = None
    """Pairs to refine on: .csv, .tsv, .jsonl, .parquet, .tar (shards-{0000..0127}.tar), COCO's or
    Karpathy's .json, Flickr's token file, a folder with metadata.jsonl, hf:ORG/NAME, or `toy`.
    Several are mixed."""
    weights: tuple[Positive, ...] = ()
    """Shares of the pairs that come from each of several sources, as in 2 1. Without them every
    image is used once an epoch."""
    val: str | None = None
    """Pairs for the before/after numbers. Without it a part of `train` is held out."""
    kind: str | None = None
    """What all sources are: table, coco, webdataset, ... as in docs/data.md. Without it:
    recognised. NAME#kind=coco says it of one source."""
    image_column: str | None = None
    """Column of the image paths or contents of `train`. Without it: image, file_name, jpg, ... as
    found."""
    caption_column: str | None = None
    """Column of the captions of `train`. Without it: caption, text, title, ... as found."""
    image_folder: Path | None = None
    """Where relative image paths of all sources start. Without it: the file's folder, or one
    beside it. NAME#images=FOLDER says it of one source."""
    split: str | None = None
    """Part of `train` where it has several, as in train or train+restval; NAME#split=test for one
    source."""
    subset: str | None = None
    """Configuration of datasets on the Hub that have several; NAME#subset=... for one."""
    split_file: Path | None = None
    """Karpathy's JSON or a list of file names: read only the images of `train` that it has in
    `split`."""
    val_split: str | None = None
    """As `split`, of `val`. Without it: its validation split."""
    val_split_file: Path | None = None
    """As `split_file`, of `val`."""
    val_image_column: str | None = None
    """As `image_column`, of `val`."""
    val_caption_column: str | None = None
    """As `caption_column`, of `val`."""
    allow_outside: bool = False
    """Follow links out of folders of images, and absolute paths and `..` in files of captions."""
    skip_bad: bool = False
    """Go on without bad rows, listed in `skipped.jsonl`, after decoding every image once."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of bad rows above which to stop even with `skip_bad`."""
    captions: Literal["one", "all"] = "one"
    """one: of each image one caption, drawn anew each epoch. all: every caption is a pair."""
    streaming: bool = False
    """Read .tar, .parquet, .jsonl and hf: sources as training goes on, without listing or copying
    them first. Needs `val`, and `train.steps` where the source does not tell its length."""
    shuffle_buffer: Count = 2000
    """Streaming: pairs held in memory, among which the next one is drawn."""
    own_files: bool = False
    """Streaming in several processes: each reads its share of the files instead of all. Which pairs
    meet in a step then depends on the number of processes, with which a run has to go on."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the training images held out (at least 100) where `val` is not given."""
    draft: bool = True
    """Decode large JPEGs at 1/2, 1/4 or 1/8 where 3.3 times the model's pixels are left:
    faster, with features at a cosine above .999 to those of full size."""
    cache_images: bool = False
    """Keep preprocessed pixels on disk, 150 kB an image at 224 pixels, so that no later epoch or
    run decodes them. Exact: the numbers are those without."""
    cache_folder: Path | None = None
    """Folder for them, and for a teacher's features. Without it: $XDG_CACHE_HOME/clip-refine, else
    ~/.cache/clip-refine."""

    @property
    def sources(self) -> tuple[str, ...]:
        """All of `train`."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()

    @property
    def endless(self) -> str | None:
        """A stream that is known not to tell how many pairs it has; None where it may."""
        for name in self.sources if self.streaming else ():
            # the first of several files
            path = Path(re.sub(r"\{([^{},.]+)(\.\.|,)[^{}]*\}", r"\1", _plain(name)))
            stats = path.with_name(f"{path.stem}_stats.json")
            shard = path.suffix == ".tar" and "*" not in path.name and not stats.is_file()
            mixed = len(self.sources) > 1 or self.captions == "all" or self.split_file
            if mixed or shard or path.suffix in (".jsonl", ".ndjson"):
                return name
        return None

    @model_validator(mode="after")
    def _settings_of_val_have_a_val(self) -> "DataConfig":
        given = [f"val_{name}" for name in _OF_ONE if getattr(self, f"val_{name}") is not None]
        if self.val is None and given:
            raise ValueError(f"{given[0]} says how val is read, which is missing; give both")
        return self

    def check_there(self) -> None:
        """Refuse by a DataError the first file not there, before a library is loaded for it."""
        for name in (*self.sources, *filter(None, [self.val])):
            plain = _plain(name)
            elsewhere = plain == "toy" or plain.startswith("hf:") or "://" in plain
            if not elsewhere and not set(plain) & set("*?{"):
                hub = " A dataset on the Hub is written hf:ORG/NAME." * ("." not in plain)
                check_path(plain, hub)
        for name in ("image_folder", "split_file", "val_split_file"):
            if path := getattr(self, name):
                check_path(path, f" It is --data.{name.replace('_', '-')}.")

    def for_val(self, *, passed: bool = False) -> "DataConfig":
        """The settings that `val` is read with; refuses one for a `train` that is not `passed`."""
        given = [name for name in _OF_ONE if getattr(self, name) is not None]
        if given and not (self.sources or passed):
            raise ConfigError(
                f"data.{given[0]} says how data.train is read, which is missing. Of data.val say "
                f"it with --data.val-{given[0].replace('_', '-')}."
            )
        own = {name: getattr(self, f"val_{name}") for name in _OF_ONE}
        return self.model_copy(update=own | {f"val_{name}": None for name in _OF_ONE})


class TrainConfig(SettingsGroup):
    """One epoch of training."""

    group: ClassVar[str] = "train"

    epochs: Count = 1
    """Passes over the training pairs."""
    steps: Count | None = None
    """Stop after so many steps, in as many epochs as that takes. Without it: `epochs`."""
    batch_size: Annotated[int, Field(ge=2)] = 512
    """Pairs a step, over all processes together."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Pairs that a process encodes with a graph at a time: less memory, a quarter more time. The
    loss still sees the whole batch. auto: as many as fit into half the device's memory."""
    learning_rate: Positive | Literal["auto"] = 1e-6
    """AdamW's learning rate. auto: the best of short runs at powers of ten, then of their halves,
    on a tenth of the training images, which are held out."""
    image_learning_rate: Positive | None = None
    """Of the image tower's weights, where it is another one."""
    text_learning_rate: Positive | None = None
    """Of the text tower's weights, where it is another one."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """A block of a tower has so many times the learning rate of the one behind it; what follows the
    last block has all of it."""
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
    dropout: Literal["off", "on"] = "off"
    """Dropout and stochastic depth of models that have them. The teacher never drops anything."""
    parameters: Literal[
        "all", "image-tower", "text-tower", "projections", "last-blocks", "lora"
    ] = "all"
    """What is trained: all, one tower, the layers that both towers end in, their last blocks with
    what follows, or LoRA adapters (extra `[peft]`), merged before saving."""
    blocks: Count = 2
    """last-blocks: how many of each tower."""
    lora_rank: Count = 16
    """lora: the adapters' inner dimension."""
    lora_alpha: Positive = 32.0
    """lora: adapters are multiplied by alpha / rank."""
    gradient_checkpointing: bool = False
    """Compute activations again for the gradient: less memory, more time."""
    compile: bool = False
    """The image towers' blocks through `torch.compile`, which takes a C++ compiler and minutes at
    the start. On a CPU nothing was won by it."""
    save_every: str = "10m"
    """What a run goes on from after `--resume` is saved every so many minutes, as in 10m, or steps,
    as in 500; or never."""
    precision: Precision = "auto"
    """bf16 autocast over float32 weights, for both towers or one. auto: where the
    device has units for it and the tower is large enough."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images. Without it: as many as let images come 1.5 times as fast as the
    model takes them, which is measured; 0 on a CPU where it reads that fast itself."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    @property
    def rate(self) -> float:
        """The learning rate as a number; where it is auto the default, where a search begins."""
        default: float = type(self).model_fields["learning_rate"].get_default()
        return default if self.learning_rate == "auto" else self.learning_rate

    @field_validator("save_every", mode="before")
    @classmethod
    def _steps_or_minutes(cls, given: Any) -> str:
        if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?m|never", str(given)):
            raise ValueError(f"{given!r} is neither minutes (10m) nor steps (500) nor never")
        return str(given)

    @model_validator(mode="after")
    def _statistics_count_once(self) -> "TrainConfig":
        in_parts = isinstance(self.micro_batch, int) and self.micro_batch < self.batch_size
        if in_parts and self.normalization_statistics == "updated":
            raise ValueError(
                "micro_batch encodes each pair twice, so that normalization_statistics updated "
                "would count it twice; choose one of them"
            )
        if self.gradient_checkpointing and self.normalization_statistics == "updated":
            raise ValueError(
                "gradient_checkpointing runs every block twice, so that normalization_statistics "
                "updated would count each batch twice; choose one of them"
            )
        if self.compile and self.dropout == "on":
            raise ValueError(
                "compile draws dropout in its own order, so that a micro_batch would be encoded "
                "with another one than its loss was; choose compile or dropout on"
            )
        return self


class LossConfig(SettingsGroup):
    """The objective: a weighted sum of losses. `recipe` sets several of these at once."""

    group: ClassVar[str] = "loss"

    rafa_weight: NonNegative = 1.0
    """Weight of random feature alignment."""
    hycd_weight: NonNegative = 1.0
    """Weight of hybrid contrastive-distillation."""
    contrastive_weight: NonNegative = 0.0
    """Weight of the symmetric contrastive loss."""
    contrastive_form: Literal["softmax", "sigmoid"] = "softmax"
    """Contrastive: cross-entropy over the batch, or SigLIP's sigmoid, for models with a bias."""
    contrastive_normalize: bool = True
    """Contrastive: on unit features; off for raw ones, as the paper's baseline has it."""
    contrastive_scale: Positive | None = None
    """Contrastive and m2-mix: factor on similarities, 100 or 14.3. Without it: the model's own."""
    contrastive_scale_end: Positive | None = None
    """Contrastive and m2-mix: the factor toward which the run goes; the temperature, 1 / factor,
    changes evenly. Without it: the factor stays."""
    alignment_weight: NonNegative = 0.0
    """Weight of the mean squared distance between image and text."""
    alignment_normalize: bool = False
    """Alignment: on unit features instead of raw ones."""
    centroid_uniformity_weight: NonNegative = 0.0
    """Weight of the uniformity of the pairs' middles (ModGap)."""
    covariance_weight: NonNegative = 0.0
    """Weight of the squared difference of the two modalities' covariances."""
    anchor_weight: NonNegative = 0.0
    """Weight of the mean squared distance to the teacher's features."""
    anchor_shift: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Anchor: the teacher's image and text features are first moved together by this share of the
    gap between their centroids; 1 lets the centroids meet."""
    m2_mix_weight: NonNegative = 0.0
    """Weight of the contrastive loss with mixed features as hard negatives."""
    logit_distillation_weight: NonNegative = 0.0
    """Weight of the mean squared distance to the teacher's similarities."""
    own_weight: NonNegative = 0.0
    """Weight of a function of features of your own: `refine(..., objective=...)` in Python."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """HyCD: share of the true pairs in the target; the rest is the teacher's softmax."""
    temperature: Positive | None = 1.0
    """HyCD: similarities are divided by it. None: 1 / the model's own logit scale."""
    normalize: bool = False
    """HyCD: compare unit features (with `temperature` None or about 0.01) instead of raw ones."""
    positives: Literal["own", "same-caption"] = "own"
    """HyCD, contrastive, m2-mix: what is true in a batch: an image's own pair alone, or every pair
    with the same caption, which else counts as wrong."""
    negatives: Literal["in-batch", "swapped-words"] = "in-batch"
    """Contrastive, softmax: what an image's caption is told from: the others of the batch, or also
    every caption of it with two words exchanged. English; where no words can be, the caption has no
    wrong twin."""
    false_negatives: Literal["kept", "masked"] = "kept"
    """Contrastive and m2-mix: negatives that the teacher holds nearer to an image or a caption than
    its own partner count, or are left out."""
    rafa_reduction: Literal["mean", "sum"] = "mean"
    """RaFA: `mean` over batch and dimension (as released), or the paper's half sum."""
    rafa_decay: Literal["none", "linear"] = "none"
    """RaFA: its weight stays, or falls linearly to zero over the run."""
    references: Literal["shared", "independent"] = "shared"
    """RaFA: one reference for both sides of a pair (the method), or one each (its ablation)."""
    fold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Before training, fold this share of each tower's mean feature out of its output layer, and
    fit the model's logit scale to the teacher's softmax: 1 closes nearly all of the gap."""
    fold_text: Annotated[float, Field(ge=0, le=1)] | None = None
    """The share for the text tower, where it is another one."""
    feature_scale: Literal["auto", "as-is", "canonical"] = "auto"
    """as-is: raw features as the model gives them (the paper). canonical: trained at the paper's
    norms, HyCD on unit features at the model's own logit scale. auto: canonical where norms are far
    from the paper's, unless `temperature` or `normalize` say otherwise."""

    @model_validator(mode="after")
    def _canonical_temperature(self) -> "LossConfig":
        if self.feature_scale == "canonical" and self.temperature not in (None, 1.0):
            raise ValueError(
                f"temperature {self.temperature:g} does not go with feature_scale canonical, where "
                "HyCD compares unit features at the model's own logit scale; leave it out, or set "
                "feature_scale as-is and normalize"
            )
        return self

    @model_validator(mode="after")
    def _fold_goes_with(self) -> "LossConfig":
        if not (self.fold or self.fold_text):
            return self
        if self.feature_scale != "canonical" and not self.normalize:
            raise ValueError(
                "fold needs unit features in HyCD, since the teacher is not folded; set "
                "feature_scale canonical, or normalize"
            )
        pulling = [n for n in ("anchor_weight", "logit_distillation_weight") if getattr(self, n)]
        if pulling:
            raise ValueError(
                f"fold does not go with {pulling[0]}, which would pull the teacher's means back "
                "in; set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _wrong_captions_need_a_softmax(self) -> "LossConfig":
        if self.negatives != "in-batch" and self.contrastive_form == "sigmoid":
            raise ValueError(
                f"negatives {self.negatives} does not go with contrastive_form sigmoid; use softmax"
            )
        return self

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "LossConfig":
        names = [name for name in type(self).model_fields if name.endswith("_weight")]
        if not any(getattr(self, name) for name in names):
            raise ValueError("every weight is 0, so there is nothing to minimise; set one above 0")
        return self


class PriorConfig(SettingsGroup):
    """The distribution of RaFA's random references."""

    group: ClassVar[str] = "prior"

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

    @property
    def fitted(self) -> bool:
        """Whether it has moments of the model's own features of all training pairs."""
        return self.kind.startswith("gaussian") or self.kind == "fixed"


class GuardConfig(SettingsGroup):
    """A watch over training: probes every few steps, and a bound that ends it."""

    group: ClassVar[str] = "guard"

    every: Count | None = None
    """Steps from one probe to the next: R@1 of a tenth of the training images, which are held out,
    and the zero-shot tasks. Without it there is no guard; `--guard` alone means 10."""
    bound: NonNegative = 1.0
    """Points (hundredths) that any of these may surely lose: training stops where the lower end of
    the 95 % interval of the difference is further down."""
    then: Literal["roll-back", "stop"] = "roll-back"
    """Which weights a stopped run keeps: of the probes within the bound the best on average, or
    those it stopped at."""
    pairs: str | None = None
    """Captioned images to take R@1 of instead, so that no training images are held out for it; a
    stream needs them."""
    bystanders: str | None = None
    """Other images that the model shall not forget: a folder of classes or captioned images."""
    images: Annotated[int, Field(ge=11)] = 1000
    """Captioned images a probe takes at most."""

    def check_there(self) -> None:
        """Refuse files that are not there, as `DataConfig.check_there`."""
        if self.every:
            DataConfig(train=tuple(filter(None, (self.pairs, self.bystanders)))).check_there()


class EvaluationConfig(SettingsGroup):
    """How the before/after numbers are taken; always in float32."""

    group: ClassVar[str] = "evaluation"

    zero_shot: tuple[str, ...] = ()
    """Zero-shot tasks: folders with one sub-folder of images a class, or `toy`."""
    template: str | tuple[str, ...] = "a photo of a {}"
    """Prompts for the class names of those folders, one or several, of which the mean counts; `{}`
    stands for the name."""
    batch_size: Count | None = None
    """Images or captions encoded at a time. Without it: 32 on a CPU, 256 beside a GPU."""

    @property
    def templates(self) -> tuple[str, ...]:
        """All of `template`."""
        return (self.template,) if isinstance(self.template, str) else self.template

    @field_validator("template")
    @classmethod
    def _have_a_place_for_the_name(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        templates = (given,) if isinstance(given, str) else given
        if not templates:
            raise ValueError("there is none; give one or leave it out")
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the class name")
        return given
