"""A comparison → what to do, and its numbers: for the terminal, as Markdown, as CSV."""

import csv
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from clip_refine.config import named_model
from clip_refine.config.runs import PEER_NAMES
from clip_refine.report.tables import (
    SIGNS,
    STYLES,
    Mark,
    interval_text,
    mark_of,
    number,
    power,
    signed,
)
from clip_refine.results import Comparison, Interval, RecipeSummary, Spread
from clip_refine.results.metrics import metric
from clip_refine.support.console import printable

# --------------------------------------------------------------------------------------------------
# Whether to keep the untouched model, at what price something else, and what to run next.


JUDGED = ("mean_recall@1", "zero_shot_top1", "linear_probe", "gap")
RULE = (
    "A row beats the untouched model where one of gap, mean R@1, zero-shot and linear probe is "
    "clearly better and none clearly worse: the 95 % interval of the difference excludes zero, "
    "and a gain exceeds twice the standard error over seeds. Of several, the one with most of R@1, "
    "zero-shot and probe better is taken, then one that needs no training, then the higher mean "
    "R@1."
)


@dataclass(frozen=True)
class Change:
    """One number of a row against the untouched model's."""

    name: str  # of `JUDGED`
    change: float  # less the untouched model's
    value: float  # the row's
    base: float  # the untouched model's
    interval: Interval | None  # of the change
    mark: Mark  # better or worse only where it is clear

    def __str__(self) -> str:
        shown = f"{signed(self.change)} {interval_text(self.interval)}".rstrip()
        heading = metric(self.name).short
        return f"{heading} {number(self.value)} against {number(self.base)} ({shown})"


@dataclass(frozen=True)
class Decision:
    """What a comparison says to do, as plain text; names in it are data."""

    taken: str  # the row to take: the untouched model where nothing beats it
    answer: str  # that in a sentence
    price: str  # what it costs, or what keeps others from being taken
    doubt: str  # what is noise, or what another seed may change; may be empty
    advice: str  # what to do next, in a sentence
    command: str  # the command line for that; empty where there is none

    @property
    def text(self) -> str:
        """All of it but the command line."""
        return " ".join(part for part in (self.answer, self.price, self.doubt, self.advice) if part)


def decide(comparison: Comparison, out: str = "runs/compare") -> Decision:
    """Whether a row beats the untouched model, the first one, by `RULE`, and what follows."""
    untouched, *others = comparison.summary
    found = [(line, changes(line, untouched)) for line in others]
    winners = [
        pair for pair in found if _marked(pair[1], "better") and not _marked(pair[1], "worse")
    ]
    if winners:
        return _take(comparison, *max(winners, key=_merit), out)
    mixed = [pair for pair in found if _marked(pair[1], "better")]
    keep = f"Keep {untouched.recipe}: nothing compared beats it."
    if mixed:
        line, own = max(mixed, key=lambda pair: (-len(_marked(pair[1], "worse")), *_merit(pair)))
        if line.learning_rate is None:
            advice, command = _untrained(comparison, line, out)
            advice = f"Take it only where what is better matters more than what is worse. {advice}"
        else:
            advice = (
                "Train it at a third of its learning rate, or keep part of the way by clip-refine "
                "interpolate:"
            )
            command = _compare(comparison, [line], out, "-milder", slower=3, save=True)
        return Decision(
            taken=untouched.recipe,
            answer=keep,
            price=f"{line.recipe} comes nearest: better in {_listed(own, 'better')}; the price is "
            f"{_listed(own, 'worse')}.",
            doubt="",
            advice=advice,
            command=command,
        )
    worse = [line.recipe for line, own in found if _marked(own, "worse")]
    narrowest = min(
        (line.difference["mean_recall@1"] for line in others if "mean_recall@1" in line.difference),
        key=lambda found: found.high - found.low,
        default=None,
    )
    more = "--held-out" if comparison.vectors else "--data.val"
    wider = "" if comparison.vectors else " and a wider search"
    # of more than a grid's three auto has searched already
    edge = [c.recipe for c in comparison.learning_rates if c.at_edge and len(c.tried) <= 3]
    advice = (
        "To gain more, more training pairs or steps, or another learning rate would be needed; "
        f"more held-out images ({more}) or seeds would show smaller differences. With more "
        f"steps{wider}:"
    )
    if edge:
        advice = (
            f"The best learning rate of {', '.join(edge)} is the last one tried: --learning-rates "
            "auto looks further:"
        )
    elif all(line.learning_rate is None for line in others):
        advice = "Nothing was trained here; that may do more:"
    steps = 0 if edge else 2 * max((row.steps for row in comparison.rows), default=0)
    return Decision(
        taken=untouched.recipe,
        answer=keep,
        price=f"Clearly worse in something: {', '.join(worse)}." if worse else "",
        doubt="What else differs is within the noise of the evaluation images and seeds. "
        f"{power(narrowest, comparison.held_out)}".rstrip(),
        advice=advice,
        command=_compare(comparison, others, out, "-further", auto=True, steps=steps),
    )


