"""What an epoch costs from one GPU to sixty-four, by arithmetic: the tables of docs/scale.md.

    python benchmarks/scale.py
    python benchmarks/scale.py --processes 1 2 --model ViT-B-32 --batch 64   # measured, on CPUs

The second takes steps of one batch in so many gloo processes of one thread each, in turn, round by
round. Efficiency is the rate of P processes by P times the rate of one, in the same round; CPU time
is that of all of them, which others on the machine change less, but which does not show who waits.

Counted: floating-point operations of both towers on the meta device, parameters, bytes. Taken from
data sheets or assumed, and to be replaced by your own: everything in `ASSUMED`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import open_clip
import torch
from step import random_model, spread
from torch.utils.flop_counter import FlopCounterMode

from clip_refine.config import RefineConfig
from clip_refine.data import PairBatch
from clip_refine.models import Teacher, load_open_clip
from clip_refine.models.encoder import quick_on_cpu
from clip_refine.priors import StandardNormal
from clip_refine.roads import build
from clip_refine.toy import model_directory
from clip_refine.train import TowerPrecision

MODELS = ("ViT-B-32", "ViT-L-14", "ViT-H-14")
PAIRS = (100_000, 10_000_000, 1_000_000_000)
GPUS = (1, 8, 64)
TOKENS = 16  # to which most captions' batches are cut; the towers' own length is 77
BATCH = 512  # pairs a GPU
CACHED = 3 * 224**2  # bytes of an image's pixels
ASSUMED = {
    "peak": 989e12,  # H100 SXM, bf16, dense, by its data sheet
    "utilisation": 0.4,  # of it; the aim of benchmarks/gpu.py, not yet measured by us
    "cores": 16,  # that decode, a GPU
    "decoded": 150.0,  # images a second and core; benchmarks/bench.py --rows loader has yours
    "image": 50e3,  # bytes of a stored photograph
    "disk": 2e9,  # bytes a second and machine of 8 GPUs
    "nvlink": 450e9,  # bytes a second between GPUs of one machine
    "network": 50e9,  # bytes a second between machines
}


def forward_flops(name: str) -> tuple[float, int, int]:
    """Operations of both towers for one pair, parameters, dimension of the features."""
    config = open_clip.get_model_config(name)
    assert config is not None
    with torch.device("meta"):
        model = open_clip.CLIP(**config).eval()
        pixels = torch.empty(1, 3, *[config["vision_cfg"]["image_size"]] * 2)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        model.positional_embedding = torch.nn.Parameter(model.positional_embedding[:TOKENS])
        model.attn_mask = model.attn_mask[:TOKENS, :TOKENS]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.encode_image(pixels)
            model.encode_text(tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return float(counter.get_total_flops()), parameters, config["embed_dim"]


def exchanged(parameters: int, dim: int, gpus: int) -> float:
    """Bytes a GPU and step: gradients there and back; features of all, and theirs likewise."""
    return 2 * 4 * parameters + 3 * 2 * 4 * dim * BATCH * gpus


WAYS = ("listed", "cached", "streamed")  # in which images come


def seconds(
    flops: float, parameters: int, dim: int, pairs: int, gpus: int, way: str
) -> dict[str, float]:
    """What each part of one epoch takes by itself; the largest is what the epoch waits for.

    Of a stream each process reads all and decodes its share; those of one machine read at about the
    same time, so that its disk gives a shard once.
    """
    machines, steps = -(-gpus // 8), pairs / (BATCH * gpus)
    link = ASSUMED["network"] if machines > 1 else ASSUMED["nvlink"]
    moved = exchanged(parameters, dim, gpus)
    # both directions of the student, forward and backward, and of the teacher: own rows with all
    similarities = 2 * 4 * 2 * dim * BATCH * BATCH * gpus * steps
    stored = CACHED if way == "cached" else ASSUMED["image"]
    decoding = 0.0 if way == "cached" else pairs / gpus / (ASSUMED["cores"] * ASSUMED["decoded"])
    rate = ASSUMED["peak"] * ASSUMED["utilisation"]
    return {
        "arithmetic": (4 * flops * pairs / gpus + similarities) / rate,
        "decoding": decoding,
        "disk": pairs * stored / (1 if way == "streamed" else machines) / ASSUMED["disk"],
        "network": moved * steps / link if gpus > 1 else 0.0,
    }


def shown(taken: float) -> str:
    """Seconds as people say them."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if taken >= 1.5 * size:
            return f"{taken / size:.3g} {unit}"
    return f"{taken:.2g} s"


