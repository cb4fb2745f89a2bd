"""Scores as tables for the terminal."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from clip_refine.results import Scores

_GEOMETRY = {
    # name: (heading, True where a higher value is better, None where neither is)
    "centroid_distance": ("centroid distance (the gap)", False),
    "true_pair_cosine": ("cosine of true pairs", None),
    "alignment": ("alignment, mean squared distance", False),
    "uniformity_log": ("uniformity, log", False),
    "relative_modality_gap": ("relative modality gap", False),
    "text_first_share": ("text ranks first in a mixed index", False),
    "linear_separability": ("images told from text by a line", False),
    "hubness_skewness": ("hubness, skewness", False),
    "effective_rank": ("effective rank", True),
}


def before_after_table(before: Scores, after: Scores) -> Table:
    """The headline numbers of both sides; green is better, red is worse."""
    table = Table(title="Held-out scores", title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for name, (heading, higher_is_better) in _GEOMETRY.items():
        _add(table, heading, before.geometry, after.geometry, name, higher_is_better)
    table.add_section()
    for name in before.retrieval:
        heading = name.replace("image_to_text_recall", "image to text R").replace(
            "text_to_image_recall", "text to image R"
        )
        _add(table, heading, before.retrieval, after.retrieval, name, True)
    table.add_section()
    for task, scores in before.zero_shot.items():
        for name in ("top1", "top5"):
            _add(table, f"{task} {name}", scores, after.zero_shot[task], name, True)
    return table


def scores_table(scores: Scores) -> Table:
    """All numbers of one model."""
    table = Table(title="Held-out scores", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in scores.geometry.items():
        table.add_row(name, _number(value))
    table.add_section()
    for name, value in scores.retrieval.items():
        table.add_row(name, _number(value))
    table.add_section()
    for task, values in scores.zero_shot.items():
        for name, value in values.items():
            table.add_row(escape(f"{task} {name}"), _number(value))
    return table


def verdict(before: Scores, after: Scores) -> str:
    """What the refinement did, in a sentence."""
    gap = (before.geometry["centroid_distance"], after.geometry["centroid_distance"])
    recall = (mean_recall_at_1(before), mean_recall_at_1(after))
    parts = [
        f"The gap went from {gap[0]:.3f} to {gap[1]:.3f} ({gap[1] / gap[0] - 1:+.0%})",
        f"mean R@1 from {recall[0]:.3f} to {recall[1]:.3f}",
    ]
    if before.zero_shot:
        top1 = (mean_top1(before), mean_top1(after))
        parts.append(f"mean zero-shot top-1 from {top1[0]:.3f} to {top1[1]:.3f}")
    return ", ".join(parts) + f", on {after.pairs:,} held-out images."


def mean_recall_at_1(scores: Scores) -> float:
    """Mean of R@1 in both directions."""
    return (
        scores.retrieval["image_to_text_recall@1"] + scores.retrieval["text_to_image_recall@1"]
    ) / 2


def mean_top1(scores: Scores) -> float:
    """Mean of top-1 over the zero-shot tasks."""
    values = [task["top1"] for task in scores.zero_shot.values()]
    return sum(values) / len(values)


def _add(
    table: Table,
    heading: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    name: str,
    higher_is_better: bool | None,
) -> None:
    change = after[name] - before[name]
    style = ""
    if higher_is_better is not None and abs(change) >= 0.0005:
        style = "green" if (change > 0) == higher_is_better else "red"
    table.add_row(
        escape(heading),
        _number(before[name]),
        _number(after[name]),
        f"[{style}]{change:+.3f}[/]" if style else f"{change:+.3f}",
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"
