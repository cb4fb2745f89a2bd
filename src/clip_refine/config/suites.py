"""What a suite's file says: sources and tasks."""

from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from clip_refine.config.runs import explain
from clip_refine.config.settings import Count, NonNegative, SettingsGroup
from clip_refine.support.errors import ConfigError, first_line
from clip_refine.support.limits import parse_yaml, read_text, shown

# --------------------------------------------------------------------------------------------------
# The tasks that a suite can ask for, each with its protocol.


CaptionProtocol = Literal["all-captions", "first-caption"]


class _Task(SettingsGroup):
    needs: ClassVar[str] = "classes"
    """What its source must hold, as `SuiteSource.holds` says."""

    source: str
    """The name of a source of the suite."""
    name: str | None = None
    """What to call the task; without it its source and its kind."""

    @property
    def kind_name(self) -> str:
        """The task's kind, as in the YAML."""
        return getattr(self, "kind")  # noqa: B009 - declared by every task, not here

    @property
    def title(self) -> str:
        """What to call the task."""
        return self.name or f"{self.source} {self.kind_name}"

    def sources(self) -> dict[str, str]:
        """Field → the source that it names."""
        return {"source": self.source}


class _CaptionTask(_Task):
    needs: ClassVar[str] = "captions"


class _ProtocolTask(_CaptionTask):
    protocol: CaptionProtocol = "all-captions"
    """all-captions: all captions of an image are its own (COCO 5k: 5 an image). first-caption: one
    caption an image, as in the paper's tables; not comparable with the other."""


class PromptedTask(_Task):
    """Measured on images and on texts made from the names of their classes."""

    prompts: str | tuple[str, ...] = "paper"
    """`paper`: "a photo of a {}". `openai-imagenet` (80) and `simple-imagenet` (7): open_clip's.
    `short`: the few of this package for sources it knows by name. Else a list of templates, or a
    .txt, .yaml or .json file with one; `{}` stands for the class name."""

    @field_validator("prompts")
    @classmethod
    def _places_for_the_name(cls, prompts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(prompts, str):
            bad = [template for template in prompts if "{}" not in template]
            if bad or not prompts:
                raise ValueError(
                    f"{bad[0]!r} has no {{}} for the class name" if bad else "is empty"
                )
        return prompts


class ZeroShotTask(PromptedTask):
    """Classification by the class names: top-1, top-5, per-class recall, calibration."""

    kind: Literal["zero-shot"]


class RetrievalTask(_ProtocolTask):
    """Recall at 1, 5 and 10, median rank, mAP and hubness, both directions."""

    kind: Literal["retrieval"]


class MixedSearchTask(_ProtocolTask):
    """Images and captions in one index: NDCG@10, who stands first, rank of the right image."""

    kind: Literal["mixed-search"]


class SeparationTask(_ProtocolTask):
    """Whether one threshold tells true pairs from wrong ones."""

    kind: Literal["separation"]
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01


ImageWeight = Annotated[float, Field(ge=0, le=1)]
"""Of the image in a document that is both, 0–1; the rest is the text's."""


class MixedDocumentsTask(_CaptionTask):
    """An index of documents that are an image, a text or both, as in MixBench; any query kind."""

    kind: Literal["mixed-documents"]
    mixing: tuple[NonNegative, NonNegative, NonNegative] = (1, 1, 1)
    """How many parts of the documents are an image, a text, both."""
    image_weight: ImageWeight = 0.5


class MixBenchTask(_Task):
    """The same on documents, queries and judgements that are given."""

    needs: ClassVar[str] = "documents"

    kind: Literal["mixbench"]
    image_weight: ImageWeight = 0.5


class ImageNeighboursTask(_Task):
    """Image to image by class: mAP, recall at 1, 5 and 10, accuracy of the nearest ten's vote."""

    kind: Literal["image-neighbours"]


class TextNeighboursTask(_CaptionTask):
    """Text to text, captions of one image: mAP and recall at 1, 5 and 10."""

    kind: Literal["text-neighbours"]


class ClusteringTask(PromptedTask):
    """k-means on images, prompts and both, against the classes and against the modality."""

    kind: Literal["clustering"]


class PairClusteringTask(_CaptionTask):
    """k-means on images and first captions together: do clusters follow pairs, or modality?"""

    kind: Literal["pair-clustering"]
    clusters: Annotated[int, Field(ge=2)] = 20


class StorageTask(_ProtocolTask):
    """Retrieval and gap of vectors as they are stored: cut to d/2 and d/4, int8, binary."""

    kind: Literal["storage"]


class CompositionTask(_Task):
    """Whether an image is nearer to its text than to one of the same words in another order."""

    needs: ClassVar[str] = "compositions"

    kind: Literal["composition"]


class GeometryTask(_CaptionTask):
    """The shape of the shared space, on every image with its first caption."""

    kind: Literal["geometry"]


class _ProbeTask(_Task):
    train: str | None = None
    """The source to fit on. Without it half of `source` fits, the other half tests."""

    def sources(self) -> dict[str, str]:
        return super().sources() | ({"train": self.train} if self.train else {})


class LinearProbeTask(_ProbeTask):
    """Logistic regression on frozen image features, C chosen on a validation part."""

    kind: Literal["linear-probe"]


class FewShotTask(_ProbeTask):
    """The same with few images a class."""

    kind: Literal["few-shot-probe"]
    shots: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 4, 16)
    """Images a class to fit on."""
    draws: Annotated[int, Field(ge=2)] = 5
    """How often they are drawn anew."""


