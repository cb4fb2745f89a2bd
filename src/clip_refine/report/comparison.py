"""A comparison as a table for the terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from clip_refine.report.score_lines import interval_text, mark_of, signed
from clip_refine.results import Comparison, ComparisonRow, Interval, RecipeSummary, Spread

COLUMNS = {
    "gap": "gap ↓",
    "image_to_text_recall@1": "R@1 i→t ↑",
    "text_to_image_recall@1": "R@1 t→i ↑",
    "mean_recall@10": "mean R@10 ↑",
    "zero_shot_top1": "zero-shot ↑",
    "linear_probe": "linear probe ↑",
}
DIFFERENCES = {
    "gap": ("gap", False),
    "mean_recall@1": ("mean R@1", True),
    "zero_shot_top1": ("zero-shot", True),
}
"""Headings, and whether higher is better."""
BEST = "*"
LEGEND = (
    "Mean ± standard deviation over seeds; one value where nothing is trained. "
    f"{BEST} Pareto-best: no other row is as good in gap, mean R@1, zero-shot and linear probe and "
    "better in one."
)
INTERVALS = (
    "Differences from the untouched model with 95 % intervals of a paired bootstrap over the "
    "evaluation images; + is better, − worse, neither where the interval holds 0. They do not "
    "cover what another training seed would change."
)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The numbers of every recipe, and their differences from the untouched model."""
    return [_scores_table(comparison), _differences_table(comparison)]


def comparison_markdown(comparison: Comparison) -> str:
    """Both tables and the learning rates as Markdown."""
    lines = _markdown_table(*scores_cells(comparison))
    lines += ["", LEGEND, ""]
    lines += _markdown_table(*differences_cells(comparison))
    lines += ["", INTERVALS]
    if comparison.learning_rates:
        lines += ["", *_markdown_table(*rates_cells(comparison)), "", RATES_LEGEND]
    return "\n".join(lines) + "\n"


def comparison_csv(comparison: Comparison) -> str:
    """One line a run with every number; empty where a run has none."""
    rows = [_flat(row) for row in comparison.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


RATES_LEGEND = (
    "Learning rates by mean recall (R@1, R@5, R@10, both directions) on held-out training pairs, "
    "first seed; ! where the best one is at the edge of the grid."
)


def _scores_table(comparison: Comparison) -> Table:
    heads, rows = scores_cells(comparison)
    table = _table("Comparison", LEGEND)
    _add_columns(table, [head.replace(" ", "\n", 1) for head in heads])
    for line, (name, *cells) in zip(comparison.summary, rows, strict=True):
        # the deviation below its mean: six columns of both do not fit side by side
        narrow = [cell.replace(" ± 0", "\n±").replace(" ± ", "\n±") for cell in cells]
        table.add_row(escape(name), *narrow, style="bold" if line.pareto_best else "")
    return table


def _differences_table(comparison: Comparison) -> Table:
    heads, rows = differences_cells(comparison)
    table = _table("Less the untouched model", INTERVALS)
    _add_columns(table, heads)
    for name, *cells in rows:
        # three columns of both do not fit side by side
        narrow = [cell.replace(" [", "\n[") for cell in cells] if len(cells) > 2 else cells
        table.add_row(escape(name), *(_coloured(cell) for cell in narrow))
    return table


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _add_columns(table: Table, heads: Sequence[str]) -> None:
    for position, head in enumerate(heads):
        is_name = position == 0
        table.add_column(head, justify="left" if is_name else "right", overflow="fold")


def _coloured(cell: str) -> str:
    style = {"+": "green", "−": "red"}.get(cell[-1:], "")
    return f"[{style}]{escape(cell)}[/]" if style else escape(cell)


def scores_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the numbers."""
    present = [name for name in COLUMNS if name in comparison.summary[0].scores]
    heads = ["", *(COLUMNS[name] for name in present), "lr", "s", "GB"]
    rows = []
    for line in comparison.summary:
        mark = f" {BEST}" if line.pareto_best else ""
        rate = "" if line.learning_rate is None else f"{line.learning_rate:g}"
        cells = [_spread(line.scores[name]) for name in present]
        memory = f"{line.peak_memory.mean:.2f}" if line.peak_memory.mean else ""
        seconds = f"{line.seconds.mean:.1f}"
        rows.append([line.recipe + mark, *cells, rate, seconds, memory])
    return heads, rows


def differences_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the differences from the untouched model."""
    lines = [line for line in comparison.summary if line.difference]
    present = [name for name in DIFFERENCES if lines and name in lines[0].difference]
    heads = ["", *(DIFFERENCES[name][0] for name in present)]
    return heads, [[line.recipe, *_intervals(line, present)] for line in lines]


def _intervals(line: RecipeSummary, names: Sequence[str]) -> list[str]:
    return [_interval(line.difference[name], DIFFERENCES[name][1]) for name in names]


def _interval(difference: Interval, higher_is_better: bool) -> str:
    sign = {"better": " +", "worse": " −"}.get(
        mark_of(difference, difference.mean, higher_is_better), ""
    )
    return f"{signed(difference.mean)} {interval_text(difference)}{sign}"


def rates_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of how learning rates were chosen."""
    rows = []
    for choice in comparison.learning_rates:
        tried = ", ".join(
            f"{rate}: {'failed' if score is None else f'{score:.3f}'}"
            for rate, score in choice.tried.items()
        )
        chosen = f"{choice.chosen:g}" + (" !" if choice.at_edge else "")
        rows.append([choice.recipe, chosen, tried])
    return ["", "chosen", "tried"], rows


def _spread(value: Spread) -> str:
    deviation = "" if value.deviation is None else f" ± {value.deviation:.3f}"
    return f"{value.mean:.3f}{deviation}"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *rows]
    return ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace(BEST, f"\\{BEST}")


def _flat(row: ComparisonRow) -> dict[str, object]:
    """`{"geometry": {"alignment": 1}}` as `{"geometry.alignment": 1}`."""
    flat: dict[str, object] = {}

    def walk(prefix: str, values: Mapping[str, object]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{name}.", value)
            else:
                flat[f"{prefix}{name}"] = value

    walk("", row.model_dump())
    return flat
