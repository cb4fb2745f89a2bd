"""What comes out, as plain data: scores, comparisons, suites, reports, checks, provenance."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from clip_refine.support.errors import DataError, foreign
from clip_refine.support.limits import WHOLE, read_text

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Comparison",
    "ComparisonRow",
    "Cutoff",
    "Difference",
    "FitProbability",
    "Interval",
    "RecipeSummary",
    "RunScores",
    "Score",
    "Scores",
    "SuiteScores",
    "TaskScores",
    "Trial",
    "Tuned",
    "read",
]


class Record(BaseModel):
    """Plain data that is a JSON file or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    is_none: ClassVar[str] = "is not valid"  # what is said of a file that holds something else
    advice: ClassVar[str] = ""  # what to do then, or where there is no file
    indent: ClassVar[int | None] = 2  # of the JSON

    @property
    def text(self) -> str:
        """What the file holds."""
        return self.model_dump_json(indent=self.indent) + "\n"

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(self.text, encoding="utf-8")


class Table(Record):
    """Results that are a table, too."""

    def rows_of_table(self) -> list[dict[str, Any]]:
        """A dictionary a line, column → value."""
        raise NotImplementedError

    def to_pandas(self) -> "pandas.DataFrame":
        """The lines as a `pandas.DataFrame`; a number that a line does not have is NaN there."""
        import pandas

        return pandas.DataFrame(self.rows_of_table())


Kind = TypeVar("Kind", bound=Record)


def read(kind: type[Kind], path: str | Path) -> Kind:
    """Read a file of results, as in `read(RunScores, Path("runs/mine/scores.json"))`.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        return kind.model_validate_json(read_text(path, WHOLE))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).{kind.advice}") from error
    except ValidationError as error:
        raise DataError(
            f"{path}: {kind.is_none} ({error.error_count()} errors).{kind.advice}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {kind.is_none} ({error}).{kind.advice}") from error


def of_one_run(folder: Path) -> AbstractContextManager[None]:
    """Around what is made of a folder's results: where they do not fit each other, say so."""
    after = " They were changed, or are of several runs; give the folder as it was written."
    return foreign(DataError, f"{folder}: its results do not fit each other", after)


def headline(
    geometry: Mapping[str, Any], retrieval: Mapping[str, Any], top1: Sequence[Any]
) -> dict[str, Any]:
    """What a run or recipe is judged by: the gap, mean recalls, and mean top-1 over the tasks.

    Of numbers, or of whatever adds up and can be divided, as numbers with their resamples do.
    """
    found = {"gap": geometry["centroid_distance"]} if geometry else {}
    for k in (1, 10):
        if f"image_to_text_recall@{k}" in retrieval:
            both = [retrieval[f"{way}_recall@{k}"] for way in ("image_to_text", "text_to_image")]
            found[f"mean_recall@{k}"] = mean(both)
    return found | ({"zero_shot_top1": mean(top1)} if top1 else {})


