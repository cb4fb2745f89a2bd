"""`compare`: the same road for several recipes and seeds: one table, and nobody favoured."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.markup import escape
from torch import Tensor, nn

from clip_refine.config import ModelConfig, RefineConfig, dump_config, override
from clip_refine.config.runs import RUNS, CompareConfig
from clip_refine.data import ImageCaptions, LabelledImages, Stream, Subset, hold_out
from clip_refine.data.pairs import (
    MINIMUM_HELD_OUT,
    GivenPairs,
    Images,
    fingerprint,
    image_fingerprint,
)
from clip_refine.evaluation import Embedder
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.evaluation.scores import (
    ModelFeatures,
    TaskFeatures,
    embed_model,
    probe_features,
    resampled_headline,
    score_features,
    selection_score,
    summarise,
)
from clip_refine.losses import Objective
from clip_refine.models import DualEncoder
from clip_refine.models.embed import EmbeddedPairs, embed_pairs
from clip_refine.report.comparison import comparison_csv, comparison_markdown
from clip_refine.report.comparison_page import write_comparison_report
from clip_refine.results import (
    Comparison,
    ComparisonRow,
    LearningRateChoice,
    Record,
    flat,
    headline,
    read,
)
from clip_refine.roads import build
from clip_refine.roads.guard import open_bystanders
from clip_refine.roads.plan import (
    Variant,
    best_rate,
    choose_precision,
    list_variants,
    next_rate,
    say_plan,
    split_combination,
)
from clip_refine.roads.refine import train_student
from clip_refine.saving import refinement, save_model, saved_size
from clip_refine.support.console import Bar, Clock, PeakMemory, console, quietly, remark
from clip_refine.support.errors import (
    ConfigError,
    DataError,
    OutputError,
    TrainingError,
    unwritable,
)
from clip_refine.support.folder import (
    alone,
    check_room,
    complete_folder,
    default_cache,
    drop_aside,
    set_aside,
    write_environment,
    write_file,
)
from clip_refine.support.limits import WHOLE, read_text
from clip_refine.train import StepLog, TowerPrecision
from clip_refine.train.teacher_cache import kept_features, model_fingerprint
from clip_refine.vectors.transforms import Peer, check_name, fit_peer

UNTOUCHED = "pre-trained"
NUMBERS = 2
"""Raised where the same run would now have other numbers, so that no table mixes both."""


def compare(
    config: CompareConfig,
    *,
    model: DualEncoder | None = None,
    train_pairs: GivenPairs | None = None,
    held_out: GivenPairs | None = None,
    tasks: Sequence[LabelledImages] | None = None,
) -> Comparison:
    """Train every recipe with every seed on the same batches and score all of them alike.

    Writes `comparison.json`, `comparison.csv` and `comparison.md` to `config.out`, and each
    finished run to `config.out`/rows, from where a comparison that stopped goes on.

    Args:
        config: Every setting.
        model: Used instead of loading `config.model`; has its own weights back in the end.
        train_pairs: In place of `config.data.train`, which is then left out.
        held_out: In place of `config.data.val`, or of a part of the training pairs.
        tasks: Used instead of opening `config.evaluation.zero_shot`.

    Returns:
        What `comparison.json` holds.

    Raises:
        ClipRefineError: Bad settings, data or model, an output folder that holds something else,
            or a recipe that cannot be trained at any of its learning rates.
    """
    with alone(config.out):
        # what is compared
        variants = list_variants(config.refinement(), recipes=config.recipes, sweeps=config.sweep)
        tried = [1 if variant.fixed_rate else len(config.grid) for variant in variants]
        trainings = sum(tried) + len(variants) * (config.seeds - 1)
        others, size = build.label_models(config.models), 0
        for label, other in others.items():
            if other == config.model and model is None:
                raise ConfigError(
                    f"models: {label} is model.name, compared in any case. Leave it out."
                )
            with quietly():  # what cannot be loaded is said now, not when the first model is done
                size += saved_size(build.build_model(other))
        if others:
            remark(
                f"The plan is of {config.model.title} (--model.name), the first model; the same "
                f"follows for {', '.join(others)}."
            )
        runs = open_runs(config, model, train_pairs, held_out, tasks, trainings=trainings)
        if any(Objective(variant.config.loss).needs_wrong_texts for variant in variants):
            build.check_swaps(runs.training, config.seed)  # single runs are quiet
        if config.save_models:
            each, models = len(variants) * config.seeds, config.out / "models"
            there = sum(file.stat().st_size for file in models.rglob("*.safetensors"))
            check_room(
                config.out,
                each * (saved_size(runs.encoder) + size) - there,
                f"the {each * (1 + len(others))} models that --save-models keeps",
                "Make room, choose another --out, or leave --save-models out.",
            )

        # run after run, model after model
        stored, choices = runs.all(variants)
        for label, other in others.items():
            runs = runs.of_another(label, other, trainings)
            of_it = [replace(v, config=override(v.config, model=other)) for v in variants]
            for found, more in zip((stored, choices), runs.all(of_it), strict=True):
                found += more

        # numbers → something to look at
        finished = [(found.row, found.resampled) for found in stored if found.row]
        rows = tuple(row for row, _ in finished)
        summary = summarise(rows, [resampled for _, resampled in finished], untouched=UNTOUCHED)
        result = Comparison(
            rows=rows,
            summary=summary,
            learning_rates=tuple(choices),
            held_out=len(runs.held_out),
            models={label: other.title for label, other in others.items()},
        )
        _say_what_is_left_out(config.out / "comparison.json", result)
        write_comparison(config.out, result, runs.accelerator.device, report=config.report)
        runs.store.complete()
        return result


def open_runs(
    config: CompareConfig,
    model: DualEncoder | None,
    train_pairs: GivenPairs | None,
    held_out: GivenPairs | None,
    tasks: Sequence[LabelledImages] | None,
    *,
    trainings: float,
    bystanders: str | None = None,
) -> "Runs":
    """Images and captions, the untouched model, its features of the training pairs; the plan."""
    combined = _combined(config)
    FinishedRuns.check(config.out, _shared_settings(config), overwrite=config.overwrite)
    build.check_model(config.model, model)
    train_pairs, held_out = build.build_data(
        config.data, seed=config.seed, train_pairs=train_pairs, held_out=held_out
    )
    if isinstance(train_pairs, Stream):
        raise ConfigError(
            "data.streaming: compare reads the training pairs many times, so they cannot be "
            "streamed. Leave it out."
        )
    if tasks is None:
        tasks = build.build_tasks(config.evaluation, links=config.data.allow_outside)
    own, others = open_bystanders(bystanders, config.refinement())
    tasks = [*tasks, *own]
    build.check_names(tasks)
    data = (train_pairs, held_out, tasks, others, combined)
    return _set_up(config, model, *data, trainings)


def write_comparison(
    folder: Path,
    result: Comparison,
    device: torch.device,
    *,
    report: bool = True,
    shown_as: Path | None = None,
) -> None:
    """Everything to look at, into `folder`, which will be called `shown_as` in the end."""
    shown = shown_as or folder
    write_file(folder / "comparison.json", result.text)
    write_file(folder / "comparison.csv", comparison_csv(result))
    write_file(folder / "comparison.md", comparison_markdown(result, str(shown)))
    write_environment(folder / "environment.json", build.device_name(device))
    if report:
        write_comparison_report(folder, shown_as=shown)


def _say_what_is_left_out(earlier: Path, result: Comparison) -> None:
    """Name the recipes that an earlier call showed in this folder and this one does not."""
    try:
        before = read(Comparison, earlier)
    except DataError:
        return
    shown = {line.recipe for line in result.summary}
    left_out = [line.recipe for line in before.summary if line.recipe not in shown]
    if left_out:
        remark(
            f"Not shown any more, as this call does not name them: {', '.join(left_out)}. Their "
            "runs are kept and stand in the table again when they are named.",
            style="yellow",
        )


def _combined(config: CompareConfig) -> dict[str, list[str]]:
    """Recipe → the peers behind it, all names checked before anything is trained."""
    combined: dict[str, list[str]] = {}
    for peer in config.peers:
        check_name(peer)
    for name in config.combine:
        recipe, peer = split_combination(name, config.recipes)
        check_name(peer)
        combined.setdefault(recipe, []).append(peer)
    for names in (config.peers, config.combine):
        if len(set(names)) < len(names):
            raise ConfigError(f"{', '.join(names)}: one of these comes twice. Name each once.")
    return combined


def _shared_settings(config: CompareConfig) -> dict[str, Any]:
    """What the numbers of every run depend on, as plain data; a cache changes none."""
    settings = config.model_dump(mode="json", exclude=set(RUNS))
    kept = {name: value for name, value in settings["data"].items() if "cache" not in name}
    settings["train"].pop("save_every")  # of runs that are short
    return {**settings, "data": kept}


def _set_up(
    config: CompareConfig,
    model: DualEncoder | None,
    train_pairs: ImageCaptions,
    held_out: ImageCaptions,
    tasks: Sequence[LabelledImages],
    bystanders: ImageCaptions | None,
    combined: Mapping[str, list[str]],
    trainings: float,
    label: str = "",
) -> "Runs":
    """Everything that a model's runs share; the folder is cleared once data and model are there."""
    base = config.refinement()
    accelerator = build.build_accelerator(config.train.device)
    if accelerator.num_processes > 1:
        raise ConfigError("compare runs in one process. Start it without accelerate or torchrun.")
    training, selection = _set_aside(config, train_pairs)
    build.count_steps(config.train, training, 1)
    encoder = build.build_model(config.model, model)
    build.warn_of_marks(encoder, train_pairs, held_out)
    student = build.build_student(encoder, base, accelerator.device)
    weights = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}
    scored = {
        "held-out images": len(held_out),
        "of zero-shot tasks": sum(map(len, tasks)),
        "set aside to choose on": len(selection),
        "bystanders": len(bystanders) if bystanders else 0,
    }
    store = FinishedRuns(config.out)
    if not (label or config.dry_run):  # before pixels are cached, which may be within it
        store = FinishedRuns.open(config.out, _shared_settings(config), overwrite=config.overwrite)
    sources = [train_pairs, held_out, *filter(None, [bystanders])]
    reader = build.build_reader(
        config.data,
        encoder,
        [*sources, *tasks],
        workers=config.train.workers,
        folder=config.cache,
    )
    workers = say_plan(config, student, training, scored, accelerator, reader, trainings=trainings)

    def measured() -> str:
        return choose_precision(config.train, student, training, accelerator).name

    # one for all runs: what `auto` was measured to be stays so when a comparison goes on
    chosen = store.once(f"precision of {label}" if label else "precision", measured)
    precision = TowerPrecision.from_name(chosen)  # pyright: ignore
    feeding = build.build_embedder(
        encoder, accelerator, config.evaluation, config.train.workers, reader
    )
    embedder = replace(feeding, visible=False)
    # what is swept may be what is trained
    one_part = not any(sweep.strip().startswith("train.") for sweep in config.sweep)
    heads = build.find_heads(student, base.train, accelerator, training) if one_part else None
    return Runs(
        config=config,
        workers=workers,
        combined=combined,
        encoder=encoder,
        weights=weights,
        training=training,
        selection=selection,
        held_out=held_out,
        tasks=tasks,
        bystanders=bystanders,
        teacher_features=kept_features(
            training, embedder, precision, config.cache or default_cache(), heads
        ),
        of_trunk=heads is not None,
        accelerator=accelerator,
        embedder=embedder,
        precision=precision,
        store=store,
        content=_content(encoder, precision, sources, tasks),
        bar=Bar(f"Runs of {label}" if label else "Runs", math.ceil(trainings) + 1),
        train_pairs=train_pairs,
        prefix=f"{label}: " if label else "",
    )


