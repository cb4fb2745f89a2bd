"""What a report shows beyond the scores, as plain data: `report.json`."""

from collections.abc import Mapping
from pathlib import Path

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


class Evidence(_Record):
    """`report.json`.

    Attributes:
        source: Where the held-out pairs are from.
        clouds: For the scatter plots.
        histograms: Of cosines.
        spectra: Of both modalities.
        thumbnails: Position of a held-out image → a small JPEG, base64.
    """

    source: str
    clouds: Clouds
    histograms: Histograms
    spectra: Spectra
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
