"""Processes that torchrun or `accelerate launch` started together, for work that needs no GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from clip_refine.support.errors import EndedError

_LONGEST = timedelta(days=30)  # that the first to finish its share may wait for the last
_CALLS = count()


class Group:
    """This process among those of its run; one alone exchanges nothing.

    Apart from PyTorch's own group, which may be of GPUs, and of which Accelerate is to make what it
    wants later. Whoever fails says so at one meeting, and nobody meets again.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ.get("RANK") or 0) if self.count > 1 else 0
        self.first = self.rank == 0
        self._over = False

    @cached_property
    def _gloo(self) -> Any:  # PyTorch does not say what it can
        store, rank, size = next(iter(rendezvous("env://")))
        own = PrefixStore(f"clip-refine/{next(_CALLS)}", store)
        return ProcessGroupGloo(own, rank, size, _LONGEST)

    def meet(self, number: int = 0, *, failed: bool = False) -> int:
        """Wait for all; the sum of their numbers. An `EndedError` where another has failed."""
        if self.count == 1:
            return number
        told = torch.tensor([failed, number])
        try:
            self._gloo.allreduce([told]).wait()
        except RuntimeError as error:  # one was killed
            self._over = True
            raise EndedError from error
        self._over = bool(told[0])
        if self._over and not failed:
            raise EndedError
        return int(told[1])

    @contextmanager
    def together(self) -> Iterator[None]:
        """All meet at the end of the block; what fails within it on one process ends all."""
        try:
            yield
        except Exception:
            if not self._over:
                with suppress(EndedError):
                    self.meet(failed=True)
            raise
        self.meet()
