"""A comparison's folder → its page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any

from clip_refine.report.comparison import (
    INTERVALS,
    LEGEND,
    RATES_LEGEND,
    RULE,
    decide,
    differences_cells,
    marks,
    rates_cells,
    scores_cells,
)
from clip_refine.report.page import (
    MUTED,
    SURFACE,
    Chart,
    Figure,
    Panel,
    axis,
    layout,
    read_mapping,
    trace,
    write_page,
)
from clip_refine.report.tables import number, short_path
from clip_refine.results import Comparison, RecipeSummary, of_one_run, read
from clip_refine.results.metrics import metric

# --------------------------------------------------------------------------------------------------
# Rankings with seeds as dots, trade-offs.


RANKED = ("mean_recall@1", "gap", "zero_shot_top1", "linear_probe")
KINDS = {
    # kind: (what to call it, symbol)
    "untouched": ("untouched model", "square"),
    "trained": ("trained", "circle"),
    "free": ("training-free", "diamond"),
}
# of recipes, one after the other; all to be seen on light and on dark
COLOURS = (
    *("#2f7de1", "#d9731a", "#179a6b", "#c94f8c", "#8b67d6", "#a8871a", "#1797ad", "#d0493f"),
    *("#6f8f2f", "#7d7f8c"),
)
NAMED = 30  # letters of a name beside its mark at most; pointing at the mark shows all


@dataclass(frozen=True)
class Ranked:
    """A recipe's line in a ranking; places are on the scale, in percent."""

    recipe: str  # its name
    kind: str  # of `KINDS`
    colour: str  # the same in every chart
    value: float  # mean over seeds
    deviation: float | None  # over seeds, None for a single run
    dots: Sequence[float]  # where each seed's value lies
    mean: float  # where the mean lies
    noise: tuple[float, float] | None  # where the interval of the mean's difference ends
    mark: str  # as `marks` in `report.comparison`
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


def colours(comparison: Comparison) -> dict[str, str]:
    """One a recipe; the untouched model has that of what is not emphasised."""
    untouched, *others = comparison.summary
    return {untouched.recipe: MUTED, **{o.recipe: c for o, c in zip(others, cycle(COLOURS))}}


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


def _seeds(comparison: Comparison, name: str) -> dict[str, list[float]]:
    seeds: dict[str, list[float]] = {}
    for row in comparison.rows:
        seeds.setdefault(row.recipe, []).append(row.headline[name])
    return seeds


def _scale(comparison: Comparison, name: str) -> tuple[float, float]:
    """Both ends: the gap from zero, shares over a tenth at least, as a narrow one dramatises."""
    base = comparison.summary[0].scores[name].mean
    values = [value for seeds in _seeds(comparison, name).values() for value in seeds]
    found = [line.difference[name] for line in comparison.summary if name in line.difference]
    values += [base + end for interval in found for end in (interval.low, interval.high)]
    low, high = min(values), max(values)
    if name == "gap":
        return 0.0, 1.04 * high
    beside = max(0.1 - (high - low), 0.04 * (high - low)) / 2
    return max(low - beside, 0.0), min(high + beside, 1.0)


def _ranking(comparison: Comparison, name: str) -> Ranking:
    row, untouched = metric(name), comparison.summary[0]
    base, up = untouched.scores[name].mean, bool(row.higher_is_better)
    seeds, hues, (low, high) = (
        _seeds(comparison, name),
        colours(comparison),
        _scale(comparison, name),
    )

    def place(value: float) -> float:
        return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 2)

    def noise(line: RecipeSummary) -> tuple[float, float] | None:
        found = line.difference.get(name)
        return (place(base + found.low), place(base + found.high)) if found else None

    ordered = sorted(comparison.summary, key=lambda line: line.scores[name].mean, reverse=up)
    lines = [
        Ranked(
            recipe=line.recipe,
            kind=kind(line),
            colour=hues[line.recipe],
            value=line.scores[name].mean,
            deviation=line.scores[name].deviation,
            dots=[place(value) for value in seeds[line.recipe]],
            mean=place(line.scores[name].mean),
            noise=noise(line),
            mark=marks(line, untouched)[name] if line.difference else "",
            pareto_best=line.pareto_best,
        )
        for line in ordered
    ]
    return Ranking(name, capitalised(row.heading), up, place(base), low, high, lines)