def _set_aside(config: CompareConfig, pairs: ImageCaptions) -> tuple[ImageCaptions, Subset]:
    """What is trained on, and the selection pairs."""
    if len(pairs) < 2 * MINIMUM_HELD_OUT:
        raise DataError(
            f"{pairs.name}: {len(pairs)} training images, too few to set {MINIMUM_HELD_OUT} aside "
            f"for choosing learning rates and fitting peers. Give at least {2 * MINIMUM_HELD_OUT}."
        )
    return hold_out(pairs, fraction=config.selection_fraction, seed=config.seed)


# --------------------------------------------------------------------------------------------------
# Finished runs on disk, so that a comparison that stopped goes on where it was.


class FinishedRun(Record):
    """A finished run as `rows/NAME.json` has it."""

    depends_on: str  # everything that its numbers follow from, as one fingerprint
    # the numbers; None where training failed, which happens while learning rates are tried
    row: ComparisonRow | None
    # headline name → its value in each bootstrap resample
    resampled: Mapping[str, tuple[float, ...]]
    bystanders: float | None = None  # mean R@1 on them, where `tune` guards them


class _State(Record):
    """`state.json`, the one record of what a comparison's runs depend on."""

    settings: Mapping[str, Any]
    found: Mapping[str, str] = {}  # what was measured once


