"""Let one run train for long and watch whether it grows: memory, files, threads, temporary files.

    python tools/soak.py --minutes 30 --folder DIR

A stream of drawn pairs in two shards, a state every minute, a probe every 25 steps, one thread. A
line every few seconds; at the end the second quarter of its training beside the last. Then the
run is told to stop (SIGTERM), which it has to do with 143 and a saved state.
"""

import argparse
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from statistics import fmean

from clip_refine.toy import ToyPairs

NAMES = ("MB", "MB peak", "open files", "threads", "children", "temporary", "states", "steps")


def write_shards(folder: Path, *, images: int) -> None:
    """Two .tar files of images with a text file each."""
    pairs = ToyPairs("soaked", size=images)
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for index in range(shard, images, 2):
                image = io.BytesIO()
                pairs.load_image(index).save(image, "PNG")
                for kind, content in (
                    ("png", image.getvalue()),
                    ("txt", pairs.captions[index][0].encode()),
                ):
                    entry = tarfile.TarInfo(f"{index:05}.{kind}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def watch(process: int, folder: Path) -> tuple[float, ...]:
    """What a process holds now."""
    proc, work = Path(f"/proc/{process}"), folder / ".run.partial"
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    log = work / "log.jsonl"
    return (
        int(status["VmRSS"].split()[0]) / 1000,
        int(status["VmHWM"].split()[0]) / 1000,
        len(list((proc / "fd").iterdir())),
        int(status["Threads"]),
        len((proc / f"task/{process}/children").read_text().split()),
        sum(1 for _ in (folder / "tmp").rglob("*")),
        len(list((work / "state").glob("*"))),
        log.read_bytes().count(b"\n") if log.is_file() else 0,
    )


def soak(folder: Path, *, minutes: float, seconds: float) -> None:
    (folder / "tmp").mkdir(parents=True)
    write_shards(folder, images=600)
    command = [
        *(sys.executable, "-m", "clip_refine", "refine", "--model.name", "toy", "--quiet"),
        *("--data.train", str(folder / "train-{0..1}.tar"), "--data.streaming"),
        *("--data.val", "toy", "--out", str(folder / "run"), "--train.save-every", "1m"),
        *("--guard.every", "25", "--guard.pairs", "toy", "--guard.bound", "100"),
        *("--guard.images", "200", "--train.steps", "10000000", "--train.batch-size", "32"),
    ]
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=env)
    print("seconds", *NAMES, sep="\t")
    begin, rows = time.monotonic(), []
    while (now := time.monotonic() - begin) < 60 * minutes and run.poll() is None:
        row = watch(run.pid, folder)
        print(f"{now:.0f}", *(f"{value:.0f}" for value in row), sep="\t", flush=True)
        if row[-1]:  # it trains
            rows.append(row)
        time.sleep(seconds)
    run.send_signal(signal.SIGTERM)
    print(
        "exit status", run.wait(300), "states", *sorted((folder / ".run.partial/state").iterdir())
    )
    quarter = max(1, len(rows) // 4)
    for number, name in enumerate(NAMES):
        first, last = (
            fmean(row[number] for row in part)
            for part in (rows[quarter : 2 * quarter], rows[-quarter:])
        )
        print(f"{name}: second quarter {first:,.1f}, last {last:,.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seconds", type=float, default=10, help="between two looks")
    parser.add_argument("--folder", type=Path, required=True, help="a new one")
    given = parser.parse_args()
    soak(given.folder.resolve(), minutes=given.minutes, seconds=given.seconds)