def changes(line: RecipeSummary, untouched: RecipeSummary) -> list[Change]:
    """Every number that is judged and was measured."""
    found = []
    for name in JUDGED:
        if name not in line.scores or name not in untouched.scores:
            continue
        spread, base = line.scores[name], untouched.scores[name].mean
        interval = line.difference.get(name)
        change = interval.mean if interval else spread.mean - base
        up = bool(metric(name).higher_is_better)
        mark: Mark = "no clear change"
        if interval:
            mark = mark_of(interval, change, up)
        # a loss counts although seeds differ: it is the safer mistake
        if mark == "better" and abs(change) <= 2 * (spread.deviation or 0.0) / line.runs**0.5:
            mark = "no clear change"
        found.append(Change(name, change, spread.mean, base, interval, mark))
    return found


def marks(line: RecipeSummary, untouched: RecipeSummary) -> dict[str, Mark]:
    """What `RULE` says of each number that is judged, so that rows say what the head does."""
    return {change.name: change.mark for change in changes(line, untouched)}


def _marked(own: Sequence[Change], mark: Mark, *, gap: bool = True) -> list[Change]:
    return [change for change in own if change.mark == mark and (gap or change.name != "gap")]


def _listed(own: Sequence[Change], mark: Mark) -> str:
    return " and ".join(str(change) for change in _marked(own, mark))


def _merit(pair: tuple[RecipeSummary, list[Change]]) -> tuple[int, bool, float, float]:
    line, own = pair
    by_name = {change.name: change.change for change in own}
    return (
        len(_marked(own, "better", gap=False)),
        line.learning_rate is None,
        by_name.get("mean_recall@1", 0.0),
        -by_name.get("gap", 0.0),
    )


def _take(comparison: Comparison, line: RecipeSummary, own: Sequence[Change], out: str) -> Decision:
    price = "No other number is clearly worse"
    if len(own) == len(_marked(own, "better")):
        price = "Nothing is worse"
    if line.learning_rate is None:
        price += ", and it needs no training."
    else:
        price += f"; training took {line.seconds.mean:.0f} s a seed."
    if not _marked(own, "better", gap=False):
        price += " Only the gap is better, which helps where images and texts share one index."
    doubt = ""
    if line.learning_rate is None:
        advice, command = _untrained(comparison, line, out)
    elif line.runs < 2:
        doubt = "That is one training seed, and intervals do not cover what another would change."
        advice = "Repeat it with more:"
        command = _compare(comparison, [line], out, "-seeds", seeds=3)
    else:
        advice = "Train it again and keep the models:"
        command = _compare(comparison, [line], out, "-models", save=True)
    return Decision(
        taken=line.recipe,
        answer=f"Take {line.recipe}: it is better in {_listed(own, 'better')}.",
        price=price,
        doubt=doubt,
        advice=advice,
        command=command,
    )


