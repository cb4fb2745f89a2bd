"""Signals: heeded at a good moment, or at once where one comes again. Workers that end."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, signal, time
from clip_refine.support.process import heed_signals, patient, stop_asked
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
heed_signals()
with patient():
    os.kill(os.getpid(), signal.{first})
    assert stop_asked() == signal.{first}
    os.kill(os.getpid(), signal.{second})
    print("went on", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("first", "second", "status", "said"),
    [
        ("SIGTERM", "SIGTERM", 143, ""),
        ("SIGINT", "SIGINT", 130, ""),
        ("SIGINT", "SIGTERM", 1, "went on\n"),  # as torchrun sends it after Ctrl-C
    ],
)
def test_the_same_signal_again_ends_at_once(first: str, second: str, status: int, said: str):
    code = CODE.format(first=first, second=second)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.stdout == said
    assert ended.returncode == status, ended.stderr


FORKED = """
import os, signal
from clip_refine.support.process import heed_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
heed_signals()
if not (worker := os.fork()):
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
"""


def test_a_worker_that_was_just_forked_leaves_a_signal_to_its_parent():
    ended = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.stderr) == ("7\n", "")


SWALLOWED = """
import os, signal, time
from clip_refine.support.process import Stopped, heed_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
heed_signals()
class Dies:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
try:
    Dies()
    time.sleep(60)
except Stopped:
    print("heard")
"""


def test_a_signal_that_came_within_a_destructor_is_heard_behind_it():
    ended = subprocess.run(
        [sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.stderr) == ("heard\n", "")


LEFT = """
import sys
from clip_refine.data.loader import in_parallel
if __name__ == "__main__":
    items = in_parallel(abs, 1000, "left", workers=2, visible=False)
    next(items)
    sys.modules["left"] = items  # as the traceback of an exception may hold them to the end
"""


def test_workers_that_are_left_end_with_their_process(tmp_path: Path):
    script = tmp_path / "left.py"
    script.write_text(LEFT)
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


BROKEN = """
import os, signal
from clip_refine import cli
from clip_refine.support.process import heed_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
heed_signals()
def breaks(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        raise RecursionError from error
cli.VERBS["doctor"] = breaks
cli.main(["doctor"])
"""


def test_what_a_signal_breaks_in_a_library_is_a_stop():
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stderr == "\nclip-refine doctor: stopped; nothing was written.\n"
    assert ended.returncode == 130
