"""A run's folder → its page."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle, pairwise, zip_longest
from pathlib import Path
from typing import Any

from clip_refine.report.page import (
    ACCENT,
    AFTER,
    IMAGE,
    INK,
    MUTED,
    TEXT,
    Chart,
    Figure,
    Panel,
    axis,
    layout,
    line,
    read_mapping,
    trace,
    write_page,
)
from clip_refine.report.tables import (
    answer,
    doubts,
    headline_lines,
    making_facts,
    score_lines,
    seconds,
    short_path,
    signed,
    verdict,
)
from clip_refine.results import (
    Clouds,
    Evidence,
    Histograms,
    Point,
    Ranking,
    RunScores,
    Spectra,
    TaskChange,
    of_one_run,
    read,
)
from clip_refine.support.errors import DataError
from clip_refine.support.limits import WHOLE, parse_json, read_text


def write_run_report(run: Path) -> Path:
    """Write `report.html` from the other files of a run."""
    with of_one_run(run):
        return _write(run)


def _write(run: Path) -> Path:
    scores = read(RunScores, run / "scores.json")
    evidence = read(Evidence, run / "report.json")
    settings = read_mapping(run / "config.yaml")
    environment = read_mapping(run / "environment.json")
    training = training_charts(read_steps(run / "log.jsonl"))
    features = [
        clouds_chart(evidence.clouds),
        cosines_chart(evidence.histograms),
        spectra_chart(evidence.spectra),
    ]
    model, source = short_path(scores.recipe["model"]), short_path(evidence.source)
    tabs = {"scores": "Scores", "space": "Feature space", "retrieval": "Retrieval"}
    tabs |= {"classes": "Zero-shot"} if evidence.tasks else {}
    tabs |= {"training": "Training"} if training else {}
    return write_page(
        run / "report.html",
        "run.html.j2",
        charts=[*features, *training],
        settings=settings,
        environment=environment,
        title=f"{settings.get('recipe', 'refinement')} on {model}",
        about=f"Recipe {settings.get('recipe', 'unknown')} · model {model} · "
        f"{scores.recipe['pairs']:,} training images · {scores.recipe['steps']:,} steps",
        answer=answer(scores),
        verdict=verdict(scores),
        doubts=doubts(scores),
        headline=headline_lines(scores),
        lines=score_lines(scores),
        scores=scores,
        source=source,
        training=[chart.name for chart in training],
        tab_names={**tabs, "made": "How it was made"},
        rankings={
            # captions of one image may move together
            "captions": _moved(evidence.captions, scores.after.captions / scores.after.pairs),
            "images": _moved(evidence.images, 1),
        },
        thumbnails=evidence.thumbnails,
        tasks=[_task(task) for task in evidence.tasks],
        facts=making_facts(scores, settings, environment, source),
        seconds=seconds(scores),
        island={
            "pairs": [
                {**pair.model_dump(), "name": short_path(pair.name)}
                for pair in evidence.clouds.pairs
            ],
            "thumbnails": evidence.thumbnails,
        },
    )


def read_steps(path: Path) -> list[dict[str, float]]:
    """The records of `log.jsonl`."""
    try:
        return [parse_json(line) for line in read_text(path, WHOLE).splitlines()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is no log of a run ({error}).") from error


def _moved(ranking: Ranking, together: float) -> dict[str, Any]:
    """Queries whose rank moved, and whether a sign test says so, so many `together` being one."""
    least = 1.96 * math.sqrt((ranking.improved + ranking.worsened) * together)
    way = ranking.improved - ranking.worsened
    sides = {
        "Improved most" if way > least else "Up most": ranking.most_improved,
        "Worsened most" if -way > least else "Down most": ranking.most_worsened,
    }
    return {
        "ranking": ranking,
        "beyond_chance": "up" if way > least else "down" if -way > least else "",
        "sides": {
            name: [q for q in queries if not 0.5 <= q.rank_after / q.rank_before <= 2]
            for name, queries in sides.items()
        },
    }


def _task(task: TaskChange) -> dict[str, Any]:
    """A zero-shot task as the page shows it: classes by what they gained, tables as cells."""
    by_gain = sorted(task.classes, key=lambda found: found.before - found.after)
    return {
        "name": task.name,
        "classes": task.classes,
        "moved": sum(found.before != found.after for found in task.classes),
        # beyond chance, all classes of the task considered
        "gained": [found for found in by_gain if found.low > 0],
        "lost": [found for found in reversed(by_gain) if found.high < 0],
        "rows": [
            (
                found.name,
                str(found.images),
                f"{found.before:.3f}",
                f"{found.after:.3f}",
                f"{signed(found.after - found.before)} [{signed(found.low)}, {signed(found.high)}]",
            )
            for found in by_gain
        ],
        "confusions": [
            (pair.label, pair.predicted, str(pair.images), str(pair.before), str(pair.after))
            for pair in task.confusions
        ],
    }


# --------------------------------------------------------------------------------------------------
# Charts of the feature space: clouds, cosines, spectra.


def clouds_chart(clouds: Clouds) -> Chart:
    """Both clouds of both models in one plane."""
    sides = {
        "before": (clouds.image_before, clouds.text_before),
        "after": (clouds.image_after, clouds.text_after),
    }
    ranges = []
    for direction in (0, 1):
        values = [point[direction] for side in sides.values() for cloud in side for point in cloud]
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 1.0
        ranges.append([round(low - margin, 4), round(high + margin, 4)])
    percent = [f"{share:.0%}" for share in clouds.explained]
    plain = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    both_axes = layout(
        axis(f"PC 1 · {percent[0]}", range=ranges[0], **plain),
        axis(f"PC 2 · {percent[1]}", range=ranges[1], scaleanchor="x", **plain),
        hovermode="closest",
        hoverdistance=24,
    )
    panels, gaps = [], []
    for name, (images, texts) in sides.items():
        centres = [_centre(images), _centre(texts)]
        gaps.append(math.dist(*centres))
        figure = {"data": _cloud(images, texts, centres), "layout": both_axes}
        panels.append(Panel(f"clouds-{name}", name.capitalize(), figure))
    count = len(clouds.pairs)
    return Chart(
        name="clouds",
        heading="Images and captions in one plane",
        alternative=(
            f"Two scatter plots of {count} images and their captions, before and after. The line "
            f"between the two centres is {gaps[0]:.2f} long before and {gaps[1]:.2f} "
            "after, in this plane."
        ),
        caption=(
            f"Unit features of {count} held-out pairs, drawn at random, in the plane of the first "
            f"two principal components ({percent[0]} and {percent[1]} of the variance) of images "
            f"and captions of both models together, fitted on {clouds.fitted_on:,} pairs: both "
            "plots have the same axes and limits. The thick line joins the centres of the two "
            "clouds. Point at a dot, or tap it, to see its pair."
        ),
        panels=panels,
        head=("image", "caption", "cosine before", "after", "rank before", "after"),
        rows=[
            (
                short_path(pair.name),
                pair.caption,
                f"{pair.cosine_before:.3f}",
                f"{pair.cosine_after:.3f}",
                str(pair.rank_before),
                str(pair.rank_after),
            )
            for pair in clouds.pairs
        ],
    )


def _cloud(
    images: Sequence[Point], texts: Sequence[Point], centres: Sequence[Point]
) -> list[Figure]:
    unnamed = {"hoverinfo": "skip", "showlegend": False}
    dots = [("images", images, IMAGE, "circle"), ("captions", texts, TEXT, "diamond")]
    return [
        *(
            trace(
                name,
                "markers",
                points,
                marker={"color": colour, "size": 6, "symbol": symbol, "opacity": 0.6},
                hoverinfo="none",  # the card beside the plots shows the pair
            )
            for name, points, colour, symbol in dots
        ),
        trace(
            "centres",
            "lines+markers",
            centres,
            line={"color": INK, "width": 2.5},
            marker={
                "size": 11,
                "color": [IMAGE, TEXT],
                "symbol": ["circle", "diamond"],
                "line": {"color": INK, "width": 2},
            },
            **unnamed,
        ),
        trace(
            "pair",  # filled in by the page's script for the dot that is pointed at
            "lines+markers",
            [],
            line={"color": INK, "width": 1.5, "dash": "dot"},
            marker={"size": 13, "color": "rgba(0,0,0,0)", "line": {"width": 2}},
            **unnamed,
        ),
    ]


def _centre(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def cosines_chart(histograms: Histograms) -> Chart:
    """True and wrong pairs before and after, side by side on the same axes."""
    middles = [(low + high) / 2 for low, high in pairwise(histograms.edges)]
    sides = {
        "before": (histograms.true_before, histograms.wrong_before),
        "after": (histograms.true_after, histograms.wrong_after),
    }
    columns = [shares for side in sides.values() for shares in side]
    both_axes = layout(
        axis("cosine of image and caption", range=[histograms.edges[0], histograms.edges[-1]]),
        axis("share of pairs", range=[0, 1.05 * max(map(max, columns))], tickformat=".0%"),
        barmode="overlay",
        bargap=0,
    )
    panels, words = [], []
    for name, (true, wrong) in sides.items():
        means = [sum(m * s for m, s in zip(middles, row, strict=True)) for row in (true, wrong)]
        words.append(f"{name}, true pairs lie around {means[0]:.2f}, wrong ones {means[1]:.2f}")
        data = []
        for pairs, shares, colour in (("wrong pairs", wrong, MUTED), ("true pairs", true, AFTER)):
            data.append(
                {
                    "type": "bar",
                    "name": pairs,
                    "x": middles,
                    "y": list(shares),
                    "marker": {"color": colour, "line": {"width": 0}},
                    "opacity": 0.6,
                    "hovertemplate": "%{y:.1%}<extra>%{fullData.name}</extra>",
                }
            )
        figure = {"data": data, "layout": both_axes}
        panels.append(Panel(f"cosines-{name}", name.capitalize(), figure))
    auc, recall, threshold = histograms.auc, histograms.recall, histograms.threshold
    words += [f"AUC {auc[0]:.3f} before and {auc[1]:.3f} after"]
    return Chart(
        name="cosines",
        heading="Can one threshold tell true pairs from wrong ones?",
        alternative=f"Histograms of cosines: {'; '.join(words)}.",
        caption=(
            "Cosines of held-out captions with their own images and with other images. A true pair "
            f"scores above a wrong one with a chance of {auc[0]:.3f} before and {auc[1]:.3f} after "
            "(AUC). With the threshold that lets 1 % of the wrong pairs through "
            f"({threshold[0]:.3f} before, {threshold[1]:.3f} after), {recall[0]:.1%} of the true "
            f"pairs were found before and {recall[1]:.1%} are after."
        ),
        panels=panels,
        head=("cosine", "true before", "wrong before", "true after", "wrong after"),
        rows=[
            (f"{middle:.3f}", *(f"{share:.2%}" for share in shares))
            for middle, *shares in zip(middles, *columns, strict=True)
        ],
    )


def spectra_chart(spectra: Spectra) -> Chart:
    """How many directions each modality fills."""
    sides = {
        "images before": (spectra.image_before, IMAGE, "dot"),
        "images after": (spectra.image_after, IMAGE, "solid"),
        "captions before": (spectra.text_before, TEXT, "dot"),
        "captions after": (spectra.text_after, TEXT, "solid"),
    }
    data, halves, ends = [], [], {}
    for name, (values, colour, dash) in sides.items():
        # what is nothing but rounding would stretch the logarithmic axis over many decades
        ends[name] = [value for value in values if value > 1e-4 * values[0]]
        data.append(line(name, enumerate(ends[name], start=1), colour, dash=dash))
        # how many of the strongest directions hold half of the variance
        variance = list(accumulate(value**2 for value in values))
        halves.append(f"{name} {bisect_left(variance, variance[-1] / 2) + 1}")
    both_axes = layout(
        axis("direction, strongest first"),
        axis("singular value", type="log", dtick=1, exponentformat="power"),
    )
    return Chart(
        name="spectra",
        heading="How many directions are in use?",
        alternative=(
            f"Line chart. Directions that hold half of the variance: {', '.join(halves)}."
        ),
        caption=(
            "Singular values of the centred unit features over the root of their number. A steep "
            "fall means that few directions are used; a line ends where the rest is rounding, "
            f"below 1e-4 of the first. Half of the variance lies in: {', '.join(halves)}."
        ),
        panels=[Panel("spectra", "", {"data": data, "layout": both_axes})],
        head=("direction", *sides),
        rows=[
            (str(number), *("" if value is None else f"{value:.4g}" for value in row))
            for number, row in enumerate(zip_longest(*ends.values()), start=1)
        ],
    )


# --------------------------------------------------------------------------------------------------
# Charts of the steps: losses, norms, the gap, the gradient.


Steps = Sequence[Mapping[str, float]]

_OF_MODALITY = {"image_norm": IMAGE, "text_norm": TEXT}


def training_charts(steps: Steps) -> list[Chart]:
    """One chart a subject, from the records of `log.jsonl`."""
    if not steps:
        return []
    losses = [name for name in steps[0] if name.startswith("loss_") and name != "loss_total"]
    terms = {"loss_total": "total", **{name: name.removeprefix("loss_") for name in losses}}
    norms = {"image_norm": "images", "text_norm": "captions"}
    subjects = [
        (
            *("losses", "Loss", terms),
            "Weighted terms of the objective on each batch. Random references make RaFA noisy by "
            "design; whether the model got better is read off the held-out scores.",
        ),
        (
            *("norms", "Length of the raw features", norms),
            "Mean norms in the batch. RaFA pulls them toward the references' length.",
        ),
        (
            *("batch-gap", "Gap in the batch", {"centroid_distance": "centroid distance"}),
            "Distance between the mean image and the mean caption on the unit sphere.",
        ),
        (
            *("gradient", "Gradient norm", {"gradient_norm": "gradient norm"}),
            "Before clipping. A rise that does not end points at a learning rate that is too high.",
        ),
    ]
    found = [_chart(steps, *subject) for subject in subjects]
    return [chart for chart in found if chart]


def _chart(
    steps: Steps, name: str, heading: str, series: Mapping[str, str], caption: str
) -> Chart | None:
    series = {key: shown for key, shown in series.items() if key in steps[0]}
    if not series:
        return None
    numbers = [int(step["step"]) for step in steps]
    styles = zip(
        cycle((INK, ACCENT, AFTER, MUTED)), cycle(("solid", "dash", "dot", "dashdot")), strict=False
    )
    few, data, words = len(numbers) <= 12, [], []
    for (key, shown), (colour, dash) in zip(series.items(), styles, strict=False):
        values = [float(f"{step[key]:.5g}") for step in steps]
        points = zip(numbers, values, strict=True)
        style = line(shown, points, _OF_MODALITY.get(key, colour), dash=dash)
        # of one step there is no line
        data.append(style | ({"mode": "lines+markers"} if few else {}))
        words.append(f"{shown} goes from {values[0]:.3g} to {values[-1]:.3g}")
    # what goes up is in the heading; from zero on, since a cut axis makes much of little
    # plotly would mark half steps where there are few
    steps_axis = axis("step", tickformat=",d") | ({"dtick": 1} if few else {})
    both_axes = layout(steps_axis, {"rangemode": "tozero"}, showlegend=len(data) > 1)
    return Chart(
        name=name,
        heading=heading,
        alternative=f"Line chart over {len(numbers)} steps: {'; '.join(words)}.",
        caption=caption,
        panels=[Panel(name, "", {"data": data, "layout": both_axes})],
        head=("step", *series.values()),
        rows=[
            (str(number), *(f"{step[key]:.4g}" for key in series))
            for number, step in zip(numbers, steps, strict=True)
        ],
    )
