"""What a verb is about to train: recipes and sweeps, what `auto` comes to, what it will take.

The plan is said before it begins, in three lines: pairs, time, memory, weights.
"""

import difflib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from clip_refine.config import LossConfig, RefineConfig, TrainConfig, override, with_recipe
from clip_refine.config.runs import CompareConfig, recipe_settings, unused_settings
from clip_refine.data import ImageCaptions, PixelReader, Stream
from clip_refine.data.pairs import as_pairs
from clip_refine.losses import Objective
from clip_refine.losses.objective import check_objective
from clip_refine.roads import build
from clip_refine.support.console import console, duration, quietly, remark
from clip_refine.support.errors import ConfigError, Planned
from clip_refine.support.folder import size_text
from clip_refine.support.limits import parse_yaml
from clip_refine.train import StudentTowers, TowerPrecision, faster_precision
from clip_refine.train.towers import (
    COPIES,
    bytes_per_pair,
    fitting_size,
    memory_of,
)

# --------------------------------------------------------------------------------------------------
# Recipes × swept values → what is trained, and under which name it stands in the table.


SWEPT_GROUPS = ("train", "loss", "prior")
ONE_FOR_ALL = ("precision", "device", "workers")  # of `train`: all runs share them


@dataclass(frozen=True)
class Variant:
    """Something to train."""

    name: str  # what it is called in the table: the recipe, and in brackets what was swept
    recipe: str  # the recipe
    config: RefineConfig  # its settings, but for seed and learning rate
    fraction: float = 1.0  # share of the training pairs it is trained on
    fixed_rate: float | None = None  # the learning rate where that itself is swept

    def at(self, *, seed: int, learning_rate: float) -> RefineConfig:
        """The settings of one run."""
        return override(self.config, seed=seed, train={"learning_rate": learning_rate})


@dataclass(frozen=True)
class Sweep:
    """One setting and its values."""

    group: str  # `train`, `loss`, `prior` or `data`
    setting: str  # its name in that group
    values: tuple[tuple[str, Any], ...]  # as written and as read


def list_variants(
    base: RefineConfig, *, recipes: Sequence[str], sweeps: Sequence[str]
) -> list[Variant]:
    """Every recipe, or with sweeps every recipe with every swept value."""
    parsed = [parse_sweep(text) for text in sweeps]
    variants = []
    for recipe in recipes:
        plain = Variant(recipe, recipe, of_recipe(base, recipe))
        swept = [_with_value(plain, s, *value, base) for s in parsed for value in s.values]
        variants += swept if parsed else [plain]
    _refuse_in_vain(base, recipes)
    for variant in variants:
        check_objective(variant.config.loss, None)
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"{twice} would be trained twice. Name each recipe and value once.")
    return variants


def _given(loss: LossConfig) -> dict[str, Any]:
    """What was asked for; of a group that is whole, as files have it, what is no default."""
    names = loss.model_fields_set
    if names < type(loss).model_fields.keys():
        return loss.model_dump(include=names)
    default = LossConfig().model_dump()
    return {name: at for name, at in loss.model_dump().items() if at != default[name]}


def _refuse_in_vain(base: RefineConfig, recipes: Sequence[str]) -> None:
    """Refuse a setting of `loss` that every recipe has otherwise, so that nobody would heed it."""
    every = {recipe: recipe_settings(recipe, base.train.parameters) for recipe in recipes}
    if base.loss.model_fields_set >= type(base.loss).model_fields.keys():
        return  # a comparison's own file has all, and may name fewer recipes
    for name, at in _given(base.loss).items():
        others = {recipe: own[name] for recipe, own in every.items() if own.get(name, at) != at}
        if others and len(others) == len(every):
            listed = ", ".join(f"{recipe} {value}" for recipe, value in others.items())
            raise ConfigError(
                f"loss.{name} {at}: every recipe here has its own ({listed}), which stays. Leave "
                f"it out, or try it with --sweep loss.{name}={at}, or with refine --recipe."
            )


