"""A model's features → the numbers that are shown, and how two models differ in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.bootstrap import RESAMPLES, Bootstrap, Resampled, interval, means
from clip_refine.evaluation.classify import (
    can_halve,
    class_vectors,
    confusion_pairs,
    probe_hits,
    zero_shot_predictions,
    zero_shot_ranks,
    zero_shot_scores,
)
from clip_refine.evaluation.geometry import geometry, resampled_pairs, text_first
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
    flat,
    headline,
    mean,
)
from clip_refine.results.metrics import OBJECTIVES, pareto_best
from clip_refine.support.console import Bar, remark

KS = (1, 5, 10)
"""Depths of recall."""

# --------------------------------------------------------------------------------------------------
# What a task of a suite finds with one model, before it becomes a record.


class Answers(NamedTuple):
    """What a model puts at the top for every query of one kind."""

    first: Tensor  # (Q,) int64
    owners: Tensor | None = None  # (Q,) the image of each; None where query i is image i
    truth: Tensor | None = None  # (Q,) the right answer, where there is one


@dataclass(frozen=True, eq=False)
class Outcome:
    """Numbers of one task with one model."""

    protocol: str  # how they were taken, in a sentence
    counts: Mapping[str, int]  # how many images, captions, classes, ... there were.
    # name → number with its resamples, the same draws for every model; not all are resampled
    numbers: Mapping[str, Resampled]
    # what stands behind the numbers, as plain data
    details: Mapping[str, Any] = field(default_factory=dict)
    # kind of query → answers, to compare with another model's; "" where there is one kind
    answers: Mapping[str, Answers] = field(default_factory=dict)


def mean_of(outcomes: Mapping[str, Outcome], score: str) -> Outcome:
    """One score of several tasks on average, each task's images drawn for themselves."""
    every = list(outcomes.values())
    return Outcome(
        protocol=f"mean over {', '.join(outcomes)}",
        counts={"tasks": len(every), "images": sum(o.counts["images"] for o in every)},
        numbers={score: mean([outcome.numbers[score] for outcome in every])},
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
    return ModelFeatures(pairs or embed_pairs(embedder, held_out), embed_tasks(embedder, tasks))


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
        zero_shot=score_tasks(features.tasks, normalize=normalize),
        pairs=len(pairs.image_features),
        captions=len(pairs.text_features),
    )


def score_tasks(
    tasks: Sequence[TaskFeatures], *, normalize: bool = True
) -> dict[str, dict[str, float]]:
    """Task name → zero-shot scores."""
    return {
        task.name: zero_shot_scores(
            task.image_features, task.class_features, task.labels, normalize=normalize
        )
        for task in tasks
    }


def probe_features(features: ModelFeatures, *, seed: int) -> dict[str, Tensor]:
    """Task name → which test images a linear probe is right about, of tasks with enough for one."""
    found = {}
    for task in features.tasks:
        if can_halve(task.labels):
            images = task.image_features[:, : features.dim]
            found[task.name] = probe_hits(images, task.labels, seed=seed)
        else:
            remark(f"{task.name}: no linear probe, which needs a class of two images or more.")
    return found


def embed_tasks(embedder: Embedder, tasks: Sequence[LabelledImages]) -> list[TaskFeatures]:
    """Encode the prompts and the images of each task."""
    return [
        TaskFeatures(
            task.name,
            class_features=class_vectors(embed_prompts(embedder, task.class_names, task.templates)),
            image_features=embedder.images(task, f"Encoding {task.name}"),
            labels=torch.tensor(task.labels),
        )
        for task in tasks
    ]


# --------------------------------------------------------------------------------------------------
# What is known of every single item, and how far that moves the numbers with the images.


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
    """Every single item's numbers."""
    pairs, normalize = features.pairs, features.normalize
    image_unit, text_unit = unit_sides(
        pairs.image_features[:, : features.dim], pairs.first_caption_features[:, : features.dim]
    )
    return Measured(
        features=features,
        image_unit=image_unit,
        text_unit=text_unit,
        ranks=retrieval_ranks(
            pairs.image_features, pairs.text_features, pairs.text_to_image, normalize=normalize
        ),
        cosines=(image_unit * text_unit).sum(dim=1),
        text_first=text_first(image_unit, text_unit),
        class_ranks={
            task.name: zero_shot_ranks(
                task.image_features, task.class_features, task.labels, normalize=normalize
            )
            for task in features.tasks
        },
    )


