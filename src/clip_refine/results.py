"""What comes out, as plain data: scores, comparisons, suites, reports, checks, provenance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from clip_refine.errors import DataError

# --------------------------------------------------------------------------------------------------
# What comes out, as plain data: JSON in and out.


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def write(self, path: Path) -> None:
        """Save as indented JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class Scores(_Record):
    """The numbers of one model on held-out data.

    Attributes:
        geometry: Names of docs/method.md, on each image with its first caption.
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


class Interval(_Record):
    """A difference from the untouched model and its 95 % bootstrap interval over images.

    Attributes:
        mean: Mean over seeds less the untouched model's value.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
    """

    mean: float
    low: float
    high: float


class RunScores(_Record):
    """`scores.json` of a refinement.

    Attributes:
        before: The model as it came.
        after: The refined model.
        difference: Score's path, as in `retrieval.image_to_text_recall@1` → after less before; only
            scores that are means over items have one.
        recipe: What was minimised and how.
        seconds: Wall-clock seconds of each part of the run.
    """

    before: Scores
    after: Scores
    difference: Mapping[str, Interval] = {}
    recipe: Mapping[str, Any]
    seconds: Mapping[str, float]


def read_run_scores(path: Path) -> RunScores:
    """Read a `scores.json`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return RunScores.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(
            f"{path}: is no scores.json of a run ({error.error_count()} errors)."
        ) from error


