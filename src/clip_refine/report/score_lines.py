"""Scores before and after as lines of a table, and the verdict in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from clip_refine.results import Interval, RunScores, Scores

Mark = Literal["better", "worse", "no clear change", ""]

GEOMETRY = {
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
_MIXED = GEOMETRY["text_first_share"][0]

Sides = tuple[float, float]


@dataclass(frozen=True)
class ScoreLine:
    """One score of a model before and after.

    Attributes:
        group: `geometry`, `retrieval` or `zero-shot`.
        heading: What to call it.
        before: Of the model as it came.
        after: Of the refined model.
        difference: After less before with its interval, where there is one.
        higher_is_better: None where neither direction is.
    """

    group: str
    heading: str
    before: float
    after: float
    difference: Interval | None
    higher_is_better: bool | None

    @property
    def mark(self) -> Mark:
        """As `mark_of`; empty where nothing is known, too."""
        if self.difference is None or self.higher_is_better is None:
            return ""
        return mark_of(self.difference, self.after - self.before, self.higher_is_better)


def mark_of(difference: Interval, change: float, higher_is_better: bool) -> Mark:
    """Better or worse only where the interval excludes zero and three places show the change.

    A run of two steps can move a score in its fifth place for certain; "fell from 0.829 to 0.829"
    would tell nobody anything.

    >>> mark_of(Interval(mean=-0.0001, low=-0.0002, high=-0.0001), -0.0001, False)
    'no clear change'
    >>> mark_of(Interval(mean=-0.01, low=-0.02, high=-0.001), -0.01, False)
    'better'
    """
    if difference.low <= 0 <= difference.high or signed(change) == "0.000":
        return "no clear change"
    return "better" if (difference.low > 0) == higher_is_better else "worse"


def score_lines(scores: RunScores) -> list[ScoreLine]:
    """Every score that tables show, group after group."""
    return [*_geometry(scores), *_retrieval(scores), *_zero_shot(scores)]


def headline_lines(scores: RunScores) -> list[ScoreLine]:
    """The few that the verdict is about: gap, mean R@1, zero-shot; then mixed search."""
    gap, *others = _geometry(scores)
    recall = mean_recall_at_1(scores.before), mean_recall_at_1(scores.after)
    lines = [gap, _line(scores, "retrieval", "mean R@1", "mean_recall@1", recall, True)]
    if scores.before.zero_shot:
        top1 = mean_top1(scores.before), mean_top1(scores.after)
        heading = "mean zero-shot top-1"
        lines.append(_line(scores, "zero-shot", heading, "zero_shot_top1", top1, True))
    return lines + [line for line in others if line.heading == _MIXED]


def verdict(scores: RunScores) -> str:
    """What the refinement did, in a sentence."""
    gap, *means = [line for line in headline_lines(scores) if line.heading != _MIXED]
    share = "" if signed(gap.after - gap.before) == "0.000" else _share(gap)
    parts = [_clause("the gap", gap) + share]
    parts += [_clause(line.heading, line) for line in means]
    listed = ", ".join(parts[:-1]) + (", and " if len(parts) > 2 else " and ") + parts[-1]
    pairs = f"{scores.after.pairs:,} held-out images"
    return f"{listed[0].upper()}{listed[1:]}, on {pairs}.".replace("(-", "(−")


def mean_recall_at_1(scores: Scores) -> float:
    """Mean of R@1 in both directions."""
    return (
        scores.retrieval["image_to_text_recall@1"] + scores.retrieval["text_to_image_recall@1"]
    ) / 2


def mean_top1(scores: Scores) -> float:
    """Mean of top-1 over the zero-shot tasks."""
    values = [task["top1"] for task in scores.zero_shot.values()]
    return sum(values) / len(values)


def retrieval_heading(name: str) -> str:
    """What to call a score of retrieval.

    >>> retrieval_heading("image_to_text_recall@5")
    'image to text R@5'
    """
    return name.replace("_recall", " R").replace("_", " ")


def number(value: float) -> str:
    """Three places, or two digits where that would show zero."""
    text = f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign, a true minus, and no sign on what rounds to zero."""
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text[1:] == "0.000" else text


def interval_text(difference: Interval | None) -> str:
    """`[−0.010, +0.020]`, or nothing."""
    return f"[{signed(difference.low)}, {signed(difference.high)}]" if difference else ""


def _share(line: ScoreLine) -> str:
    return f" ({line.after / line.before - 1:+.0%})"


def _clause(name: str, line: ScoreLine) -> str:
    values = f"from {number(line.before)} to {number(line.after)}"
    if line.mark == "no clear change":
        return f"{name} did not clearly change ({values.removeprefix('from ')})"
    verb = ("rose" if line.after > line.before else "fell") if line.mark else "went"
    return f"{name} {verb} {values}"


def _line(
    scores: RunScores, group: str, heading: str, path: str, sides: Sides, up: bool | None
) -> ScoreLine:
    return ScoreLine(group, heading, *sides, scores.difference.get(path), up)


def _geometry(scores: RunScores) -> list[ScoreLine]:
    return [
        _line(scores, "geometry", heading, f"geometry.{name}", _both(scores, "geometry", name), up)
        for name, (heading, up) in GEOMETRY.items()
    ]


def _retrieval(scores: RunScores) -> list[ScoreLine]:
    lines = []
    for name in scores.before.retrieval:
        sides, path = _both(scores, "retrieval", name), f"retrieval.{name}"
        lines.append(_line(scores, "retrieval", retrieval_heading(name), path, sides, True))
    return lines


def _zero_shot(scores: RunScores) -> list[ScoreLine]:
    lines = []
    for task, before in scores.before.zero_shot.items():
        for name in ("top1", "top5"):
            sides = before[name], scores.after.zero_shot[task][name]
            path = f"zero_shot.{task}.{name}"
            lines.append(_line(scores, "zero-shot", f"{task} {name}", path, sides, True))
    return lines


def _both(scores: RunScores, group: str, name: str) -> Sides:
    before: Mapping[str, float] = getattr(scores.before, group)
    after: Mapping[str, float] = getattr(scores.after, group)
    return before[name], after[name]
