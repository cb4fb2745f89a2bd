"""Every metric: what it is called, its unit, which way is better, what it means. No torch here.

Here and not beside the functions, since reports and everything below `evaluation` read it. A new
metric is a function in `evaluation` whose number is returned by name, and a row here; tables,
comparisons, suites, pages and cards follow. `@` and what comes after it (a depth, shots a class, a
rate of false positives) belong to a name but not to its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """One row."""

    name: str  # as in the JSON, without `@`
    group: str  # `geometry`, `retrieval`, ..., as in a suite's kinds; `headline` for a second name
    heading: str  # in tables and sentences; {at} stands for `@` and what follows it
    unit: str  # and its range
    higher_is_better: bool | None  # None where neither direction is better by itself
    meaning: str
    short: str = ""  # where columns are narrow; the heading where empty
    shown: bool = True  # in tables, or in the JSON only


_GAP = Metric(
    *("centroid_distance", "geometry", "centroid distance (the gap){at}", "distance, 0–2", False),
    "how far the mean image lies from the mean text on the unit sphere",
    short="gap",
)
_ROWS = (
    _GAP,
    Metric(
        *("centroid_squared_over_dim", "geometry", "the paper's modality gap"),
        *("squared distance, 0–4/d", False),
        "the square of that over the dimension",
        shown=False,
    ),
    Metric(
        *("true_pair_cosine", "geometry", "cosine of true pairs", "cosine, −1–1", None),
        "how near an image and its caption are; says nothing unless wrong pairs are further",
    ),
    Metric(
        *("alignment", "geometry", "alignment, mean squared distance"),
        *("squared distance, 0–4", False),
        "how far an image and its caption are apart",
    ),
    Metric(
        *("residual_alignment", "geometry", "residual alignment", "squared distance, 0–4", False),
        "what is left of alignment when each modality is centred",
        shown=False,
    ),
    Metric(
        *("uniformity_log", "geometry", "uniformity, log", "log, −8–0", False),
        "how unevenly images and texts together fill the sphere",
    ),
    Metric(
        *("uniformity_mean", "geometry", "uniformity, mean", "kernel, e⁻⁸–1", False),
        "the same without the logarithm, as the paper prints it",
        shown=False,
    ),
    Metric(
        *("relative_modality_gap", "geometry", "relative modality gap", "share, 0–1", False),
        "distance within pairs as a share of it plus the distance within a modality",
    ),
    Metric(
        *("text_first_share", "geometry", "text ranks first in a mixed index"),
        *("share, 0–1", False),
        "share of captions that find another caption before any image",
    ),
    Metric(
        *("linear_separability", "geometry", "images told from text by a line"),
        *("share, ½–1", False),
        "accuracy of a logistic regression that tells images from texts",
    ),
    Metric(
        *("hubness_skewness", "geometry", "hubness, skewness", "skewness", False),
        "how unequally often texts are among an image's nearest",
    ),
    Metric(
        *("effective_rank", "geometry", "effective rank", "directions, 1–d", True),
        "how many directions images and texts together fill",
    ),
    Metric(
        *("image_to_text_recall", "retrieval", "image to text R{at}", "share, 0–1", True),
        "share of images with one of their captions among the first k",
        short="R{at} i→t",
    ),
    Metric(
        *("text_to_image_recall", "retrieval", "text to image R{at}", "share, 0–1", True),
        "share of captions with their image among the first k",
        short="R{at} t→i",
    ),
    Metric(
        *("image_to_text_mAP", "retrieval", "image to text mAP", "share, 0–1", True),
        "mean over images of the precision at each of their captions",
    ),
    Metric(
        *("text_to_image_mAP", "retrieval", "text to image mAP", "share, 0–1", True),
        "mean over captions of the precision at their image",
    ),
    Metric(
        *("image_to_text_median_rank", "retrieval", "image to text median rank"),
        *("rank, from 1", False),
        "where an image's best caption stands",
    ),
    Metric(
        *("text_to_image_median_rank", "retrieval", "text to image median rank"),
        *("rank, from 1", False),
        "where a caption's image stands",
    ),
    Metric(
        *("image_to_text_hubness", "retrieval", "hubness of captions{at}", "skewness", False),
        "how unequally often captions are among an image's nearest",
    ),
    Metric(
        *("text_to_image_hubness", "retrieval", "hubness of images{at}", "skewness", False),
        "how unequally often images are among a caption's nearest",
    ),
    *(
        Metric(
            *(f"{kind}_churn", "retrieval", f"{kind.replace('_', ' ')} churn"),
            *("share, 0–1", False),
            f"share of {queries} whose first hit is another than the first model's",
        )
        for kind, queries in (("image_to_text", "images"), ("text_to_image", "captions"))
    ),
    Metric(
        *("ndcg", "mixed-search", "NDCG{at}", "share, 0–1", True),
        "how early captions find what belongs to them among images and captions together",
    ),
    Metric(
        *("median_image_rank", "mixed-search", "median rank of the image", "rank, from 1", False),
        "where a caption's image stands among images and captions together",
    ),
    *(
        row
        for kind, what in (("image", "images"), ("text", "texts"), ("both", "image with text"))
        for row in (
            Metric(
                *(f"{kind}_query_ndcg", "mixed-documents", f"NDCG{{at}}, query: {kind}"),
                *("share, 0–1", True),
                f"how early queries that are {what} find their documents of any kind",
            ),
            Metric(
                *(f"{kind}_query_recall", "mixed-documents", f"R{{at}}, query: {kind}"),
                *("share, 0–1", True),
                f"share of queries that are {what} with a document of theirs among the first k",
            ),
        )
    ),
    *(
        row
        for kind, group in (("image", "image-neighbours"), ("text", "text-neighbours"))
        for row in (
            Metric(
                *(f"{kind}_to_{kind}_mAP", group, f"{kind} to {kind} mAP", "share, 0–1", True),
                f"mean over {kind}s of the precision at each other {kind} of their group",
            ),
            Metric(
                *(f"{kind}_to_{kind}_recall", group, f"{kind} to {kind} R{{at}}"),
                *("share, 0–1", True),
                f"share of {kind}s with another of their group among the first k",
            ),
        )
    ),
    Metric(
        *("knn_accuracy", "image-neighbours", "k-NN accuracy{at}", "share, 0–1", True),
        "share of images whose class most of their nearest have",
    ),
    *(
        row
        for kind, what, better in (
            ("image", "clusters of images and classes", True),
            ("text", "clusters of prompts and classes", True),
            ("both", "clusters of images and prompts together and classes", True),
            ("modality", "clusters of images and texts together and modality", False),
        )
        for row in (
            Metric(
                *(f"{kind}_v_measure", "clustering", f"V-measure, {kind}", "share, 0–1", better),
                f"mutual information of {what} over their mean entropy (NMI)",
            ),
            Metric(
                *(f"{kind}_adjusted_rand", "clustering", f"adjusted Rand, {kind}"),
                *("index, −½–1", better),
                f"agreement of {what} on pairs of items, 0 for chance",
            ),
        )
    ),
    Metric(
        *("pairs_together", "clustering", "pairs in one cluster", "share, 0–1", True),
        "share of images whose first caption is in their cluster",
    ),
    Metric(
        *("composition_accuracy", "composition", "composition{at}", "share, 0–1", True),
        "share of images nearer to their own texts than to one of nearly the same words",
    ),
    Metric(
        *("text_only_accuracy", "composition", "text only{at}", "share, 0–1", True),
        "share of texts nearer to their paraphrase than to one of nearly the same words",
    ),
    Metric(
        *("text_score", "composition", "text score{at}", "share, 0–1", True),
        "share of items whose two images are both nearer to their own text",
    ),
    Metric(
        *("image_score", "composition", "image score{at}", "share, 0–1", True),
        "share of items whose two texts are both nearer to their own image",
    ),
    Metric(
        *("group_score", "composition", "group score{at}", "share, 0–1", True),
        "share of items with both",
    ),
    Metric(
        *("auc", "separation", "AUC", "share, 0–1", True),
        "chance that a true pair scores above a wrong one",
    ),
    Metric(
        *("recall", "separation", "recall{at}", "share, 0–1", True),
        "share of true pairs above the cosine that so many wrong pairs reach",
    ),
    Metric(
        *("threshold", "separation", "threshold", "cosine, −1–1", None),
        "that cosine",
    ),
    Metric(
        # as `true_pair_cosine`, over all captions
        *("true_pair_mean", "separation", "mean of true pairs", "cosine, −1–1", None),
        "mean cosine of captions with their images",
    ),
    Metric(
        *("true_pair_deviation", "separation", "deviation of true pairs", "cosine, 0–1", None),
        "standard deviation of those",
    ),
    Metric(
        *("wrong_pair_mean", "separation", "mean of wrong pairs", "cosine, −1–1", None),
        "mean cosine of captions with all other images",
    ),
    Metric(
        *("wrong_pair_deviation", "separation", "deviation of wrong pairs", "cosine, 0–1", None),
        "standard deviation of those",
    ),
    Metric(
        *("top1", "zero-shot", "top1", "share, 0–1", True),
        "share of images whose class is the nearest",
    ),
    Metric(
        *("top5", "zero-shot", "top5", "share, 0–1", True),
        "share of images whose class is among the nearest five",
    ),
    Metric(
        *("mean_per_class_recall", "zero-shot", "mean_per_class_recall", "share, 0–1", True),
        "top1 within each class, averaged over classes",
    ),
    Metric(
        *("expected_calibration_error", "zero-shot", "expected_calibration_error"),
        *("share, 0–1", False),
        "how far confidence is from accuracy",
    ),
    Metric(
        *("churn", "zero-shot", "churn", "share, 0–1", False),
        "share of images whose class is another than the first model's",
    ),
    Metric(
        *("classes_lost", "zero-shot", "classes lost", "classes", False),
        "classes that lost recall beyond chance since the first model, all classes considered",
    ),
    Metric(
        *("accuracy", "probe", "accuracy{at}", "share, 0–1", True),
        "share of held-out images whose class a logistic regression finds",
    ),
    Metric(
        *("deviation_over_draws", "probe", "deviation over draws{at}", "share, 0–1", None),
        "of accuracy, over draws of the training images",
    ),
    replace(_GAP, name="gap", group="headline"),
    Metric(
        *("mean_recall", "retrieval", "mean R{at}", "share, 0–1", True),
        "mean recall of both directions",
    ),
    Metric(
        *("zero_shot_top1", "zero-shot", "mean zero-shot top-1", "share, 0–1", True),
        "top1 averaged over tasks",
        short="zero-shot",
    ),
    Metric(
        *("linear_probe", "probe", "linear probe", "share, 0–1", True),
        "accuracy of a linear probe averaged over tasks",
    ),
)
METRICS = {row.name: row for row in _ROWS}


def metric(name: str) -> Metric:
    """The row of a number, headings filled in; else a KeyError, as each needs a direction."""
    row_name, mark, depth = name.partition("@")
    if row_name not in METRICS:
        raise KeyError(f"{name}: no metric of this name; results/metrics.py has a row for each")
    row = METRICS[row_name]
    at = f"{mark}{depth}"
    heading = row.heading.replace("{at}", at)
    return replace(row, heading=heading, short=row.short.replace("{at}", at) or heading)


OBJECTIVES = ("gap", "mean_recall@1", "zero_shot_top1", "linear_probe")
"""What Pareto-best is judged by."""


def pareto_best(scores: Mapping[str, Mapping[str, float]]) -> set[str]:
    """Those that no other one dominates: as good in every objective and better in one."""
    signed = {
        name: [
            found[key] * (1 if metric(key).higher_is_better else -1)
            for key in OBJECTIVES
            if key in found
        ]
        for name, found in scores.items()
    }
    return {
        name
        for name, own in signed.items()
        if not any(
            other != own and all(o >= mine for o, mine in zip(other, own, strict=True))
            for other in signed.values()
        )
    }