def read_comparison(path: Path) -> "Comparison":
    """Read a `comparison.json`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(f"{path}: is no comparison.json ({error.error_count()} errors).") from error


class Spread(_Record):
    """A number over the runs of a recipe.

    Attributes:
        mean: Over its seeds.
        deviation: Sample standard deviation over its seeds, None for a single run.
    """

    mean: float
    deviation: float | None


class ComparisonRow(_Record):
    """One run of one recipe: a line of `comparison.csv`.

    Attributes:
        recipe: `pre-trained`, a recipe, a peer, or a combination such as `hycd+mean-centring`.
        seed: Of the order, the captions drawn and the references; results that depend on none
            stand once, with the first seed.
        learning_rate: None where nothing was trained.
        steps: Training steps.
        pairs: Training images.
        geometry: As in `Scores`.
        retrieval: As in `Scores`.
        zero_shot: As in `Scores`.
        linear_probe: Task name → accuracy, 0-1.
        selection: Mean recall on the selection pairs, which chose the learning rate; None for
            peers, which are fitted on those.
        seconds: Of training, or of fitting and applying a peer, or both.
        peak_memory: GB, of the process or the GPU, while it ran.
    """

    recipe: str
    seed: int
    learning_rate: float | None
    steps: int
    pairs: int
    geometry: Mapping[str, float]
    retrieval: Mapping[str, float]
    zero_shot: Mapping[str, Mapping[str, float]]
    linear_probe: Mapping[str, float]
    selection: float | None
    seconds: float
    peak_memory: float

    @property
    def headline(self) -> dict[str, float]:
        """The columns of the table: the gap, recalls, and means over tasks where there are any."""
        both = {
            k: fmean(
                self.retrieval[f"{way}_recall@{k}"] for way in ("image_to_text", "text_to_image")
            )
            for k in (1, 10)
        }
        numbers = {
            "gap": self.geometry["centroid_distance"],
            "image_to_text_recall@1": self.retrieval["image_to_text_recall@1"],
            "text_to_image_recall@1": self.retrieval["text_to_image_recall@1"],
            "mean_recall@1": both[1],
            "mean_recall@10": both[10],
        }
        if self.zero_shot:
            numbers["zero_shot_top1"] = fmean(task["top1"] for task in self.zero_shot.values())
        if self.linear_probe:
            numbers["linear_probe"] = fmean(self.linear_probe.values())
        return numbers


class RecipeSummary(_Record):
    """All runs of one recipe together: a line of the table.

    Attributes:
        recipe: As in the rows.
        runs: How many rows.
        learning_rate: As in the rows.
        scores: The headline numbers first, then every number of the rows by its path, as in
            `zero_shot.cifar10.top1`.
        seconds: As in the rows.
        peak_memory: As in the rows.
        difference: Headline name → difference from the untouched model; empty for that itself.
        pareto_best: No other recipe is as good in all of gap, mean R@1, zero-shot and linear probe
            and better in one.
    """

    recipe: str
    runs: int
    learning_rate: float | None
    scores: Mapping[str, Spread]
    seconds: Spread
    peak_memory: Spread
    difference: Mapping[str, Interval]
    pareto_best: bool


class LearningRateChoice(_Record):
    """How a recipe came by its learning rate.

    Attributes:
        recipe: Which.
        chosen: The best of those tried, the lower one of equals.
        tried: Learning rate → mean recall on the selection pairs; None where training failed.
        at_edge: Whether the best one is the lowest or highest of several: a wider grid might win.
    """

    recipe: str
    chosen: float
    tried: Mapping[str, float | None]
    at_edge: bool


class Comparison(_Record):
    """`comparison.json`.

    Attributes:
        rows: Every run.
        summary: Every recipe over its seeds, in the order of the rows.
        learning_rates: For every trained recipe.
    """

    rows: tuple[ComparisonRow, ...]
    summary: tuple[RecipeSummary, ...]
    learning_rates: tuple[LearningRateChoice, ...]


# --------------------------------------------------------------------------------------------------
# What an evaluation suite finds, as plain data: JSON in and out.


class Score(_Record):
    """A number and how much it would move with other images of the same kind.

    Attributes:
        value: On the images that there are.
        low: 2.5 % quantile of bootstrap resamples of the images; None where it is not resampled.
        high: 97.5 % quantile.
        higher_is_better: None where neither is.
    """

    value: float
    low: float | None
    high: float | None
    higher_is_better: bool | None


class Measured(_Record):
    """One task with one model.

    Attributes:
        task: The task's name in the suite.
        kind: What was measured.
        model: The model's label.
        protocol: How, in a sentence.
        source: Where the images are from.
        note: What the suite says about them.
        counts: How many images, captions, classes, prompts, ... there were.
        prompts: Which prompt set; None where there are none.
        templates: The prompts, with `{}` for the class name.
        class_names: Which list of class names; None where there are none.
        model_fingerprint: Of weights, architecture, preprocessing and tokenizer.
        data_fingerprint: Of every image with its captions or class, of class names and prompts.
        scores: Name → number with interval.
        details: What stands behind the numbers: per class, confusions, histograms, draws.
    """

    task: str
    kind: str
    model: str
    protocol: str
    source: str
    note: str | None
    counts: Mapping[str, int]
    prompts: str | None
    templates: tuple[str, ...]
    class_names: str | None
    model_fingerprint: str
    data_fingerprint: str
    scores: Mapping[str, Score]
    details: Mapping[str, Any]


class Difference(_Record):
    """One score of two models on the same images.

    Attributes:
        task: The task's name.
        score: The score's name.
        model: Whose score.
        against: Less whose: the first model's.
        mean: The difference.
        low: 2.5 % quantile, both models resampled with the same images; None where not resampled.
        high: 97.5 % quantile.
        higher_is_better: As in `Score`.
    """

    task: str
    score: str
    model: str
    against: str
    mean: float
    low: float | None
    high: float | None
    higher_is_better: bool | None


class EvaluatedModel(_Record):
    """A model of the comparison.

    Attributes:
        label: What tables call it.
        name: As given or as a run's settings have it.
        pretrained: Tag or file of weights.
        fingerprint: Of weights, architecture, preprocessing and tokenizer.
    """

    label: str
    name: str
    pretrained: str | None
    fingerprint: str


class SuiteScores(_Record):
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

    suite: str
    models: tuple[EvaluatedModel, ...]
    measured: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    missing: Mapping[str, str]
    resamples: int
    seed: int
    seconds: float
    environment: Mapping[str, Any]


def read_suite_scores(path: Path) -> SuiteScores:
    """Read what `evaluate --suite --out` wrote.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return SuiteScores.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise DataError(
            f"{path}: holds no scores of a suite ({error.error_count()} errors)."
        ) from error


# --------------------------------------------------------------------------------------------------
# What `clip-refine data check` finds, as plain data: its JSON.