def of_recipe(base: RefineConfig, recipe: str) -> RefineConfig:
    """A recipe with its own settings of `loss`, else those that were given."""
    config = with_recipe(base, recipe)
    given = _given(base.loss)
    own = recipe_settings(recipe, base.train.parameters)
    kept = {name: at for name, at in given.items() if name not in own}
    stays = {name: own[name] for name, at in given.items() if name in own and own[name] != at}
    for name, value in stays.items():
        remark(f"{recipe}: loss.{name} stays {value}, as this recipe has it.", style="yellow")
    config = override(config, loss=kept)
    for name, why in unused_settings(config).items():
        remark(f"{recipe}: {name} changes nothing here: {why}.", style="yellow")
    return config


def parse_sweep(text: str) -> Sweep:
    """Read `group.setting=value,value,...`."""
    name, equals, listed = text.partition("=")
    group, dot, setting = name.strip().partition(".")
    written = [value.strip() for value in listed.split(",")]
    if not (equals and dot and all(written)):
        raise ConfigError(
            f"sweep {text!r}: expected a setting and its values, as in loss.alpha=0,0.25,0.5."
        )
    _check_setting(text, group, setting)
    try:
        values = tuple((value, parse_yaml(value)) for value in written)
    except ValueError as error:
        raise ConfigError(f"sweep {text!r}: a value cannot be read ({error}).") from error
    return Sweep(group, setting, values)


def split_combination(name: str, recipes: Sequence[str]) -> tuple[str, str]:
    """Split `recipe+peer`, both of which may hold a `+` themselves."""
    begins = [recipe for recipe in recipes if name.startswith(f"{recipe}+")]
    if not begins:
        raise ConfigError(
            f"combine {name!r}: does not begin with a recipe that is compared "
            f"({', '.join(recipes)}) and a +. Write it as in clip-refine+mean-centring."
        )
    recipe = max(begins, key=len)
    return recipe, name.removeprefix(f"{recipe}+")


def _check_setting(text: str, group: str, setting: str) -> None:
    if group == "data":
        known = ["fraction"]
    elif group in SWEPT_GROUPS:
        kind: Any = RefineConfig.model_fields[group].annotation
        known = list(kind.model_fields)
    else:
        raise ConfigError(
            f"sweep {text!r}: settings of {', '.join(SWEPT_GROUPS)} and data.fraction can be "
            f"swept, got {group}.{setting}."
        )
    if group == "train" and setting in ONE_FOR_ALL:
        raise ConfigError(
            f"sweep {text!r}: all runs of a comparison share one train.{setting}. Compare two "
            f"calls with --train.{setting}, each with its own --out."
        )
    if setting not in known:
        near = difflib.get_close_matches(setting, known, n=1)
        hint = f"Did you mean {group}.{near[0]}?" if near else f"There are {', '.join(known)}."
        raise ConfigError(f"sweep {text!r}: there is no setting {group}.{setting}. {hint}")


def _with_value(
    plain: Variant, sweep: Sweep, written: str, value: Any, base: RefineConfig
) -> Variant:
    name = f"{plain.name}[{sweep.group}.{sweep.setting}={written}]"
    if sweep.group == "data":
        if not (isinstance(value, int | float) and 0 < value <= 1):
            raise ConfigError(f"{name}: the fraction must be above 0 and at most 1.")
        return Variant(name, plain.recipe, plain.config, fraction=float(value))
    try:
        changed = {sweep.group: {sweep.setting: value}}
        config = override(plain.config, **changed)
        if sweep.setting == "parameters":  # which some recipes go by
            config = of_recipe(override(base, **changed), plain.recipe)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    why = unused_settings(config).get(f"{sweep.group}.{sweep.setting}")
    if why:
        raise ConfigError(
            f"{name}: {sweep.group}.{sweep.setting} changes nothing in this recipe ({why}), so "
            "that its rows would all be the same. Sweep it with another recipe."
        )
    swept_rate = (sweep.group, sweep.setting) == ("train", "learning_rate")
    if swept_rate and value == "auto":
        raise ConfigError(f"{name}: name rates, or leave this out and pass --learning-rates auto.")
    fixed_rate = config.train.rate if swept_rate else None
    return Variant(name, plain.recipe, config, fixed_rate=fixed_rate)


