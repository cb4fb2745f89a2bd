"""What stands side by side → its page: a comparison, several runs, the models of a suite."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from clip_refine.report.comparison import (
    INTERVALS,
    LEGEND,
    RATES_LEGEND,
    RULE,
    Decision,
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
    reliability_chart,
    trace,
    write_page,
)
from clip_refine.report.tables import (
    SIGNS,
    interval_text,
    letters,
    mark_of,
    number,
    short_path,
    signed,
    threshold_sentence,
)
from clip_refine.results import (
    Comparison,
    ComparisonRow,
    Difference,
    FitProbability,
    RecipeSummary,
    RunScores,
    Score,
    Scores,
    Spread,
    SuiteScores,
    TaskScores,
    of_one_run,
    read,
)
from clip_refine.results.metrics import metric, pareto_best
from clip_refine.support.errors import DataError

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
    base = comparison.summary[0].scores[name].mean
    values = [value for seeds in _seeds(comparison, name).values() for value in seeds]
    found = [line.difference[name] for line in comparison.summary if name in line.difference]
    least = min(0.0, *values)  # what is never negative is not, whatever an interval's end
    values += [
        max(least, base + end) for interval in found for end in (interval.low, interval.high)
    ]
    return ends(name, values)


def ends(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Of a scale: shares over a tenth at least, others from zero, as a narrow one dramatises.

    >>> ends("top1", [0.5, 0.52])
    (0.46, 0.56)
    """
    low, high = min(values), max(values)
    if not metric(name).unit.startswith("share"):
        return min(0.0, 1.04 * low), max(0.0, 1.04 * high) or 1.0
    beside = max(0.1 - (high - low), 0.04 * (high - low)) / 2
    return round(max(low - beside, 0.0), 4), round(min(high + beside, 1.0), 4)


def _place(value: float, low: float, high: float) -> float:
    """Where it lies on a scale, in percent."""
    return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 2)


def _ranking(comparison: Comparison, name: str) -> Ranking:
    row, untouched = metric(name), comparison.summary[0]
    base, up = untouched.scores[name].mean, bool(row.higher_is_better)
    seeds, hues, (low, high) = (
        _seeds(comparison, name),
        colours(comparison),
        _scale(comparison, name),
    )

    def place(value: float) -> float:
        return _place(value, low, high)

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
    """Write `report.html` from the other files of a comparison, which will be at `shown_as`."""
    with of_one_run(folder):
        return _write(folder, shown_as or folder)


def _write(folder: Path, shown_as: Path) -> Path:
    comparison = read(Comparison, folder / "comparison.json")
    settings = read_mapping(folder / "config.yaml")
    if comparison.vectors:
        comparison = comparison.model_copy(update={"vectors": short_path(comparison.vectors)})
    environment_file = folder / "environment.json"
    trained = sum(bool(line.learning_rate) for line in comparison.summary)
    free = len(comparison.summary) - 1 - trained
    on = f"stored vectors {comparison.vectors}" if comparison.vectors else ""
    on = on or f"model {short_path(str(settings.get('model', {}).get('name')))}"
    images = f" · {comparison.held_out:,} held-out images" if comparison.held_out else ""
    # where the folder lies is nobody's business where the page is shared
    name = shown_as.resolve().name
    return _side_by_side(
        folder / "report.html",
        comparison,
        decision=decide(comparison, name),
        beside=name,
        settings=settings,
        environment=read_mapping(environment_file) if environment_file.is_file() else {},
        title="Comparison",
        about=f"{trained} trained and {free} training-free rows · {on}{images}",
        facts=_facts(comparison, settings),
    )


_DOTS = "Every dot is a seed, the bar their mean"
_BAND = (
    "the pale band the 95 % bootstrap interval of the difference from {0}, which is the vertical "
    "line"
)
_STAR = (
    "★ Pareto-best: no other row is as good in gap, mean R@1, zero-shot and linear probe and "
    "better in one."
)