def resampled_scores(side: Measured, bootstrap: Bootstrap) -> dict[str, Resampled]:
    """Score's path → number, as in `Scores`, with its resamples.

    And `mean_recall@1` and `zero_shot_top1`, the means over both directions and over all tasks.
    Each task's images are drawn for themselves. Scores that are no mean over items and no norm of
    one, such as the effective rank, are not here.
    """
    owners = side.features.pairs.text_to_image
    ranks = side.ranks
    image_hits = {f"image_to_text_recall@{k}": ranks.image_to_text < k for k in KS}
    caption_hits = {f"text_to_image_recall@{k}": ranks.text_to_image < k for k in KS}
    found = bootstrap.numbers(
        len(side.cosines),
        means({"text_first_share": side.text_first, **image_hits}),
        means(caption_hits, owners),
    ) | resampled_pairs(side.image_unit, side.text_unit, bootstrap)
    shown = ("centroid_distance", "true_pair_cosine", "alignment", "text_first_share")
    geometry = {name: found[name] for name in shown}
    retrieval = {name: found[name] for name in (*image_hits, *caption_hits)}
    zero_shot = {}
    for number, (task, of_task) in enumerate(side.class_ranks.items(), start=1):
        drawn = replace(bootstrap, seed=bootstrap.seed + number)
        hits = {"top1": of_task < 1, "top5": of_task < 5}
        zero_shot[task] = drawn.numbers(len(of_task), means(hits))
    numbers = headline(geometry, retrieval, [task["top1"] for task in zero_shot.values()])
    both = {name: numbers[name] for name in ("mean_recall@1", "zero_shot_top1") if name in numbers}
    return both | flat({"geometry": geometry, "retrieval": retrieval, "zero_shot": zero_shot})


def resampled_headline(
    features: ModelFeatures, probes: Mapping[str, Tensor], *, resamples: int, seed: int
) -> dict[str, list[float]]:
    """The draws of everything in `OBJECTIVES` that was measured, as `Resampled` has them.

    `probes` is what `probe_features` found; of a probe the test images are drawn, not those that
    it was fitted on.
    """
    found = resampled_scores(measure(features), Bootstrap(resamples, seed))
    found["gap"] = found["geometry.centroid_distance"]
    if probes:
        found["linear_probe"] = mean(
            [
                Bootstrap(resamples, seed, f"probe of {task}").numbers(
                    len(hits), means({"share": hits})
                )["share"]
                for task, hits in probes.items()
            ]
        )
    return {name: found[name].draws.tolist() for name in OBJECTIVES if name in found}


