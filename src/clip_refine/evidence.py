"""What a report shows beyond the scores, as plain data: `report.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from clip_refine.errors import DataError

Point = tuple[float, float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