class _Finding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumberSpread(_Finding):
    """Some whole numbers in five.

    Attributes:
        smallest: The smallest.
        median: The one in the middle, of two the lower.
        mean: Their mean.
        high: 95 % are not above it.
        largest: The largest.
    """

    smallest: int
    median: int
    mean: float
    high: int
    largest: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "NumberSpread | None":
        """That of some numbers, None where there are none.

        >>> NumberSpread.of([4, 1, 1, 2]).median
        1
        """
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


class Problem(_Finding):
    """Something that a run would stop at.

    Attributes:
        where: The row or image.
        problem: What is wrong and what to do.
    """

    where: str
    problem: str


class CaptionFindings(_Finding):
    """About the texts.

    Attributes:
        count: All of them.
        per_image: How many an image has, of those that have any.
        characters: Their lengths.
        words: Their lengths in words.
        tokens: Their lengths as the model's tokenizer has them, with start and end; None where it
            does not tell.
        context_length: Tokens that the model reads; None where it is not known.
        too_long: Captions that are cut for the model.
        too_long_examples: The longest of them, longest first.
        shared: Text → how many images have it, of those that several have, most common first.
    """

    count: int
    per_image: NumberSpread | None
    characters: NumberSpread | None
    words: NumberSpread | None
    tokens: NumberSpread | None
    context_length: int | None
    too_long: int
    too_long_examples: tuple[str, ...]
    shared: Mapping[str, int]


class ImageFindings(_Finding):
    """About the images.

    Attributes:
        count: Different ones that rows name, readable or not.
        kinds: Format → how many.
        odd: What had to be done to see them as they are meant → how many.
        short_side: In pixels.
        long_side: In pixels.
        unreadable: Those that cannot be decoded.
        without_captions: Their names.
        duplicates: Groups of names with the same content.
        near_duplicates: Groups of names that look the same but differ in content.
    """

    count: int
    kinds: Mapping[str, int]
    odd: Mapping[str, int]
    short_side: NumberSpread | None
    long_side: NumberSpread | None
    unreadable: tuple[Problem, ...]
    without_captions: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]


class Findings(_Finding):
    """Everything about a source.

    Attributes:
        source: As it was named.
        kind: What it was recognised as.
        rows: All of them, bad ones too.
        bad_rows: Those with something wrong besides the image.
        broken_off: Why reading stopped before the end, if it did.
        images: About its images.
        captions: About its captions.
    """

    source: str
    kind: str
    rows: int
    bad_rows: tuple[Problem, ...]
    broken_off: str | None
    images: ImageFindings
    captions: CaptionFindings

    @property
    def sound(self) -> bool:
        """Whether a run on this source would start as it stands."""
        return not (self.bad_rows or self.broken_off or self.images.unreadable)


# --------------------------------------------------------------------------------------------------
# What a report shows beyond the scores, as plain data: `report.json`.


Point = tuple[float, float]


class Pair(_Record):
    """A held-out image with its first caption, as the charts name it.

    Attributes:
        image: Its position among the held-out images, by which thumbnails are named.
        name: What its source calls it.
        caption: The text.
        cosine_before: Between image and caption.
        cosine_after: The same of the refined model.
        rank_before: Where the image's best caption stands among all captions, 1 is first.
        rank_after: The same of the refined model.
    """

    image: int
    name: str
    caption: str
    cosine_before: float
    cosine_after: float
    rank_before: int
    rank_after: int


class Clouds(_Record):
    """Unit features of some pairs in the plane of one joint PCA of both models.

    Attributes:
        pairs: Which are drawn, in the order of all the points.
        image_before: One point a pair.
        text_before: The same.
        image_after: The same.
        text_after: The same.
        explained: Share of the variance that each axis shows.
        fitted_on: Pairs that the plane was fitted on.
    """

    pairs: tuple[Pair, ...]
    image_before: tuple[Point, ...]
    text_before: tuple[Point, ...]
    image_after: tuple[Point, ...]
    text_after: tuple[Point, ...]
    explained: Point
    fitted_on: int


