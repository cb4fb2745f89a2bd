"""Charts of the steps: losses, norms, the gap, the gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_refine.report.chart import ACCENT, AFTER, IMAGE, INK, MUTED, TEXT, Chart, Panel, line
from clip_refine.report.chart import layout as axes

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
        "layout": axes("step", heading.lower(), showlegend=len(data) > 1),
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
