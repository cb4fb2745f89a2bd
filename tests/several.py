"""Several processes, as a launcher would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes


def in_processes(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` in each of them; they are forked from one that has imported what takes long."""
    multiprocessing.set_forkserver_preload(["tests.several", "clip_refine.roads.refine"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_one, (count, port, work, arguments), nprocs=count, start_method="forkserver")


def _one(
    rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # what loaders start is as in any other process, not servers that import everything once more
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