def paired_differences(
    before: Measured, after: Measured, *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Score's path → after less before, with a 95 % paired bootstrap interval over the images.

    Paths are those of `resampled_scores`.
    """
    bootstrap = Bootstrap(resamples, seed)
    was, now = (resampled_scores(side, bootstrap) for side in (before, after))
    return {path: difference(now[path], was[path]) for path in now}


def difference(number: Resampled, base: Resampled) -> Interval:
    """Of two models on the same images, both with the same draws."""
    change = number - base
    low, high = interval(change)
    return Interval.model_validate({"mean": change.value, "low": low, "high": high})


# --------------------------------------------------------------------------------------------------
# What a refined model lost against the one it came from, beside its averages. A mean may stand
# still while answers change places. Measured on sets that were not refined on.


LEVEL = 0.95  # that all intervals of a task's classes hold the truth at once


class ClassLoss(NamedTuple):
    """One class before and after."""

    label: int
    images: int
    before: float  # recall, 0–1
    after: float
    low: float  # of after less before; all classes' intervals together hold at `LEVEL`
    high: float


def churn(
    before: Mapping[str, Answers], after: Mapping[str, Answers], bootstrap: Bootstrap
) -> dict[str, Resampled]:
    """Share of queries whose top answer changed, 0–1; 0 for the same model, lower is calmer.

    Of each kind of query by its name: `churn` where there is one, else `KIND_churn`. Source: Milani
    Fard et al., "Launch and Iterate: Reducing Prediction Churn", NeurIPS 2016.
    """
    numbers: dict[str, Resampled] = {}
    for kind, was in before.items():
        changed = {f"{kind}_churn".lstrip("_"): was.first != after[kind].first}
        images = len(was.first) if was.owners is None else int(was.owners.max()) + 1
        numbers |= bootstrap.numbers(images, means(changed, was.owners))
    return numbers


@measured
def class_losses(before: Tensor, after: Tensor, labels: Tensor) -> list[ClassLoss]:
    """Every class's recall before and after, with intervals that hold for all classes at once.

    `before` and `after` say of each image whether a model is right. The interval rests on images
    that only one of them gets right: of m such images a share p speaks for the second model, with
    an exact binomial interval (Clopper and Pearson, Biometrika 1934) at 1 − (1 − `LEVEL`)/C for C
    classes (Bonferroni); the change is m/n (2p − 1), given m. It lies beside zero only where
    McNemar's exact test says so at that level. Not resampled: a thousand resamples have no tail of
    0.05/C.

    Ten images, all of them lost; and ten of which none changed:

    >>> import torch
    >>> was = torch.ones(20).bool()
    >>> now = torch.tensor([False] * 10 + [True] * 10)
    >>> lost, kept = class_losses(was, now, torch.arange(2).repeat_interleave(10))
    >>> round(lost.low, 3), round(lost.high, 3), kept.low, kept.high
    (-1.0, -0.29, 0.0, 0.0)
    """
    found = []
    classes = labels.unique().tolist()
    for label in classes:
        was, now = (side[labels == label] for side in (before, after))
        images, changed, won = len(was), int((was != now).sum()), int((now & ~was).sum())
        low = high = 0.0
        if changed:
            level = 1 - (1 - LEVEL) / len(classes)
            share = binomtest(won, changed).proportion_ci(confidence_level=level)
            low, high = (float(changed / images * (2 * end - 1)) for end in (share.low, share.high))
        before_share, after_share = (side.double().mean().item() for side in (was, now))
        found.append(ClassLoss(label, images, before_share, after_share, low, high))
    return found


def against(first: Outcome, own: Outcome, bootstrap: Bootstrap) -> Outcome:
    """One task's outcome with what changed since the first model: churn, and of classes the lost.

    `classes_lost` counts those whose interval of `class_losses` lies below zero; all are in the
    details. A task without answers at the top stays as it is.
    """
    numbers = churn(first.answers, own.answers, bootstrap)
    details: dict[str, list[dict[str, str | float]]] = {}
    labelled = own.answers.get("")
    if labelled is not None and labelled.truth is not None:
        truth = labelled.truth
        was, now = (side.answers[""].first == truth for side in (first, own))
        losses = class_losses(was, now, truth)
        names = [row["class"] for row in own.details["per_class"]]
        numbers["classes_lost"] = Resampled(float(sum(loss.high < 0 for loss in losses)))
        details["class_losses"] = [
            {"class": names[loss.label], **loss._asdict()} for loss in losses
        ]
    return replace(own, numbers={**own.numbers, **numbers}, details={**own.details, **details})


CONFUSIONS = 15
"""Pairs of classes that are shown, those confused most often before or after."""


def task_changes(
    before: Measured, after: Measured, tasks: Sequence[LabelledImages]
) -> tuple[TaskChange, ...]:
    """Every class as `class_losses` has it, and the most frequent confusions, before and after."""
    sides = zip(before.features.tasks, after.features.tasks, tasks, strict=True)
    return tuple(_task_change(was, now, tuple(task.class_names)) for was, now, task in sides)


def _task_change(before: TaskFeatures, after: TaskFeatures, names: tuple[str, ...]) -> TaskChange:
    hits, confusions, labels = [], [], before.labels
    for task in (before, after):
        predicted = zero_shot_predictions(task.image_features, task.class_features).predicted
        hits.append(predicted == labels)
        found = confusion_pairs(predicted, labels, len(names), limit=None)
        confusions.append({(pair.label, pair.predicted): pair.images for pair in found})
    images = labels.bincount(minlength=len(names)).tolist()
    first, second = confusions
    most = sorted({**first, **second}, key=lambda at: -max(first.get(at, 0), second.get(at, 0)))
    return TaskChange(
        name=before.name,
        classes=tuple(
            ClassChange(name=names[label], images=count, before=was, after=now, low=low, high=high)
            for label, count, was, now, low, high in class_losses(hits[0], hits[1], labels)
        ),
        confusions=tuple(
            ConfusionChange(
                label=names[pair[0]],
                predicted=names[pair[1]],
                images=images[pair[0]],
                before=first.get(pair, 0),
                after=second.get(pair, 0),
            )
            for pair in most[:CONFUSIONS]
        ),
    )


# --------------------------------------------------------------------------------------------------
# Rows of single runs → one line a recipe: spread over seeds, intervals, who is beaten by whom.


Draws = Mapping[str, Sequence[float]]
"""Headline name → its value in each resample."""


def summarise(
    rows: Sequence[ComparisonRow], resampled: Sequence[Draws], *, untouched: str
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
    """Mean and sample standard deviation."""
    return Spread(mean=fmean(values), deviation=stdev(values) if len(values) > 1 else None)


def _numbers(row: ComparisonRow) -> dict[str, float]:
    """The headline, then everything by its path."""
    groups = ("geometry", "retrieval", "linear_probe", "zero_shot")
    return row.headline | flat({group: getattr(row, group) for group in groups})


def _spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def _differences(
    recipe: str,
    untouched: str,
    scores: Mapping[str, Mapping[str, Spread]],
    replicates: Mapping[str, Sequence[Draws]],
) -> dict[str, Interval]:
    """Mean over seeds less the untouched model's, with both resampled alike."""

    def number(of: str, name: str) -> Resampled:
        drawn = [list(run[name]) for run in replicates[of]]
        draws = torch.tensor(drawn, dtype=torch.float64).mean(dim=0)
        least = 0.0 if name == "gap" else -math.inf
        return Resampled(scores[of][name].mean, draws, least)

    names = replicates[untouched][0]
    return {name: difference(number(recipe, name), number(untouched, name)) for name in names}


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
