"""A comparison's folder → its page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from clip_refine.report.comparison import (
    INTERVALS,
    LEGEND,
    RATES_LEGEND,
    RULE,
    decide,
    differences_cells,
    rates_cells,
    scores_cells,
)
from clip_refine.report.page import (
    ACCENT,
    INK,
    MUTED,
    TEXT,
    Chart,
    Panel,
    axis,
    layout,
    read_mapping,
    trace,
    write_page,
)
from clip_refine.report.tables import mark_of, number, short_paths
from clip_refine.results import Comparison, Interval, RecipeSummary, of_one_run, read
from clip_refine.results.metrics import metric

# --------------------------------------------------------------------------------------------------
# Rankings with seeds as dots, trade-offs.


RANKED = ("mean_recall@1", "gap", "zero_shot_top1", "linear_probe")
KINDS = {
    # kind: (what to call it, colour, symbol)
    "untouched": ("untouched model", MUTED, "square"),
    "trained": ("trained", ACCENT, "circle"),
    "free": ("training-free", TEXT, "diamond"),
}


@dataclass(frozen=True)
class Ranked:
    """A recipe's line in a ranking."""

    place: int  # 1 is best
    recipe: str  # its name
    kind: str  # of `KINDS`
    value: float  # mean over seeds
    deviation: float | None  # over seeds, None for a single run
    dots: Sequence[float]  # where each seed's value lies on the scale, in percent
    mean: float  # where the mean lies
    difference: Interval | None  # from the untouched model, with its interval
    mark: str  # of the difference, as for `ScoreLine`
    pareto_best: bool  # as in the summary


@dataclass(frozen=True)
class Ranking:
    """All recipes by one number."""

    name: str  # of the headline
    heading: str  # what to call it
    higher_is_better: bool  # whether
    untouched: float  # where the untouched model's value lies on the scale, in percent
    low: float  # left end of the scale
    high: float  # right end
    lines: Sequence[Ranked]  # best first


def kind(line: RecipeSummary) -> str:
    """Of `KINDS`."""
    if not line.difference:
        return "untouched"
    return "free" if line.learning_rate is None else "trained"


def rankings(comparison: Comparison) -> list[Ranking]:
    """One a headline number that was measured."""
    present = [name for name in RANKED if name in comparison.summary[0].scores]
    return [_ranking(comparison, name) for name in present]


def trade_off_charts(comparison: Comparison) -> list[Chart]:
    """The gap against retrieval, and against zero-shot."""
    present = [
        name for name in ("mean_recall@1", "zero_shot_top1") if name in comparison.summary[0].scores
    ]
    return [_trade_off(comparison, name) for name in present]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that none beats in both: to the left of it and above it.

    >>> front([(1.0, 0.2), (0.5, 0.1), (0.7, 0.05), (0.5, 0.3)])
    [3]
    """
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


def _ranking(comparison: Comparison, name: str) -> Ranking:
    heading, up = capitalised(metric(name).heading), bool(metric(name).higher_is_better)
    seeds: dict[str, list[float]] = {}
    for row in comparison.rows:
        seeds.setdefault(row.recipe, []).append(row.headline[name])
    every = [value for values in seeds.values() for value in values]
    low, high = min(every), max(every)
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    ordered = sorted(comparison.summary, key=lambda line: line.scores[name].mean, reverse=up)
    lines = [
        Ranked(
            place=position,
            recipe=line.recipe,
            kind=kind(line),
            value=line.scores[name].mean,
            deviation=line.scores[name].deviation,
            dots=[place(value) for value in seeds[line.recipe]],
            mean=place(line.scores[name].mean),
            difference=line.difference.get(name),
            mark=_mark(line, name),
            pareto_best=line.pareto_best,
        )
        for position, line in enumerate(ordered, start=1)
    ]
    untouched = comparison.summary[0].scores[name].mean
    return Ranking(name, heading, up, place(untouched), low, high, lines)


def _mark(line: RecipeSummary, name: str) -> str:
    difference = line.difference.get(name)
    change = difference.mean if difference else 0.0
    return mark_of(difference, change, metric(name).higher_is_better)


def _trade_off(comparison: Comparison, name: str) -> Chart:
    shown = metric(name).heading
    summary = comparison.summary
    points = [(line.scores["gap"].mean, line.scores[name].mean) for line in summary]
    best = front(points)
    dotted = {"color": INK, "width": 1.5, "dash": "dot"}
    on_front = [points[index] for index in best]
    data = [trace("Pareto front", "lines", on_front, line=dotted, hoverinfo="skip")]
    for key, (called, colour, symbol) in KINDS.items():
        chosen = [index for index, line in enumerate(summary) if kind(line) == key]
        bars = {
            bar: {
                "type": "data",
                "array": [summary[index].scores[score].deviation or 0 for index in chosen],
                "color": colour,
                "thickness": 1,
                "width": 0,
            }
            for bar, score in (("error_x", "gap"), ("error_y", name))
        }
        marks = trace(
            called,
            "markers+text",
            [points[index] for index in chosen],
            **bars,
            # names beside every mark would lie on one another
            text=[str(index + 1) if index in (0, *best) else "" for index in chosen],
            cliponaxis=False,
            textposition="top right",
            textfont={"size": 11, "color": INK},
            # Plotly reads some HTML in labels; names are to be shown as they are
            customdata=[escape(summary[index].recipe, quote=False) for index in chosen],
            marker={"color": colour, "symbol": symbol, "size": 10},
            hovertemplate="%{customdata}<br>gap %{x:.3f}<br>%{y:.3f}<extra></extra>",
        )
        data += [marks] if chosen else []
    both_axes = layout(
        axis("gap (smaller to the left)"),
        axis(shown),
        hovermode="closest",
    )
    names = ", ".join(summary[index].recipe for index in best)
    return Chart(
        name=f"trade-off-{name.partition('@')[0]}".replace("_", "-"),
        heading=f"Gap against {shown}",
        alternative=(
            f"Scatter plot of {len(points)} rows. On the Pareto front, from the smallest gap on: "
            f"{names}."
        ),
        caption=(
            "Means over seeds; bars show the standard deviation. Further up and further left is "
            "better; no row beats one on the dotted front in both. Numbers are those of the table "
            "below; point at a mark, or tap it, for its name. A smaller gap is not a better model "
            "by itself."
        ),
        panels=[Panel(f"trade-off-{name}", "", {"data": data, "layout": both_axes})],
        head=("", "recipe", "gap", capitalised(shown)),
        rows=[
            (str(position), line.recipe, number(gap), number(score))
            for position, (line, (gap, score)) in enumerate(
                zip(summary, points, strict=True), start=1
            )
        ],
    )


def capitalised(text: str) -> str:
    """With a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