Task = Annotated[
    ZeroShotTask
    | RetrievalTask
    | MixedSearchTask
    | MixedDocumentsTask
    | MixBenchTask
    | SeparationTask
    | ImageNeighboursTask
    | TextNeighboursTask
    | ClusteringTask
    | PairClusteringTask
    | StorageTask
    | CompositionTask
    | GeometryTask
    | LinearProbeTask
    | FewShotTask,
    Field(discriminator="kind"),
]
"""One thing to measure."""


# --------------------------------------------------------------------------------------------------
# A suite: the sources and tasks of an evaluation, from a small YAML file.


SHIPPED = ("paper", "quick", "toy")


class FolderSource(SettingsGroup):
    """`PATH/CLASS/image.jpg`."""

    kind: Literal["folder"]
    path: str
    only: str | None = None
    """A text file with one image a line; others are left out. The first word of a line counts,
    with the folders that it names and without its ending: as in UCF101's `testlist01.txt`."""


class CubSource(SettingsGroup):
    """CUB-200-2011 as it is distributed; `split` by its `train_test_split.txt`."""

    kind: Literal["cub"]
    path: str
    split: Literal["train", "test"] = "test"


class TorchvisionSource(SettingsGroup):
    """A dataset that torchvision reads."""

    kind: Literal["torchvision"]
    path: str = "."
    """torchvision's `root`."""
    dataset: Literal[
        "CIFAR10",
        "CIFAR100",
        "Caltech101",
        "DTD",
        "EuroSAT",
        "FGVCAircraft",
        "Flowers102",
        "Food101",
        "ImageNet",
        "OxfordIIITPet",
        "STL10",
        "SUN397",
        "StanfordCars",
    ]
    split: str | None = None
    """As torchvision calls it; for CIFAR `train` or `test`. None where there are no splits."""


class RowsSource(SettingsGroup):
    """Rows with an image and a class, which the `datasets` library reads."""

    kind: Literal["rows"]
    path: str
    """A folder of Parquet or WebDataset (.tar) files, or `hf:ORG/NAME`."""
    split: str = "test"
    subset: str | None = None
    """The configuration of a dataset on the Hub that has several."""
    image: str = "image"
    """Column of the images; in WebDataset files their ending, such as `jpg`."""
    label: str = "label"
    """Column of the classes, numbers or names; in WebDataset files `cls`."""


class CaptionsSource(SettingsGroup):
    """Captioned images: anything that `--data.val` takes."""

    kind: Literal["captions"]
    path: str
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of `data`, such as `caption_column`."""


class MixBenchSource(SettingsGroup):
    """A subset of MixBench: `queries.jsonl`, `mixed_corpus.jsonl`, `qrels/qrels.tsv`."""

    kind: Literal["mixbench"]
    path: str


class SugarCrepeSource(SettingsGroup):
    """SugarCrepe's or SugarCrepe++'s folder of JSON files, a file a category."""

    kind: Literal["sugarcrepe"]
    path: str
    images: str
    """The folder of COCO's val2017."""


class WinogroundSource(SettingsGroup):
    """`examples.jsonl` with its folder `images`."""

    kind: Literal["winoground"]
    path: str


class ToySource(SettingsGroup):
    """The drawn world: its held-out pairs, or a task: of classes, or `toy_composition`."""

    kind: Literal["toy"]
    task: str | None = None


