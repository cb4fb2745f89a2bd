"""Ours beside its rivals, in turn, round by round: `make bench` (or `python benchmarks/bench.py`).

One Markdown table, and a line of JSON with what it ran on in `benchmarks/history.jsonl`. A ratio is
taken within each round, since the machine's speed drifts; shown is the median with the range.
Rivals are what a user would write otherwise, as it is meant to be used. `--rows step embed`
measures only these; `--rounds` sets how often, less where a row has had its `--patience`.

`--against COMMIT` has the refine step of an earlier commit as one more rival, from a work tree of
its own: `python benchmarks/bench.py --rows step --against 8a12f8e`.
"""

import argparse
import copy
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from step import our_trainer, random_model, textbook_step, trainer_step
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from clip_refine.config.runs import VectorsConfig
from clip_refine.data import PairBatch, PairLoader, PixelReader, image_batches
from clip_refine.data.loader import EpochPlan
from clip_refine.data.pairs import ImageCaptions, as_pairs
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.embed import EmbeddedPairs, Embedder
from clip_refine.roads import build
from clip_refine.roads.vector_maps import learn_maps, recipe_loss
from clip_refine.support.console import quietly
from clip_refine.support.folder import describe_environment
from clip_refine.toy import ToyPairs
from clip_refine.train import StepLog
from clip_refine.vectors.stored import apply_stored
from clip_refine.vectors.transforms import LinearMaps, VectorStudent

Run = Callable[[], Any]
CPU = torch.device("cpu")
PART = 32  # pairs that are encoded with a graph at a time
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


@dataclass
class Row:
    """What is done, the rival's name, the rival, ours."""

    what: str
    rival: str
    theirs: Run
    ours: Run
    count: int = 0  # of what is done in one run, for a rate; 0 where that makes no sense
    of: str = "pairs"
    unit: str = "s"  # else runs return what is compared
    warm: Run | None = None  # before all rounds; where there is none the first round is


def drawn_batch(model: OpenClipEncoder, size: int) -> tuple[PairBatch, Tensor]:
    """Pairs of the toy world, and their captions at full length."""
    pairs = ToyPairs("bench", size=size)
    texts = [pairs.captions[index][0] for index in range(size)]
    pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in range(size)])
    batch = PairBatch(pixels, model.tokenizer(texts), range(size))
    return batch, model.full_length_tokenizer(texts)


def step(options: argparse.Namespace) -> Iterator[Row]:
    """The refine step, in parts of 32, against a textbook loop, open_clip's trainer, and ours."""
    for size in options.batches:
        rivals: dict[str, Any] = {
            "textbook loop, float32": textbook_step,
            "open_clip's --distill, bf16": trainer_step,
            **({f"ours at {options.against}": earlier_step} if options.against else {}),
        }
        for name, rival in rivals.items():
            model = random_model(options.model)
            batch, full = drawn_batch(model, size)
            few, few_full = drawn_batch(model, 4)
            with ExitStack() as stay:
                untouched = copy.deepcopy(model)
                trainer = our_trainer(model, ToyPairs("bench", size=4), size, min(size, PART))
                if rival is earlier_step:
                    precision = trainer.precision.name
                    theirs = stay.enter_context(earlier_step(options, size, precision))
                else:
                    theirs = rival(untouched)

                sizes = (few, few_full), (batch, full)

                def warm(theirs=theirs, trainer=trainer, sizes=sizes) -> None:
                    for given in sizes:
                        earlier = theirs(*given)
                        now = trainer.step(1, given[0], steps=1)["loss_total"]
                        if earlier is not None:
                            pairs = len(given[0].indices)
                            print(f"Loss of the same {pairs} pairs, earlier and now:", earlier, now)

                parts = f" in parts of {PART}" if size > PART else ""
                yield Row(
                    f"refine step, {options.model}, batch {size}{parts}",
                    name,
                    lambda theirs=theirs, batch=batch, full=full: theirs(batch, full),
                    lambda trainer=trainer, batch=batch: trainer.step(1, batch, steps=1),
                    size,
                    warm=warm,
                )


