"""What a verb is about to do: what is chosen for device and model, and what that will take.

The plan is said before it begins, in three lines: pairs, time, memory, weights.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from clip_refine.config import RefineConfig, TrainConfig
from clip_refine.config.runs import CompareConfig
from clip_refine.data import ImageCaptions, Stream
from clip_refine.data.pairs import as_pairs
from clip_refine.losses import Objective
from clip_refine.roads import build
from clip_refine.roads.sweeps import MOST_RATES, SHORT
from clip_refine.support.console import console, duration, quietly, remark
from clip_refine.support.errors import Planned
from clip_refine.support.folder import size_text
from clip_refine.train import StudentTowers, TowerPrecision, faster_precision
from clip_refine.train.micro_batch import (
    COPIES,
    bytes_per_pair,
    fitting_size,
    memory_of,
)

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
    config: RefineConfig, model: Any, pairs: ImageCaptions | Stream, count: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few pairs as training encodes them, which may be with two texts an image."""
    pixels, tokens = build.sample_pairs(model, pairs, count)
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
    *,
    trainings: float = 1,
) -> None:
    """Say it, from a step that changes nothing; with `dry_run` stop there. Every process asks.

    `measured` are the images, by what they are, that are embedded each time that a model is scored,
    before all trainings and behind each; `trainings` how many there are.

    Raises:
        Planned: `dry_run` asks for no more.
    """
    run = config if isinstance(config, RefineConfig) else config.refinement()
    steps = build.count_steps(run.train, pairs, accelerator.num_processes)
    for line in _lines(run, student, pairs, measured, accelerator, trainings, steps):
        remark(line)
    if config.dry_run:
        raise Planned("--dry-run stops here; nothing was written.")


def _lines(
    config: RefineConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    measured: Mapping[str, int],
    accelerator: Accelerator,
    trainings: float,
    steps: int,
) -> list[str]:
    train, device, processes = config.train, accelerator.device, accelerator.num_processes
    batch = train.batch_size // processes
    # quietly, as training says what it chooses
    with quietly():
        precision = choose_precision(train, student, pairs, accelerator)
    with quietly(), build.build_part(config, student, accelerator) as part:
        size = choose_micro_batch(config, student, precision, pairs, accelerator)
        count = min(SAMPLE.get(device.type, _FEW), size)  # more might not fit
        _sample(config, student, pairs, 1, device)  # what reads them is loaded by it
        begin = time.perf_counter()
        sample = _sample(config, student, pairs, count, device)
        load = (time.perf_counter() - begin) / count
        towers = StudentTowers(student, precision)
        kept = bytes_per_pair(towers, *(side[:2] for side in sample))
        forward, whole = _seconds(towers, *sample)
    # a teacher's pass, and one more of the student where the batch is encoded in parts
    kept_once = keeps_teacher(config, student, pairs, accelerator)
    needed = Objective(config.loss).needs_teacher and not kept_once
    heads = build.find_heads(student, config.train, accelerator, pairs)
    more = 0.0 if heads else forward * (needed + (size < batch))
    free = 1 + build.count_workers(train.workers, device)
    seen = forward + load / free
    # above a trunk that is looked up nothing is left but the gradient of the heads
    step = batch * max(0.0, whole - forward + more + (0.0 if heads and kept_once else seen))
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
    return [
        f"{runs}{share} pairs of {pairs.name} in {steps:,} "
        f"step{'s' * (steps > 1)} of {train.batch_size:,}; scored on {scored}.",
        f"About {duration(seconds)} on {build.device_name(device)}: {step:.2g} s a step, from "
        f"{count} pairs that were tried. Weights, optimiser and graph: {size_text(int(size_of))}.",
        f"{part} Learning rate {train.learning_rate}, recipe {config.recipe}."
        if trainings == 1
        else str(part),
        *([once] if kept_once and trainings == 1 else []),
    ]


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