Source = Annotated[
    FolderSource
    | CubSource
    | TorchvisionSource
    | RowsSource
    | CaptionsSource
    | MixBenchSource
    | SugarCrepeSource
    | WinogroundSource
    | ToySource,
    Field(discriminator="kind"),
]
"""Where images come from."""


class SuiteSource(SettingsGroup):
    """A named set of images, and where it may be."""

    at: tuple[Source, ...]
    """Places in the order in which they are tried; the first that is there is taken."""
    naming: Literal["plain", "camel-case", "numbered"] = "plain"
    """How folder names become class names: underscores as spaces; also `ApplyEyeMakeup` as `apply
    eye makeup`; or also without the number in `001.Laysan_Albatross`."""
    class_names: str | tuple[str, ...] | dict[str, str] | None = None
    """Instead of the source's own: a list in the order of its classes, a mapping from its names, a
    .txt, .yaml or .json file with either, or `open_clip` for ImageNet's."""
    note: str | None = None
    """What to know about it; stands in the results."""
    how_to_get: str | None = None
    """Where to get it and how to lay it out, for the list of what is missing."""

    @model_validator(mode="before")
    @classmethod
    def _one_place_or_several(cls, values: Any) -> Any:
        """`at: {...}` means a list of one."""
        if isinstance(values, dict) and isinstance(values.get("at"), dict):
            return {**values, "at": [values["at"]]}
        return values

    @property
    def holds(self) -> str:
        """What its images come with: classes, captions, compositions or documents."""
        return _held(self.at[0])

    @field_validator("at")
    @classmethod
    def _somewhere(cls, at: tuple[Source, ...]) -> tuple[Source, ...]:
        if not at:
            raise ValueError("needs at least one place")
        held = dict.fromkeys(_held(place) for place in at)
        if len(held) > 1:
            raise ValueError(f"its places hold {' and '.join(held)}; one source holds one of them")
        return at

    @model_validator(mode="after")
    def _names_are_of_classes(self) -> "SuiteSource":
        for name in ("naming", "class_names"):
            default = type(self).model_fields[name].get_default()
            if self.holds != "classes" and getattr(self, name) != default:
                raise ValueError(f"{name} is for classes, and it holds {self.holds}; leave it out")
        return self


def _held(place: Source) -> str:
    match place:
        case CaptionsSource() | ToySource(task=None):
            return "captions"
        case SugarCrepeSource() | WinogroundSource() | ToySource(task="toy_composition"):
            return "compositions"
        case MixBenchSource():
            return "documents"
    return "classes"


class Suite(SettingsGroup):
    """Sources and tasks."""

    name: str
    about: str = ""
    sources: dict[str, SuiteSource]
    """Name → where its images are."""
    tasks: tuple[Task, ...]
    """What to measure, in this order."""
    resamples: Count = 1000
    """Bootstrap resamples for the intervals."""

    @model_validator(mode="after")
    def _tasks_have_fitting_sources_and_names(self) -> "Suite":
        if not self.tasks:
            raise ValueError("tasks: needs at least one")
        for number, task in enumerate(self.tasks):
            for field, name in task.sources().items():
                where = f"tasks.{number}.{field}"
                if name not in self.sources:
                    raise ValueError(
                        f"{where}: there is no source {name!r}; there are {', '.join(self.sources)}"
                    )
                if self.sources[name].holds != task.needs:
                    raise ValueError(
                        f"{where}: {task.kind} needs a source with {task.needs}, {name!r} has none"
                    )
        counts = Counter(task.title for task in self.tasks)
        twice = [title for title, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"tasks: two are called {twice[0]!r}; give one a `name`")
        return self


def load_suite(name: str) -> Suite:
    """A shipped suite by its name, or one from a YAML file."""
    if name in SHIPPED:
        text, where = shipped(f"{name}.yaml"), f"suite {name}"
    else:
        where = name
        try:
            text = read_text(Path(name))
        except (OSError, ValueError) as error:
            why = "not UTF-8" if isinstance(error, UnicodeError) else first_line(error)
            raise ConfigError(
                f"{name}: no suite of this name ({', '.join(SHIPPED)}) and no readable file "
                f"({getattr(error, 'strerror', None) or why}). Check --suite."
            ) from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{where}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected name, sources and tasks, got {shown(values)}.")
    try:
        return Suite.model_validate({"name": Path(name).stem, **values})
    except ValidationError as error:
        raise ConfigError(explain(error, where=f"{where}: ")) from error


def shipped(name: str) -> str:
    """The text of a file in `config/shipped`."""
    return (resources.files("clip_refine.config") / "shipped" / name).read_text(encoding="utf-8")
