"""Scores as tables for the terminal."""

from rich.markup import escape
from rich.table import Table

from clip_refine.report.score_lines import (
    GEOMETRY,
    interval_text,
    number,
    retrieval_heading,
    score_lines,
    signed,
)
from clip_refine.results import RunScores, Scores

_STYLES = {"better": "green", "worse": "red"}
_SIGNS = {"better": " +", "worse": " −"}


def before_after_table(scores: RunScores) -> Table:
    """Both sides; green + is better, red − is worse, as `mark_of` says."""
    table = Table(
        title="Held-out scores",
        title_justify="left",
        title_style="bold",
        caption="+ better, − worse, neither where the 95 % interval holds 0 or there is none.",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("before", "after", "change", "95 % interval"):
        table.add_column(heading, justify="right")
    group = ""
    for line in score_lines(scores):
        if group and line.group != group:
            table.add_section()
        group = line.group
        change = f"{signed(line.after - line.before)}{_SIGNS.get(line.mark, '  ')}"
        style = _STYLES.get(line.mark)
        table.add_row(
            escape(line.heading),
            number(line.before),
            number(line.after),
            f"[{style}]{change}[/]" if style else change,
            escape(interval_text(line.difference)),
        )
    return table


def scores_table(scores: Scores) -> Table:
    """All numbers of one model."""
    title = f"Scores on {scores.pairs:,} images with {scores.captions:,} captions"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in scores.geometry.items():
        heading = GEOMETRY[name][0] if name in GEOMETRY else name.replace("_", " ")
        table.add_row(heading, number(value))
    table.add_section()
    for name, value in scores.retrieval.items():
        table.add_row(retrieval_heading(name), number(value))
    table.add_section()
    for task, values in scores.zero_shot.items():
        for name, value in values.items():
            table.add_row(escape(f"{task} {name}"), number(value))
    return table
