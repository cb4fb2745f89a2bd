"""The refine step on a GPU beside a textbook float32 loop: one command, under ten minutes.

    python benchmarks/gpu.py                      # ViT-B-32 at 512, ViT-L-14 and ViT-H-14 in parts
    python benchmarks/gpu.py --device cpu --models ViT-B-32 --batch 8 --steps 1   # tries the script

Weights and data are random. Utilisation is the arithmetic of the model, forward and backward of the
student and forward of the teacher, by the peak of the device that `--peak` names in TFLOP/s of bf16
(H100 SXM 989, H200 989, A100 312, by their data sheets); recomputed passes of micro-batches do not
count.
"""

import argparse
import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from step import random_model, synchronize, textbook_step
from torch.utils.flop_counter import FlopCounterMode

from clip_refine.config import RefineConfig
from clip_refine.data import PairBatch
from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.train import TowerPrecision
from clip_refine.train.part import compiled_blocks


def forward_flops(model: OpenClipEncoder, batch: PairBatch) -> float:
    """Of both towers and one pair."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(batch.pixels[:2])
        model.encode_text(batch.tokens[:2])
    return counter.get_total_flops() / 2


def seconds_of(run: Callable[[], object], steps: int, device: torch.device) -> float:
    run()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="*", default=["ViT-B-32", "ViT-L-14", "ViT-H-14"])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--micro", type=int, default=64, help="of every model but the first")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak", type=float, default=989.0)
    parser.add_argument("--compile", action="store_true", help="as --train.compile does")
    options = parser.parse_args()
    device = build.build_accelerator(options.device).device
    print("| model | micro-batch | textbook pairs/s | ours | times | peak GiB | utilisation |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for position, name in enumerate(options.models):
        model = random_model(name).to(device)
        size = model.clip.visual.image_size[0]
        pixels = torch.randn(options.batch, 3, size, size, device=device)
        texts = ["a photo of a dog in the park"] * options.batch
        batch = PairBatch(pixels, model.tokenizer(texts).to(device), range(options.batch))
        flops = forward_flops(model, batch)
        theirs = 0.0
        if position == 0:  # the others do not fit in one go
            loop = textbook_step(copy.deepcopy(model))
            full = model.full_length_tokenizer(texts).to(device)
            taken = seconds_of(partial(loop, batch, full), options.steps, device)
            theirs = options.batch / taken
            del loop, full
        micro = options.batch if position == 0 else min(options.micro, options.batch)
        train = {"batch_size": options.batch, "micro_batch": micro}
        config = RefineConfig.model_validate({"train": train})
        accelerator = build.build_accelerator(options.device)
        student = build.build_student(model, config, device)
        precision = TowerPrecision.from_name("bf16")
        trainer = build.build_trainer(
            config, student, Teacher(student), precision, StandardNormal(), accelerator, steps=1
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        towers = (student, trainer.teacher.encoder)
        with compiled_blocks(*towers) if options.compile else nullcontext():
            taken = seconds_of(partial(trainer.step, 1, batch, steps=1), options.steps, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        ours = options.batch / taken
        used = 4 * flops * ours / (options.peak * 1e12)
        times = f"{ours / theirs:.1f}" if theirs else ""
        rates = f"{theirs:.1f} | {ours:.1f}" if theirs else f" | {ours:.1f}"
        print(f"| {name} | {micro} | {rates} | {times} | {peak:.1f} | {used:.1%} |", flush=True)


if __name__ == "__main__":
    main()
