"""Ours beside its rivals, in turn, round by round: `make bench` (or `python benchmarks/bench.py`).

One Markdown table, and a line of JSON with what it ran on in `benchmarks/history.jsonl`. A ratio is
taken within each round, since the machine's speed drifts; shown is the median with the range.
Rivals are what a user would write otherwise, as it is meant to be used. `--rows step embed`
measures only these; `--rounds` sets how often.
"""

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from step import our_step, random_model, textbook_step, trainer_step
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_refine.data import PairBatch, PixelReader, image_batches
from clip_refine.data.images import decode_image
from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.retrieval import retrieval
from clip_refine.models.embed import Embedder
from clip_refine.support.folder import describe_environment
from clip_refine.toy import ToyPairs
from clip_refine.vectors.stored import apply_stored
from clip_refine.vectors.transforms import LinearMaps

Run = Callable[[], object]
Row = tuple[str, str, Run, Run]
"""What is done, the rival's name, the rival, ours."""
CPU = torch.device("cpu")


def step(options: argparse.Namespace) -> Iterator[Row]:
    """The refine step, at two batch sizes, against a textbook loop and open_clip's own trainer."""
    for size in (32, 64):
        pairs = ToyPairs("bench", size=size)
        texts = [pairs.captions[index][0] for index in range(size)]
        for name, rival in (
            ("textbook loop, float32", textbook_step),
            ("open_clip's --distill, bf16", trainer_step),
        ):
            model = random_model(options.model)
            pixels = torch.stack([model.preprocess(pairs.load_image(i)) for i in range(size)])
            batch = PairBatch(pixels, model.tokenizer(texts), range(size))
            full = model.full_length_tokenizer(texts)
            theirs, ours = rival(copy.deepcopy(model)), our_step(model, pairs, size)
            what = f"refine step, {options.model}, batch {size}"
            yield (
                what,
                name,
                lambda theirs=theirs, batch=batch, full=full: theirs(batch, full),
                lambda ours=ours, batch=batch: ours(batch, 1),
            )


def embed(options: argparse.Namespace) -> Iterator[Row]:
    """Features of images and of captions, against the loop in open_clip's README."""
    model = random_model(options.model)
    pairs = ToyPairs("bench-embed", size=64)
    texts = [pairs.captions[index][0] for index in range(64)]
    embedder = Embedder(model, CPU, 64, visible=False)
    pixels = torch.stack([model.preprocess(pairs.load_image(index)) for index in range(64)])

    @torch.no_grad()
    def images() -> Tensor:
        return model.clip.encode_image(pixels)

    @torch.no_grad()
    def captions() -> Tensor:
        return model.clip.encode_text(model.full_length_tokenizer(texts))

    yield "features of 64 images", "encode_image", images, lambda: embedder.encode_pixels(pixels)
    yield "features of 64 captions", "encode_text", captions, lambda: embedder.encode_texts(texts)


def metrics(options: argparse.Namespace) -> Iterator[Row]:
    """Retrieval and geometry, against one matrix of all similarities (at fewer pairs, to fit)."""
    del options
    count = 10_000
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, 512, generator=generator)
    text = torch.randn(count, 512, generator=generator) + image
    owner = torch.arange(count)

    def one_matrix() -> Tensor:
        a, b = (torch.nn.functional.normalize(side, dim=1) for side in (image, text))
        similarity = a @ b.T
        true = similarity.diagonal()
        ranks = [(s > true[:, None]).sum(1) for s in (similarity, similarity.T)]
        return torch.stack([(rank < k).float().mean() for rank in ranks for k in (1, 5, 10)])

    def gap() -> Tensor:
        a, b = (torch.nn.functional.normalize(side, dim=1) for side in (image, text))
        uniform = [torch.pdist(side[:5000]).square().mul(-2).exp().mean().log() for side in (a, b)]
        return (a.mean(0) - b.mean(0)).norm() + torch.stack(uniform).sum()

    yield (
        f"retrieval, {count:,} × {count:,}",
        "one matrix",
        one_matrix,
        lambda: retrieval(image, text, owner),
    )
    yield f"geometry, {count:,} pairs", "pdist of 5,000", gap, lambda: geometry(image, text)


