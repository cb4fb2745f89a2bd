"""Seconds that telling images apart adds to the start, on small noise files."""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from clip_refine.data import hold_out, open_pairs
from clip_refine.data.pairs import image_groups

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000


def write(folder: Path) -> Path:
    """A table of small JPEG files, so that nearly all share their size with another."""
    generator = np.random.default_rng(0)
    rows = ["image,caption"]
    for index in range(COUNT):
        side = int(generator.integers(16, 64))
        content = io.BytesIO()
        pixels = generator.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(content, "JPEG", quality=90)
        name = f"{index // 1000:03}/{index:06}.jpg"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.getvalue())
        rows.append(f"{name},caption {index}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder / "captions.csv"


def timed(name: str, work: Callable[[], object]) -> None:
    """Print wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{name}: {time.perf_counter() - wall:.2f} s, CPU {time.process_time() - cpu:.2f} s")


with tempfile.TemporaryDirectory() as folder:
    table = write(Path(folder))
    pairs = open_pairs(str(table))
    timed("opening the table, images told apart", lambda: open_pairs(str(table)))
    timed("image_groups", lambda: image_groups(pairs))
    timed("hold_out", lambda: hold_out(pairs, fraction=0.01, seed=0))