class FinishedRuns:
    """A comparison's folder, locked: its settings, and a file for each run that is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # the comparison's `out`

    @staticmethod
    def check(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Refuse what `open` would refuse, before anything is read or cleared."""
        if folder.exists():
            _check_usable(folder, settings, overwrite=overwrite)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> "FinishedRuns":
        """Begin anew, what was there kept beside till the end, or go on with the same settings."""
        try:
            cls.check(folder, settings, overwrite=overwrite)
            if overwrite:
                set_aside(folder)
            (folder / "rows").mkdir(parents=True, exist_ok=True)
            store = cls(folder)
            state = _read_state(folder)
            if state is None or dict(state.settings) != settings:
                kept = state.found if state else {}
                store._write(_State(settings=dict(settings), found=kept))
            text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
            config = folder / "config.yaml"  # to read, and for `compare --config`
            if not config.is_file() or config.read_bytes() != text.encode():
                write_file(config, text)
        except OSError as error:
            raise unwritable(folder, error, "another --out", begun=False) from error
        return store

    def complete(self) -> None:
        """All is written: what was overwritten goes."""
        drop_aside(self.folder)

    def read(self, name: str, depends_on: str) -> FinishedRun | None:
        """The run of this name if it is finished and followed from the same things."""
        try:
            stored = FinishedRun.model_validate_json(read_text(self._path(name), WHOLE))
        except (OSError, ValueError):  # not there, or cut off while it was written
            return None
        return stored if stored.depends_on == depends_on else None

    def write(self, name: str, stored: FinishedRun) -> None:
        """Keep a finished run; it is there whole or not at all."""
        write_file(self._path(name), stored.model_dump_json(indent=1) + "\n")

    def once(self, name: str, find: Callable[[], str]) -> str:
        """A word that is found when a comparison begins and kept when it goes on.

        Without a finished run nothing depends on it, and it may be of other settings.
        """
        state = _read_state(self.folder) or _State(settings={})
        if name not in state.found or not any((self.folder / "rows").glob("*.json")):
            state = state.model_copy(update={"found": {**state.found, name: find()}})
            self._write(state)
        return state.found[name]

    def _write(self, state: _State) -> None:
        write_file(self.folder / "state.json", state.model_dump_json(indent=1) + "\n")

    def _path(self, name: str) -> Path:
        """Readable, and different for different names on every file system."""
        readable = re.sub(r"[^A-Za-z0-9.=+-]+", "_", name)[:120]
        return self.folder / "rows" / f"{readable}-{digest(name)[:8]}.json"


