"""How a run was made and what it, one model or a suite scored, as lines and tables."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import yaml
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clip_refine.results import (
    Difference,
    Evidence,
    FitProbability,
    Interval,
    RunScores,
    Score,
    Scores,
    SuiteScores,
    TaskScores,
)
from clip_refine.results.metrics import METRICS, metric

# --------------------------------------------------------------------------------------------------
# How a run was made, as names and values.


_PATH = re.compile(r"(?s)(?:(?<=file://)|(?<![\w./]))/(?!/)(?:.*/)?([^/]+/[^/]+/?)$")

_LOSSES = {"rafa_weight": "RaFA", "hycd_weight": "HyCD", "m2_mix_weight": "m²-mix"}


def making_facts(
    scores: RunScores, settings: Mapping[str, Any], environment: Mapping[str, Any], source: str
) -> dict[str, str]:
    """What was trained on what, how, with which seed, where."""
    recipe, train = scores.recipe, settings.get("train", {})
    loss = settings.get("loss", {})
    weights = {
        _LOSSES.get(name, name.removesuffix("_weight").replace("_", " ")): value
        for name, value in loss.items()
        if name.endswith("_weight") and value
    }
    prior = settings.get("prior", {})
    rate = f"{train.get('learning_rate', 0):g}, {train.get('schedule')}"
    facts = {
        "Model": _named(settings.get("model", {})),
        "Recipe": settings.get("recipe"),
        "Losses": ", ".join(f"{name} × {value:g}" for name, value in weights.items()),
        "References": f"{prior.get('kind')}, scale {prior.get('scale'):g}" if prior else None,
        "Feature scale in training": loss.get("feature_scale"),
        "Training images": f"{recipe['pairs']:,} from {settings.get('data', {}).get('train')}",
        "Steps": f"{recipe['steps']:,} of {train.get('batch_size')} pairs, {_epochs(train)}",
        "Interpolation": _way(recipe.get("interpolation")),
        "Learning rate": rate,
        "Precision": train.get("precision"),
        "Held-out images": f"{scores.after.pairs:,} from {source}",
        "Seed": settings.get("seed"),
        "Device": environment.get("device"),
        "Machine": environment.get("platform"),
        "Commit": str(environment.get("git_commit") or "")[:12],
    }
    return {
        name: short_path(str(value)) for name, value in facts.items() if value not in (None, "")
    }


def versions(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Python's and those of the packages that numbers depend on."""
    packages = {"python": environment.get("python"), **environment.get("packages", {})}
    return [(name, str(version)) for name, version in packages.items() if version]


def seconds(scores: RunScores) -> list[tuple[str, str]]:
    """Of each part of the run."""
    return [(name.replace("_", " "), f"{value:.1f}") for name, value in scores.seconds.items()]


def command(environment: Mapping[str, Any]) -> str:
    """The command line that made the run; empty where it was made from Python."""
    words: Sequence[str] = environment.get("command", ())
    if not words or not words[0].endswith(("clip-refine", "clip_refine/__main__.py")):
        return ""
    # dots, since the shell knows no ellipsis and it would be quoted
    words = [short_path(word).replace("…", "...") for word in words[1:]]
    return shlex.join(["clip-refine", *words])


def all_settings(settings: Mapping[str, Any]) -> str:
    """As in `config.yaml`."""
    return yaml.safe_dump(_shortened(dict(settings)), sort_keys=False, allow_unicode=True)


def _shortened(value: Any) -> Any:
    match value:
        case str():
            return short_path(value)
        case dict():
            return {name: _shortened(inner) for name, inner in value.items()}
        case list():
            return [_shortened(inner) for inner in value]
    return value


def short_path(text: str) -> str:
    """A value or word without the folders above the last, if it is a path or ends with one.

    They are nobody's business where a report is shared.

    >>> short_path("--data.train=/home/some one/secret/photos/my captions.csv")
    '--data.train=…/photos/my captions.csv'
    """
    return _PATH.sub(r"…/\1", text)


def _named(model: Mapping[str, Any]) -> str:
    tag = f" ({model['pretrained']})" if model.get("pretrained") else ""
    return f"{model.get('name')}{tag}"


