"""The refine step on a GPU beside a textbook float32 loop, and what we aim at: one command, under
ten minutes.

    python benchmarks/gpu.py                      # ViT-B-32 at 512, ViT-L-14 and ViT-H-14 in parts
    python benchmarks/gpu.py --device cpu --models ViT-B-32 --batch 8 --steps 1   # tries the script

Aims are those for one H200; an epoch is the first model's, of 118,287 pairs (COCO) with cached
pixels, by the rate of a pass over drawn images through our loader once their pixels are cached.

Weights and data are random. Utilisation is the arithmetic of the model, forward and backward of the
student and forward of the teacher, by the peak of the device that `--peak` names in TFLOP/s of bf16
(H100 SXM 989, H200 989, A100 312, by their data sheets); recomputed passes of micro-batches do not
count.
"""

import argparse
import copy
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from step import random_model, synchronize, textbook_step
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_refine.config import RefineConfig
from clip_refine.data import EpochPlan, PairBatch
from clip_refine.data.loader import PairLoader, PixelReader, with_cached_pixels
from clip_refine.models import OpenClipEncoder, Teacher
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.toy import ToyPairs
from clip_refine.train import TowerPrecision, Trainer
from clip_refine.train.part import compiled_blocks


def forward_flops(model: OpenClipEncoder, batch: PairBatch) -> float:
    """Of both towers and one pair; attention as products, since as one call it may not count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
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


COCO = 118_287  # pairs of an epoch


class Files(ToyPairs):
    """Drawn images as files are: what is cached is known by its bytes."""

    def image_bytes(self, index: int) -> bytes:
        file = io.BytesIO()
        self.load_image(index).save(file, "png", compress_level=1)
        return file.getvalue()


def epoch_seconds(model: OpenClipEncoder, trainer: Trainer, batch: int, steps: int) -> float:
    """Of an epoch of COCO's size from cached pixels; two steps warm up."""
    device = trainer.accelerator.device
    workers = build.count_workers(None, device)
    pairs = Files("gpu", size=(steps + 2) * batch)
    with tempfile.TemporaryDirectory() as folder:
        reader = PixelReader(model.preprocess)
        reader = with_cached_pixels(reader, [pairs], Path(folder), workers=workers, visible=False)
        assert len(reader.cached.rows if reader.cached else ()) == len(pairs)
        reader = replace(reader, as_levels=True)  # as `refine` does beside a GPU
        fed = {"workers": workers, "pin_memory": device.type == "cuda", "batch_size": batch}
        loader = PairLoader(pairs, preprocess=reader, tokenizer=model.tokenizer, **fed)
        plan = EpochPlan.draw(pairs, generator=torch.Generator().manual_seed(0))
        begin = 0.0
        for number, pairs_read in enumerate(loader.epoch(plan)):
            if number == 2:
                synchronize(device)
                begin = time.perf_counter()
            trainer.step(1, pairs_read.to(device), steps=1)
        synchronize(device)
        return (time.perf_counter() - begin) / (steps * batch) * COCO


def aims(found: dict[str, dict[str, float]], epoch: float, first: str) -> list[str]:
    """What is aimed at on one H200 and what was found; there is no verdict on other machines."""
    one, large = found[first], found.get("ViT-L-14", {})
    rows = [
        (f"{first}: times the textbook loop", "at least 10", one["times"], one["times"] >= 10),
        (f"{first}: utilisation, %", "at least 40", one["used"], one["used"] >= 40),
        (f"{first}: s for {COCO:,} pairs, cached pixels", "below 60", epoch, epoch < 60),
    ]
    if large:
        rows.append(("ViT-L-14: peak GB", "below 16", large["peak"], large["peak"] < 16))
    if "ViT-H-14" in found:
        rows.append(("ViT-H-14: peak GB", "fits", found["ViT-H-14"]["peak"], True))
    asked = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
    lines = [
        f"| {what} | {aim} | {value:.1f} | {('no', 'yes')[met] if asked else 'other machine'} |"
        for what, aim, value, met in rows
    ]
    return ["| | aim | found | met |", "|---|---|---|---|", *lines]


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
    heads = "model", "GFLOP a pair", "micro-batch", "textbook pairs/s", "ours", "times", "peak GB"
    print("|", " | ".join((*heads, "utilisation, %")), "|")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    found, epoch = {}, float("nan")
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
            peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
            if position == 0:
                epoch = epoch_seconds(model, trainer, options.batch, options.steps)
        ours = options.batch / taken
        used = 4 * flops * ours / (options.peak * 1e12) * 100
        times = ours / theirs if theirs else 0.0
        found[name] = {"times": times, "used": used, "peak": peak}
        rates = f"{theirs:.1f} | {ours:.1f} | {times:.1f}" if theirs else f" | {ours:.1f} | "
        print(f"| {name} | {flops / 1e9:.2f} | {micro} | {rates} | {peak:.1f} | {used:.1f} |")
    print("", *aims(found, epoch, options.models[0]), sep="\n")


if __name__ == "__main__":
    main()
