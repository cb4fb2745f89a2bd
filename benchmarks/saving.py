"""What saving states and checksums cost: `python benchmarks/saving.py`.

A state of a model of so many parameters (weights and two moments) is written as a run writes it,
with checksums and fsync, and read back with its checksums; rows of cached pixels are read with
theirs and without.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_refine.data.loader import Levels
from clip_refine.support.cache import RowCache
from clip_refine.support.folder import WORK, check_sums
from clip_refine.train.state import States, newest_state


class Weights:
    """Stands for a trainer."""

    def __init__(self, millions: float) -> None:
        count = int(millions * 1e6)
        names = ("weights.all", "optimiser.0.exp_avg", "optimiser.0.exp_avg_sq")
        self.tensors = {name: torch.randn(count) for name in names}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return self.tensors, {
            "micro_batch": None,
            "first": {},
            "best": None,
            "groups": [],
            "schedule": {},
        }

    def agree(self, *numbers: int) -> list[int]:
        return list(numbers)


def seconds(work: Callable[[], Any], rounds: int) -> str:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return f"{statistics.median(taken):.4g} s ({min(taken):.4g}-{max(taken):.4g})"


def preprocess(image: Any) -> torch.Tensor:
    levels = torch.from_numpy(np.array(image.resize((224, 224)))).permute(2, 0, 1)
    return (levels / 255 - 0.5) / 0.25


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=151.0, help="Of parameters.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="On the disk to measure.")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        trainer, states = (
            Weights(asked.millions),
            States(folder, "1", {}, decided={"precision": "fp32"}),
        )
        step = iter(range(1, 100))

        def save() -> None:
            states.after(next(step), 100, trainer, lambda: None)

        size = sum(4 * tensor.numel() for tensor in trainer.tensors.values())
        print(f"state of {size / 1e9:.2f} GB, saved: {seconds(save, asked.rounds)}")
        last = sorted((folder / WORK).iterdir())[-1]
        print(f"its checksum verified: {seconds(lambda: check_sums(last), asked.rounds)}")
        found = newest_state(folder)
        assert found is not None
        print(f"read back, verified: {seconds(lambda: newest_state(folder).tensors(), 1)}")  # pyright: ignore
        rows = RowCache(folder / "rows", flag="--cache")
        levels = Levels.of(preprocess)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 3, 224, 224), np.uint8)
        rows.add([f"{number:032x}" for number in range(64)], pixels)

        def verified() -> None:
            for number in range(64):
                levels.decode(rows.sound(number))  # pyright: ignore

        def unverified() -> None:
            for number in range(64):
                levels.decode(rows._rows(number)[0][number])

        print(f"64 rows of pixels without checksums: {seconds(unverified, 9)}")
        print(f"64 rows of pixels with checksums: {seconds(verified, 9)}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run()
