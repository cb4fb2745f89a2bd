"""Signals: heeded at a good moment, or at once where one comes again."""

import subprocess
import sys

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