# --------------------------------------------------------------------------------------------------
# Learning rates that are tried.


Rate = TypeVar("Rate", int, float)
SHORT = 50  # steps of the runs that `refine` compares learning rates by
HARMED = 0.9  # share of the best score below which a rate is too high
MOST_RATES = 9  # that `auto` tries


def next_rate(tried: Mapping[float, float | None], start: float) -> float | None:
    """The learning rate that `auto` tries next, None where enough are tried; failed ones are None.

    `start`, powers of ten up to where it harms, then half powers beside the best.

    >>> next_rate({0.1: 0.3, 1.0: 0.4}, 1.0), next_rate({0.1: 0.3, 1.0: 0.4, 10.0: None}, 1.0)
    (10.0, 0.316228)
    """
    halves = {round(2 * math.log10(rate / start)): score for rate, score in tried.items()}
    best = best_rate({step: score for step, score in halves.items() if step % 2 == 0})
    beside = [min(halves, default=0) - 2] if best is None else [best + at for at in (-2, 2, -1, 1)]
    top = max(halves, default=0)
    if best is not None and (halves[top] or 0) >= HARMED * (halves[best] or 0):
        beside.insert(0, top + 2)  # small scores are noisy, so up to where it harms
    new = next((step for step in (0, -2, 2, *beside) if step not in halves), None)
    if new is None or len(tried) >= MOST_RATES:
        return None
    return float(f"{start * 10 ** (new / 2):.6g}")


def best_rate(tried: Mapping[Rate, float | None]) -> Rate | None:
    """The rate of the highest score, of equal ones the lowest; None where all failed."""
    scored = {rate: score for rate, score in tried.items() if score is not None}
    return max(scored, key=lambda rate: (scored[rate], -rate)) if scored else None


# --------------------------------------------------------------------------------------------------
# What `auto` comes to. Processes have to agree, so every one of them asks.


def choose_precision(
    config: TrainConfig, model: Any, pairs: ImageCaptions | Stream, accelerator: Accelerator
) -> TowerPrecision:
    """The precision asked for, or the one that suits device and towers, of the first process."""
    if config.precision != "auto":
        return TowerPrecision.from_name(config.precision)
    chosen = [faster_precision(model, *build.sample_pairs(model, pairs, 2), accelerator.device)]
    broadcast_object_list(chosen)
    if accelerator.is_main_process:
        console.print(f"Precision {chosen[0].name} (--train.precision).")
    return chosen[0]


def choose_micro_batch(
    config: RefineConfig,
    student: nn.Module,
    precision: TowerPrecision,
    pairs: ImageCaptions | Stream,
    accelerator: Accelerator,
) -> int:
    """How many pairs a process encodes with a graph at a time: asked for, or what fits."""
    train = config.train
    whole = train.batch_size // accelerator.num_processes
    if train.micro_batch != "auto":
        return min(train.micro_batch, whole)
    if train.normalization_statistics == "updated":
        return whole
    pixels, tokens = _sample(config, student, pairs, 2, accelerator.device)
    per_pair = bytes_per_pair(StudentTowers(student, precision), pixels, tokens)
    device = accelerator.device
    copies = _copies(config, accelerator)
    size = min(whole, fitting_size(student, per_pair, memory_of(device), copies=copies))
    chosen = [size]
    broadcast_object_list(chosen)
    if chosen[0] < whole and accelerator.is_main_process:
        console.print(
            f"Memory: a pair's graph takes {per_pair / 2**20:.0f} MiB, so that {chosen[0]:,} of "
            f"{whole:,} pairs are encoded at a time (--train.micro-batch)."
        )
    return chosen[0]


def _copies(config: RefineConfig, accelerator: Accelerator) -> float:
    """How often the weights stand in the device's memory; a guard's best ones are on the CPU."""
    best = config.guard.every is not None and accelerator.device.type == "cpu"
    sharing = build.sharing_processes(accelerator)
    # the teacher and the model that is saved are whole, all else is shared
    copies = COPIES if sharing == 1 else 2 + (COPIES - 1) / sharing
    return copies + best + (config.interpolate is not None)


