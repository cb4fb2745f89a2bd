"""`make fuzz`: read changed files of every kind for some minutes; keep those that go wrong.

    python -m tests.fuzz SECONDS [TARGET ...]

Hypothesis makes the changes. Where atheris is installed it chooses them by the code that they
reach, else they are random. Each target has a process of its own with 2 GB of memory more than what
its imports take, so that a file which takes more shows as a MemoryError. A file that ends the
process, or holds it where no signal is heeded, is kept, too.
"""

import faulthandler
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TextIO

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

try:
    import atheris  # type: ignore[import-not-found]
except ImportError:
    atheris = None

from tests.fuzz.targets import TARGETS, changed
from tests.fuzz.trial import CORPUS, judged

EXTRA = 2 * 10**9
_SHOWN = 1500  # letters of a fault
LAST = "last"  # file that names the one that is read
MOST = 20  # different faults of a target after which it is left
_PATIENCE = 240  # seconds for imports
_HELD = 90  # seconds for a file: more than a signal that is heeded would leave it


def fuzz(name: str, seconds: float, work: Path) -> None:
    """Read changed files of one target, print what goes wrong and keep it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    told = os.fdopen(os.dup(1), "w")
    faulthandler.enable(file=told)
    faulthandler.register(signal.SIGUSR1, file=told)  # answers where Python's own handlers do not
    try:
        _fuzz(name, seconds, work, told)
    except BaseException:  # of the driver itself, whose process has no other way to tell
        print(f"{name}: {traceback.format_exc()}", file=told, flush=True)
        os._exit(2)


def _fuzz(name: str, seconds: float, work: Path, told: TextIO) -> None:
    target, faults, count = TARGETS[name], set[str](), 0
    folder = work / "sound"
    os.chdir(work)
    # only code that is imported like this tells atheris where a file has led it
    with atheris.instrument_imports(include=["clip_refine"]) if atheris else nullcontext():
        files = target.prepare(folder)
        for file in files:  # so that all is imported, which may take longer than a file may
            with suppress(Exception):
                target.read(folder, file)
    taken = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (taken + EXTRA, taken + EXTRA))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def trial(data: st.DataObject) -> None:
        nonlocal count
        file, content = data.draw(changed(files))
        count += 1
        (work / LAST).write_text(file)
        wrong = judged(target, folder, file, content)
        if wrong is None:
            return
        where = [line for line in wrong.splitlines() if "clip_refine" in line][-1:]
        kind = "".join(where) or wrong.splitlines()[-1][:80]
        if kind not in faults and len(faults) < MOST:
            faults.add(kind)
            kept = _keep(name, file, content)
            print(f"{name}: {kept}\n{wrong[-_SHOWN:]}", file=told, flush=True)

    one = trial.hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    end, how = time.monotonic() + seconds, "by coverage" if atheris else "random"

    def tried(choices: bytes) -> None:
        if time.monotonic() > end:  # atheris has no other end
            print(f"{name}: {count:,} files, {how}, {len(faults)} faults", file=told, flush=True)
            os._exit(bool(faults))
        one(choices)

    if atheris:
        flags = ["-verbosity=0", "-max_len=4000", "-len_control=0"]
        # libFuzzer's own handlers allocate, and wait for ever where the allocator has crashed
        flags += [f"-handle_{signal}=0" for signal in ("segv", "bus", "abrt", "ill", "fpe")]
        atheris.Setup([sys.argv[0], *flags], tried)
        atheris.Fuzz()
    generator = random.Random()
    while True:
        tried(generator.randbytes(generator.choice((200, 1000, 4000))))


def _keep(name: str, file: str, content: bytes) -> Path:
    """Put a changed file where every test run reads it again."""
    number = hashlib.blake2b(content, digest_size=4).hexdigest()
    kept = CORPUS / name / f"{number}-{file.replace('/', '+')}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(content)
    return kept


def _held(work: Path) -> bool:
    """Whether one file has been read for too long."""
    try:
        return time.time() - (work / LAST).stat().st_mtime > _HELD
    except OSError:  # none has been read
        return False


def main() -> None:
    """Every target for its share of the time."""
    seconds, *names = sys.argv[1:] or ["600"]
    names = names or list(TARGETS)
    failed = []
    forked = multiprocessing.get_context("fork")
    for name in names:
        share, work = float(seconds) / len(names), Path(tempfile.mkdtemp())
        process = forked.Process(target=fuzz, args=(name, share, work))
        process.start()
        end = time.monotonic() + share + _PATIENCE
        while process.is_alive() and time.monotonic() < end and not _held(work):
            process.join(1)
        if process.is_alive() and process.pid:
            print(f"{name}: did not end, and is here:", flush=True)
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
        process.kill()
        process.join()
        if process.exitcode:
            failed.append(f"{name} ({process.exitcode})")
        if process.exitcode not in (0, 1, 2) and (work / LAST).is_file():
            file = (work / LAST).read_text()
            print(f"{name}: ended by {_keep(name, file, (work / 'sound' / file).read_bytes())}")
        shutil.rmtree(work)
    if failed:
        raise SystemExit(f"went wrong: {', '.join(failed)}. See tests/fuzz/corpus.")


if __name__ == "__main__":
    main()
