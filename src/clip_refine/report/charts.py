"""The charts of a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_refine.report.tables import short_name
from clip_refine.results import Clouds, Evidence, Histograms, Point, Spectra

# --------------------------------------------------------------------------------------------------
# A chart as the page needs it: a figure for Plotly, the same in words, and the table behind it.
#
# Colours are the names of the page's own, as in `var(--image)`, so that a chart follows the page
# from
# light to dark.


Figure = dict[str, Any]

IMAGE, TEXT = "var(--image)", "var(--text)"
AFTER = "var(--after)"
MUTED, INK, ACCENT = "var(--muted)", "var(--ink)", "var(--accent)"


@dataclass(frozen=True)
class Panel:
    """One figure of a chart."""

    name: str  # unique on the page
    heading: str  # what stands above it; may be empty
    figure: Figure  # `data` and `layout` as Plotly has them


@dataclass(frozen=True)
class Chart:
    """What a reader sees of one question."""

    name: str  # unique on the page
    heading: str  # the question or the subject
    alternative: str  # what the figure shows, in words and numbers, for those who do not see it
    caption: str  # how to read it
    panels: Sequence[Panel]  # side by side where there is room
    head: Sequence[str]  # of the table behind
    rows: Sequence[Sequence[str]]  # the same


def line(
    name: str,
    across: Sequence[float],
    up: Sequence[float | None],
    colour: str,
    *,
    dash: str = "solid",
    hover: str = "%{y:.4g}",
    **more: Any,
) -> dict[str, Any]:
    """A line trace."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(across),
        "y": list(up),
        "line": {"color": colour, "dash": dash, "width": 2},
        "hovertemplate": f"{hover}<extra>%{{fullData.name}}</extra>",
        **more,
    }


def layout(across: str, up: str, **more: Any) -> dict[str, Any]:
    """A layout with both axes named."""
    axes = {"xaxis": {"title": {"text": across}}, "yaxis": {"title": {"text": up}}}
    return {**axes, "hovermode": "x unified", **more}


# --------------------------------------------------------------------------------------------------
# Charts of the feature space: clouds, cosines, spectra.


def clouds_chart(evidence: Evidence) -> Chart:
    """Both clouds of both models in one plane."""
    clouds = evidence.clouds
    every = [clouds.image_before, clouds.text_before, clouds.image_after, clouds.text_after]
    ranges = [_range([point[axis] for side in every for point in side]) for axis in (0, 1)]
    panels = [
        Panel("clouds-before", "Before", _cloud(clouds, every[0], every[1], ranges)),
        Panel("clouds-after", "After", _cloud(clouds, every[2], every[3], ranges)),
    ]
    distances = [_gap(every[0], every[1]), _gap(every[2], every[3])]
    count, percent = len(clouds.pairs), [f"{share:.0%}" for share in clouds.explained]
    return Chart(
        name="clouds",
        heading="Images and captions in one plane",
        alternative=(
            f"Two scatter plots of {count} images and their captions, before and after. The line "
            f"between the two centres is {distances[0]:.2f} long before and {distances[1]:.2f} "
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
                short_name(pair.name),
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
    clouds: Clouds, images: Sequence[Point], texts: Sequence[Point], ranges: list[list[float]]
) -> dict[str, Any]:
    centres = [_centre(images), _centre(texts)]
    percent = [f"{share:.0%}" for share in clouds.explained]
    shared = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    return {
        "data": [
            _dots("images", images, IMAGE, "circle"),
            _dots("captions", texts, TEXT, "diamond"),
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "centres",
                "x": [x for x, _ in centres],
                "y": [y for _, y in centres],
                "line": {"color": INK, "width": 2.5},
                "marker": {
                    "size": 11,
                    "color": [IMAGE, TEXT],
                    "symbol": ["circle", "diamond"],
                    "line": {"color": INK, "width": 2},
                },
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "pair",
                "x": [],
                "y": [],
                "line": {"color": INK, "width": 1.5, "dash": "dot"},
                "marker": {"size": 13, "color": "rgba(0,0,0,0)", "line": {"width": 2}},
                "hoverinfo": "skip",
                "showlegend": False,
            },
        ],
        "layout": {
            "hovermode": "closest",
            "hoverdistance": 24,
            "xaxis": {"title": {"text": f"PC 1 · {percent[0]}"}, "range": ranges[0], **shared},
            "yaxis": {
                "title": {"text": f"PC 2 · {percent[1]}"},
                "range": ranges[1],
                "scaleanchor": "x",
                **shared,
            },
        },
    }