def _untrained(comparison: Comparison, line: RecipeSummary, out: str) -> tuple[str, str]:
    """What to do with another model as it is, or with a peer, and the command for it."""
    label, recipe = _of_model(comparison, line.recipe)
    model = comparison.models.get(label, "")
    if label and recipe == comparison.summary[0].recipe:
        search = ["clip-refine", "tune", "--config", f"{out}/config.yaml", *_flags_of(model)]
        advice = f"Start from {model} instead, and search for what improves it:"
        return advice, shlex.join([*search, "--out", f"{out}-tuned"])
    of, peer = f" with {model}" if label else "", shlex.quote(recipe)
    return (
        f"Fit it on features of your own pairs{of}, which clip-refine evaluate --save-features "
        "writes:",
        f"clip-refine posthoc fit {peer} FEATURES.safetensors --out {peer}",
    )


def _flags_of(model: str) -> list[str]:
    """A model of the comparison instead of the one that its settings name, weights too."""
    one = named_model(model)
    named = ["--model.factory", one.factory] if one.factory else ["--model.name", one.name]
    return [*named, "--model.pretrained", str(one.pretrained)]


def _compare(
    comparison: Comparison,
    lines: Sequence[RecipeSummary],
    out: str,
    beside: str = "",
    *,
    seeds: int = 0,
    slower: int = 1,
    save: bool = False,
    auto: bool = False,
    steps: int = 0,
) -> str:
    """`clip-refine compare` with the settings of this one, for some of its trained rows.

    Without any of its default recipes.
    """
    if comparison.vectors:
        return _of_vectors(comparison, lines, out, beside, seeds, slower, steps, save=save)
    recipes, sweeps, combined, models, rates = {}, {}, {}, {}, []
    chosen = {choice.recipe: choice for choice in comparison.learning_rates}
    for line in lines:
        if line.learning_rate is None:
            continue
        label, own = _of_model(comparison, line.recipe)
        bare, peer = _without_peer(own)
        choice = chosen.get(f"{label}: {bare}" if label else bare)
        models[label] = None
        if swept := re.fullmatch(r"(.*)\[([\w.]+)=(.*)\]", bare, re.DOTALL):
            bare = swept[1]
            sweeps.setdefault(swept[2], {})[swept[3]] = None
        recipes[bare] = None
        combined |= {f"{bare}+{peer}": None} if peer else {}
        # of one row the rate that it was trained with; of several those that all tried
        rates = (
            [line.learning_rate / slower]
            if len(lines) == 1
            else list(choice.tried if choice else ())
        )
    words = ["clip-refine", "compare", "--config", f"{out}/config.yaml"]
    words += ["--recipes", *recipes] if recipes else []
    for setting, values in sweeps.items():
        words += ["--sweep", f"{setting}={','.join(values)}"]
    words += ["--combine", *combined] if combined else []
    further = [comparison.models[label] for label in models if label]
    if further and len(models) > 1:
        words += ["--models", *further]
    elif further:
        words += _flags_of(further[0])
    words += ["--seeds", str(seeds or max(line.runs for line in lines))] if recipes else []
    words += (
        ["--learning-rates", *(f"{float(rate):.3g}" for rate in rates)]
        if rates and not auto
        else []
    )
    words += ["--learning-rates", "auto"] if auto and recipes else []
    words += ["--train.steps", str(steps)] if steps else []
    words += ["--save-models"] if save else []
    return shlex.join([*words, "--out", f"{out}{beside}"])


def _of_vectors(
    comparison: Comparison,
    lines: Sequence[RecipeSummary],
    out: str,
    beside: str,
    seeds: int,
    slower: int,
    steps: int,
    *,
    save: bool,
) -> str:
    """The same for maps of stored vectors, which one training keeps."""
    if comparison.vectors == "python":  # as arrays they have no name
        return ""
    trained = [line for line in lines if line.learning_rate is not None]
    names = [line.recipe for line in trained]
    pairs, settings = str(comparison.vectors), dict(comparison.vectors_settings)
    what = ["refine", pairs, "--recipe", *names[:1]] if save else ["compare", pairs]
    words = ["clip-refine", "vectors", *what]
    if trained:
        words += [] if save else ["--recipes", *names]
        settings.pop("learning_rate", None)
        words += ["--learning-rate", f"{(trained[0].learning_rate or 0) / slower:.3g}"]
    settings |= {"steps": steps} if steps else {}
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if trained and not save:
        words += ["--seeds", str(seeds or max(line.runs for line in trained))]
    return shlex.join([*words, "--out", f"{out}{beside}"])


