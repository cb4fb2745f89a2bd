"""Peak memory of a refine step by batch and micro-batch: `python benchmarks/memory.py`.

With `--losses 4096` that of every objective's loss alone, forward and backward on so many pairs of
512 dimensions, for one of `--processes 1 2 8`, counted twice: what PyTorch has allocated at once,
and what the process takes, which is more by what malloc keeps of blocks below 32 MiB that were
given back, unless it is told to keep none above 64 KiB, as here. Each row is a process of its own,
since a process never gives its peak back. Weights and data are random, as memory does not depend on
them.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from step import random_model, textbook_step
from torch.profiler import ProfilerActivity, profile

from clip_refine.config import RefineConfig
from clip_refine.config.settings import RECIPES
from clip_refine.data import PairBatch
from clip_refine.losses import Objective, PairFeatures
from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.models.encoder import quick_on_cpu
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.support.console import PeakMemory
from clip_refine.train import TowerPrecision


def measure(options: argparse.Namespace) -> None:
    """One line: batch, micro-batch, peak in GiB, seconds of the second step."""
    peak = PeakMemory(torch.device("cpu"))
    torch.manual_seed(0)
    model = random_model(options.model)
    pixels = torch.randn(options.batch, 3, 224, 224)
    texts = ["a photo of a dog in the park"] * options.batch
    batch = PairBatch(pixels, model.tokenizer(texts), range(options.batch))
    step = taken_step(options, model) if not options.textbook else textbook_step(model)
    tokens = model.full_length_tokenizer(texts) if options.textbook else batch.tokens
    for _ in range(2):
        start = time.perf_counter()
        step(batch, tokens)
        seconds = time.perf_counter() - start
    gibibytes = peak.gigabytes * 1e9 / 2**30
    print(f"| {options.batch} | {options.micro} | {gibibytes:.1f} | {seconds:.1f} |", flush=True)


def taken_step(
    options: argparse.Namespace, model: OpenClipEncoder
) -> Callable[[PairBatch, torch.Tensor], object]:
    """Ours, in parts."""
    train = {"batch_size": options.batch, "micro_batch": options.micro, "device": "cpu"}
    config = RefineConfig.model_validate({"train": train})
    accelerator = Accelerator(cpu=True)
    student = build.build_student(model, config, accelerator.device)
    precision = TowerPrecision.from_name(options.precision)
    teacher, prior = Teacher(student), StandardNormal()
    quick_on_cpu(student)  # as `build_part` has it
    trainer = build.build_trainer(config, student, teacher, precision, prior, accelerator, steps=2)
    return lambda batch, _: trainer.step(1, batch, steps=2)


def measure_loss(recipe: str, batch: int, processes: int) -> None:
    """One line: objective, processes, MiB above the features by both counts."""
    loss_step(recipe, 8, 1)()  # what libraries take once is not the loss's
    step = loss_step(recipe, batch, processes)
    before = PeakMemory(torch.device("cpu")).gigabytes
    peak = PeakMemory(torch.device("cpu"))
    step()
    taken = (peak.gigabytes - before) * 1e9 / 2**20
    print(f"| {recipe} | {processes} | {allocated(step):.0f} | {taken:.0f} |", flush=True)


def loss_step(recipe: str, count: int, processes: int) -> Callable[[], None]:
    """A loss there and back, whose gradients are let go."""
    objective = Objective(RefineConfig.model_validate({"recipe": recipe}).loss)
    features = [torch.randn(count, 512) for _ in range(5)]
    mix, gap = torch.rand(count), torch.zeros(512)
    student = PairFeatures(*(side.requires_grad_() for side in features[:2]))

    def step() -> None:
        terms = objective(
            student,
            PairFeatures(*features[2:4]),
            features[4],
            logit_scale=torch.tensor(100.0),
            mix=mix,
            centroid_gap=gap,
            rows=slice(0, count // processes),
        )
        terms.total.backward()
        for side in student:
            side.grad = None

    return step


def allocated(run: Callable[[], object]) -> float:
    """The most MiB that PyTorch's tensors on the CPU take at once, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--batch", type=int, help="measure one, in this process")
    parser.add_argument("--textbook", action="store_true", help="of --batch: a float32 loop")
    parser.add_argument("--losses", type=int, help="pairs; measure the losses alone")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--recipe", help="measure one, in this process")
    options = parser.parse_args()
    if options.recipe:
        measure_loss(options.recipe, options.losses, options.processes[0])
        return
    if options.losses:
        print("| objective | processes | MiB allocated | taken |\n|---|---|---|---|", flush=True)
        one = [sys.executable, __file__, "--losses", str(options.losses)]
        exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
        for recipe in RECIPES:
            for count in map(str, options.processes if recipe != "own" else ()):
                row = ["--recipe", recipe, "--processes", count]
                subprocess.run([*one, *row], check=True, env=exact)
        return
    if options.batch:
        measure(options)
        return
    print("| batch | micro-batch | peak GiB | seconds a step |\n|---|---|---|---|", flush=True)
    whole = [(options.micro, options.micro), (64, 64)]  # more in one go does not fit everywhere
    for batch, micro in [*whole, *((batch, options.micro) for batch in options.batches)]:
        arguments = ["--batch", str(batch), "--micro", str(micro), "--precision", options.precision]
        subprocess.run([sys.executable, __file__, "--model", options.model, *arguments], check=True)


if __name__ == "__main__":
    main()