def _way(interpolation: Mapping[str, Any] | None) -> str:
    """How far from the model to its refinement the result lies; empty where that is all the way."""
    if interpolation is None:
        return ""
    chosen = ", chosen on held-out training pairs" if interpolation.get("tried") else ""
    return f"{interpolation['weight']:g} of the way from the model to its refinement{chosen}"


def _epochs(train: Mapping[str, Any]) -> str:
    if train.get("steps"):
        return "as many as were asked for"
    count = train.get("epochs", 1)
    return f"{count} epoch{'' if count == 1 else 's'}"


# --------------------------------------------------------------------------------------------------
# Scores before and after as lines of a table, and the verdict in a sentence.


Mark = Literal["better", "worse", "no clear change", ""]

_MIXED = metric("text_first_share").heading


@dataclass(frozen=True)
class ScoreLine:
    """One score of a model before and after."""

    group: str  # `geometry`, `retrieval` or `zero-shot`
    heading: str  # what to call it
    before: float  # of the model as it came
    after: float  # of the refined model
    difference: Interval | None  # after less before with its interval, where there is one
    higher_is_better: bool | None  # None where neither direction is

    @property
    def mark(self) -> Mark:
        """As `mark_of`."""
        return mark_of(self.difference, self.after - self.before, self.higher_is_better)

    @property
    def unjudged(self) -> str:
        """Why there is no mark."""
        if self.higher_is_better is None:
            return "neither way is better by itself"
        return "" if self.difference else "not resampled, so no interval"

    @property
    def at_an_end(self) -> bool:
        """Whether the change is shown as an end of its own interval."""
        ends = (self.difference.low, self.difference.high) if self.difference else ()
        return signed(self.after - self.before) in map(signed, ends)


def mark_of(difference: Interval | None, change: float, higher_is_better: bool | None) -> Mark:
    """Better or worse where the interval as it is shown excludes zero, and the change, too.

    Judged on rounded numbers: who reads "−0.007 [−0.016, 0.000]" sees zero in the interval, and
    "fell from 0.829 to 0.829", which a run of two steps can do for certain, would tell nobody
    anything. Empty where there is no interval or neither direction is better.

    >>> mark_of(Interval(mean=-0.007, low=-0.016, high=-0.0004), -0.007, False)
    'no clear change'
    """
    if difference is None or higher_is_better is None:
        return ""
    low, high = rounded(difference.low), rounded(difference.high)
    if low <= 0 <= high or rounded(change) == 0:
        return "no clear change"
    return "better" if (low > 0) == higher_is_better else "worse"


def score_lines(scores: RunScores) -> list[ScoreLine]:
    """Every score that tables show, group after group."""
    return [*_geometry(scores), *_retrieval(scores), *_zero_shot(scores)]


def headline_lines(scores: RunScores) -> list[ScoreLine]:
    """The few that the verdict is about: gap, mean R@1, zero-shot; then mixed search."""
    before, after = scores.before.headline, scores.after.headline
    lines = [_line(scores, "centroid_distance", before["gap"], after["gap"])]
    for name in ("mean_recall@1", "zero_shot_top1"):
        if name in before:
            lines.append(_line(scores, name, before[name], after[name], path=name))
    return lines + [line for line in _geometry(scores) if line.heading == _MIXED]


def worse(scores: RunScores) -> list[str]:
    """Which of mean R@1 and zero-shot are clearly lower after than before."""
    _, *means = headline_lines(scores)
    return [line.heading for line in means if line.mark == "worse" and line.heading != _MIXED]


def answer(scores: RunScores) -> str:
    """Better and worse in what: the verdict in a few words."""
    went_back = f"{back} " if (back := rolled_back(scores)) else ""
    lines = [line for line in headline_lines(scores) if line.heading != _MIXED]
    marked = {
        mark: " and ".join(
            "the gap" if line is lines[0] else line.heading for line in lines if line.mark == mark
        )
        for mark in ("better", "worse")
    }
    if not any(marked.values()):
        return f"{went_back}Nothing clearly changed."
    said = ", ".join(f"{mark} in {names}" for mark, names in marked.items() if names)
    if not marked["worse"]:
        below = [line.heading for line in score_lines(scores) if line.mark == "worse"]
        more = f" and {len(below) - 1} more rows are" if below[1:] else " is"
        said += f", but {below[0]}{more} worse" if below else ", worse in nothing"
    return f"{went_back}{said[0].upper()}{said[1:]}."