def _of_model(comparison: Comparison, name: str) -> tuple[str, str]:
    """The label of a further model, none for the first one, and what a row of it is of."""
    label = next((label for label in comparison.models if name.startswith(f"{label}: ")), "")
    return label, name.removeprefix(f"{label}: ")


def _without_peer(name: str) -> tuple[str, str]:
    """Recipe, and what is put behind it."""
    parts = name.split("+")
    at = next((i for i, part in enumerate(parts) if i and part in PEER_NAMES), len(parts))
    return "+".join(parts[:at]), "+".join(parts[at:])


# --------------------------------------------------------------------------------------------------
# Its numbers as tables.


COLUMNS = (
    *("gap", "image_to_text_recall@1", "text_to_image_recall@1", "mean_recall@10"),
    *("zero_shot_top1", "linear_probe"),
)
DIFFERENCES = ("gap", "mean_recall@1", "zero_shot_top1", "linear_probe")
BEST = "*"
LEGEND = (
    "Mean ± standard deviation over seeds; one value where nothing is trained. "
    f"{BEST} Pareto-best: no other row is as good in gap, mean R@1, zero-shot and linear probe and "
    "better in one."
)
INTERVALS = (
    "Differences from the untouched model with 95 % intervals of a paired bootstrap over the "
    "evaluation images; + is better, − worse, neither where the interval holds 0 or a gain is "
    "within twice the standard error over seeds, which intervals do not cover. Of two gaps that "
    "may both be none, the interval is as wide as those of both together."
)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The numbers of every recipe, and their differences from the untouched model."""
    return [_scores_table(comparison), _differences_table(comparison)]


def comparison_markdown(comparison: Comparison, out: str = "runs/compare") -> str:
    """What to do, both tables and the learning rates as Markdown; `out` as for `decide`."""
    decision = decide(comparison, out)
    lines = [_plain(decision.text), ""]
    if decision.command:
        # indented it is code, whatever it holds
        lines += [f"    {' '.join(decision.command.splitlines())}", ""]
    lines += [RULE, "", *_markdown_table(*scores_cells(comparison))]
    lines += ["", LEGEND, ""]
    lines += _markdown_table(*differences_cells(comparison))
    lines += ["", INTERVALS]
    if comparison.learning_rates:
        lines += ["", *_markdown_table(*rates_cells(comparison)), "", RATES_LEGEND]
    return printable("\n".join(lines) + "\n")


def comparison_csv(comparison: Comparison) -> str:
    """One line a run with every number; empty where a run has none."""
    rows = comparison.rows_of_table()
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return printable(text.getvalue())


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
    mark = next((mark for mark, sign in SIGNS.items() if cell.endswith(sign)), "")
    return f"[{STYLES[mark]}]{escape(cell)}[/]" if mark else escape(cell)


def scores_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the numbers."""
    present = [name for name in COLUMNS if name in comparison.summary[0].scores]
    columns = [metric(name) for name in present]
    arrows = [f"{row.short} {'↑' if row.higher_is_better else '↓'}" for row in columns]
    heads = ["", *arrows, "lr", "s", "GB"]
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
    heads = ["", *(metric(name).short for name in present)]
    found = []
    for line in lines:
        said = marks(line, comparison.summary[0])
        found.append(
            [line.recipe, *(_difference(line.difference[name], said[name]) for name in present)]
        )
    return heads, found


def _difference(found: Interval, mark: Mark) -> str:
    return f"{signed(found.mean)} {interval_text(found)}{SIGNS.get(mark, '')}"


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
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


def _plain(text: str) -> str:
    """Text from data in a paragraph of Markdown, where brackets and `<` are more than signs."""
    return re.sub(r"([\\`*_<\[\]|])", r"\\\1", " ".join(text.split()))