class Histograms(_Record):
    """How cosines are spread: shares of the pairs in each bin.

    Attributes:
        edges: One more than there are bins.
        true_before: Of captions with their own images.
        wrong_before: Of captions with other images.
        true_after: The same of the refined model.
        wrong_after: The same.
        auc: Before and after, the chance that a true pair scores above a wrong one.
        threshold: Before and after, the cosine that 1 % of the wrong pairs reach.
        recall: Before and after, share of true pairs that reach it.
    """

    edges: tuple[float, ...]
    true_before: tuple[float, ...]
    wrong_before: tuple[float, ...]
    true_after: tuple[float, ...]
    wrong_after: tuple[float, ...]
    auc: tuple[float, float]
    threshold: tuple[float, float]
    recall: tuple[float, float]


class Spectra(_Record):
    """Singular values of the centred unit features over the root of their number, falling.

    Attributes:
        image_before: One a dimension; squared, they are the variances along the principal axes.
        text_before: The same.
        image_after: The same.
        text_after: The same.
    """

    image_before: tuple[float, ...]
    text_before: tuple[float, ...]
    image_after: tuple[float, ...]
    text_after: tuple[float, ...]


class ImageQuery(_Record):
    """An image that looks for its captions.

    Attributes:
        image: Its position.
        caption: The best-placed of its own captions, after.
        rank_before: Where the best of its own stands, 1 is first.
        rank_after: The same of the refined model.
        first_before: The caption that stood first.
        first_after: The caption that stands first.
    """

    image: int
    caption: str
    rank_before: int
    rank_after: int
    first_before: str
    first_after: str


class CaptionQuery(_Record):
    """A caption that looks for its image.

    Attributes:
        caption: The text.
        image: The image that it describes.
        rank_before: Where that stands, 1 is first.
        rank_after: The same of the refined model.
        first_before: The image that stood first.
        first_after: The image that stands first.
    """

    caption: str
    image: int
    rank_before: int
    rank_after: int
    first_before: int
    first_after: int


Query = TypeVar("Query", ImageQuery, CaptionQuery)


class Ranking(_Record, Generic[Query]):
    """How the ranks of all queries of one kind moved.

    Attributes:
        queries: How many.
        improved: How many found their own earlier than before.
        worsened: How many found it later.
        most_improved: Examples.
        most_worsened: As many, chosen alike.
    """

    queries: int
    improved: int
    worsened: int
    most_improved: tuple[Query, ...]
    most_worsened: tuple[Query, ...]


class ClassChange(_Record):
    """A class of a zero-shot task.

    Attributes:
        name: The class.
        images: Of this class.
        before: Share of them that is found, 0-1.
        after: The same of the refined model.
    """

    name: str
    images: int
    before: float
    after: float


class ConfusionChange(_Record):
    """Images of one class that are taken for another.

    Attributes:
        label: The true class.
        predicted: The other one.
        images: Of the true class.
        before: How many of them were taken for the other.
        after: How many are.
    """

    label: str
    predicted: str
    images: int
    before: int
    after: int


class TaskChange(_Record):
    """A zero-shot task.

    Attributes:
        name: The task.
        classes: Those with images.
        confusions: The most frequent ones, before or after.
    """

    name: str
    classes: tuple[ClassChange, ...]
    confusions: tuple[ConfusionChange, ...]


class Evidence(_Record):
    """`report.json`.

    Attributes:
        source: Where the held-out pairs are from.
        clouds: For the scatter plots.
        histograms: Of cosines.
        spectra: Of both modalities.
        images: As queries.
        captions: As queries.
        tasks: Zero-shot, class by class.
        thumbnails: Position of a held-out image → a small JPEG, base64.
    """

    source: str
    clouds: Clouds
    histograms: Histograms
    spectra: Spectra
    images: Ranking[ImageQuery]
    captions: Ranking[CaptionQuery]
    tasks: tuple[TaskChange, ...]
    thumbnails: Mapping[int, str]

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(self.model_dump_json() + "\n", encoding="utf-8")


def read_evidence(path: Path) -> Evidence:
    """Read a `report.json`.

    Raises:
        DataError: The file is missing or holds something else.
    """
    try:
        return Evidence.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). A run writes it unless --no-report is "
            "given; repeat the run with its config.yaml to have one."
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: is no report.json of this version. Repeat the run with its config.yaml to "
            "have one."
        ) from error


# --------------------------------------------------------------------------------------------------
# Where a saved model comes from: plain data without local paths, beside the weights.


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