def digest(value: Any) -> str:
    """A fingerprint of plain data, whatever the order of its keys: 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_state(folder: Path) -> _State | None:
    try:
        return _State.model_validate_json(read_text(folder / "state.json"))
    except (OSError, ValueError):
        return None


def _check_usable(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that is no comparison, or one with finished runs of other settings."""
    written = {path.name for path in folder.rglob("[!.]*") if path.is_file()}
    if folder.is_dir() and not written:
        return  # empty, or of one that was killed when it had made its folders
    state, finished = _read_state(folder), any((folder / "rows").glob("*.json"))
    if not (folder / "rows").is_dir() or not (state or finished or "config.yaml" in written):
        raise OutputError(
            f"{folder}: exists already and holds no comparison. Choose another --out."
        )
    if overwrite or not finished:
        return
    if state is None:
        remark(
            f"{folder}: state.json cannot be read. Finished runs that do not follow from these "
            "settings are made again.",
            "yellow",
        )
        return
    earlier, now = flat(state.settings), flat(settings)
    differing = sorted(name for name in {*earlier, *now} if earlier.get(name) != now.get(name))
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise OutputError(
            f"{folder}: holds a comparison with other settings ({name} was "
            f"{earlier.get(name)!r}, is {now.get(name)!r}{more}). Pass --overwrite to start "
            "again, or another --out."
        )


