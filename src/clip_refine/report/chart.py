"""A chart as the page needs it: a figure for Plotly, the same in words, and the table behind it.

Colours are the names of the page's own, as in `var(--image)`, so that a chart follows the page from
light to dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]

IMAGE, TEXT = "var(--image)", "var(--text)"
AFTER = "var(--after)"
MUTED, INK, ACCENT = "var(--muted)", "var(--ink)", "var(--accent)"


@dataclass(frozen=True)
class Panel:
    """One figure of a chart.

    Attributes:
        name: Unique on the page.
        heading: What stands above it; may be empty.
        figure: `data` and `layout` as Plotly has them.
    """

    name: str
    heading: str
    figure: Figure


@dataclass(frozen=True)
class Chart:
    """What a reader sees of one question.

    Attributes:
        name: Unique on the page.
        heading: The question or the subject.
        alternative: What the figure shows, in words and numbers, for those who do not see it.
        caption: How to read it.
        panels: Side by side where there is room.
        head: Of the table behind.
        rows: The same.
    """

    name: str
    heading: str
    alternative: str
    caption: str
    panels: Sequence[Panel]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


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