def _dots(name: str, points: Sequence[Point], colour: str, symbol: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "marker": {"color": colour, "size": 6, "symbol": symbol, "opacity": 0.6},
        "hoverinfo": "none",  # the card beside the plots shows the pair
    }


def _range(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    return [round(low - margin, 4), round(high + margin, 4)]


def _centre(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _gap(images: Sequence[Point], texts: Sequence[Point]) -> float:
    (image_x, image_y), (text_x, text_y) = _centre(images), _centre(texts)
    return ((image_x - text_x) ** 2 + (image_y - text_y) ** 2) ** 0.5


def cosines_chart(histograms: Histograms) -> Chart:
    """True and wrong pairs before and after, above one another."""
    middles = [
        (low + high) / 2 for low, high in zip(histograms.edges, histograms.edges[1:], strict=False)
    ]
    sides = {
        "before": (histograms.true_before, histograms.wrong_before),
        "after": (histograms.true_after, histograms.wrong_after),
    }
    limits = [histograms.edges[0], histograms.edges[-1]]
    highest = 1.05 * max(share for side in sides.values() for row in side for share in row)
    panels, words = [], []
    for name, (true, wrong) in sides.items():
        means = [sum(m * s for m, s in zip(middles, row, strict=True)) for row in (true, wrong)]
        words.append(f"{name}, true pairs lie around {means[0]:.2f}, wrong ones {means[1]:.2f}")
        figure = {
            "data": [
                _filled("wrong pairs", middles, wrong, MUTED),
                _filled("true pairs", middles, true, AFTER),
            ],
            "layout": layout("cosine of image and caption", "share of pairs")
            | {
                "xaxis": {"title": {"text": "cosine of image and caption"}, "range": limits},
                "yaxis": {
                    "title": {"text": "share of pairs"},
                    "range": [0, highest],
                    "tickformat": ".0%",
                },
            },
        }
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
        rows=_cosine_rows(middles, histograms),
    )


def _filled(name: str, across: Sequence[float], up: Sequence[float], colour: str) -> dict[str, Any]:
    trace = line(name, across, up, colour, hover="%{y:.1%}", fill="tozeroy")
    trace["line"]["shape"] = "hvh"
    return trace


def _cosine_rows(middles: Sequence[float], histograms: Histograms) -> list[Sequence[str]]:
    columns = (
        histograms.true_before,
        histograms.wrong_before,
        histograms.true_after,
        histograms.wrong_after,
    )
    return [
        (f"{middle:.3f}", *(f"{share:.2%}" for share in shares))
        for middle, *shares in zip(middles, *columns, strict=True)
    ]


def spectra_chart(found: Spectra) -> Chart:
    """How many directions each modality fills."""
    sides = {
        "images before": (found.image_before, IMAGE, "dot"),
        "images after": (found.image_after, IMAGE, "solid"),
        "captions before": (found.text_before, TEXT, "dot"),
        "captions after": (found.text_after, TEXT, "solid"),
    }
    numbers = list(range(1, len(found.image_before) + 1))
    halves = ", ".join(f"{name} {_half(values)}" for name, (values, *_) in sides.items())
    floor = 1e-4 * max(max(values) for values, *_ in sides.values())
    figure = {
        "data": [
            line(
                name,
                numbers,
                [value if value > floor else None for value in values],
                colour,
                dash=dash,
            )
            for name, (values, colour, dash) in sides.items()
        ],
        "layout": layout("direction, strongest first", "singular value")
        | {
            "yaxis": {
                "title": {"text": "singular value"},
                "type": "log",
                "dtick": 1,
                "exponentformat": "power",
            }
        },
    }
    return Chart(
        name="spectra",
        heading="How many directions are in use?",
        alternative=f"Line chart. Directions that hold half of the variance: {halves}.",
        caption=(
            "Singular values of the centred unit features over the root of their number. A steep "
            f"fall means that few directions are used. Half of the variance lies in: {halves}."
        ),
        panels=[Panel("spectra", "", figure)],
        head=("direction", *sides),
        rows=[
            (str(number), *(f"{values[number - 1]:.4g}" for values, *_ in sides.values()))
            for number in numbers
        ],
    )


def _half(values: Sequence[float]) -> int:
    """How many of the strongest directions hold half of the variance."""
    total, so_far = sum(value**2 for value in values), 0.0
    for count, value in enumerate(values, start=1):
        so_far += value**2
        if so_far >= total / 2:
            return count
    return len(values)


# --------------------------------------------------------------------------------------------------
# Charts of the steps: losses, norms, the gap, the gradient.


Steps = Sequence[Mapping[str, float]]

_COLOURS = (INK, ACCENT, AFTER, MUTED)
_OF_MODALITY = {"image_norm": IMAGE, "text_norm": TEXT}
_DASHES = ("solid", "dash", "dot", "dashdot")


def training_charts(steps: Steps) -> list[Chart]:
    """One chart a subject, from the records of `log.jsonl`."""
    if not steps:
        return []
    losses = [name for name in steps[0] if name.startswith("loss_") and name != "loss_total"]
    found = [
        _chart(
            steps,
            "losses",
            "Loss",
            {"loss_total": "total", **{name: name.removeprefix("loss_") for name in losses}},
            "Weighted terms of the objective on each batch. Random references make RaFA noisy by "
            "design; whether the model got better is read off the held-out scores.",
        ),
        _chart(
            steps,
            "norms",
            "Length of the raw features",
            {"image_norm": "images", "text_norm": "captions"},
            "Mean norms in the batch. RaFA pulls them toward the references' length.",
        ),
        _chart(
            steps,
            "batch-gap",
            "Gap in the batch",
            {"centroid_distance": "centroid distance"},
            "Distance between the mean image and the mean caption on the unit sphere.",
        ),
        _chart(
            steps,
            "gradient",
            "Gradient norm",
            {"gradient_norm": "gradient norm"},
            "Before clipping. A rise that does not end points at a learning rate that is too high.",
        ),
    ]
    return [chart for chart in found if chart]


def _chart(
    steps: Steps, name: str, heading: str, series: Mapping[str, str], caption: str
) -> Chart | None:
    series = {key: shown for key, shown in series.items() if key in steps[0]}
    if not series:
        return None
    numbers = [int(step["step"]) for step in steps]
    styles = zip(_COLOURS * 3, _DASHES * 3, strict=True)
    data: list[dict[str, Any]] = []
    words = []
    for (key, shown), (colour, dash) in zip(series.items(), styles, strict=False):
        values = [float(f"{step[key]:.5g}") for step in steps]
        colour = _OF_MODALITY.get(key, colour)
        data.append(line(shown, numbers, values, colour, dash=dash))
        words.append(f"{shown} goes from {values[0]:.3g} to {values[-1]:.3g}")
    figure = {
        "data": data,
        "layout": layout("step", heading.lower(), showlegend=len(data) > 1),
    }
    figure["layout"]["yaxis"] = {"rangemode": "tozero" if name == "losses" else "normal"}
    return Chart(
        name=name,
        heading=heading,
        alternative=f"Line chart over {len(numbers)} steps: {'; '.join(words)}.",
        caption=caption,
        panels=[Panel(name, "", figure)],
        head=("step", *series.values()),
        rows=[
            (str(number), *(f"{step[key]:.4g}" for key in series))
            for number, step in zip(numbers, steps, strict=True)
        ],
    )
