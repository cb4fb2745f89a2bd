"""Kill a run with SIGKILL at random moments, let it go on, and compare it with an unbroken one.

    python tools/kill_runs.py --moments 25 --folder DIR --signals --interrupts 31

Loads, caches pixels in two worker processes, evaluates, trains, saves every few steps and reports,
on drawn images that lie as files. Each moment is a run of its own: killed once, every other one
again before it has gone on for long, then resumed until it is complete. Weights and log have to be
those of the unbroken run bit by bit, but for times; no worker process and no hidden file may be
left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# as in a run of its own, so that all have the same
os.environ.setdefault("OMP_NUM_THREADS", "1")

from clip_refine.__main__ import main
from clip_refine.roads.refine import refine  # noqa: F401 (imported once, not in every child)
from clip_refine.toy import ToyPairs

TIMES = ("step_seconds", "pairs_per_second")


def write_data(folder: Path, *, images: int) -> None:
    folder.mkdir(parents=True)
    for name, count in (("train", images), ("val", 64)):
        pairs = ToyPairs(f"killed-{name}", size=count)
        lines = ["image,caption"]
        for index in range(count):
            pairs.load_image(index).save(folder / f"{name}{index:04}.png")
            lines.append(f'{name}{index:04}.png,"{pairs.captions[index][0]}"')
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def words(folder: Path, out: Path) -> list[str]:
    """What is typed behind the program's name."""
    data = folder / "data"
    return [
        *("refine", "--model.name", "toy", "--out", str(out), "--resume", "auto"),
        *("--data.train", str(data / "train.csv"), "--data.val", str(data / "val.csv")),
        *("--data.cache-images", "--data.cache-folder", f"{out}-cache", "--train.workers", "2"),
        *("--train.batch-size", "32", "--train.learning-rate", "3e-4", "--train.epochs", "2"),
        *("--train.precision", "fp32", "--train.device", "cpu", "--train.save-every", "3"),
    ]