def rolled_back(scores: RunScores) -> str:
    """That a guard put the weights of an earlier step into the model; empty where none did."""
    guard = scores.recipe.get("guard")
    if not guard or guard["kept"] == guard["step"]:
        return ""
    if guard["kept"]:
        return f"The guard went back from step {guard['step']} to step {guard['kept']}."
    return f"The guard refused the training at step {guard['step']}: this is the model as it was."


def verdict(scores: RunScores) -> str:
    """What the refinement did, in a sentence with the numbers."""
    gap, *means = [line for line in headline_lines(scores) if line.heading != _MIXED]
    share = "" if signed(gap.after - gap.before) == "0.000" else _share(gap)
    parts = [_clause("the gap", gap) + share]
    parts += [_clause(line.heading, line) for line in means]
    listed = ", ".join(parts[:-1]) + (", and " if len(parts) > 2 else " and ") + parts[-1]
    pairs = f"{scores.after.pairs:,} held-out images"
    return f"{listed[0].upper()}{listed[1:]}, on {pairs}.".replace("(-", "(−")


def doubts(scores: RunScores) -> str:
    """Why nothing or little may have changed, and what would show more; empty where R@1 did."""
    lines = [line for line in headline_lines(scores) if line.heading != _MIXED]
    parts = []
    steps, rate = scores.recipe.get("steps"), scores.recipe.get("train", {}).get("learning_rate")
    if steps and rate and not any(line.mark in ("better", "worse") for line in lines):
        # AdamW moves a weight by about its learning rate a step at most
        reach = f"{steps:,} step{'s' * (steps > 1)} at learning rate {rate:g} move no weight by "
        reach += f"more than about {steps * rate:.0e}"
        little = steps * rate < ENOUGH
        parts.append(
            f"{reach}, which can hardly change this model: more pairs, more steps or a larger "
            f"--train.learning-rate (auto tries some) would. The paper's runs reach {ENOUGH:g}."
            if little
            else f"Nothing clearly changed although {reach}: compare would say whether another "
            "recipe does more here."
        )
    r1 = next((line for line in lines if line.heading == metric("mean_recall@1").heading), None)
    if r1 and r1.mark == "no clear change":
        parts.append(power(r1.difference, scores.after.pairs))
    return " ".join(part for part in parts if part)


ENOUGH = 2e-4
"""Learning rate times steps of the paper's epoch on COCO: 1e-6, 118,000 pairs in batches of 512."""
_POWER = 1.43  # (1.96 + 0.84) / 1.96: normal quantiles of 97.5 % and of four in five


def power(difference: Interval | None, images: int | None, wished: float = 0.01) -> str:
    """Which change of mean R@1 so many images would show, and how many it takes for `wished`.

    An interval's width falls with the square root of the images. Empty where there is no interval.

    >>> power(Interval(mean=0.0, low=-0.02, high=0.02), 500)
    'On 500 images a mean R@1 that changes by less than 0.029 passes for noise more than one time in
    five; to see +0.01, about 4,100 are needed.'
    """
    half = (difference.high - difference.low) / 2 if difference else 0.0
    if not images or _POWER * half <= wished:
        return ""
    needed = images * (_POWER * half / wished) ** 2
    needed = round(needed, 1 - len(str(int(needed))) + 1)
    return (
        f"On {images:,} images a mean R@1 that changes by less than {_POWER * half:.3f} passes for "
        f"noise more than one time in five; to see +{wished:g}, about {needed:,.0f} are needed."
    )


def rounded(value: float) -> float:
    """As a difference is shown: three places, none from 100 on."""
    return round(value, 3 if abs(value) < 100 else 0)