def apply(options: argparse.Namespace) -> Iterator[Row]:
    """A map over a stored index, against NumPy on the whole file."""
    folder = Path(options.folder)
    source, new = folder / "stored.npy", folder / "new.npy"
    drawn = np.random.default_rng(0).standard_normal((200_000, 512), dtype=np.float32)
    np.save(source, drawn.astype(np.float16))
    maps = LinearMaps(torch.eye(512) + 0.01, torch.eye(512), 0, 0)
    weight = maps.image_map.numpy()

    def whole() -> None:
        mapped = np.load(source).astype(np.float32) @ weight
        mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
        np.save(folder / "whole.npy", mapped.astype(np.float16))

    def ours() -> None:
        new.unlink(missing_ok=True)
        apply_stored(maps, source, new, side="image")

    yield "vectors apply, 200,000 × 512", "NumPy, all in memory", whole, ours


class Photographs(Dataset):
    """What torch's own loader reads, and what ours does."""

    def __init__(self, files: list[Path], preprocess: Callable[..., Tensor]) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(self.load_image(index))

    def load_image(self, index: int):
        return decode_image(self.files[index].read_bytes(), str(self.files[index]))

    def image_name(self, index: int) -> str:
        return str(self.files[index])

    def image_bytes(self, index: int) -> bytes:
        return self.files[index].read_bytes()


def loader(options: argparse.Namespace) -> Iterator[Row]:
    """Photographs as they are published, against torch's DataLoader."""
    files = sorted((options.shared / "data" / "originals").glob("*.jpg"))
    if not files:
        return
    preprocess = random_model(options.model).preprocess
    photographs = Photographs(files, preprocess)

    def theirs() -> None:
        for _ in DataLoader(photographs, batch_size=20):
            pass

    def ours() -> None:
        for _ in image_batches(photographs, batch_size=20, preprocess=PixelReader(preprocess)):
            pass

    yield f"reading {len(files)} photographs", "DataLoader, no workers", theirs, ours


def start(options: argparse.Namespace) -> Iterator[Row]:
    """How long help takes, against importing the library it stands on."""
    del options

    def command(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    yield (
        "refine --help",
        "import open_clip",
        lambda: command("-c", "import open_clip"),
        lambda: command("-m", "clip_refine", "refine", "--help"),
    )


ROWS = {f.__name__: f for f in (step, embed, metrics, apply, loader, start)}


def measure(theirs: Run, ours: Run, rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, one after the other; the first round warms up."""
    found = []
    for _ in range(rounds + 1):
        pair = []
        for run in (theirs, ours):
            begin = time.perf_counter()
            run()
            pair.append(time.perf_counter() - begin)
        found.append(tuple(pair))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--model", default="ViT-B-32", help="an architecture, random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--history", type=Path, default=Path(__file__).parent / "history.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    print(
        "| | rival | rival's s | ours, s | times as fast (range) |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as options.folder:
        for name in options.rows:
            for what, rival, theirs, ours in ROWS[name](options):
                rounds = measure(theirs, ours, options.rounds)
                ratios = [a / b for a, b in rounds]
                a, b = (statistics.median(side) for side in zip(*rounds, strict=True))
                ratio = statistics.median(ratios)
                shown = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                print(f"| {what} | {rival} | {a:.2f} | {b:.2f} | {shown} |", flush=True)
                found.append({"what": what, "rival": rival, "seconds": rounds})
                del theirs, ours
                gc.collect()
    facts = describe_environment("cpu") | {"threads": options.threads}
    facts.pop("command")
    line = {"at": time.strftime("%F %T"), "machine": facts, "rows": found}
    with options.history.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