# --------------------------------------------------------------------------------------------------
# The runs: each from the untouched weights; those that are finished already are read instead.


@dataclass(frozen=True)
class Training:
    """What was done to the model before it is scored; a row says the same by these names."""

    seed: int  # of order, captions and references
    learning_rate: float | None = None  # None for the untouched model
    steps: int = 0
    pairs: int = 0  # training images
    seconds: float = 0.0
    peak_memory: float = 0.0  # GB while it trained


@dataclass(eq=False, kw_only=True)
class Runs:
    """One model and one set of pairs, on which recipe after recipe is tried."""

    config: CompareConfig
    combined: Mapping[str, list[str]]  # recipe → the peers its results are also scored behind
    encoder: Any  # the model; every training begins from `weights`
    weights: Mapping[str, Tensor]  # as they came, on the CPU
    training: ImageCaptions  # what every recipe is trained on
    selection: ImageCaptions  # held-out training pairs, for peers and learning rates
    held_out: ImageCaptions  # what everything is scored on
    tasks: Sequence[LabelledImages]  # zero-shot tasks, also for linear probes
    bystanders: ImageCaptions | None  # what `tune` guards besides
    teacher_features: EmbeddedPairs  # of `training`, from the untouched model
    of_trunk: bool  # which then is all of it below the heads that alone are trained
    accelerator: Accelerator
    embedder: Embedder  # without progress bars
    precision: TowerPrecision  # of every run
    workers: int  # that decode images while it trains
    store: FinishedRuns  # where finished runs are
    content: str  # fingerprint of model and data
    bar: Bar  # a run after the other
    train_pairs: ImageCaptions  # `training` and `selection`
    prefix: str  # of the rows' names: which model it is, where that is not the first
    seen: set[str] = field(default_factory=set)  # those that the bar knows
    trained: str = ""  # what the model's weights are at the moment

    def all(
        self, variants: Sequence[Variant]
    ) -> tuple[list[FinishedRun], list[LearningRateChoice]]:
        """Every row of the model, the untouched one first, and which learning rates were chosen."""
        with self.bar.progress:
            stored, choices = self.untouched(), []
            for variant in variants:
                choice = self.choose_learning_rate(variant)
                choices.append(choice)
                for seed in self.config.run_seeds:
                    stored += self.chosen(variant, seed, choice.chosen)
        self.restore(self.config.refinement())
        return stored, choices

    def of_another(self, label: str, model: ModelConfig, trainings: float) -> "Runs":
        """The same runs of another model; this one is let go first."""
        data = (self.train_pairs, self.held_out, self.tasks, self.bystanders, self.combined)
        config = override(self.config, model=model)
        del self.encoder, self.embedder, self.weights
        return _set_up(config, None, *data, trainings, label)

    def untouched(self) -> list[FinishedRun]:
        """The model as it came, alone and behind every peer."""
        rows = {UNTOUCHED: None, **{peer: peer for peer in self.config.peers}}
        names = {f"{self.prefix}{name}": peer for name, peer in rows.items()}

        def train() -> Training:
            self.restore(self.config.refinement())
            self.trained = UNTOUCHED
            return Training(seed=self.config.seed)

        return self._run(names, f"{self.config.seed}", {}, train)

    def choose_learning_rate(self, variant: Variant) -> LearningRateChoice:
        """Train with the first seed at every learning rate of the grid, and take the best."""
        grid = list(self.config.grid if variant.fixed_rate is None else (variant.fixed_rate,))
        search = self.config.learning_rates == "auto" and variant.fixed_rate is None
        tried: dict[float, float | None] = {}
        while grid:
            rate = grid.pop(0)
            row = self.tried(variant, self.config.seed, rate).row
            tried[rate] = row.selection if row else None
            if search and not grid and (more := next_rate(tried, self.config.train.rate)):
                grid.append(more)
                self.bar.expect(1)
        best, names = best_rate(tried), ", ".join(f"{rate:g}" for rate in sorted(tried))
        if best is None:
            raise TrainingError(
                f"{self.prefix}{variant.name}: training failed at every learning rate tried "
                f"({names}). Pass lower --learning-rates."
            )
        at_edge = len(tried) > 1 and best in (min(tried), max(tried))
        choice = LearningRateChoice(
            recipe=f"{self.prefix}{variant.name}",
            chosen=best,
            tried={f"{rate:g}": tried[rate] for rate in sorted(tried)},
            at_edge=at_edge,
        )
        if len(tried) > 1:
            edge = ", at the edge of the grid" if at_edge else ""
            _say(f"{self.prefix}{variant.name}: learning rate {best:g} of {names}{edge}")
        return choice

    def tried(self, variant: Variant, seed: int, rate: float) -> FinishedRun:
        """One run; without a row where training failed."""
        return self._variant(variant, seed, rate)[0]

    def chosen(self, variant: Variant, seed: int, learning_rate: float) -> list[FinishedRun]:
        """The rows of a recipe with one seed at its learning rate; saves the model if asked to."""
        stored = self._variant(variant, seed, learning_rate)
        if stored[0].row is None:
            raise TrainingError(
                f"{self.prefix}{variant.name}: training failed with seed {seed} at learning rate "
                f"{learning_rate:g}. Pass lower --learning-rates."
            )
        if self.config.save_models:
            self._save_model(variant, seed, learning_rate)
        return stored

    def restore(self, config: RefineConfig) -> nn.Module:
        """The untouched model, ready to be trained with these settings."""
        student = build.build_student(self.encoder, config, self.accelerator.device)
        student.load_state_dict(self.weights)
        return student

    def train(self, config: RefineConfig, *, fraction: float) -> Training:
        """Refine on `refine`'s road from the untouched weights, the teacher looked up."""
        clock, memory = Clock(), PeakMemory(self.accelerator.device)
        own = {"precision": self.precision.name, "workers": self.workers}
        config = override(config, train=own)
        pairs = self.part(fraction)
        with quietly(), clock("train"):
            train_student(
                config,
                self.restore(config),
                pairs,
                self.embedder,
                self.accelerator,
                log=StepLog(None),
                teacher_features=self.teacher_features.part(pairs.indices),
                of_trunk=self.of_trunk,
            )
        self.accelerator.free_memory()
        return Training(
            seed=config.seed,
            learning_rate=config.train.rate,
            steps=build.count_steps(config.train, pairs, 1),
            pairs=len(pairs),
            seconds=clock.seconds["train"],
            peak_memory=memory.gigabytes,
        )

    def part(self, fraction: float) -> Subset:
        """A share of the training pairs, the same for all; a smaller lies in a larger one."""
        count = len(self.training)
        generator = build.seeded_generator(self.config.seed, "fraction")
        order = torch.randperm(count, generator=generator).tolist()
        chosen = sorted(order[: max(1, round(fraction * count))])
        return Subset(self.training, chosen, self.training.name)

    def _variant(self, variant: Variant, seed: int, rate: float) -> list[FinishedRun]:
        row = f"{self.prefix}{variant.name}"
        names: dict[str, str | None] = {row: None}
        names |= {f"{row}+{peer}": peer for peer in self.combined.get(variant.recipe, [])}
        settings = self._settings(variant, seed, rate)
        return self._run(
            names, f"{seed}-{rate!r}", settings, partial(self._train, variant, seed, rate)
        )

    def _settings(self, variant: Variant, seed: int, rate: float) -> dict[str, Any]:
        """What the numbers of a run depend on, besides model and data."""
        config = variant.at(seed=seed, learning_rate=rate)
        left_out = {"out", "log", "report", "overwrite", "dry_run", "resume"}
        plain = config.model_dump(mode="json", exclude=left_out)
        plain["train"].pop("save_every")
        return plain | {"fraction": variant.fraction}

    def _train(self, variant: Variant, seed: int, rate: float) -> Training:
        self.trained = ""  # until it has ended well
        config = variant.at(seed=seed, learning_rate=rate)
        training = self.train(config, fraction=variant.fraction)
        self.trained = f"{variant.name}-{seed}-{rate!r}"
        return training

    def _run(
        self,
        names: dict[str, str | None],
        label: str,
        settings: dict[str, Any],
        train: Callable[[], Training],
    ) -> list[FinishedRun]:
        """The rows of one training: read where all are there, else made and written."""
        depends_on = {
            name: digest([NUMBERS, self.content, settings, peer]) for name, peer in names.items()
        }
        read = [self.store.read(f"{name}-{label}", key) for name, key in depends_on.items()]
        found = [stored for stored in read if stored]
        first = f"{next(iter(names))}-{label}"
        if len(found) == len(names):
            if first not in self.seen:  # of an earlier call, so that it takes no time
                self.seen.add(first)
                self.bar.expect(-1)
            return found
        self.seen.add(first)
        self.bar.remark(first)
        made = self._make(names, depends_on, train)
        for name, stored in made.items():
            self.store.write(f"{name}-{label}", stored)
            _say(_describe(name, label, stored))
        self.bar.advance()
        return list(made.values())

    def _make(
        self,
        names: dict[str, str | None],
        depends_on: dict[str, str],
        train: Callable[[], Training],
    ) -> dict[str, FinishedRun]:
        """Train, embed, score alone and behind each peer."""
        try:
            training = train()
        except TrainingError:
            # a learning rate that is too high is a result, too
            return {
                name: FinishedRun(depends_on=key, row=None, resampled={})
                for name, key in depends_on.items()
            }
        self.encoder.eval()
        features = embed_model(self.embedder, self.held_out, self.tasks)
        selection = embed_pairs(self.embedder, self.selection)
        kept = None
        if self.bystanders is not None:
            pairs = embed_pairs(self.embedder, self.bystanders)
            sides = pairs.image_features, pairs.text_features, pairs.text_to_image
            kept = headline({}, retrieval(*sides), ())["mean_recall@1"]
        made, alike = {}, {"seed": self.config.seed, "resamples": self.config.resamples}
        for name, peer in names.items():
            scored, at, score = features, training, None
            if peer is None:
                score = selection_score(selection)
            else:
                at, scored = self._behind(peer, training, features, selection)
            row, resampled = score_row(name, at, scored, selection=score, **alike)
            made[name] = FinishedRun.model_validate(
                {
                    "depends_on": depends_on[name],
                    "row": row,
                    "resampled": resampled,
                    "bystanders": kept,
                }
            )
        return made

    def _behind(
        self, peer_name: str, training: Training, features: ModelFeatures, fitted_on: EmbeddedPairs
    ) -> tuple[Training, ModelFeatures]:
        """Fit a peer on the selection pairs and put it behind the model."""
        clock, memory = Clock(), PeakMemory(self.accelerator.device)
        try:
            with clock("peer"):
                peer = fit_peer(peer_name, fitted_on.image_features, fitted_on.text_features)
                moved = transformed(features, peer)
        except ValueError as error:
            raise DataError(
                f"{self.selection.name}: {peer_name} cannot be fitted. {error}."
            ) from error
        seconds = training.seconds + clock.seconds["peer"]
        peak = max(training.peak_memory, memory.gigabytes)
        return replace(training, seconds=seconds, peak_memory=peak), moved

    def _save_model(self, variant: Variant, seed: int, rate: float) -> None:
        """Save the model unless it is there, made of the same model, data and settings."""
        name = re.sub(r"[^\w.=+-]+", "_", f"{self.prefix}{variant.name}")
        folder = self.store.folder / "models" / f"{name}-{seed}"
        config = variant.at(seed=seed, learning_rate=rate)
        made_of = digest([self.content, self._settings(variant, seed, rate)])
        settings = f"# made of {made_of}\n{dump_config(config)}"
        note = folder / "config.yaml"
        if note.is_file() and note.read_text(encoding="utf-8") == settings:
            return
        if self.trained != f"{variant.name}-{seed}-{rate!r}":
            self._train(variant, seed, rate)
        pairs = self.part(variant.fraction)
        made = refinement(
            config, pairs, self.held_out, steps=build.count_steps(config.train, pairs, 1)
        )
        with complete_folder(folder, overwrite=True) as new:
            save_model(self.encoder, new, made)
            (new / "config.yaml").write_text(settings, encoding="utf-8")


