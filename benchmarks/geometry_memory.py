"""Peak memory and time of the metrics at 100,000 pairs: `python benchmarks/geometry_memory.py`.

The bound is 2 GB for the whole process, the features, their copies and torch included.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from clip_refine.evaluation.geometry import geometry
from clip_refine.evaluation.retrieval import retrieval


def peak_gigabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def made_pairs(count: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(count, dim, generator=generator)
    text = torch.randn(count, dim, generator=generator).add_(image).add_(0.5)
    return image, text


def timed(name: str, metric: Callable[[], dict[str, float]]) -> None:
    start = time.perf_counter()
    scores = metric()
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.0f} s, peak {peak_gigabytes():.2f} GB", flush=True)
    for key, value in scores.items():
        print(f"  {key} {value:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    image, text = made_pairs(options.pairs, options.dim)
    print(f"{options.pairs} pairs, d = {options.dim}: {peak_gigabytes():.2f} GB held at the start")
    timed("retrieval", lambda: retrieval(image, text))
    timed("geometry", lambda: geometry(image, text))


if __name__ == "__main__":
    main()
