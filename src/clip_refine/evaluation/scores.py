"""A model's features → the numbers that refine and compare show."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.bootstrap import interval, resampled_means, resampled_ratios
from clip_refine.evaluation.classify import (
    class_vectors,
    confusion_pairs,
    linear_probe,
    per_class_recall,
    zero_shot_predictions,
    zero_shot_ranks,
    zero_shot_scores,
)
from clip_refine.evaluation.geometry import geometry, text_first
from clip_refine.evaluation.retrieval import RetrievalRanks, retrieval, retrieval_ranks
from clip_refine.evaluation.similarity import measured, unit_sides
from clip_refine.models.embed import EmbeddedPairs, Embedder, embed_pairs, embed_prompts
from clip_refine.models.weights import interpolate_weights
from clip_refine.results import (
    ClassChange,
    ComparisonRow,
    ConfusionChange,
    Interval,
    RecipeSummary,
    Scores,
    Spread,
    TaskChange,
)
from clip_refine.support.console import Bar

# --------------------------------------------------------------------------------------------------
# What a task of a suite finds with one model, before it becomes a record.


_LOWER_IS_BETTER = (
    *("expected_calibration_error", "median_rank", "median_image_rank", "text_first_share"),
    *("centroid_distance", "centroid_squared_over_dim", "alignment"),
    *("residual_alignment", "uniformity_log", "uniformity_mean", "relative_modality_gap"),
    *("linear_separability", "hubness_skewness"),
)
_NEITHER = ("threshold", "wrong_pair_mean", "wrong_pair_deviation", "true_pair_deviation")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Numbers of one task with one model."""

    protocol: str  # how they were taken, in a sentence
    counts: Mapping[str, int]  # how many images, captions, classes, ... there were.
    scores: Mapping[str, float]  # name → number
    # name → (resamples,) the number with the images drawn anew, the same draws for every model;
    # not for all scores
    resampled: Mapping[str, Tensor]
    # what stands behind the numbers, as plain data
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are taken."""

    resamples: int  # how often the images are drawn anew
    seed: int  # of splits and few-shot draws, and with `source` of the images drawn
    # what the images are from: other sources, other draws, the same for all models
    source: str = ""

    @property
    def draws(self) -> dict[str, int]:
        """`resamples` and `seed` for the functions of `bootstrap`."""
        stream = zlib.crc32(self.source.encode())
        return {"resamples": self.resamples, "seed": (self.seed + stream) % 2**63}

    def of_images(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Resampled means of numbers that each image has, (N,) each."""
        count = len(next(iter(columns.values())))
        return self.of_queries(columns, torch.arange(count), count)

    def of_queries(
        self, columns: Mapping[str, Tensor], owners: Tensor, image_count: int
    ) -> dict[str, Tensor]:
        """Resampled means of numbers that each query has, (Q,) each; `owners` are their images."""
        values = torch.stack([column.cpu().double() for column in columns.values()], dim=1)
        drawn = resampled_ratios(values, owners, image_count, **self.draws)
        return dict(zip(columns, drawn.T, strict=True))