EARLIER = """
import sys, torch, step
try:
    from clip_refine.train.precision import TowerPrecision
except ImportError:
    from clip_refine.train.towers import TowerPrecision
from clip_refine.data import PairBatch
from clip_refine.toy import ToyPairs
name, threads, sizes = sys.argv[1], int(sys.argv[2]), (int(sys.argv[3]), 4)
torch.set_num_threads(threads)
model, batches = step.random_model(name), {}
for size in sizes:
    pairs = ToyPairs("bench", size=size)
    pixels = torch.stack([model.preprocess(pairs.load_image(i)) for i in range(size)])
    texts = [pairs.captions[i][0] for i in range(size)]
    batches[size] = PairBatch(pixels, model.tokenizer(texts), range(size))
for module in (step, getattr(step, "build", step)):
    for chooses in ("choose_precision", "build_precision"):
        if hasattr(module, chooses):
            setattr(module, chooses, lambda *_: TowerPrecision.from_name(sys.argv[4]))
take = step.our_step(model, ToyPairs("bench", size=4), sizes[0])
for line in sys.stdin:
    print("loss", take(batches[int(line)], 1)["loss_total"], flush=True)
"""
"""A step whenever a line says how many pairs to take, with an earlier commit's own benchmark, and
in our precision: what it chose itself it measured, on these few pairs wrongly."""


@contextmanager
def earlier_step(
    options: argparse.Namespace, size: int, precision: str
) -> Iterator[Callable[[PairBatch, Tensor], float]]:
    """The step of the commit to compare with, of the same model and pairs, in its own process."""
    tree = Path(options.folder) / options.against
    if not tree.exists():
        repository = Path(__file__).parents[1]
        git = ["git", "-C", str(repository), "archive", options.against, "src", "benchmarks"]
        tree.mkdir()
        archive = subprocess.run(git, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    own = os.pathsep.join(str(tree / name) for name in ("src", "benchmarks"))
    command = [sys.executable, "-c", EARLIER, options.model, str(options.threads), str(size)]
    command.append(precision)
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        asked, said = process.stdin, process.stdout
        assert asked
        assert said

        def take(batch: PairBatch, full: Tensor) -> float:
            del full
            print(len(batch.indices), file=asked, flush=True)
            for line in said:
                if line.startswith("loss "):
                    return float(line.split()[1])
            raise RuntimeError(f"the step of {options.against} ended with {process.wait()}")

        yield take
        asked.close()


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """The peak of a process that takes two steps, against the textbook loop."""
    script = [sys.executable, str(Path(__file__).parent / "memory.py"), "--model", options.model]

    def gibibytes(*more: str) -> float:
        row = [*script, "--batch", "64", "--micro", str(PART), *more]
        said = subprocess.run(row, check=True, capture_output=True, text=True).stdout
        return float(said.splitlines()[-1].split("|")[3])

    yield Row(
        f"peak of a refine step, {options.model}, batch 64 in parts of {PART}",
        "textbook loop, float32",
        lambda: gibibytes("--textbook"),
        gibibytes,
        unit="GiB",
        warm=lambda: None,
    )


def embed(options: argparse.Namespace) -> Iterator[Row]:
    """Features of images and of captions, against the loop in open_clip's README."""
    model = random_model(options.model)
    batch, full = drawn_batch(model, 64)
    pairs = ToyPairs("bench", size=64)
    texts = [pairs.captions[index][0] for index in range(64)]
    embedder = Embedder(model, CPU, 64, visible=False)

    @torch.no_grad()
    def images() -> Tensor:
        return model.clip.encode_image(batch.pixels)

    @torch.no_grad()
    def captions() -> Tensor:
        return model.clip.encode_text(full)

    ours = lambda: embedder.encode_pixels(batch.pixels)  # noqa: E731
    yield Row("features of 64 images", "encode_image", images, ours, 64, "images")
    ours = lambda: embedder.encode_texts(texts)  # noqa: E731
    yield Row("features of 64 captions", "encode_text", captions, ours, 64, "captions")


def metrics(options: argparse.Namespace) -> Iterator[Row]:
    """Retrieval and geometry, against plain loops in float32 over blocks of all similarities."""
    count, block = options.pairs, 1024
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 512, generator=generator)
    text = torch.randn(count, 512, generator=generator).add_(image)

    def recalls(image: Tensor = image, text: Tensor = text) -> Tensor:
        a, b = normalize(image), normalize(text)
        true = (a * b).sum(1) + 1e-6  # a product rounds otherwise, and none is above itself
        forth, back = torch.zeros(len(a), dtype=torch.long), torch.zeros(len(b), dtype=torch.long)
        for start in range(0, len(a), block):
            rows = slice(start, start + block)
            similarity = a[rows] @ b.T
            forth[rows] = (similarity > true[rows, None]).sum(1)
            back += (similarity > true).sum(0)
        return torch.stack(
            [(rank < k).float().mean() for rank in (forth, back) for k in (1, 5, 10)]
        )

    def shape(image: Tensor = image, text: Tensor = text) -> Tensor:
        """Gap, alignment, uniformity, hubs, and whether a caption finds a caption first."""
        a, b = normalize(image), normalize(text)
        kernel, found, first = torch.zeros(()), torch.zeros(len(b)), torch.zeros(())
        for start in range(0, len(a), block):
            rows = slice(start, start + block)
            own, other, across, back = (
                one[rows] @ two.T for one, two in ((a, a), (b, b), (a, b), (b, a))
            )
            own.diagonal(start).fill_(-torch.inf)
            other.diagonal(start).fill_(-torch.inf)
            found += across.topk(10).indices.flatten().bincount(minlength=len(b))
            first += (other.amax(1) > back.amax(1)).sum()
            for similarity, times in ((own, 1), (other, 1), (across, 2)):
                kernel += times * (4 * similarity - 4).exp().sum()
        centred = (found - found.mean()) / found.std()
        gap = (a.mean(0) - b.mean(0)).norm()
        aligned = (a - b).square().sum(1).mean()
        uniform = (kernel / (2 * len(a) * (2 * len(a) - 1))).log()
        return torch.stack([gap, aligned, uniform, (centred**3).mean(), first / len(b)])

    few = image[:1000], text[:1000]
    yield Row(
        f"retrieval, {count:,} × {count:,}",
        "one product in blocks, float32",
        recalls,
        lambda: retrieval(image, text),
        count,
        warm=lambda: (recalls(*few), retrieval(*few)),
    )
    yield Row(
        f"geometry, {count:,} pairs",
        "the same of all pairs in blocks, float32",
        shape,
        lambda: geometry(image, text),
        count,
        warm=lambda: (shape(*few), geometry(*few)),
    )


