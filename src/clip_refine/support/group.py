"""Processes that torchrun or `accelerate launch` started together, for work that needs no GPU."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch.distributed import AllreduceOptions, ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from clip_refine.support.errors import EndedError, FailedError, first_line

_FORMING = timedelta(minutes=5)  # that processes may begin after each other
_LONGEST = timedelta(days=30)  # that the first to finish its share may wait for the last
_GROUPS = count()


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
        self._told = count()

    @cached_property
    def _store(self) -> PrefixStore:
        store, _, _ = next(iter(rendezvous("env://", timeout=_FORMING)))
        return PrefixStore(f"clip-refine/{next(_GROUPS)}", store)

    @cached_property
    def _gloo(self) -> Any:  # PyTorch does not say what it can
        try:
            return ProcessGroupGloo(self._store, self.rank, self.count, _FORMING)
        except (RuntimeError, ValueError) as error:
            raise FailedError(
                f"the {self.count} processes of this run did not find each other, for which they "
                f"have {_FORMING.seconds // 60} minutes ({first_line(error)}). See whether one has "
                "ended, and start them by torchrun or accelerate launch."
            ) from error

    def meet(self, number: int = 0, *, failed: bool = False) -> int:
        """Wait for all; the sum of their numbers. An `EndedError` where another has failed."""
        if self.count == 1:
            return number
        told, options = torch.tensor([failed, number]), AllreduceOptions()
        options.timeout = _LONGEST
        try:
            work = self._gloo.allreduce([told], options)
            while not work.is_completed():
                time.sleep(0.01)  # signals are heard here and not within `wait`
            work.wait()
        except RuntimeError as error:  # one was killed
            self._over = True
            raise EndedError from error
        self._over = bool(told[0])
        if self._over and not failed:
            raise EndedError
        return int(told[1])

    def tell(self, text: str) -> str:
        """What the first process gives here, on all."""
        if self.count == 1:
            return text
        name = f"told-{next(self._told)}"
        if self.first:
            self._store.set(name, text)
        self.meet()
        return text if self.first else self._store.get(name).decode()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All meet at the end of the block; what fails within it on one process ends all."""
        if self.count > 1:
            _ = self._gloo  # before anything can fail on one of them
        try:
            yield
        except Exception:
            if not self._over:
                with suppress(EndedError):
                    self.meet(failed=True)
            raise
        self.meet()