_CAPTION = 1 / 7  # of an image's arithmetic: 16 tokens in ViT-B-32's text tower
_ROW = 4096  # bytes: features of 1,024 numbers


def keeps_teacher(
    config: RefineConfig, student: Any, pairs: ImageCaptions | Stream, accelerator: Accelerator
) -> bool:
    """Whether the teacher's features are computed once, before the first step, and then looked up.

    That is where it is less work: pairs come again in another epoch, as an image's other captions
    or while a learning rate is searched, or all are measured anyway. Not of a stream, with several
    processes, or where an image's pixels are not the same each time.
    """
    if isinstance(pairs, Stream) or accelerator.num_processes > 1:
        return False
    needed = Objective(config.loss).needs_teacher
    if not needed and build.find_heads(student, config.train, accelerator, pairs) is None:
        return False
    # beside a GPU reading the images once more takes longer than their features
    quick_to_read = accelerator.device.type == "cpu" or config.data.cache_images
    if not (quick_to_read or config.prior.fitted):
        return False
    steps = build.count_steps(config.train, pairs, 1)
    steps += MOST_RATES * min(SHORT, steps) * (config.train.learning_rate == "auto")
    places = map(as_pairs(pairs).origin, range(len(pairs)))
    images = len({(id(source), index) for source, index in places})
    texts = sum(map(len, pairs.captions))
    once = texts * _CAPTION + images * (not config.prior.fitted)
    again = steps * config.train.batch_size * (1 + _CAPTION)
    if once >= again or (len(pairs) + texts) * _ROW > memory_of(torch.device("cpu")) / 8:
        return False
    return build.reads_alike(student, pairs)