def vectors(options: argparse.Namespace) -> Iterator[Row]:
    """Maps learnt on stored pairs, against full batches; one applied, against NumPy in memory."""
    count = min(options.pairs, 2000)
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(count, 512, generator=generator))
    text = normalize(torch.randn(count, 512, generator=generator).add_(image))
    config, eye = VectorsConfig(recipe="clip-refine", device="cpu"), torch.eye(512)
    pairs = EmbeddedPairs(image, text, torch.arange(count))
    norm = config.logit_scale**0.5
    batch = PairBatch(norm * image, norm * text, range(count))

    def loop() -> None:
        student: Any = SimpleNamespace(clip=VectorStudent(eye, eye, logit_scale=100.0))
        step = textbook_step(student)
        for _ in range(config.steps):
            step(batch, batch.tokens)

    def ours() -> None:
        loss = recipe_loss(config, config.recipe)
        learn_maps(pairs, config, loss, 0, build.build_accelerator("cpu"), StepLog(None))

    yield Row(
        f"vectors refine, {config.steps} steps on {count:,} × 512",
        "full batches, float32",
        loop,
        ours,
    )
    folder, rows = Path(options.folder), 4 * options.pairs
    source, new = folder / "stored.npy", folder / "new.npy"
    drawn = np.random.default_rng(0).standard_normal((rows, 512), dtype=np.float32)
    np.save(source, drawn.astype(np.float16))
    maps = LinearMaps(eye + 0.01, eye, 0, 0)
    weight = maps.image_map.numpy()

    def whole() -> None:
        mapped = np.load(source).astype(np.float32) @ weight
        mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
        np.save(folder / "whole.npy", mapped.astype(np.float16))

    def apply() -> None:
        new.unlink(missing_ok=True)
        apply_stored(maps, source, new, side="image")

    yield Row(
        f"vectors apply, {rows:,} × 512", "NumPy, all in memory", whole, apply, rows, "vectors"
    )


class Decoded(Dataset):
    """What torch's own loader reads."""

    def __init__(self, pairs: ImageCaptions, preprocess: Callable[..., Tensor]) -> None:
        self.pairs, self.preprocess = pairs, preprocess

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(self.pairs.load_image(index))


