"""`vectors apply` on a large index: rate against a plain copy of the file, and the peak memory.

`python benchmarks/apply.py 4000000 FOLDER`: rows × 512 float16 from a seeded writer. With a number
of shards behind it a folder of clip-retrieval's instead, which torchrun's processes share:
`torchrun --nproc_per_node 2 benchmarks/apply.py 800000 FOLDER 8`.
"""

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from clip_refine.support.console import PeakMemory
from clip_refine.support.group import Group
from clip_refine.vectors.stored import apply_stored
from clip_refine.vectors.transforms import LinearMaps

DIM, BLOCK = 512, 100_000


def write(path: Path, rows: int) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, DIM)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            drawn = np.random.default_rng(start).standard_normal((count, DIM), dtype=np.float32)
            drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
            drawn.astype(np.float16).tofile(file)


def some_maps() -> LinearMaps:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(DIM, DIM, generator=generator) for _ in range(2)]
    return LinearMaps(maps[0], maps[1], 0, 0)


def main(rows: int, folder: Path) -> None:
    source, copy, new = (folder / name for name in ("stored.npy", "copy.npy", "new.npy"))
    write(source, rows)
    gigabytes = source.stat().st_size / 1e9
    start = time.perf_counter()
    shutil.copyfile(source, copy)
    copied = time.perf_counter() - start
    copy.unlink()
    peak = PeakMemory(torch.device("cpu"))
    before = peak.gigabytes
    start = time.perf_counter()
    apply_stored(some_maps(), source, new, side="image")
    applied = time.perf_counter() - start
    print(f"{rows:,} rows, {gigabytes:.2f} GB, {torch.get_num_threads()} threads")
    print(f"copy  {copied:7.1f} s  {gigabytes / copied:.2f} GB/s")
    print(f"apply {applied:7.1f} s  {gigabytes / applied:.2f} GB/s  {rows / applied:,.0f} rows/s")
    print(f"peak {peak.gigabytes:.2f} GB, {before:.2f} GB before")


def shared(rows: int, folder: Path, shards: int) -> None:
    """The shards have to be written once, by one process, before several share them."""
    source, group = folder / "index", Group()
    if not source.exists():
        if group.count > 1:
            raise SystemExit(f"{source}: make it first, by this script in one process.")
        (source / "img_emb").mkdir(parents=True)
        for shard in range(shards):
            write(source / f"img_emb/img_emb_{shard}.npy", rows // shards)
    for again in range(3):
        with group.together():  # all begin together
            pass
        start = time.perf_counter()
        apply_stored(some_maps(), source, folder / "new", side="image", overwrite=True)
        seconds = time.perf_counter() - start
        if group.first:
            threads = torch.get_num_threads()
            print(f"{again + 1}: {group.count} processes, {threads} threads each, {seconds:.1f} s")


if __name__ == "__main__":
    if sys.argv[3:]:
        shared(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]), Path(sys.argv[2]))