def rows() -> Iterator[str]:
    """Both tables."""
    counted = {name: forward_flops(name) for name in MODELS}
    yield (
        "| model | parameters | GFLOP forward a pair | GFLOP trained | ms a pair | MB read, "
        "with pixels cached | MB sent | state GB | gradients GB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, (flops, parameters, dim) in counted.items():
        rate, gpus = ASSUMED["peak"] * ASSUMED["utilisation"], 8
        took = 1e3 * 4 * flops / rate
        sent = exchanged(parameters, dim, gpus) / BATCH / 1e6
        read = f"{ASSUMED['image'] / 1e6:.2f}, {CACHED / 1e6:.2f}"
        state = (16 + 4) * parameters / 1e9  # weights, gradient, two moments; the teacher's weights
        yield (
            f"| {name} | {parameters / 1e6:.0f} M | {flops / 1e9:.1f} | {4 * flops / 1e9:.1f} | "
            f"{took:.2f} | {read} | {sent:.1f} | {state:.1f} | {4 * parameters / 1e9:.1f} |"
        )
    yield ""
    yield "| model | pairs | GPUs | epoch | waits for | cached | waits for | streamed | waits for |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, found in counted.items():
        for pairs in PAIRS:
            for gpus in GPUS:
                cells = []
                for way in WAYS:
                    parts = seconds(*found, pairs, gpus, way)
                    slowest = max(parts, key=parts.__getitem__)
                    cells += [shown(parts[slowest]), slowest]
                yield f"| {name} | {pairs:,} | {gpus} | {' | '.join(cells)} |"


# --------------------------------------------------------------------------------------------------
# Processes on this machine.


def take_steps(options: argparse.Namespace) -> None:
    """One of several processes; the first one writes a line of JSON."""
    torch.set_num_threads(1)
    accelerator = build.build_accelerator("cpu")
    toy = options.model == "toy"
    model = load_open_clip(f"local-dir:{model_directory()}") if toy else random_model(options.model)
    config = RefineConfig.model_validate({"train": {"batch_size": options.batch}})
    student = build.build_student(model, config, accelerator.device)
    more = TowerPrecision.from_name(options.precision), StandardNormal(), accelerator
    trainer = build.build_trainer(config, student, Teacher(student), *more, steps=1)
    quick_on_cpu(student)
    share, size = options.batch // accelerator.num_processes, model.clip.visual.image_size[0]
    tokens = model.tokenizer(["a photo of a dog in the park"] * share)
    batch = PairBatch(torch.randn(share, 3, size, size), tokens, range(share))
    taken = []
    for _ in range(options.steps + 1):
        accelerator.wait_for_everyone()
        begin, spent = time.perf_counter(), time.process_time()
        trainer.step(1, batch, steps=1)
        own = torch.tensor([time.perf_counter() - begin, time.process_time() - spent])
        seconds, processor = accelerator.gather(own[None]).unbind(dim=1)
        taken.append((float(seconds.max()), float(processor.sum())))
    if accelerator.is_main_process:
        print(json.dumps([statistics.median(side) for side in zip(*taken[1:], strict=True)]))
    accelerator.end_training()


def processes(options: argparse.Namespace) -> Iterator[str]:
    """A table; a round is a run of each number of processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    kept = ("model", "batch", "steps", "precision")
    settings = [word for name in kept for word in (f"--{name}", str(vars(options)[name]))]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in options.processes}
    for _ in range(options.rounds):
        for count, rounds in found.items():
            command = [*launch, str(count), __file__, "--one", *settings]
            run = subprocess.run(command, env=alone, check=True, capture_output=True, text=True)
            rounds.append(tuple(json.loads(run.stdout.splitlines()[-1])))
    first = options.processes[0]
    yield f"{options.model}, batch {options.batch}, {options.precision}, a thread each"
    yield "| processes | pairs/s | efficiency | CPU s a step, all |"
    yield "|---|---|---|---|"
    for count, rounds in found.items():
        both = list(zip(found[first], rounds, strict=True))
        shown = (
            [options.batch / seconds for seconds, _ in rounds],
            [first * before[0] / (count * now[0]) for before, now in both],
            [processor for _, processor in rounds],
        )
        yield f"| {count} | {' | '.join(map(spread, shown))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[])
    parser.add_argument("--model", default="toy", help="toy, or an architecture (random weights)")
    parser.add_argument("--batch", type=int, default=64, help="pairs of all processes")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=5, help="of a run, behind one that warms up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        take_steps(options)
        return
    for line in processes(options) if options.processes else rows():
        print(line, flush=True)


if __name__ == "__main__":
    main()