def _trade_off(comparison: Comparison, name: str) -> Chart:
    shown, summary, hues = metric(name).heading, comparison.summary, colours(comparison)
    points = [(line.scores["gap"].mean, line.scores[name].mean) for line in summary]
    seeds = {axis_name: _seeds(comparison, axis_name) for axis_name in ("gap", name)}
    best, (_, widest) = front(points), _scale(comparison, "gap")
    dotted = {"color": MUTED, "width": 1.5, "dash": "dot"}
    data = [trace("front", "lines", [points[i] for i in best], line=dotted, hoverinfo="skip")]
    notes = []
    for line, point in zip(summary, points, strict=True):
        colour = hues[line.recipe]
        # Plotly reads some HTML in texts; names are to be shown as they are
        full = escape(line.recipe, quote=False)
        if line.difference:
            notes.append(_arrow(points[0], point, colour))
        short = line.recipe if len(line.recipe) <= NAMED else f"{line.recipe[: NAMED - 1]}…"
        notes.append(_name(point, escape(short, quote=False), colour))
        dots = zip(seeds["gap"][line.recipe], seeds[name][line.recipe], strict=True)
        symbol = KINDS[kind(line)][1]
        data += [
            trace(
                full,
                "markers",
                dots if line.runs > 1 else [],
                marker={"color": colour, "size": 6, "symbol": symbol, "opacity": 0.55},
                hoverinfo="skip",
            ),
            trace(
                full,
                "markers",
                [point],
                marker={"color": colour, "size": 11, "symbol": symbol},
                hovertemplate="%{fullData.name}<br>gap %{x:.3f}<br>%{y:.3f}<extra></extra>",
            ),
        ]
    both_axes = layout(
        axis("gap (smaller to the left)", range=[-0.02 * widest, widest]),
        axis(shown, range=list(_scale(comparison, name))),
        hovermode="closest",
        showlegend=False,
        annotations=notes,
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
            "An arrow goes from the untouched model to each mean over seeds; small dots are the "
            "seeds. Further up and further left is better; no row beats one on the dotted front in "
            "both. A smaller gap is not a better model by itself."
        ),
        panels=[Panel(f"trade-off-{name}", "", {"data": data, "layout": both_axes})],
        head=("recipe", "gap", capitalised(shown)),
        rows=[
            (line.recipe, number(gap), number(score))
            for line, (gap, score) in zip(summary, points, strict=True)
        ],
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> Figure:
    return {
        **dict(zip(("ax", "ay", "x", "y"), (*start, *end), strict=True)),
        "axref": "x",
        "ayref": "y",
        "showarrow": True,
        "text": "",
        "arrowcolor": colour,
        "arrowhead": 2,
        "arrowwidth": 1,
        "opacity": 0.5,
        "standoff": 7,
        "startstandoff": 7,
    }


def _name(point: tuple[float, float], text: str, colour: str) -> Figure:
    """Beside its mark; the page's script moves it to where it hides least."""
    at = {"x": point[0], "y": point[1], "xanchor": "left", "xshift": 9}
    return {
        **at,
        "text": text,
        "showarrow": False,
        "font": {"size": 12, "color": colour},
        "bgcolor": SURFACE,
    }


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
    if comparison.vectors:
        comparison = comparison.model_copy(update={"vectors": short_path(comparison.vectors)})
    environment_file = folder / "environment.json"
    charts = trade_off_charts(comparison)
    trained = sum(bool(line.learning_rate) for line in comparison.summary)
    free = len(comparison.summary) - 1 - trained
    on = f"stored vectors {comparison.vectors}" if comparison.vectors else ""
    on = on or f"model {short_path(str(settings.get('model', {}).get('name')))}"
    images = f" · {comparison.held_out:,} held-out images" if comparison.held_out else ""
    # where the folder lies is nobody's business where the page is shared
    name = shown_as.resolve().name
    return write_page(
        folder,
        "comparison.html.j2",
        charts=charts,
        settings=settings,
        environment=read_mapping(environment_file) if environment_file.is_file() else {},
        title="Comparison",
        about=f"{trained} trained and {free} training-free rows · {on}{images}",
        decision=decide(comparison, name),
        rule=RULE,
        beside=name,
        rankings=rankings(comparison),
        kinds={key: name for key, (name, _) in KINDS.items()},
        trade_offs=[chart.name for chart in charts],
        tables={
            "Scores": (*scores_cells(comparison), LEGEND),
            "Less the untouched model": (*differences_cells(comparison), f"{INTERVALS} {RULE}"),
            "Learning rates": (*rates_cells(comparison), RATES_LEGEND),
        },
        facts=_facts(comparison, settings),
    )


def _facts(comparison: Comparison, settings: Mapping[str, Any]) -> dict[str, str]:
    data, train = settings.get("data", {}), settings.get("train", {})
    trained = [row for row in comparison.rows if row.learning_rate is not None]
    pairs = max(row.pairs for row in comparison.rows)
    size = train.get("batch_size", settings.get("batch_size"))
    rates = {row.recipe: f"{row.recipe} {row.learning_rate:g}" for row in trained}
    held_out = [f"{comparison.held_out:,}"] if comparison.held_out else []
    held_out += [f"from {data['val']}"] if data.get("val") else []
    facts = {
        "Model": settings.get("model", {}).get("name"),
        "Training images": f"{pairs:,} from {comparison.vectors or data.get('train')}",
        "Held-out images": " ".join(held_out) or None,
        "Steps": f"{_listed(row.steps for row in trained)} of {size} pairs",
        "Learning rates": ", ".join(rates.values()),
        "Seeds": _listed(row.seed for row in comparison.rows),
        "Bootstrap resamples": settings.get("resamples"),
    }
    return {name: short_path(str(value)) for name, value in facts.items() if value}


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(f"{number:,}" for number in sorted(set(numbers)))