def loader(options: argparse.Namespace) -> Iterator[Row]:
    """Photographs as they are published: against torch's DataLoader, and against a step on them.

    The latter's ratio says how many times the model's rate the loader has.
    """
    files = sorted((options.shared / "data" / "originals").glob("*.jpg"))[: options.pairs]
    if not files:
        return
    pairs = as_pairs([(str(file), "a photo of a dog in the park") for file in files])
    count, what = len(files), f"reading {len(files)} photographs"
    photo_clip = options.shared / "models" / "photo-clip"
    models = {options.model: lambda: random_model(options.model)}
    if photo_clip.exists():
        models["photo-clip"] = lambda: load_open_clip(f"local-dir:{photo_clip}")
    for name, opened in models.items():
        model = opened()
        reader = PixelReader(model.preprocess)
        read = PairLoader(
            pairs, batch_size=count, preprocess=reader, tokenizer=model.tokenizer, workers=0
        )
        plan = EpochPlan(range(count), [0] * count)
        if name == options.model:
            decoded = Decoded(pairs, model.preprocess)
            yield Row(
                what,
                "DataLoader, no workers",
                lambda decoded=decoded: list(DataLoader(decoded, batch_size=20)),
                lambda reader=reader: list(image_batches(pairs, batch_size=20, preprocess=reader)),
                count,
                "images",
            )
        [batch] = read.epoch(plan)
        trainer = our_trainer(model, pairs, count)
        yield Row(
            f"{what} for {name}",
            "a step on them: times the model's rate",
            lambda trainer=trainer, batch=batch: trainer.step(1, batch, steps=1),
            lambda read=read, plan=plan: list(read.epoch(plan)),
            count,
            "images",
        )


def start(options: argparse.Namespace) -> Iterator[Row]:
    """How long help takes, against importing the library it stands on."""
    del options

    def command(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    yield Row(
        "refine --help",
        "import open_clip",
        lambda: command("-c", "import open_clip"),
        lambda: command("-m", "clip_refine", "refine", "--help"),
    )


ROWS = {f.__name__: f for f in (step, memory, embed, metrics, vectors, loader, start)}


def measure(row: Row, rounds: int, patience: float) -> list[tuple[float, float]]:
    """Both, one after the other, until there are enough rounds or the patience is at its end."""
    found: list[tuple[float, float]] = []
    if row.warm:
        row.warm()
    else:
        row.theirs(), row.ours()
    begin = time.perf_counter()
    while len(found) < rounds and (not found or time.perf_counter() - begin < patience):
        pair = []
        for run in (row.theirs, row.ours):
            before = time.perf_counter()
            value = run()
            pair.append(time.perf_counter() - before if row.unit == "s" else value)
        found.append((pair[0], pair[1]))
        if row.unit != "s":  # as good as the same each time
            break
    return found


def facts(threads: int) -> dict[str, Any]:
    """What it runs on."""
    cpu = Path("/proc/cpuinfo")
    told = (
        dict(re.findall(r"^(model name|flags)\s*: (.*)$", cpu.read_text(), re.M))
        if (cpu.exists())
        else {}
    )
    found = describe_environment("cpu")
    found.pop("command")
    return found | {
        "threads": threads,
        "cpu": told.get("model name"),
        "flags": [flag for flag in FLAGS if flag in told.get("flags", "").split()],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--model", default="ViT-B-32", help="an architecture, random weights")
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128], help="of a step")
    parser.add_argument("--against", help="a commit whose step is one more rival")
    parser.add_argument("--pairs", type=int, default=50_000, help="of metrics; fewer are quick")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=40, help="seconds of a row's rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--history", type=Path, default=Path(__file__).parent / "history.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, found = facts(options.threads), []
    print(", ".join(f"{name} {machine[name]}" for name in ("cpu", "flags", "cores", "load")))
    print("\n| | rival | rival's | ours | ours a second | times as good (range) |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as options.folder:
        for name in options.rows:
            for row in ROWS[name](options):
                with quietly():
                    rounds = measure(row, options.rounds, options.patience)
                ratios = [a / b for a, b in rounds]
                a, b = (statistics.median(side) for side in zip(*rounds, strict=True))
                shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                rate = f"{row.count / b:,.3g} {row.of}" if row.count else ""
                sides = f"{a:.2f} {row.unit} | {b:.2f} {row.unit}"
                print(f"| {row.what} | {row.rival} | {sides} | {rate} | {shown} |", flush=True)
                kept = {"what": row.what, "rival": row.rival, "count": row.count, "unit": row.unit}
                found.append(kept | {"seconds" if row.unit == "s" else "values": rounds})
                del row
                gc.collect()
    line = {"at": time.strftime("%F %T"), "machine": machine, "rows": found}
    with options.history.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
