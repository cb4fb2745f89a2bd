"""A model's features → the numbers that refine and compare show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clip_refine.data import ImageCaptions, LabelledImages
from clip_refine.evaluation.bootstrap import RESAMPLES, Bootstrap, Resampled, interval, means
from clip_refine.evaluation.classify import (
    can_halve,
    class_vectors,
    probe_hits,
    zero_shot_ranks,
    zero_shot_scores,
)
from clip_refine.evaluation.geometry import geometry, resampled_pairs, text_first
from clip_refine.evaluation.retrieval import RetrievalRanks, retrieval, retrieval_ranks
from clip_refine.evaluation.similarity import measured, unit_sides
from clip_refine.models.embed import EmbeddedPairs, Embedder, embed_pairs, embed_prompts
from clip_refine.models.weights import interpolate_weights
from clip_refine.results import (
    ComparisonRow,
    Interval,
    RecipeSummary,
    Scores,
    Spread,
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
