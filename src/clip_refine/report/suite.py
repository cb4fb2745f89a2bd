"""The numbers of a suite for the terminal: a table a kind of task, models side by side."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from clip_refine.suite_results import Difference, Measured, Score, SuiteScores

_SHOWN = {
    "zero-shot": ("top1", "top5", "mean_per_class_recall", "expected_calibration_error"),
    "geometry": (
        *("centroid_distance", "true_pair_cosine", "alignment", "uniformity_log"),
        *("relative_modality_gap", "linear_separability", "effective_rank"),
    ),
}
"""Of the kinds that have more numbers than a table should; the JSON has them all."""


def suite_tables(scores: SuiteScores) -> list[RenderableType]:
    """Which model is which, one table a kind of task, what was left out, and how to read it."""
    several = len(scores.models) > 1
    letters = dict(zip((m.label for m in scores.models), _letters(scores), strict=True))
    parts: list[RenderableType] = [
        Text(f"{letters[model.label]}  {model.label}" if several else model.label)
        for model in scores.models
    ]
    kinds = dict.fromkeys(found.kind for found in scores.measured)
    parts += [_table(scores, kind, letters) for kind in kinds]
    parts += [
        Text(f"Left out: {name}: {why}", style="yellow") for name, why in scores.missing.items()
    ]
    remark = f"Brackets: 95 % bootstrap interval over images ({scores.resamples:,} resamples)."
    if scores.differences:
        remark += (
            " Changes are from A, resampled together; coloured where the interval excludes zero, "
            "green for better."
        )
    parts.append(Text(remark, style="dim"))
    return parts


def _letters(scores: SuiteScores) -> list[str]:
    """A, B, C for the columns, since paths are too long for them."""
    names = (ascii_uppercase[i] if i < 26 else str(i + 1) for i in range(len(scores.models)))
    return list(names) if len(scores.models) > 1 else [""]


def _table(scores: SuiteScores, kind: str, letters: Mapping[str, str]) -> Table:
    table = Table(title=kind, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for model in scores.models:
        table.add_column(letters[model.label], justify="right", no_wrap=True)
    changes = {(d.task, d.score, d.model): d for d in scores.differences}
    by_task: dict[str, list[Measured]] = {}
    for found in scores.measured:
        if found.kind == kind:
            by_task.setdefault(found.task, []).append(found)
    for task, of_models in by_task.items():
        heading = Text(task, style="bold")
        heading.append(f"\n{_about(of_models[0])}", style="not bold dim")
        table.add_row(heading)
        for name in _names(kind, of_models[0]):
            cells = (_cell(m.scores[name], changes.get((task, name, m.model))) for m in of_models)
            table.add_row(Text(name), *cells)
        table.add_section()
    return table


def _names(kind: str, found: Measured) -> Sequence[str]:
    return [name for name in _SHOWN.get(kind, tuple(found.scores)) if name in found.scores]


def _about(found: Measured) -> str:
    """How many, and with which prompts or captions."""
    about = f"n = {found.counts['images']:,}"
    if found.prompts is not None:
        return f"{about}, prompts: {found.prompts}"
    for protocol in ("first-caption", "all-captions"):  # the first mentions the second
        if protocol in found.protocol:
            return f"{about}, {protocol}"
    return about


def _cell(score: Score, change: Difference | None) -> Text:
    text = Text(_number(score.value))
    if score.low is not None and score.high is not None:
        text.append(f" [{_number(score.low)}, {_number(score.high)}]", style="dim")
    if change is not None:
        text.append(f"\n{_signed(change.mean)}", style=_style(change))
        if change.low is not None and change.high is not None:
            text.append(f" [{_signed(change.low)}, {_signed(change.high)}]", style="dim")
    return text


def _style(change: Difference) -> str:
    if change.low is None or change.high is None or change.higher_is_better is None:
        return ""
    if change.low <= 0 <= change.high:
        return ""
    return "green" if (change.mean > 0) == change.higher_is_better else "red"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def _signed(value: float) -> str:
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.3f}"