def means(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each."""
    return {name: column.double().mean().item() for name, column in columns.items()}


def higher_is_better(score: str) -> bool | None:
    """The direction of a score by its name, whatever task it is of.

    >>> higher_is_better("top1"), higher_is_better("text_to_image_median_rank")
    (True, False)
    """
    if score in _NEITHER or score.startswith("deviation"):
        return None
    return not score.endswith(_LOWER_IS_BETTER)


def mean_of(outcomes: Mapping[str, Outcome], score: str) -> Outcome:
    """One score of several tasks on average, each task's images drawn for themselves."""
    every = list(outcomes.values())
    drawn = torch.stack([outcome.resampled[score] for outcome in every])
    return Outcome(
        protocol=f"mean over {', '.join(outcomes)}",
        counts={"tasks": len(every), "images": sum(o.counts["images"] for o in every)},
        scores={score: sum(outcome.scores[score] for outcome in every) / len(every)},
        resampled={score: drawn.mean(dim=0)},
    )


# --------------------------------------------------------------------------------------------------
# One model, held-out pairs and labelled images → all the numbers.


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """What a model makes of a zero-shot task."""

    name: str  # the task
    image_features: Tensor  # (N, d)
    class_features: Tensor  # (C, d), from `class_vectors`
    labels: Tensor  # (N,) int64, the class of each image


@dataclass(frozen=True, eq=False)
class ModelFeatures:
    """What a model makes of everything it is scored on; a peer may have transformed it."""

    pairs: EmbeddedPairs  # the held-out pairs
    tasks: Sequence[TaskFeatures]  # the zero-shot tasks
    # whether similarity is the cosine, or the dot product of features as they are
    normalize: bool = True
    # columns that are a place in the space; those behind them only add to scores
    dim: int | None = None


def score_model(
    embedder: Embedder,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    *,
    seed: int,
    pairs: EmbeddedPairs | None = None,
) -> Scores:
    """Geometry and retrieval on the held-out pairs, zero-shot classification on each task.

    Geometry takes each image with its first caption; retrieval takes all captions.

    Args:
        embedder: The model to score.
        held_out: Pairs that were not trained on.
        tasks: May be empty.
        seed: Of the split that `linear_separability` is measured with.
        pairs: The features of `held_out`, where they are at hand already.
    """
    return score_features(embed_model(embedder, held_out, tasks, pairs=pairs), seed=seed)


def embed_model(
    embedder: Embedder,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    *,
    pairs: EmbeddedPairs | None = None,
) -> ModelFeatures:
    """Encode everything that the numbers are taken from once; arguments as in `score_model`."""
    return ModelFeatures(
        pairs or embed_pairs(embedder, held_out), [_embed_task(embedder, task) for task in tasks]
    )


def score_features(features: ModelFeatures, *, seed: int) -> Scores:
    """All the numbers of `score_model` from features that are at hand."""
    pairs, normalize = features.pairs, features.normalize
    return Scores(
        geometry=geometry(
            pairs.image_features[:, : features.dim],
            pairs.first_caption_features[:, : features.dim],
            seed=seed,
        ),
        retrieval=retrieval(
            pairs.image_features, pairs.text_features, pairs.text_to_image, normalize=normalize
        ),
        zero_shot={
            task.name: zero_shot_scores(
                task.image_features, task.class_features, task.labels, normalize=normalize
            )
            for task in features.tasks
        },
        pairs=len(pairs.image_features),
        captions=len(pairs.text_features),
    )


def probe_features(features: ModelFeatures, *, seed: int) -> dict[str, float]:
    """Task name → accuracy of a linear probe on its images."""
    return {
        task.name: linear_probe(task.image_features[:, : features.dim], task.labels, seed=seed)
        for task in features.tasks
    }


def _embed_task(embedder: Embedder, task: LabelledImages) -> TaskFeatures:
    prompt_features = embed_prompts(embedder, task.class_names, task.templates)
    return TaskFeatures(
        task.name,
        embedder.images(task, f"Encoding {task.name}"),
        class_vectors(prompt_features),
        torch.tensor(task.labels),
    )


# --------------------------------------------------------------------------------------------------
# The few numbers that a comparison turns on, and how each moves with the images.


@measured
def resampled_headline(
    features: ModelFeatures, *, resamples: int, seed: int
) -> dict[str, list[float]]:
    """`gap`, `mean_recall@1` and `zero_shot_top1` with the images drawn anew, many times.

    An image brings its captions along; what is searched stays as it is. Each task's images are
    drawn for themselves. Two models' values belong together resample by resample.
    """
    found = {
        "gap": _gap(features, resamples, seed),
        "mean_recall@1": _mean_recall_at_1(features, resamples, seed),
    }
    if features.tasks:
        found["zero_shot_top1"] = _zero_shot(features, resamples, seed)
    return {name: values.tolist() for name, values in found.items()}


def _gap(features: ModelFeatures, resamples: int, seed: int) -> Tensor:
    image_unit, text_unit = unit_sides(
        features.pairs.image_features[:, : features.dim],
        features.pairs.first_caption_features[:, : features.dim],
    )
    between_centroids = resampled_means(image_unit - text_unit, resamples=resamples, seed=seed)
    return torch.linalg.vector_norm(between_centroids, dim=1)


def _mean_recall_at_1(features: ModelFeatures, resamples: int, seed: int) -> Tensor:
    pairs = features.pairs
    ranks = retrieval_ranks(
        pairs.image_features,
        pairs.text_features,
        pairs.text_to_image,
        normalize=features.normalize,
    )
    image_hits = (ranks.image_to_text == 0).double()
    caption_hits = torch.zeros_like(image_hits)
    caption_hits.index_add_(0, pairs.text_to_image, (ranks.text_to_image == 0).double())
    caption_counts = pairs.text_to_image.bincount(minlength=len(image_hits)).double()
    columns = torch.stack([image_hits, caption_hits, caption_counts], dim=1)
    images, captions, counts = resampled_means(columns, resamples=resamples, seed=seed).T
    return (images + captions / counts) / 2


def _zero_shot(features: ModelFeatures, resamples: int, seed: int) -> Tensor:
    hits = [
        zero_shot_ranks(
            task.image_features, task.class_features, task.labels, normalize=features.normalize
        )
        == 0
        for task in features.tasks
    ]
    means = [
        resampled_means(task_hits, resamples=resamples, seed=seed + number)
        for number, task_hits in enumerate(hits, start=1)
    ]
    return torch.stack(means).mean(dim=0)


# --------------------------------------------------------------------------------------------------
# One model before and after on the same items: differences with intervals.


RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Measured:
    """A model's features with what is known of every single item."""

    features: ModelFeatures  # of one model
    image_unit: Tensor  # (N, d), rows of norm 1
    text_unit: Tensor  # (N, d), the first captions, rows of norm 1
    ranks: RetrievalRanks  # of every image and caption
    cosines: Tensor  # (N,) of each image with its first caption
    text_first: Tensor  # (N,) whether a first caption finds another caption before any image
    class_ranks: Mapping[str, Tensor]  # task name → (n,) 0-based rank of each image's true class


@measured
def measure(features: ModelFeatures) -> Measured:
    """Every single item's numbers, from features whose similarity is the cosine."""
    pairs = features.pairs
    image_unit, text_unit = unit_sides(pairs.image_features, pairs.first_caption_features)
    return Measured(
        features=features,
        image_unit=image_unit,
        text_unit=text_unit,
        ranks=retrieval_ranks(pairs.image_features, pairs.text_features, pairs.text_to_image),
        cosines=(image_unit * text_unit).sum(dim=1),
        text_first=text_first(image_unit, text_unit),
        class_ranks={
            task.name: zero_shot_ranks(task.image_features, task.class_features, task.labels)
            for task in features.tasks
        },
    )


@measured
def paired_differences(
    before: Measured, after: Measured, *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Score's path → after less before, with a 95 % paired bootstrap interval over the images.

    Paths are those of `Scores`, as in `retrieval.image_to_text_recall@1`, and `mean_recall@1` and
    `zero_shot_top1` for the means over both directions and over all tasks. An image brings its
    captions along; what is searched stays as it is. Scores that are no mean over items, such as the
    effective rank, have none.
    """
    found = {
        **_headline(before, after, resamples, seed),
        **_geometry(before, after, resamples, seed),
        **_retrieval(before, after, resamples, seed),
    }
    for number, (task, ranks) in enumerate(before.class_ranks.items(), start=1):
        for name, depth in (("top1", 1), ("top5", 5)):
            change = (after.class_ranks[task] < depth).double() - (ranks < depth).double()
            drawn = resampled_means(change, resamples=resamples, seed=seed + number)
            found[f"zero_shot.{task}.{name}"] = _interval(float(change.mean()), drawn)
    return found


def _headline(before: Measured, after: Measured, resamples: int, seed: int) -> dict[str, Interval]:
    """The gap and the two means."""
    drawn = [
        resampled_headline(side.features, resamples=resamples, seed=seed)
        for side in (before, after)
    ]
    point = [_headline_now(side) for side in (before, after)]
    paths = {"gap": "geometry.centroid_distance"}
    return {
        paths.get(name, name): _interval(
            point[1][name] - point[0][name],
            torch.tensor(drawn[1][name]) - torch.tensor(drawn[0][name]),
        )
        for name in drawn[0]
    }


def _headline_now(side: Measured) -> dict[str, float]:
    gap = torch.linalg.vector_norm((side.image_unit - side.text_unit).double().mean(dim=0))
    hits = [(ranks == 0).double().mean() for ranks in side.ranks]
    top1 = [(ranks == 0).double().mean() for ranks in side.class_ranks.values()]
    return {
        "gap": float(gap),
        "mean_recall@1": float(sum(hits)) / 2,
        "zero_shot_top1": float(sum(top1)) / max(1, len(top1)),
    }


def _geometry(before: Measured, after: Measured, resamples: int, seed: int) -> dict[str, Interval]:
    """The means over pairs."""
    cosine = after.cosines.double() - before.cosines.double()
    names = ("true_pair_cosine", "alignment", "text_first_share")
    text_firsts = after.text_first.double() - before.text_first.double()
    changes = torch.stack([cosine, -2 * cosine, text_firsts], dim=1)
    drawn = resampled_means(changes, resamples=resamples, seed=seed)
    means = changes.mean(dim=0).tolist()
    return {
        f"geometry.{name}": _interval(means[column], drawn[:, column])
        for column, name in enumerate(names)
    }


def _retrieval(
    before: Measured, after: Measured, resamples: int, seed: int, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Interval]:
    owners = before.features.pairs.text_to_image
    counts = owners.bincount(minlength=len(before.cosines)).double()
    columns, texts = [], []
    for k in ks:
        columns.append(_hits(after.ranks.image_to_text, k) - _hits(before.ranks.image_to_text, k))
        change = _hits(after.ranks.text_to_image, k) - _hits(before.ranks.text_to_image, k)
        texts.append(torch.zeros_like(counts).index_add_(0, owners, change))
    table = torch.stack([*columns, *texts, counts], dim=1)
    drawn = resampled_means(table, resamples=resamples, seed=seed)
    means = table.mean(dim=0)
    found = {}
    for position, k in enumerate(ks):
        other = len(ks) + position
        found[f"retrieval.image_to_text_recall@{k}"] = _interval(
            float(means[position]), drawn[:, position]
        )
        found[f"retrieval.text_to_image_recall@{k}"] = _interval(
            float(means[other] / means[-1]), drawn[:, other] / drawn[:, -1]
        )
    return found


def _hits(ranks: Tensor, k: int) -> Tensor:
    return (ranks < k).double()


def _interval(mean: float, drawn: Tensor) -> Interval:
    low, high = interval(drawn)
    return Interval(mean=mean, low=low, high=high)


# --------------------------------------------------------------------------------------------------
# What changed within the classes of a zero-shot task.


CONFUSIONS = 15
"""Pairs of classes that are shown, those confused most often before or after."""


def task_changes(
    before: Measured, after: Measured, tasks: Sequence[LabelledImages]
) -> tuple[TaskChange, ...]:
    """Recall of every class and the most frequent confusions, before and after."""
    return tuple(
        _task_change(before, after, number, tuple(task.class_names))
        for number, task in enumerate(tasks)
    )


def _task_change(
    before: Measured, after: Measured, number: int, names: tuple[str, ...]
) -> TaskChange:
    recalls, confusions = [], []
    labels = before.features.tasks[number].labels
    for side in (before, after):
        task = side.features.tasks[number]
        predicted = zero_shot_predictions(task.image_features, task.class_features).predicted
        recalls.append(per_class_recall(predicted, labels, len(names)))
        found = confusion_pairs(predicted, labels, len(names), limit=None)
        confusions.append({(pair.label, pair.predicted): pair.images for pair in found})
    images = labels.bincount(minlength=len(names)).tolist()
    was, now = confusions
    most = sorted({**was, **now}, key=lambda pair: -max(was.get(pair, 0), now.get(pair, 0)))
    return TaskChange(
        name=before.features.tasks[number].name,
        classes=tuple(
            ClassChange(
                name=name,
                images=images[index],
                before=float(recalls[0][index]),
                after=float(recalls[1][index]),
            )
            for index, name in enumerate(names)
            if images[index]
        ),
        confusions=tuple(
            ConfusionChange(
                label=names[pair[0]],
                predicted=names[pair[1]],
                images=images[pair[0]],
                before=was.get(pair, 0),
                after=now.get(pair, 0),
            )
            for pair in most[:CONFUSIONS]
        ),
    )


# --------------------------------------------------------------------------------------------------
# Rows of single runs → one line a recipe: spread over seeds, intervals, who is beaten by whom.


OBJECTIVES = {
    "gap": False,
    "mean_recall@1": True,
    "zero_shot_top1": True,
    "linear_probe": True,
}
"""What Pareto-best is judged by, and whether higher is better."""

Resampled = Mapping[str, Sequence[float]]


def summarise(
    rows: Sequence[ComparisonRow], resampled: Sequence[Resampled], *, untouched: str
) -> tuple[RecipeSummary, ...]:
    """One line a recipe, in the order in which they first come."""
    groups: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(row.recipe, []).append(position)
    scores = {
        recipe: _spreads([_numbers(rows[position]) for position in positions])
        for recipe, positions in groups.items()
    }
    best = pareto_best(
        {name: {key: s.mean for key, s in found.items()} for name, found in scores.items()}
    )
    replicates = {name: [resampled[p] for p in positions] for name, positions in groups.items()}
    lines = []
    for recipe, positions in groups.items():
        runs = [rows[position] for position in positions]
        differs = recipe != untouched
        lines.append(
            RecipeSummary(
                recipe=recipe,
                runs=len(runs),
                learning_rate=runs[0].learning_rate,
                scores=scores[recipe],
                seconds=spread([run.seconds for run in runs]),
                peak_memory=spread([run.peak_memory for run in runs]),
                difference=_differences(recipe, untouched, scores, replicates) if differs else {},
                pareto_best=recipe in best,
            )
        )
    return tuple(lines)


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951)
    """
    return Spread(mean=fmean(values), deviation=stdev(values) if len(values) > 1 else None)


def pareto_best(scores: Mapping[str, Mapping[str, float]]) -> set[str]:
    """Those that no other one dominates: as good in every objective and better in one.

    Example:
        >>> sorted(pareto_best({"a": {"gap": 1}, "b": {"gap": 0.5}, "c": {"gap": 0.5}}))
        ['b', 'c']
    """
    signed = {
        name: [found[key] * (1 if up else -1) for key, up in OBJECTIVES.items() if key in found]
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


def _numbers(row: ComparisonRow) -> dict[str, float]:
    """The headline, then everything by its path."""
    numbers = row.headline
    for group in ("geometry", "retrieval", "linear_probe"):
        numbers |= {f"{group}.{name}": value for name, value in getattr(row, group).items()}
    for task, found in row.zero_shot.items():
        numbers |= {f"zero_shot.{task}.{name}": value for name, value in found.items()}
    return numbers


def _spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def _differences(
    recipe: str,
    untouched: str,
    scores: Mapping[str, Mapping[str, Spread]],
    replicates: Mapping[str, Sequence[Resampled]],
) -> dict[str, Interval]:
    """Mean over seeds less the untouched model's, with both resampled alike."""
    base = replicates[untouched][0]
    found = {}
    for name in base:
        own = torch.tensor([list(run[name]) for run in replicates[recipe]], dtype=torch.float64)
        low, high = interval(own.mean(dim=0) - torch.tensor(list(base[name]), dtype=torch.float64))
        change = scores[recipe][name].mean - scores[untouched][name].mean
        found[name] = Interval(mean=change, low=low, high=high)
    return found


# --------------------------------------------------------------------------------------------------
# Choosing by held-out training pairs, so that the evaluation set stays unseen.


LINE = tuple(step / 10 for step in range(11))
"""The points that are tried between a model and its refinement."""


def selection_score(pairs: EmbeddedPairs) -> float:
    """What is chosen by: the mean of R@1, R@5 and R@10 in both directions, 0-1."""
    found = retrieval(pairs.image_features, pairs.text_features, pairs.text_to_image)
    return fmean(found.values())


def scores_along_line(
    embedder: Embedder, model: nn.Module, base: Mapping[str, Tensor], pairs: ImageCaptions
) -> dict[float, float]:
    """Selection scores between a model's weights before and after training (WiSE-FT)."""
    refined = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    silent = replace(embedder, visible=False)
    bar = Bar("Interpolating", len(LINE), visible=embedder.visible)
    scores = {}
    for weight in bar.over(LINE):
        model.load_state_dict(interpolate_weights(base, refined, weight))
        scores[weight] = selection_score(embed_pairs(silent, pairs))
    model.load_state_dict(refined)
    return scores