def start(folder: Path, out: Path, *more: str) -> int:
    """A child that refines; its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    for ignored in (signal.SIGHUP, signal.SIGINT):  # under nohup, and behind a shell's "&"
        signal.signal(ignored, signal.SIG_DFL)
    log = os.open(out.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["clip-refine", *words(folder, out), *more]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def wait(child: int, seconds: float = 300.0) -> int | None:
    """The exit status of a child, negative for a signal; None where it still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def session_of(child: int) -> list[int]:
    """Processes that still live in a child's session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(child) and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def survivors(child: int) -> list[int]:
    """Those that have not ended 20 s after it: a busy machine is slow to free their memory."""
    end = time.monotonic() + 20
    while (alive := session_of(child)) and time.monotonic() < end:
        time.sleep(0.1)
    return alive


PHASES = (
    "loading",
    "caching",
    "evaluation",
    "training",
    "saving a state",
    "saving the model",
    "report",
)


def phase(out: Path) -> str:
    """How far a run is."""
    partial = out.parent / f".{out.name}.partial"
    lines = (
        (partial / "log.jsonl").read_text().count("\n") if (partial / "log.jsonl").is_file() else 0
    )
    if out.is_dir():
        return "complete"
    if (partial / "scores.json").is_file():
        return "report"
    if (partial / "model").is_dir():
        return "saving the model"
    if any((partial / "state").glob(".step-*")):
        return f"saving a state, step {lines}"
    if lines:
        return f"training, step {lines}"
    if partial.is_dir():
        return "evaluation"
    return "caching" if any(Path(f"{out}-cache").rglob("rows")) else "loading"


def result(out: Path) -> tuple[dict[str, list[object]], list[dict[str, float]]]:
    files = {}
    for path in (out / "model").glob("*.safetensors"):
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        # the library writes the header's facts in an order of chance
        files[path.name] = [json.loads(content[8:end]), content[end:]]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return files, [{k: v for k, v in line.items() if k not in TIMES} for line in log]


def interrupted(folder: Path, number: int, after: float) -> list[str]:
    """Ctrl-C for a process of its own, as a shell starts it, after some seconds: what is wrong."""
    out = folder / f"interrupted{number}"
    command = [sys.executable, "-m", "clip_refine", *words(folder, out)]
    with out.with_suffix(".txt").open("w") as log:
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        wrong = []
        with suppress(subprocess.TimeoutExpired):
            child.wait(after)
        where, ended = phase(out), child.returncode is not None
        begin = time.monotonic()
        if not ended:
            os.killpg(child.pid, signal.SIGINT)  # the terminal's whole group has it
        try:
            status = child.wait(60)
        except subprocess.TimeoutExpired:
            wrong.append("not heeded within 60 s")
            os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
    took = time.monotonic() - begin
    if status not in ((0,) if ended else (130, 0)):
        wrong.append(f"exit {status}")
    if "Traceback" in (said := out.with_suffix(".txt").read_text()):
        wrong.append(f"a traceback: {said[-300:]}")
    if alive := survivors(child.pid):
        wrong.append(f"{len(alive)} processes live on")
    print(
        f"Ctrl-C after {after:4.1f} s, {where}: {wrong or status}, {took:.1f} s later", flush=True
    )
    return wrong


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=25)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", action="store_true", help="SIGTERM, SIGHUP, SIGINT as well")
    parser.add_argument("--interrupts", type=int, default=0, help="so many Ctrl-C, anywhere")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "data", images=asked.images)
    begin = time.monotonic()
    child, status = start(folder, folder / "unbroken"), None
    while status is None and phase(folder / "unbroken") in PHASES[:3]:  # before the first step
        status = wait(child, 0.01)
    to_first_step = time.monotonic() - begin
    status = wait(child) if status is None else status
    took = time.monotonic() - begin
    if status:
        sys.exit((folder / "unbroken.txt").read_text())
    expected = result(folder / "unbroken")
    print(f"unbroken: {took:.1f} s, {len(expected[1])} steps", flush=True)
    generator = random.Random(asked.seed)
    failed = 0
    for moment in range(asked.moments):
        out = folder / f"killed{moment}"
        # some time after a phase has begun, so that all have theirs on a busy machine, too
        begin, aim = time.monotonic(), PHASES[(moment * 3 + 1) % len(PHASES)]
        child = start(folder, out)
        steps = generator.randrange(20) if aim in ("training", "saving a state") else 0
        while (where := phase(out)) != "complete":
            enough = steps <= int(where.rpartition(" ")[2]) if where[-1].isdigit() else True
            if where.startswith(aim) and enough:
                break
            if PHASES.index(where.partition(", ")[0]) > PHASES.index(aim) + 2:
                break  # it was over before it was seen
            time.sleep(0.001)
        slack = {"loading": 2.0, "saving a state": 0.02, "saving the model": 0.05}
        if wait(child, generator.random() * slack.get(aim, 0.3)) is None:
            os.kill(child, signal.SIGKILL)
            wait(child)
        where, after = phase(out), time.monotonic() - begin
        alive = survivors(child)
        if moment % 2:
            child = start(folder, out)
            if wait(child, generator.random() * 1.2 * to_first_step) is None:
                os.kill(child, signal.SIGKILL)
                wait(child)
            where += f", then {phase(out)}"
            alive += survivors(child)
        status = wait(start(folder, out))
        wrong = []
        if alive:
            wrong.append(f"{len(alive)} processes live on")
        if status:
            wrong.append(f"exit {status}: {out.with_suffix('.txt').read_text()[-500:]}")
        elif result(out) != expected:
            wrong.append("other weights or log")
        left = [path.name for path in folder.glob(f".{out.name}*")]
        if left:
            wrong.append(f"left: {left}")
        failed += bool(wrong)
        text = out.with_suffix(".txt").read_text()
        on = [line for line in text.splitlines() if "Going on" in line or "Cleared" in line]
        print(f"{after:5.1f} s, {where}: {'; '.join(wrong) or 'the same'} {on[-1:]}", flush=True)
    signals = ("SIGTERM", "SIGHUP", "SIGINT") if asked.signals else ()
    for name in signals:
        out = folder / name
        child = start(folder, out)
        log = folder / f".{name}.partial" / "log.jsonl"
        while not (log.is_file() and log.read_text().count("\n") >= 4):
            time.sleep(0.01)
        number = signal.Signals[name]
        os.killpg(child, number)  # to its workers, too, as a terminal and Slurm do
        wrong = []
        if wait(child) != 128 + number:
            wrong.append(f"no exit {128 + number}")
        said = out.with_suffix(".txt").read_text().splitlines()[-1]
        if "is saved; --resume auto goes on" not in said:
            wrong.append(said)
        if wait(start(folder, out)) or result(out) != expected:
            wrong.append("other weights or log")
        failed += bool(wrong)
        print(f"{name}: {'; '.join(wrong) or f'{128 + number}, the same'} [{said}]", flush=True)
    for number in range(asked.interrupts):  # from the first import on, evenly
        failed += bool(interrupted(folder, number, (number + 0.5) / asked.interrupts * (took + 5)))
    count = asked.moments + len(signals) + asked.interrupts
    print(f"{count - failed} of {count} as they should be")
    sys.exit(bool(failed))


if __name__ == "__main__":
    run()