def _side_by_side(path: Path, comparison: Comparison, **more: Any) -> Path:
    """The page of rows beside the untouched model; `more` is the rest of what the page needs."""
    charts = trade_off_charts(comparison)
    tables = {
        "Scores": (*scores_cells(comparison), LEGEND),
        "Less the untouched model": (*differences_cells(comparison), f"{INTERVALS} {RULE}"),
        "Learning rates": (*rates_cells(comparison), RATES_LEGEND),
    }
    return write_page(
        path,
        "comparison.html.j2",
        charts=charts,
        rankings=rankings(comparison),
        how=f"{_DOTS}, {_BAND.format('the untouched model')}. {RULE} {_STAR}",
        kinds={key: name for key, (name, _) in KINDS.items()},
        trade_offs=[chart.name for chart in charts],
        thresholds={},
        tables={
            name: (("recipe", *head[1:]), rows, legend)
            for name, (head, rows, legend) in tables.items()
            if rows
        },
        **more,
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


# --------------------------------------------------------------------------------------------------
# Several runs of one model → the comparison that they amount to → a page.


_UNTOUCHED = "pre-trained"  # as `compare` calls the row


def write_runs_report(runs: Sequence[Path]) -> Path:
    """Write `side-by-side.html` beside the first of several runs, whose models began alike."""
    found, rows, facts = {}, [], {}
    for name, run in _names(runs).items():
        found[name] = one = read(RunScores, run / "scores.json")
        with of_one_run(run):
            rows.append(_run_row(name, one.after, one.recipe, one.seconds.get("train", 0.0)))
            facts[name] = (
                f"{one.recipe.get('name')}, {one.recipe['pairs']:,} training images, "
                f"{one.recipe['steps']:,} steps, learning rate {_rate(one.recipe)}, "
                f"seed {one.recipe.get('seed')}"
            )
    first, *others = found
    base = found[first].before
    for name in others:
        own = found[name].before.headline
        if any(abs(own[key] - value) > 5e-4 for key, value in base.headline.items() if key in own):
            raise DataError(
                f"{name}: before its refinement it scored otherwise than {first} ({_said(own)}; "
                f"{_said(base.headline)}), so these are different models or held-out images. Give "
                "runs of one model, scored on the same pairs and tasks."
            )
        one, two = (first, base.headline.keys()), (name, own.keys())
        for (lacks, few), (has, more) in ((one, two), (two, one)):
            if only := more - few:
                raise DataError(
                    f"{lacks}: was not measured by {', '.join(sorted(only))}, which {has} was. "
                    "Give runs that were scored on the same pairs and tasks, or one at a time."
                )
    rows.insert(0, _run_row(_UNTOUCHED, base, {}, 0.0))
    best = pareto_best({row.recipe: row.headline for row in rows})
    paths = {"gap": "geometry.centroid_distance"} | {
        name: name for name in ("mean_recall@1", "zero_shot_top1")
    }
    summary = [
        RecipeSummary(
            recipe=row.recipe,
            runs=1,
            learning_rate=row.learning_rate,
            scores={key: Spread(mean=value, deviation=None) for key, value in row.headline.items()},
            seconds=Spread(mean=row.seconds, deviation=None),
            peak_memory=Spread(mean=0.0, deviation=None),
            difference={
                key: found[row.recipe].difference[path]
                for key, path in paths.items()
                if row.recipe in found and path in found[row.recipe].difference
            },
            pareto_best=row.recipe in best,
        )
        for row in rows
    ]
    made = Comparison(
        rows=tuple(rows), summary=tuple(summary), learning_rates=(), held_out=base.pairs
    )
    return _side_by_side(
        runs[0].resolve().parent / "side-by-side.html",
        made,
        # what to run next would need the settings that all share, and these share none
        decision=replace(decide(made), advice="", command=""),
        beside="",
        settings={},
        environment={},
        title="Runs side by side",
        about=f"{len(runs)} runs · model {short_path(str(found[first].recipe.get('model')))} · "
        f"{base.pairs:,} held-out images",
        facts=facts,
    )


def _names(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by what to call them: their folders' names, with the one above where two are alike."""
    short = [run.resolve().name for run in runs]
    if len({_UNTOUCHED, *short}) <= len(short):
        short = ["/".join(run.resolve().parts[-2:]) for run in runs]
    if len(set(short)) < len(short):
        raise DataError(f"{', '.join(short)}: two runs of one name. Give each once, or rename one.")
    return dict(zip(short, runs, strict=True))


def _said(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{metric(name).short} {number(value)}" for name, value in numbers.items())


def _rate(recipe: Mapping[str, Any]) -> float:
    return recipe.get("train", {}).get("learning_rate") or 0.0


def _run_row(name: str, scores: Scores, recipe: Mapping[str, Any], seconds: float) -> ComparisonRow:
    return ComparisonRow(
        recipe=name,
        seed=recipe.get("seed") or 0,
        learning_rate=_rate(recipe) if recipe else None,
        steps=recipe.get("steps", 0),
        pairs=recipe.get("pairs", 0),
        geometry=scores.geometry,
        retrieval=scores.retrieval,
        zero_shot=scores.zero_shot,
        linear_probe={},
        selection=None,
        seconds=seconds,
        peak_memory=0.0,
    )


# --------------------------------------------------------------------------------------------------
# The models of a suite → a page of the same kind.


def write_suite_report(file: Path) -> Path:
    """Write the page of a suite's scores beside their JSON file, by the same name."""
    scores = read(SuiteScores, file)
    with of_one_run(file):
        return _write_suite(scores, suite_page(file))


def suite_page(file: Path) -> Path:
    """Where the page of a suite's scores goes."""
    return file.with_name(f"{file.name.removesuffix('.json')}.html")


def _write_suite(scores: SuiteScores, path: Path) -> Path:
    names = _model_names(scores)
    first, *others = names.values()
    tasks: dict[str, dict[str, TaskScores]] = {}
    for one in scores.measured:
        tasks.setdefault(one.task, {})[one.model] = one
    changes = {(d.task, d.score, d.model): d for d in scores.differences}
    ranked = {task: _task_ranking(found, changes, names) for task, found in tasks.items()}
    tables: dict[str, tuple[Sequence[str], list[list[str]], str]] = {}
    how, how_rows = ("task", "images", "from", "prompts", "protocol"), []
    for task, found in tasks.items():
        one = found[scores.models[0].label]
        _, rows, _ = tables.setdefault(one.kind, (("task", "score", *names.values()), [], ""))
        for name in one.scores:
            # geometry has more numbers than a table should; the JSON has them all
            if metric(name).shown:
                cells = (
                    _suite_cell(found[model].scores[name], changes.get((task, name, model)))
                    for model in names
                )
                rows.append([task, metric(name).heading, *cells])
        images = f"{one.counts.get('images', 0):,}"
        own = (short_path(one.source), short_path(one.prompts or ""))
        how_rows.append([task, images, *own, one.protocol])
    tables["How each was taken"] = (
        *(how, how_rows),
        f"Brackets hold 95 % bootstrap intervals over images ({scores.resamples:,} resamples), of "
        f"a number or of its difference from {first}, both resampled alike; + is better, − worse. "
        "A share's may end at 0 or 1, a gap's that is too small to be told from none at the gap.",
    )
    said = [
        f"{name} against {first}: better in {_some(ranked, name, 'better')} and worse in "
        f"{_some(ranked, name, 'worse')} of {len(ranked)} tasks."
        for name in others
    ]
    # the JSON says where each was looked for, and how to get it
    left_out = f"Left out, as not found: {', '.join(scores.missing)}." if scores.missing else ""
    of_number = "the pale band its 95 % bootstrap interval"
    fits = {
        task: {
            names[model]: FitProbability.model_validate(one.details["fit"])
            for model, one in found.items()
        }
        for task, found in tasks.items()
        if "fit" in next(iter(found.values())).details
    }
    charts = {
        task: reliability_chart(
            f"fit-{at}",
            f"{task}: from which cosine on does a pair fit?",
            of_models,
            chain([MUTED], cycle(COLOURS)),
        )
        for at, (task, of_models) in enumerate(fits.items())
    }
    return write_page(
        path,
        "comparison.html.j2",
        charts=list(charts.values()),
        settings={},
        environment=scores.environment,
        title=f"Suite {scores.suite}",
        about=f"Suite {scores.suite} · {len(ranked)} tasks · {', '.join(names.values())}",
        decision=Decision(
            taken="",
            answer=" ".join(said) or f"{first} on the suite {scores.suite}.",
            price="Of each task its first score is judged here; the tables have all.",
            doubt=left_out,
            advice="",
            command="",
        ),
        beside="",
        rankings=list(ranked.values()),
        how=f"The bar is the model's number, {_BAND.format(first) if others else of_number}. "
        "Better or worse is said where it excludes zero and three places show the difference.",
        kinds={"untouched": first, "trained": ", ".join(others)} if others else {},
        trade_offs=[],
        thresholds={
            charts[task].name: [
                f"{model}: {threshold_sentence(name, fit)}"
                for model, fit in of_models.items()
                for name in fit.cutoffs
            ]
            for task, of_models in fits.items()
        },
        tables=tables,
        facts={
            "Suite": scores.suite,
            "Models": ", ".join(names.values()),
            "Bootstrap resamples": f"{scores.resamples:,}",
            "Seed": str(scores.seed),
            "Seconds": f"{scores.seconds:.0f}",
            "Device": str(scores.environment.get("device", "")),
        },
    )


def _model_names(scores: SuiteScores) -> dict[str, str]:
    """Label → name, of a path its end; with a letter where two would be alike."""
    labels = [model.label for model in scores.models]
    short = [label if short_path(label) == label else Path(label).name for label in labels]
    alike = len(set(short)) < len(short)
    return {
        model.label: f"{letter} {name}" if alike else name
        for model, name, letter in zip(scores.models, short, letters(scores), strict=True)
    }


def _some(ranked: Mapping[str, Ranking], name: str, mark: str) -> str:
    """The tasks in which a model bears a mark, a few by name."""
    found = [
        task
        for task, ranking in ranked.items()
        if any((line.recipe, line.mark) == (name, mark) for line in ranking.lines)
    ]
    more = "; ..." if len(found) > 4 else ""
    return f"{len(found)} ({'; '.join(found[:4])}{more})" if found else "none"


def _task_ranking(
    found: Mapping[str, TaskScores],
    changes: Mapping[tuple[str, str, str], Difference],
    names: Mapping[str, str],
) -> Ranking:
    """The models by a task's first score."""
    base = next(iter(found.values()))
    name, first = next(iter(base.scores.items()))
    up, lines = bool(first.higher_is_better), []
    intervals: dict[str, tuple[float, float]] = {}
    for model, one in found.items():
        score, change = one.scores[name], changes.get((base.task, name, model))
        own, at = (change, first.value) if change else (score, 0.0)
        if own.low is not None and own.high is not None:
            intervals[model] = (at + own.low, at + own.high)
    low, high = ends(
        name,
        [*(one.scores[name].value for one in found.values()), *chain(*intervals.values())],
    )
    hues = dict(zip(found, (MUTED, *islice(cycle(COLOURS), len(found) - 1)), strict=True))
    for model, one in found.items():
        value, change = one.scores[name].value, changes.get((base.task, name, model))
        lines.append(
            Ranked(
                recipe=names[model],
                kind="trained" if change else "untouched",
                colour=hues[model],
                value=value,
                deviation=None,
                dots=[],
                mean=_place(value, low, high),
                noise=tuple(_place(end, low, high) for end in intervals[model])  # pyright: ignore
                if model in intervals
                else None,
                mark=mark_of(change.interval, change.mean, up) if change else "",
                pareto_best=False,
            )
        )
    lines.sort(key=lambda line: line.value, reverse=up)
    heading = f"{base.task}: {metric(name).heading}"
    return Ranking(name, heading, up, _place(first.value, low, high), low, high, lines)


def _suite_cell(score: Score, change: Difference | None) -> str:
    if change is not None and change.interval is not None:
        sign = SIGNS.get(mark_of(change.interval, change.mean, change.higher_is_better), "")
        moved = f"{signed(change.mean)} {interval_text(change.interval)}"
        return f"{number(score.value)} ({moved}){sign}"
    if score.low is None or score.high is None:
        return number(score.value)
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"