def number(value: float) -> str:
    """Three places, none from 100 on, or two digits where three places would show zero."""
    if abs(value) >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign, a true minus, and no sign on what rounds to zero."""
    if rounded(value) == 0:
        return "0.000"
    return (f"{value:+.3f}" if abs(value) < 100 else f"{value:+,.0f}").replace("-", "−")


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
    scores: RunScores, name: str, before: float, after: float, *, path: str = "", task: str = ""
) -> ScoreLine:
    row = metric(name)
    return ScoreLine(
        group=row.group,
        heading=f"{task} {row.heading}".strip(),
        before=before,
        after=after,
        difference=scores.difference.get(path or f"{row.group}.{name}"),
        higher_is_better=row.higher_is_better,
    )


def _geometry(scores: RunScores) -> list[ScoreLine]:
    before, after = scores.before.geometry, scores.after.geometry
    return [
        _line(scores, name, before[name], after[name])
        for name, row in METRICS.items()
        if row.group == "geometry" and row.shown
    ]


def _retrieval(scores: RunScores) -> list[ScoreLine]:
    before, after = scores.before.retrieval, scores.after.retrieval
    return [_line(scores, name, before[name], after[name]) for name in before]


def _zero_shot(scores: RunScores) -> list[ScoreLine]:
    return [
        _line(
            scores,
            name,
            before[name],
            scores.after.zero_shot[task][name],
            path=f"zero_shot.{task}.{name}",
            task=task,
        )
        for task, before in scores.before.zero_shot.items()
        for name in ("top1", "top5")
    ]


# --------------------------------------------------------------------------------------------------
# Scores as tables for the terminal.


STYLES = {"better": "green", "worse": "red"}
SIGNS = {"better": " +", "worse": " −"}


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
        change = f"{signed(line.after - line.before)}{SIGNS.get(line.mark, '  ')}"
        style = STYLES.get(line.mark)
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
    of_pairs = f"Scores on {scores.pairs:,} images with {scores.captions:,} captions"
    title = of_pairs if scores.pairs else "Zero-shot scores"
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for group in (scores.geometry, scores.retrieval):
        for name, value in group.items():
            table.add_row(metric(name).heading, number(value))
        table.add_section()
    for task, values in scores.zero_shot.items():
        for name, value in values.items():
            table.add_row(escape(f"{task} {metric(name).heading}"), number(value))
    return table


def threshold_lines(found: FitProbability, file: Path) -> str:
    """What to do with the thresholds that `file` holds, and how far to trust the probability."""
    lines = [threshold_sentence(name, found) for name in found.cutoffs]
    at = next((c.cosine for c in found.cutoffs.values() if c.cosine is not None), 0.0)
    diagram = ", ".join(f"{said:.0%}: {true:.0%}" for said, true, _ in found.reliability)
    lines += [
        f"Measured on {found.images[1]:,} images and fitted on {found.images[0]:,} others; where "
        "fits are rarer than one in two, as in search, fewer of those taken fit.",
        f"How probable: 1 / (1 + exp(−({found.slope:.1f} c {found.intercept:+.1f}))) for a cosine "
        f"c, off by {calibration_text(found)} on average (said: true, {diagram}).",
        "In code, of features of norm 1:\n"
        f"  fits = (image_unit * text_unit).sum(-1) >= {at:.4f}\n"
        "  from pathlib import Path\n"
        "  from clip_refine.results import FitProbability, read\n"
        f"  read(FitProbability, Path({str(file)!r})).probability(cosine)",
    ]
    return "\n".join(lines)


def calibration_text(found: FitProbability) -> str:
    """The calibration error with its interval."""
    ends = found.calibration_interval
    between = f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
    return f"{found.calibration_error:.3f}{between}"


def threshold_change(evidence: Evidence) -> str:
    """Whether the untouched model's thresholds still hold; empty where there are none."""
    if not evidence.fits:
        return ""
    said = []
    for name, old in evidence.kept.items():
        was, now = (fit.cutoffs[name] for fit in evidence.fits)
        if old.cosine is None or now.cosine is None:
            continue
        rare = name == "false_positive_rate"
        before, after = (
            (one.false_positive_rate if rare else one.precision) or 0.0 for one in (was, old)
        )
        drifted = not before / 2 <= after <= 2 * before if rare else abs(after - before) > DRIFT
        lost = (now.recall or 0.0) - (old.recall or 0.0) > DRIFT
        what = "of the wrong pairs pass" if rare else "of what is taken fits"
        advice = f"set it to {now.cosine:.3f}" if drifted or lost else "it still holds"
        if not (was.recall or now.recall):  # what found nothing does not hold by finding nothing
            advice = "no threshold finds anything here, before or after"
        said.append(
            f"from cosine {old.cosine:.3f} on, {after:.1%} {what} ({before:.1%} before), and "
            f"{old.recall or 0:.1%} of the true ones are taken: {advice}"
        )
    measured = f"measured on {evidence.fits[0].images[1]:,} images"
    return f"The old thresholds after refinement, {measured}: {'; '.join(said)}." if said else ""