def score_row(
    name: str,
    training: Training,
    features: ModelFeatures,
    *,
    selection: float | None,
    seed: int,
    resamples: int,
) -> tuple[ComparisonRow, dict[str, list[float]]]:
    """A row of the table, and its headline resampled; `seed` is of splits and the bootstrap."""
    scores, probes = score_features(features, seed=seed), probe_features(features, seed=seed)
    row = ComparisonRow(
        recipe=name,
        **asdict(training),
        geometry=scores.geometry,
        retrieval=scores.retrieval,
        zero_shot=scores.zero_shot,
        linear_probe={task: hits.double().mean().item() for task, hits in probes.items()},
        selection=selection,
    )
    return row, resampled_headline(features, probes, resamples=resamples, seed=seed)


def transformed(features: ModelFeatures, peer: Peer) -> ModelFeatures:
    """The features behind a peer; a class is a text, its vector the mean over its prompts."""
    pairs = EmbeddedPairs(
        peer.transform_image(features.pairs.image_features),
        peer.transform_text(features.pairs.text_features),
        features.pairs.text_to_image,
    )
    tasks = [
        TaskFeatures(
            task.name,
            peer.transform_image(task.image_features),
            peer.transform_text(task.class_features),
            task.labels,
        )
        for task in features.tasks
    ]
    return ModelFeatures(pairs, tasks, normalize=False, dim=peer.dim)


