"""How often 95 % intervals of the gap, and of its change, hold the truth, as a Markdown table.

A population of pairs, whose gap is known, is sampled many times. Half of it is the other half with
image and text exchanged, so that its gap is zero until the two are moved apart.

    python benchmarks/intervals.py
    python benchmarks/intervals.py --features FILE.npz --sizes 100 250 --trials 200
"""

import argparse
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from clip_refine.evaluation.bootstrap import Bootstrap, Resampled, interval
from clip_refine.evaluation.geometry import mean_row, resampled_pairs

GAPS = (0.0, 0.03, 0.1, 0.3, 0.8, 1.2)
# before → after; the population after has noise of its own
CHANGES = ((0.8, 0.0), (0.8, 0.1), (0.8, 0.3), (0.3, 0.1), (0.1, 0.03), (0.1, 0.0), (0.03, 0.0))
Pairs = tuple[Tensor, Tensor]


class SameDraws(Bootstrap):
    """One set of resamples for every trial, which saves most of the time."""

    def counts(self, image_count: int) -> Iterator[Tensor]:
        yield _counts(self.resamples, self.seed, image_count)


@functools.cache
def _counts(resamples: int, seed: int, image_count: int) -> Tensor:
    return torch.cat(list(Bootstrap(resamples, seed).counts(image_count)))


def drawn_pairs(*, size: int, dim: int, seed: int) -> Pairs:
    """Two clouds with the spectrum of CLIP's, a variance along axis k of about 1/k."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1) ** -0.5
    shared, image, text = torch.randn(3, size, dim, generator=generator) * scale
    return shared + 0.7 * image, shared + 0.7 * text


def moved_apart(pairs: Pairs, gap: float, *, seed: int) -> Pairs:
    """Unit features (2N, d) with this gap, and some noise by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    noisy = [
        side + 0.3 * side.std(dim=0) * torch.randn(side.shape, generator=generator)
        for side in pairs
    ]
    image, text = torch.cat(noisy), torch.cat(noisy[::-1])
    direction = torch.randn(image.shape[1], generator=torch.Generator().manual_seed(0))
    direction *= image.norm(dim=1).mean() / direction.norm()

    def apart(by: float) -> Pairs:
        moved = (image + by * direction, text - by * direction)
        return tuple(torch.nn.functional.normalize(side, dim=1) for side in moved)  # pyright: ignore

    low, high = 0.0, 3.0
    for _ in range(30 if gap else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if true_gap(apart(middle)) < gap else (low, middle)
    return apart(low)


def true_gap(pairs: Pairs) -> float:
    """Of a whole population."""
    return (mean_row(pairs[0]) - mean_row(pairs[1])).norm().item()


def coverage(
    pairs: Pairs, *, count: int, trials: int, gaps: Sequence[float], changes: Sequence[tuple]
) -> dict[str, float]:
    """Share of trials in which the interval holds the truth; every one must hold its estimate."""
    wanted = {("before", gap) for gap, _ in changes} | {("after", g) for _, g in changes}
    wanted = list(dict.fromkeys([*(("after", gap) for gap in gaps), *wanted]))
    populations = {
        key: moved_apart(pairs, key[1], seed=number) for number, key in enumerate(wanted)
    }
    truths = {key: true_gap(population) for key, population in populations.items()}
    generator = torch.Generator().manual_seed(count)
    hits: dict[str, int] = {}
    for _ in range(trials):
        chosen = torch.randint(2 * len(pairs[0]), (count,), generator=generator)
        bootstrap = SameDraws(400)
        found = {
            key: resampled_pairs(image[chosen], text[chosen], bootstrap)["centroid_distance"]
            for key, (image, text) in populations.items()
        }
        numbers: dict[str, tuple[Resampled, float]] = {
            f"{gap:g}": (found["after", gap], truths["after", gap]) for gap in gaps
        }
        for was, now in changes:
            change = found["after", now] - found["before", was]
            numbers[f"{was:g} → {now:g}"] = change, truths["after", now] - truths["before", was]
        for name, (number, truth) in numbers.items():
            low, high = interval(number)
            if low is None or high is None or not low <= number.value <= high:
                raise ValueError(f"{name}: {number.value} is not in [{low}, {high}]")
            hits[name] = hits.get(name, 0) + (low <= truth <= high)
    return {name: found / trials for name, found in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="How often 95 % intervals hold the true gap.")
    parser.add_argument("--features", help=".npz with image and text features, row by row pairs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 250, 1000, 5000])
    parser.add_argument("--trials", type=int, help="1000 to 200, fewer for more images, without it")
    asked = parser.parse_args()
    if asked.features:
        sides = [torch.from_numpy(side).float() for side in np.load(asked.features).values()]
        # their own gap would be an axis of spread in a population of both orders
        unit = [torch.nn.functional.normalize(side, dim=1) for side in sides]
        image, text = (side - side.mean(dim=0) for side in unit)
        pairs = image, text
    else:
        pairs = drawn_pairs(size=20_000, dim=64, seed=0)
    columns = {}
    for count in asked.sizes:
        trials = asked.trials or max(200, min(1000, 400_000 // count))
        columns[f"N = {count:,} ({trials} trials)"] = coverage(
            pairs, count=count, trials=trials, gaps=GAPS, changes=CHANGES
        )
    print("| true gap |", " | ".join(columns), "|")
    print("|---|" + "---:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} |", " | ".join(f"{100 * c[name]:.1f}" for c in columns.values()), "|")


if __name__ == "__main__":
    main()