DRIFT = 0.02  # of precision either way, and of recall that a threshold may cost


def threshold_sentence(name: str, found: FitProbability) -> str:
    """What to do with one of the thresholds, in plain words."""
    cutoff = found.cutoffs[name]
    rare = name == "false_positive_rate"
    wished = (
        f"at most {100 * cutoff.wished:g}% of the wrong pairs" if rare else f"{cutoff.wished:.0%}"
    )
    if cutoff.cosine is None:
        return f"No cosine lets pairs through of which {wished} fit."
    shares = {"fit": cutoff.precision, "found": cutoff.recall, "wrong": cutoff.false_positive_rate}
    fit, recall, wrong = (f"{share or 0:.1%}" for share in shares.values())
    text = (
        f"To let {wished} through, take a pair as fitting from cosine {cutoff.cosine:.3f} on: "
        f"{wrong} of the wrong pairs pass, and {recall} of the true ones."
        if rare
        else f"So that {wished} of what you take fits, take a pair as fitting from cosine "
        f"{cutoff.cosine:.3f} on: {fit} of those taken fit where true and wrong pairs are as many, "
        f"and {recall} of the true ones are taken."
    )
    if cutoff.nonsense_found is not None:
        text += f" {cutoff.nonsense_found:.0%} of {found.nonsense} nonsense texts find an image."
    return text


# --------------------------------------------------------------------------------------------------
# The numbers of a suite for the terminal: a table a kind of task, models side by side.


def suite_tables(scores: SuiteScores) -> list[RenderableType]:
    """Which model is which, one table a kind of task, what was left out, and how to read it."""
    several = len(scores.models) > 1
    names = dict(zip((m.label for m in scores.models), letters(scores), strict=True))
    parts: list[RenderableType] = [
        Text(f"{names[model.label]}  {model.label}" if several else model.label)
        for model in scores.models
    ]
    kinds = dict.fromkeys(found.kind for found in scores.measured)
    parts += [_suite_table(scores, kind, names) for kind in kinds]
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


def letters(scores: SuiteScores) -> list[str]:
    """A, B, C for the columns of a suite's models, since paths are too long for them."""
    names = (ascii_uppercase[i] if i < 26 else str(i + 1) for i in range(len(scores.models)))
    return list(names) if len(scores.models) > 1 else [""]


def _suite_table(scores: SuiteScores, kind: str, letters: Mapping[str, str]) -> Table:
    table = Table(title=kind, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold", min_width=18)
    for model in scores.models:  # an interval goes below its number where three do not fit
        table.add_column(letters[model.label], justify="right", no_wrap=len(scores.models) < 3)
    changes = {(d.task, d.score, d.model): d for d in scores.differences}
    by_task: dict[str, list[TaskScores]] = {}
    for found in scores.measured:
        if found.kind == kind:
            by_task.setdefault(found.task, []).append(found)
    for task, of_models in by_task.items():
        heading = Text(task, style="bold")
        heading.append(f"\n{_about(of_models[0])}", style="not bold dim")
        table.add_row(heading)
        for name in of_models[0].scores:
            # geometry has more numbers than a table should; the JSON has them all
            if not metric(name).shown:
                continue
            cells = (
                _suite_cell(m.scores[name], changes.get((task, name, m.model))) for m in of_models
            )
            table.add_row(Text(name), *cells)
        table.add_section()
    return table


def _about(found: TaskScores) -> str:
    """How many, and with which prompts or captions."""
    about = f"n = {found.counts['images']:,}"
    if found.prompts is not None:
        return f"{about}, prompts: {found.prompts}"
    for protocol in ("first-caption", "all-captions"):  # the first mentions the second
        if protocol in found.protocol:
            return f"{about}, {protocol}"
    return about


def _suite_cell(score: Score, change: Difference | None) -> Text:
    text = Text(number(score.value))
    if score.low is not None and score.high is not None:
        text.append(f" [{number(score.low)}, {number(score.high)}]", style="dim")
    if change is not None:
        mark = mark_of(change.interval, change.mean, change.higher_is_better)
        text.append(f"\n{signed(change.mean)}", style=STYLES.get(mark, ""))
        text.append(f" {interval_text(change.interval)}".rstrip(), style="dim")
    return text