def _describe(name: str, label: str, stored: FinishedRun) -> str:
    if stored.row is None:
        return f"{name} ({label}): training failed, the loss or its gradient was not finite"
    row, numbers = stored.row, stored.row.headline
    rate = "" if row.learning_rate is None else f", learning rate {row.learning_rate:g}"
    zero_shot = f", zero-shot {numbers['zero_shot_top1']:.3f}" if row.zero_shot else ""
    return (
        f"{name}, seed {row.seed}{rate}: gap {numbers['gap']:.3f}, mean R@1 "
        f"{numbers['mean_recall@1']:.3f}{zero_shot}, {row.seconds:.1f} s"
    )


def _say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _content(
    encoder: Any,
    precision: TowerPrecision,
    sources: Sequence[ImageCaptions],
    tasks: Sequence[LabelledImages],
) -> str:
    """Fingerprint of the untouched model and of every image, caption and class."""
    return digest(
        [
            model_fingerprint(encoder, precision),
            *(
                [_images_content(pairs), [list(captions) for captions in pairs.captions]]
                for pairs in sources
            ),
            *(
                [
                    task.name,
                    list(task.class_names),
                    list(task.templates),
                    list(task.labels),
                    _images_content(task),
                ]
                for task in tasks
            ),
        ]
    )


def _images_content(images: Images) -> str:
    found = (image_fingerprint(images, index).encode() for index in range(len(images)))
    return fingerprint(*found)