# --------------------------------------------------------------------------------------------------
# The folder of a comparison → its `report.html`.


def write_comparison_report(folder: Path, *, shown_as: Path | None = None) -> Path:
    """Write `report.html` from the other files of a comparison, which will be at `shown_as`.

    Raises:
        DataError: One is missing or not what a comparison writes, or they do not fit each other.
    """
    with of_one_run(folder):
        return _write(folder, shown_as or folder)


def _write(folder: Path, shown_as: Path) -> Path:
    comparison = read(Comparison, folder / "comparison.json")
    settings = read_mapping(folder / "config.yaml")
    environment_file = folder / "environment.json"
    charts = trade_off_charts(comparison)
    trained = sum(bool(line.learning_rate) for line in comparison.summary)
    free = len(comparison.summary) - 1 - trained
    on = f"stored vectors {short_paths(comparison.vectors)}" if comparison.vectors else ""
    on = on or f"model {settings.get('model', {}).get('name')}"
    (_, *head), rows = scores_cells(comparison)
    return write_page(
        folder,
        "comparison.html.j2",
        charts=charts,
        settings=settings,
        environment=read_mapping(environment_file) if environment_file.is_file() else {},
        title="Comparison",
        about=f"{trained} trained and {free} training-free rows · {on}",
        decision=decide(comparison, short_paths(str(shown_as))),
        rule=RULE,
        rankings=rankings(comparison),
        kinds={key: name for key, (name, *_) in KINDS.items()},
        trade_offs=[chart.name for chart in charts],
        # numbered, since the marks of the trade-offs are
        scores=(
            ("recipe", *head),
            [(f"{position} {name}", *cells) for position, (name, *cells) in enumerate(rows, 1)],
        ),
        differences=differences_cells(comparison),
        rates=rates_cells(comparison) if comparison.learning_rates else None,
        legend=LEGEND,
        intervals=INTERVALS,
        rates_legend=RATES_LEGEND,
        facts=_facts(comparison, settings),
    )


def _facts(comparison: Comparison, settings: Mapping[str, Any]) -> dict[str, str]:
    data, train = settings.get("data", {}), settings.get("train", {})
    seeds = sorted({row.seed for row in comparison.rows})
    pairs = max(row.pairs for row in comparison.rows)
    facts = {
        "Model": settings.get("model", {}).get("name"),
        "Training images": f"{pairs:,} from {comparison.vectors or data.get('train')}",
        "Held-out data": data.get("val"),
        "Batch size": train.get("batch_size", settings.get("batch_size")),
        "Epochs": train.get("epochs"),
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Bootstrap resamples": settings.get("resamples"),
    }
    return {name: short_paths(str(value)) for name, value in facts.items() if value is not None}