def mean(values: Sequence[Any]) -> Any:
    """Of numbers, or of whatever adds up and can be divided."""
    first, *others = values
    return sum(others, start=first) / len(values)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its path: `{"geometry": {"alignment": 1}}` as `{"geometry.alignment": 1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{name}": value} if inner is None else inner
    return found


class Scores(Table):
    """The numbers of one model on held-out data.

    Attributes:
        geometry: Names of docs/method.md, on each image with its first caption; empty, as
            `retrieval`, where only zero-shot tasks were measured.
        retrieval: `image_to_text_recall@k` and `text_to_image_recall@k`, shares from 0 to 1.
        zero_shot: Task name → `top1`, `top5`, `mean_per_class_recall`, shares from 0 to 1.
        pairs: Held-out images.
        captions: Their captions.
    """

    geometry: Mapping[str, float]
    retrieval: Mapping[str, float]
    zero_shot: Mapping[str, Mapping[str, float]]
    pairs: int
    captions: int

    @property
    def headline(self) -> dict[str, float]:
        """As `headline` the function."""
        top1 = [task["top1"] for task in self.zero_shot.values()]
        return headline(self.geometry, self.retrieval, top1)

    def rows_of_table(self) -> list[dict[str, Any]]:
        """Lines of `score`, by its path as in `retrieval.image_to_text_recall@1`, and `value`."""
        parts = self.model_dump(include={"geometry", "retrieval", "zero_shot"})
        return [{"score": name, "value": value} for name, value in flat(parts).items()]


class Cutoff(Record):
    """A cosine from which on a pair counts as fitting; all but `wished` are None where none is."""

    wished: float  # precision or rate of false positives
    cosine: float | None = None  # the threshold
    precision: float | None = None  # on other images, true and wrong pairs being as many
    recall: float | None = None  # share of true pairs let through there
    false_positive_rate: float | None = None  # share of wrong pairs let through there
    nonsense_found: float | None = None  # share of nonsense texts that find any image at all


THRESHOLD = "threshold.json"


class FitProbability(Record):
    """How a cosine becomes the probability that a pair fits: `threshold.json`."""

    slope: float  # per unit of cosine
    intercept: float  # at a cosine of 0
    calibration_error: float  # expected, 0-1, on images that it was not fitted on
    # its 95 % interval over those images; None in files of before there was one
    calibration_interval: tuple[float, float] | None = None
    # the diagram: mean probability, share that fits, pairs
    reliability: tuple[tuple[float, float, int], ...]
    cutoffs: Mapping[str, Cutoff]  # `precision` and `false_positive_rate`
    images: tuple[int, int]  # fitted on, measured on
    nonsense: int  # texts

    def probability(self, cosine: float) -> float:
        """That a pair fits, where true and wrong ones are as many.

        >>> FitProbability(slope=20.0, intercept=-5.0, calibration_error=0.0, reliability=(),
        ...     cutoffs={}, images=(20, 20), nonsense=0).probability(0.25)
        0.5
        """
        # 1 / (1 + exp(−z)), but exp overflows where a steep slope meets a far cosine
        return (1 + math.tanh((self.slope * cosine + self.intercept) / 2)) / 2


class Interval(Record):
    """A difference from the untouched model and its 95 % bootstrap interval over images."""

    mean: float  # mean over seeds less the untouched model's value
    low: float  # lower end, as `evaluation.bootstrap.interval` has it
    high: float  # upper end


class RunScores(Table):
    """`scores.json` of a refinement.

    Attributes:
        before: The model as it came.
        after: The refined model.
        difference: Score's path, as in `retrieval.image_to_text_recall@1` → after less before; only
            scores that are means over items have one.
        recipe: What was minimised and how.
        seconds: Wall-clock seconds of each part of the run.
    """

    is_none = "is no scores.json of a run"

    before: Scores
    after: Scores
    difference: Mapping[str, Interval] = {}
    recipe: Mapping[str, Any]
    seconds: Mapping[str, float]

    def rows_of_table(self) -> list[dict[str, Any]]:
        """A line a score: `score`, `before`, `after`, `change` and its interval, `low`, `high`."""
        after = {line["score"]: line["value"] for line in self.after.rows_of_table()}
        lines = []
        for line in self.before.rows_of_table():
            name, before = line["score"], line["value"]
            found = self.difference.get(name)
            interval = {"low": found.low, "high": found.high} if found else {}
            change = after[name] - before
            line = {"score": name, "before": before, "after": after[name], "change": change}
            lines.append({**line, "low": None, "high": None, **interval})
        return lines


class Spread(Record):
    """A number over the runs of a recipe."""

    mean: float  # over its seeds
    deviation: float | None  # sample standard deviation over its seeds, None for a single run


class ComparisonRow(Record):
    """One run of one recipe: a line of `comparison.csv`."""

    recipe: str  # `pre-trained`, a recipe, a peer, or a combination such as `hycd+mean-centring`
    # of the order, the captions drawn and the references; results that depend on none stand once,
    # with the first seed
    seed: int
    learning_rate: float | None  # None where nothing was trained
    steps: int  # training steps
    pairs: int  # training images
    geometry: Mapping[str, float]  # as in `Scores`
    retrieval: Mapping[str, float]  # as in `Scores`
    zero_shot: Mapping[str, Mapping[str, float]]  # as in `Scores`
    linear_probe: Mapping[str, float]  # task name → accuracy, 0-1
    # mean recall on the selection pairs, which chose the learning rate; None for peers, which are
    # fitted on those
    selection: float | None
    seconds: float  # of training, or of fitting and applying a peer, or both
    peak_memory: float  # GB, of the process or the GPU, while it ran

    @property
    def headline(self) -> dict[str, float]:
        """The columns of the table: the gap, recalls, and means over tasks where there are any."""
        top1 = [task["top1"] for task in self.zero_shot.values()]
        found = headline(self.geometry, self.retrieval, top1)
        ways = ("image_to_text_recall@1", "text_to_image_recall@1")
        numbers = {"gap": found.pop("gap"), **{way: self.retrieval[way] for way in ways}, **found}
        if self.linear_probe:
            numbers["linear_probe"] = mean(list(self.linear_probe.values()))
        return numbers


class RecipeSummary(Record):
    """All runs of one recipe together: a line of the table."""

    recipe: str  # as in the rows
    runs: int  # how many rows
    learning_rate: float | None  # as in the rows
    # the headline numbers first, then every number of the rows by its path, as in
    # `zero_shot.cifar10.top1`
    scores: Mapping[str, Spread]
    seconds: Spread  # as in the rows
    peak_memory: Spread  # as in the rows
    # headline name → difference from the untouched model; empty for that itself
    difference: Mapping[str, Interval]
    # no other recipe is as good in all of gap, mean R@1, zero-shot and linear probe and better in
    # one
    pareto_best: bool


class LearningRateChoice(Record):
    """How a recipe came by its learning rate."""

    recipe: str  # which
    chosen: float  # the best of those tried, the lower one of equals
    # learning rate → mean recall on the selection pairs; None where training failed
    tried: Mapping[str, float | None]
    # whether the best one is the lowest or highest of several: a wider grid might win
    at_edge: bool


class Comparison(Table):
    """`comparison.json`.

    Attributes:
        rows: Every run.
        summary: Every recipe over its seeds, in the order of the rows.
        learning_rates: For every trained recipe that had several to choose from.
        held_out: Images that all was scored on; None in files of before they were counted.
        models: Label of each further model → its name; its rows are called `LABEL: RECIPE`.
        vectors: Which stored pairs linear maps were learnt on, where it was no model.
        vectors_settings: What was set for those maps, name → value, where it is no default.
    """

    is_none = "is no comparison.json"

    rows: tuple[ComparisonRow, ...]
    summary: tuple[RecipeSummary, ...]
    learning_rates: tuple[LearningRateChoice, ...]
    held_out: int | None = None
    models: dict[str, str] = Field(default_factory=dict)
    vectors: str | None = None
    vectors_settings: dict[str, Any] = Field(default_factory=dict)

    def rows_of_table(self) -> list[dict[str, Any]]:
        """A line a run, as in comparison.csv, with every number by its path."""
        return [flat(row.model_dump()) for row in self.rows]


class Trial(Record):
    """Settings that `tune` tried."""

    recipe: str  # which
    learning_rate: float  # which
    # weights that are not the recipe's own, by their names in `loss`
    loss: Mapping[str, float]
    part: float  # share of the training pairs it was trained on in the end, 0-1
    # mean recall on the selection pairs then; None where training failed or the guard forbids it
    selection: float | None


class Tuned(Table):
    """What `tune` chose, and everything that it tried.

    Attributes:
        recipe: Of the best.
        learning_rate: Of the best.
        loss: Weights of RaFA and the anchor in the best, where it has them.
        selection: Mean recall of the best on the selection pairs, 0 to 1.
        untouched: That of the model as it came.
        trials: In the order in which they were tried.
    """

    recipe: str
    learning_rate: float
    loss: Mapping[str, float]
    selection: float
    untouched: float
    trials: tuple[Trial, ...]

    def rows_of_table(self) -> list[dict[str, Any]]:
        """A line a trial, with every weight by its path, as in `loss.rafa_weight`."""
        return [flat(trial.model_dump()) for trial in self.trials]


# --------------------------------------------------------------------------------------------------
# What an evaluation suite finds, as plain data: JSON in and out.


class Score(Record):
    """A number and how much it would move with other images of the same kind."""

    value: float  # on the images that there are
    low: float | None  # of its 95 % interval, the lower end; None where it is not resampled
    high: float | None  # the upper end
    higher_is_better: bool | None  # None where neither is


class TaskScores(Record):
    """One task with one model."""

    task: str  # the task's name in the suite
    kind: str  # what was measured
    model: str  # the model's label
    protocol: str  # how, in a sentence
    source: str  # where the images are from
    note: str | None = None  # what the suite says about them
    counts: Mapping[str, int]  # how many images, captions, classes, prompts, ... there were.
    prompts: str | None = None  # which prompt set; None where there are none
    templates: tuple[str, ...] = ()  # the prompts, with `{}` for the class name
    class_names: str | None = None  # which list of class names; None where there are none
    # both empty for stored vectors
    model_fingerprint: str = ""  # of weights, architecture, preprocessing and tokenizer
    # of every image with its captions or class, of class names and prompts
    data_fingerprint: str = ""
    scores: Mapping[str, Score]  # name → number with interval
    # what stands behind the numbers: per class, confusions, histograms, draws
    details: Mapping[str, Any] = {}


class Difference(Record):
    """One score of two models on the same images."""

    task: str  # the task's name
    score: str  # the score's name
    model: str  # whose score
    against: str  # less whose: the first model's
    mean: float  # the difference
    # lower end of its 95 % interval, both models resampled with the same images; None where it is
    # not resampled
    low: float | None
    high: float | None  # upper end
    higher_is_better: bool | None  # as in `Score`

    @property
    def interval(self) -> Interval | None:
        """The difference where it is resampled."""
        if self.low is None or self.high is None:
            return None
        return Interval(mean=self.mean, low=self.low, high=self.high)


class EvaluatedModel(Record):
    """A model of the comparison."""

    label: str  # what tables call it
    name: str  # as given or as a run's settings have it
    pretrained: str | None = None  # tag or file of weights
    fingerprint: str = ""  # of weights, architecture, preprocessing and tokenizer


class SuiteScores(Table):
    """What `clip-refine evaluate --suite` writes.

    Attributes:
        suite: The suite's name.
        models: In the order in which they were given; differences are taken from the first.
        measured: Every task with every model.
        differences: Every score of every other model less the first model's.
        missing: Source → what was not there; its tasks were left out.
        resamples: Of the bootstrap.
        seed: Of bootstrap, splits and draws.
        seconds: Wall-clock seconds.
        environment: Versions, device, command.
    """

    is_none = "holds no scores of a suite"
    advice = (
        " Give the --out file of `evaluate --suite`; an evaluation without one has all its numbers "
        "in its file, and no page."
    )

    suite: str
    models: tuple[EvaluatedModel, ...]
    measured: tuple[TaskScores, ...]
    differences: tuple[Difference, ...]
    missing: Mapping[str, str]
    resamples: int
    seed: int
    seconds: float
    environment: Mapping[str, Any]

    def rows_of_table(self) -> list[dict[str, Any]]:
        """A line a score of a task with a model: `value`, `low`, `high`, `higher_is_better`."""
        return [
            {"model": one.model, "task": one.task, "score": name, **score.model_dump()}
            for one in self.measured
            for name, score in one.scores.items()
        ]


# --------------------------------------------------------------------------------------------------
# What `clip-refine data check` finds, as plain data: its JSON.


class NumberSpread(Record):
    """Some whole numbers in five."""

    smallest: int  # the smallest
    median: int  # the one in the middle, of two the lower
    mean: float  # their mean
    high: int  # 95 % are not above it
    largest: int  # the largest

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "NumberSpread | None":
        """That of some numbers, None where there are none."""
        if not numbers:
            return None
        ranked = sorted(numbers)
        last = len(ranked) - 1
        return cls(
            smallest=ranked[0],
            median=ranked[last // 2],
            mean=sum(ranked) / len(ranked),
            high=ranked[round(0.95 * last)],
            largest=ranked[-1],
        )


class Problem(Record):
    """Something that a run would stop at."""

    where: str  # the row or image
    problem: str  # what is wrong and what to do


class CaptionFindings(Record):
    """About the texts."""

    count: int  # all of them
    per_image: NumberSpread | None  # how many an image has, of those that have any
    characters: NumberSpread | None  # their lengths
    words: NumberSpread | None  # their lengths in words
    # their lengths as the model's tokenizer has them, with start and end; None where it does not
    # tell
    tokens: NumberSpread | None
    context_length: int | None  # tokens that the model reads; None where it is not known
    too_long: int  # captions that are cut for the model
    too_long_examples: tuple[str, ...]  # the longest of them, longest first
    # text → how many images have it, of those that several have, most common first
    shared: Mapping[str, int]
    # those that hold a mark such as `<|endoftext|>`, which ends the text for the model
    special: tuple[str, ...] = ()


class ImageFindings(Record):
    """About the images."""

    count: int  # different ones that rows name, readable or not
    kinds: Mapping[str, int]  # format → how many
    odd: Mapping[str, int]  # what had to be done to see them as they are meant → how many
    short_side: NumberSpread | None  # in pixels
    long_side: NumberSpread | None  # in pixels
    unreadable: tuple[Problem, ...]  # those that cannot be decoded
    without_captions: tuple[str, ...]  # their names
    duplicates: tuple[tuple[str, ...], ...]  # groups of names with the same content
    # groups of names that look the same but differ in content
    near_duplicates: tuple[tuple[str, ...], ...]


class Findings(Record):
    """Everything about a source."""

    source: str  # as it was named
    kind: str  # what it was recognised as
    rows: int  # all of them, bad ones too
    bad_rows: tuple[Problem, ...]  # those with something wrong besides the image
    broken_off: str | None  # why reading stopped before the end, if it did
    images: ImageFindings  # about its images
    captions: CaptionFindings  # about its captions

    @property
    def sound(self) -> bool:
        """Whether a run on this source would start as it stands."""
        whole = not (self.bad_rows or self.broken_off or self.images.unreadable)
        return whole and self.images.count > 0


# --------------------------------------------------------------------------------------------------
# What a report shows beyond the scores, as plain data: `report.json`.


Point = tuple[float, float]


class Pair(Record):
    """A held-out image with its first caption, as the charts name it."""

    image: int  # its position among the held-out images, by which thumbnails are named
    name: str  # what its source calls it
    caption: str  # the text
    cosine_before: float  # between image and caption
    cosine_after: float  # the same of the refined model
    rank_before: int  # where the image's best caption stands among all captions, 1 is first
    rank_after: int  # the same of the refined model


class Clouds(Record):
    """Unit features of some pairs in the plane of one joint PCA of both models."""

    pairs: tuple[Pair, ...]  # which are drawn, in the order of all the points
    image_before: tuple[Point, ...]  # one point a pair
    text_before: tuple[Point, ...]  # the same
    image_after: tuple[Point, ...]  # the same
    text_after: tuple[Point, ...]  # the same
    explained: Point  # share of the variance that each axis shows
    fitted_on: int  # pairs that the plane was fitted on


class Histograms(Record):
    """How cosines are spread: shares of the pairs in each bin."""

    edges: tuple[float, ...]  # one more than there are bins
    true_before: tuple[float, ...]  # of captions with their own images
    wrong_before: tuple[float, ...]  # of captions with other images
    true_after: tuple[float, ...]  # the same of the refined model
    wrong_after: tuple[float, ...]  # the same
    # before and after, the chance that a true pair scores above a wrong one
    auc: tuple[float, float]
    threshold: tuple[float, float]  # before and after, the cosine that 1 % of the wrong pairs reach
    recall: tuple[float, float]  # before and after, share of true pairs that reach it


class Spectra(Record):
    """Singular values of the centred unit features over the root of their number, falling."""

    # one a dimension; squared, they are the variances along the principal axes
    image_before: tuple[float, ...]
    text_before: tuple[float, ...]  # the same
    image_after: tuple[float, ...]  # the same
    text_after: tuple[float, ...]  # the same


First = TypeVar("First", str, int)


class Query(Record, Generic[First]):
    """An image that looks for its captions, or a caption that looks for its image."""

    image: int  # its position
    caption: str  # the text; of an image the best-placed of its own captions, after
    rank_before: int  # where the (best of) its own stands, 1 is first
    rank_after: int  # the same of the refined model
    first_before: First  # the caption, or the image, that stood first
    first_after: First  # the one that stands first


class Ranking(Record, Generic[First]):
    """How the ranks of all queries of one kind moved."""

    queries: int  # how many
    improved: int  # how many found their own earlier than before
    worsened: int  # how many found it later
    most_improved: tuple[Query[First], ...]  # examples
    most_worsened: tuple[Query[First], ...]  # as many, chosen alike


class ClassChange(Record):
    """A class of a zero-shot task."""

    name: str  # the class
    images: int  # of this class
    before: float  # share of them that is found, 0-1
    after: float  # the same of the refined model
    # of an interval of after less before, for all classes of the task at once, the lower end; None
    # in files of before it was kept
    low: float | None = None
    high: float | None = None  # upper end


class ConfusionChange(Record):
    """Images of one class that are taken for another."""

    label: str  # the true class
    predicted: str  # the other one
    images: int  # of the true class
    before: int  # how many of them were taken for the other
    after: int  # how many are


class TaskChange(Record):
    """A zero-shot task."""

    name: str  # the task
    classes: tuple[ClassChange, ...]  # those with images
    confusions: tuple[ConfusionChange, ...]  # the most frequent ones, before or after


class Evidence(Record):
    """`report.json`."""

    is_none = "is no report.json of this version"
    advice = (
        " A run writes it unless --no-report is given; repeat the run with its config.yaml to have "
        "one."
    )
    indent = None  # half the size

    source: str  # where the held-out pairs are from
    clouds: Clouds  # for the scatter plots
    histograms: Histograms  # of cosines
    spectra: Spectra  # of both modalities
    images: Ranking[str]  # as queries
    captions: Ranking[int]  # as queries
    tasks: tuple[TaskChange, ...]  # zero-shot, class by class
    # before and after; None where there are too few images, and in files of older versions
    fits: tuple[FitProbability, FitProbability] | None = None
    kept: Mapping[str, Cutoff] = {}  # what the first one's thresholds do after
    thumbnails: Mapping[int, str]  # position of a held-out image → a small JPEG, base64


# --------------------------------------------------------------------------------------------------
# Where a saved model comes from: plain data without local paths, beside the weights.


class BaseModelFacts(Record):
    """The model that was started from."""

    name: str  # what to call it: `ViT-B-32 (openai)`, a Hub name, or a folder's last part
    hub_id: str | None = None  # its name on the Hugging Face Hub, where it is known
    licence: str | None = None  # the Hub's identifier of its licence, where its folder names one


class DataFacts(Record):
    """Pairs of image and captions."""

    name: str  # the file's or data set's name
    images: int  # how many
    captions: int  # how many they have together
    # 32 hexadecimal digits, see `clip_refine.data.pairs.pairs_fingerprint`; of a stream those
    # of its first pairs
    fingerprint: str


class Provenance(Record):
    """Everything that a model's card and the header of its weights say."""

    version: str  # of clip-refine
    made: Literal["refined", "interpolated", "folded", "converted"]  # how the model came about
    base: BaseModelFacts  # the model that was started from
    # the named objective of a refinement, or how else the weights were made
    recipe: str | None = None
    train: DataFacts | None = None  # what it was refined on
    held_out: DataFacts | None = None  # what it was measured on
    # name → value of what matters to repeat it
    settings: Mapping[str, str | int | float | bool] = {}
    scores: RunScores | None = None  # before and after a refinement, as its model was then
    precision: str = "fp32"  # that the weights are stored in

    @field_validator("scores", mode="wrap")
    @classmethod
    def _or_none(cls, value: Any, read_as_is: Any) -> RunScores | None:
        """Scores of another version are left out; what the model is, is known all the same."""
        try:
            return read_as_is(value)
        except ValidationError:
            return None

    def measured(self, scores: RunScores) -> "Provenance":
        """With what a run came to; nothing of the run's settings, which may name local paths."""
        guard = scores.recipe.get("guard")
        kept = {"guard": {name: guard[name] for name in ("step", "kept")}} if guard else {}
        of_run = scores.model_copy(update={"recipe": kept, "seconds": {}})
        return self.model_copy(update={"scores": of_run})

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
