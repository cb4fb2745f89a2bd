"""What the pages share: charts for Plotly, and the one self-contained HTML file."""

import base64
import gzip
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from clip_refine import __version__
from clip_refine.report.tables import (
    all_settings,
    calibration_text,
    command,
    interval_text,
    number,
    signed,
    versions,
)
from clip_refine.results import FitProbability
from clip_refine.support.console import printable
from clip_refine.support.errors import DataError
from clip_refine.support.folder import write_file
from clip_refine.support.limits import parse_yaml, read_text, shown

# --------------------------------------------------------------------------------------------------
# A chart as the page needs it: a figure for Plotly, the same in words, and the table behind it.

Figure = dict[str, Any]  # as Plotly has it, or a part of that

# the names of the page's own colours, so that a chart follows the page from light to dark
IMAGE, TEXT, AFTER = "var(--image)", "var(--text)", "var(--after)"
MUTED, INK, ACCENT, SURFACE = "var(--muted)", "var(--ink)", "var(--accent)", "var(--surface)"


@dataclass(frozen=True)
class Panel:
    """One figure of a chart."""

    name: str  # unique on the page
    heading: str  # what stands above it; may be empty
    figure: Figure  # `data` and `layout`


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


def trace(
    name: str, mode: str, points: Iterable[tuple[float, float | None]], **more: Any
) -> Figure:
    """Points in Plotly's form; `mode` says whether they are drawn as lines, markers or both."""
    points = list(points)
    across, up = [x for x, _ in points], [y for _, y in points]
    return {"type": "scatter", "mode": mode, "name": name, "x": across, "y": up, **more}


def line(
    name: str, points: Iterable[tuple[float, float | None]], colour: str, **style: Any
) -> Figure:
    """A line that tells its name and value where it is pointed at; a None is a gap in it."""
    return trace(
        name,
        "lines",
        points,
        line={"color": colour, "dash": "solid", "width": 2, **style},
        hovertemplate="%{y:.4g}<extra>%{fullData.name}</extra>",
    )


def layout(across: Figure, up: Figure, **more: Any) -> Figure:
    """A layout of two axes."""
    return {"xaxis": across, "yaxis": up, "hovermode": "x unified", **more}


def axis(title: str, **settings: Any) -> Figure:
    """An axis with its name."""
    return {"title": {"text": title}, **settings}


def reliability_chart(
    name: str, heading: str, fits: Mapping[str, FitProbability], colours: Iterable[str]
) -> Chart:
    """What models promise about pairs and what is true, each model a line of its colour."""
    data = [line("as said", [(0, 0), (1, 1)], INK, dash="dot", width=1)]
    for (model, fit), colour in zip(fits.items(), colours, strict=False):
        points = [(said, true) for said, true, _ in fit.reliability]
        # Agresti and Coull's, which is not zero where all fit
        ends = ((2 + true * pairs, 4 + pairs) for _, true, pairs in fit.reliability)
        bars = [1.96 * math.sqrt(k / n * (1 - k / n) / n) for k, n in ends]
        data.append(
            line(model, points, colour)
            | {"mode": "lines+markers", "hovertemplate": "said %{x:.0%}, true %{y:.0%}"}
            | {"error_y": {"type": "data", "array": bars, "thickness": 1, "width": 0}}
        )
    shares: Figure = {"range": [-0.02, 1.02], "tickformat": ".0%"}
    both_axes = layout(
        axis("probability that is said", **shares),
        axis("share that fits", **shares),
        hovermode="closest",
    )
    off = "; ".join(f"{model}: off by {calibration_text(fit)}" for model, fit in fits.items())
    images = next(iter(fits.values())).images[1]
    return Chart(
        name=name,
        heading=heading,
        alternative=f"Line chart of said and true shares. On average {off}.",
        caption=(
            "From its cosine a logistic curve says how probably a pair fits, here of "
            f"{images:,} images that it was not fitted on, where true and wrong pairs are as many. "
            f"On the dotted line what is said is true; bars are 95 % intervals. On average {off} "
            "(calibration error; in brackets its 95 % interval)."
        ),
        panels=[Panel(name, "", {"data": data, "layout": both_axes})],
        head=("model", "said", "true", "pairs"),
        rows=[
            (model, f"{said:.1%}", f"{true:.1%}", f"{count:,}")
            for model, fit in fits.items()
            for said, true, count in fit.reliability
        ],
    )


# --------------------------------------------------------------------------------------------------
# Charts and tables → one self-contained HTML file.


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON mapping; JSON is YAML, too."""
    try:
        found = parse_yaml(read_text(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is not valid: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected names and values, got {shown(found)}.")
    return found


def write_page(
    path: Path,
    template: str,
    *,
    charts: Sequence[Chart],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    island: Mapping[str, Any] | None = None,
    **values: Any,
) -> Path:
    """Write a page, whole or not at all; `island` is what its script reads besides the figures."""
    figures = {panel.name: panel.figure for chart in charts for panel in chart.panels}
    page = _templates().get_template(template)
    text = page.render(
        **values,
        chart={chart.name: chart for chart in charts},
        island={**(island or {}), "figures": figures},
        command=command(environment),
        versions=versions(environment),
        all_settings=all_settings(settings) if settings else "",
        plotly=_plotly(),
        version=__version__,
    )
    write_file(path, text)
    return path


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("clip_refine.report"),
        autoescape=True,  # all text from data is shown as it is, whatever the file is called
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "interval": interval_text}
    return environment


@cache
def _plotly() -> str:
    """plotly.js as the Python package has it, 4.8 MB, as gzip and base64: 2 MB."""
    code = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    # no time of day, so that the same run gives the same file
    return base64.b64encode(gzip.compress(code, compresslevel=9, mtime=0)).decode("ascii")