def _sample(
    config: RefineConfig,
    model: Any,
    pairs: ImageCaptions | Stream,
    count: int,
    device: Any,
    reader: PixelReader | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few pairs as training encodes them, which may be with two texts an image."""
    pixels, tokens = build.sample_pairs(model, pairs, count, reader)
    if Objective(config.loss).needs_wrong_texts:
        tokens = torch.stack([tokens, tokens], dim=1)
    return pixels.to(device), tokens.to(device)


# --------------------------------------------------------------------------------------------------
# The plan.


SAMPLE = {"cuda": 64}  # pairs that a step is measured on: few do not fill a GPU
_FEW = 32  # on other devices
_PATIENCE = 3.0  # seconds of trying


def say_plan(
    config: RefineConfig | CompareConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    measured: Mapping[str, int],
    accelerator: Accelerator,
    reader: PixelReader,
    *,
    trainings: float = 1,
) -> int:
    """Say it, from a step that changes nothing; with `dry_run` stop there. Every process asks.

    `measured` are the images, by what they are, that are embedded each time that a model is scored,
    before all trainings and behind each; `trainings` how many there are. Returns how many processes
    should decode: as asked for, else as many as reading and a step were measured to need.

    Raises:
        Planned: `dry_run` asks for no more.
    """
    run = config if isinstance(config, RefineConfig) else config.refinement()
    steps = build.count_steps(run.train, pairs, accelerator.num_processes)
    lines, workers = _lines(run, student, pairs, measured, accelerator, reader, trainings, steps)
    for line in lines:
        remark(line)
    if config.dry_run:
        written = "only pixels were cached" if config.data.cache_images else "nothing was written"
        raise Planned(f"--dry-run stops here; {written}.")
    return workers


def _lines(
    config: RefineConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    measured: Mapping[str, int],
    accelerator: Accelerator,
    reader: PixelReader,
    trainings: float,
    steps: int,
) -> tuple[list[str], int]:
    train, device, processes = config.train, accelerator.device, accelerator.num_processes
    batch = train.batch_size // processes
    # a stream is opened once; its rows are read by one process whatever decodes them
    few = pairs.prefix(SAMPLE.get(device.type, _FEW)) if isinstance(pairs, Stream) else pairs
    # quietly, as training says what it chooses
    with quietly():
        precision = choose_precision(train, student, few, accelerator)
    with quietly(), build.build_part(config, student, accelerator) as part:
        size = choose_micro_batch(config, student, precision, few, accelerator)
        count = min(SAMPLE.get(device.type, _FEW), size)  # more might not fit
        _sample(config, student, few, 1, device, reader)  # what reads them is loaded by it
        begin = time.perf_counter()
        sample = _sample(config, student, few, count, device, reader)
        load = (time.perf_counter() - begin) / count
        towers = StudentTowers(student, precision)
        kept = bytes_per_pair(towers, *(side[:2] for side in sample))
        forward, whole = _seconds(towers, *sample)
    # a teacher's pass, and one more of the student where the batch is encoded in parts
    kept_once = keeps_teacher(config, student, pairs, accelerator)
    needed = Objective(config.loss).needs_teacher and not kept_once
    heads = build.find_heads(student, config.train, accelerator, few)
    more = 0.0 if heads else forward * (needed + (size < batch))
    # above a trunk that is looked up no image is read, and only the heads' gradient is left
    blind = heads is not None and kept_once
    busy = max(0.0, whole - forward + more) + (0.0 if blind else forward)
    workers = train.workers
    if workers is None:
        workers = 0 if blind else build.workers_for(load, busy, device)
    read = load / (1 + workers)
    seen = forward + read
    step = batch * (busy + (0.0 if blind else read))
    images = sum(measured.values()) / processes
    score = images * seen
    seconds = trainings * (steps * step + score) + score
    listed = build.count_pairs(train, pairs, steps)
    if kept_once:
        seconds += listed * seen
    if trainings == 1 and train.learning_rate == "auto":
        seconds += MOST_RATES * min(SHORT, steps) * step
    used = steps * train.batch_size
    share = f"{used:,} of {listed:,}" if used < listed else f"{listed:,}"
    weights = sum(weight.numel() for weight in student.state_dict().values())
    size_of = 4 * _copies(config, accelerator) * weights + size * kept
    runs = "" if trainings == 1 else f"{trainings:g} trainings, each of "
    scored = ", ".join(f"{count:,} {what}" for what, count in measured.items() if count)
    once = (
        "The teacher's features are computed once, before the first step, and kept (docs/runs.md)."
    )
    decoding = (
        f" Images are decoded by {workers} more process{'es' * (workers > 1)} (--train.workers): "
        f"one reads them {busy / max(load, 1e-9):.2g} times as fast as the model takes them."
    )
    lines = [
        f"{runs}{share} pairs of {pairs.name} in {steps:,} "
        f"step{'s' * (steps > 1)} of {train.batch_size:,}; scored on {scored}.",
        f"About {duration(seconds)} on {build.device_name(device)}: {step:.2g} s a step, from "
        f"{count} pairs that were tried. Weights, optimiser and graph: {size_text(int(size_of))}."
        + f"{decoding if workers else ''}",
        f"{part} Learning rate {train.learning_rate}, recipe {config.recipe}."
        if trainings == 1
        else str(part),
        *([once] if kept_once and trainings == 1 else []),
    ]
    return lines, workers


def _seconds(
    towers: StudentTowers, pixels: torch.Tensor, tokens: torch.Tensor
) -> tuple[float, ...]:
    """Of a pair's forward pass, and of forward and backward, in the quickest round.

    The first ones load kernels, and a machine that was busy just then made a step ten times as long
    as it was; two are run, and up to five while that takes no more than a few seconds.
    """
    device = pixels.device
    rounds: list[tuple[float, float]] = []
    while len(rounds) < 2 or (len(rounds) < 5 and sum(whole for _, whole in rounds) < _PATIENCE):
        begin = _now(device)
        features = towers(pixels, tokens).features
        forward = _now(device) - begin
        loss = sum(side.square().mean() for side in features if side.requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        rounds.append((forward, _now(device) - begin))
    towers.zero_grad(set_to_none=True)
    forward, whole = min(rounds, key=lambda found: found[1])
    return forward / len(pixels), whole / len(pixels)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
