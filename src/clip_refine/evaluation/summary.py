"""Rows of single runs → one line a recipe: spread over seeds, intervals, who is beaten by whom."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch

from clip_refine.evaluation.bootstrap import interval
from clip_refine.results import ComparisonRow, Interval, RecipeSummary, Spread

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
    """One line a recipe, in the order in which they first come.

    Args:
        rows: Every run.
        resampled: `resampled_headline` of each row.
        untouched: The recipe that differences are taken from.
    """
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

    Args:
        scores: Name → the numbers of `OBJECTIVES`, or those of them that were measured.

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
