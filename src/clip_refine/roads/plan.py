"""What a verb is about to do, in three lines and before it begins: pairs, time, memory, weights."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from clip_refine.config import RefineConfig
from clip_refine.config.runs import CompareConfig
from clip_refine.data import ImageCaptions, LabelledImages, Stream
from clip_refine.roads import build
from clip_refine.roads.sweeps import MOST_RATES, SHORT
from clip_refine.support.console import duration, remark
from clip_refine.support.errors import Planned
from clip_refine.support.folder import size_text
from clip_refine.train import StudentTowers, TowerPrecision
from clip_refine.train.micro_batch import COPIES, bytes_per_pair, fitting_size, memory_of

SAMPLE = {"cuda": 64}  # pairs that a step is measured on: few do not fill a GPU
_FEW = 32  # on other devices


def say_plan(
    config: RefineConfig | CompareConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    measured: Sequence[ImageCaptions | LabelledImages],
    accelerator: Accelerator,
    *,
    trainings: float = 1,
) -> None:
    """Say it on the first process, from a step that changes nothing; with `dry_run` stop there.

    `measured` are the images that are embedded to score a model; `trainings` how many there are.

    Raises:
        Planned: `dry_run` asks for no more.
    """
    run = config if isinstance(config, RefineConfig) else config.refinement()
    steps = build.count_steps(run.train, pairs, accelerator.num_processes)
    if accelerator.is_main_process:
        for line in _lines(run, student, pairs, measured, accelerator, trainings, steps):
            remark(line)
    if config.dry_run:
        raise Planned("--dry-run stops here; nothing was written.")


def _lines(
    config: RefineConfig,
    student: Any,
    pairs: ImageCaptions | Stream,
    measured: Sequence[ImageCaptions | LabelledImages],
    accelerator: Accelerator,
    trainings: float,
    steps: int,
) -> list[str]:
    train, device, processes = config.train, accelerator.device, accelerator.num_processes
    batch = train.batch_size // processes
    name = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(train.precision)
    precision = TowerPrecision.from_name(name or train.precision)  # pyright: ignore
    with build.build_part(config, student, accelerator) as part:
        count = min(SAMPLE.get(device.type, _FEW), batch)
        begin = time.perf_counter()
        sample = build.sample_pairs(student, pairs, count)
        load = (time.perf_counter() - begin) / count
        sample = tuple(side.to(device) for side in sample)
        towers = StudentTowers(student, precision)
        kept = bytes_per_pair(towers, *(side[:2] for side in sample))
        size = min(batch, fitting_size(student, kept, memory_of(device)))
        if isinstance(train.micro_batch, int):
            size = min(batch, train.micro_batch)
        forward, whole = _seconds(towers, *sample)
    # a teacher's pass, and one more of the student where the batch is encoded in parts
    more = forward * (bool(config.loss.hycd_weight) + (size < batch))
    free = 1 + build.count_workers(train.workers, device)
    step = batch * (whole + more + load / free)
    images = sum(map(len, measured)) / processes
    score = images * (forward + load / free)
    seconds = trainings * (steps * step + score) + score
    if trainings == 1 and train.learning_rate == "auto":
        seconds += MOST_RATES * min(SHORT, steps) * step
    weights = sum(weight.numel() for weight in student.state_dict().values())
    size_of = 4 * COPIES * weights + size * kept
    runs = "" if trainings == 1 else f"{trainings:g} trainings, each of "
    return [
        f"{runs}{build.count_pairs(train, pairs, steps):,} pairs of {pairs.name} in {steps:,} "
        f"step{'s' * (steps > 1)} of {train.batch_size:,}; scored on {sum(map(len, measured)):,} "
        "images.",
        f"About {duration(seconds)} on {build.device_name(device)}: {step:.2g} s a step, from "
        f"{count} pairs that were tried. Memory: about {size_text(int(size_of))}.",
        f"{part} Learning rate {train.learning_rate}, recipe {config.recipe}."
        if trainings == 1
        else str(part),
    ]


def _seconds(
    towers: StudentTowers, pixels: torch.Tensor, tokens: torch.Tensor
) -> tuple[float, ...]:
    """Of a pair's forward pass, and of forward and backward; the second round, which is warm."""
    device, found = pixels.device, (0.0, 0.0)
    for _ in range(2):
        begin = _now(device)
        features = towers(pixels, tokens).features
        forward = _now(device) - begin
        loss = sum(side.square().mean() for side in features if side.requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        found = forward / len(pixels), (_now(device) - begin) / len(pixels)
    towers.zero_grad(set_to_none=True)
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
