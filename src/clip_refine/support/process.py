"""Processes: which of them live, which end with their parent, and the signals that stop them."""

import atexit
import ctypes
import multiprocessing.util  # first: what it registers for the end comes after ours
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# --------------------------------------------------------------------------------------------------
# Who left a file: a process by its machine, number and start, since numbers are used again.


def process_tag(pid: int | None = None) -> str:
    """What a process, this one by default, marks its temporary files with."""
    pid = os.getpid() if pid is None else pid
    try:  # proc(5): the start is the 22nd value; the second, a name, may hold spaces
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start = "0"
    return f"{platform.node()}-{pid}-{start}"


def is_alive(tag: str) -> bool:
    """Whether the process with this tag may still run; of another machine nobody here knows."""
    node, _, rest = tag.rpartition("-")[0].rpartition("-")
    if node != platform.node() or not rest.isdigit():
        return True
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return process_tag(int(rest)) == tag


_PR_SET_PDEATHSIG = 1


def end_with_parent(*_: object) -> None:
    """Called first in a worker process: it is killed when its parent dies, whatever of.

    The signals that stop a run go to all its processes; the parent still needs its workers then.
    It ends by itself those that are left when it ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died meanwhile
            os._exit(1)


@atexit.register
def _end_workers() -> None:
    """`multiprocessing` asks workers to end by SIGTERM, and would wait for ever for these."""
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would call each a failure
        for worker in workers:
            worker.kill()


# --------------------------------------------------------------------------------------------------
# Signals: Ctrl-C, what Slurm and Kubernetes send, and a terminal that was closed.


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = 20  # seconds in which an exception has to get through, Kubernetes gives 30


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop."""

    def __init__(self, number: int, left: str | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number  # as shells have it
        self.left = left  # what is there now, in words


class _Asked:
    """What the handler and those who wait for a good moment share."""

    number = 0  # the signal that came, 0 for none
    process = 0  # that heeds signals, and not what it forks
    patient = False  # whether somebody looks at `number` soon


def heed_signals() -> None:
    """Let the signals raise `Stopped`; those that are ignored, as by nohup, stay so."""
    _Asked.process = os.getpid()
    sys.unraisablehook = _swallowed
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _: FrameType | None) -> None:
    if os.getpid() != _Asked.process:
        return  # a worker that has only just been forked: it ends with its parent
    if _Asked.number == number:  # asked twice; torchrun sends another one after Ctrl-C
        os._exit(128 + number)
    _Asked.number = number
    if not _Asked.patient:
        _raise()


def _raise() -> None:
    """An exception may be swallowed where Python cannot pass it on, as in a destructor."""
    number = _Asked.number
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.alarm(_GRACE)
    raise Stopped(number)


def _swallowed(found: Any) -> None:
    """Raise again, a little later, what came where Python only remarks on it."""
    if not isinstance(found.exc_value, Stopped):
        if not _Asked.number:  # else of what a signal left half made
            sys.__unraisablehook__(found)
        return
    signal.signal(signal.SIGALRM, lambda *_: None if _Asked.patient else _raise())
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def stop_asked() -> int:
    """The signal that came while within `patient`, 0 for none."""
    return _Asked.number


@contextmanager
def patient() -> Iterator[None]:
    """Within the block a signal waits for `stop_asked`; one that nobody saw raises behind it."""
    _Asked.patient = True
    try:
        yield
    finally:
        _Asked.patient = False
    if _Asked.number:
        _raise()
