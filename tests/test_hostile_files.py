"""Files made to exhaust memory or to lead elsewhere, read in a child that may take 2 GB more.

docs/security.md names the limits. One child reads them all, since importing takes longest.
"""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DEEP = 100_000  # levels; Python 3.13 reads some thousands
CHILD = """
import json, resource, signal, sys, time
from clip_refine.config import DataConfig, ModelConfig, RefineConfig, load_config, load_suite
from clip_refine.data import open_pairs, open_stream, read_class_folders
from clip_refine.data.images import open_image
from clip_refine.models import load_open_clip, load_weights_file
from clip_refine.results import RunScores, read
from clip_refine.report.run_page import read_steps
from clip_refine.roads.build import build_tokenizer
from clip_refine.support.errors import ClipRefineError
from clip_refine.vectors.stored import read_pairs
from pathlib import Path

OUT = DataConfig(allow_outside=True)

def tokenized(text):
    tokenizer = build_tokenizer(ModelConfig())
    assert tokenizer([text]).shape == (1, 77)
    assert tokenizer.token_counts([text])[0] > 77

def drain(name):
    stream = open_stream(name, DataConfig(streaming=True))
    next(iter(stream.pairs(seed=0)))

for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmData:"):
        limit = int(line.split()[1]) * 1024 + 2 * 10**9
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
signal.alarm(300)
found = {}
for name, code in json.loads(sys.argv[1]).items():
    start = time.process_time()
    try:
        eval(code)
        said = "ok"
    except ClipRefineError as error:
        said = str(error)
    except BaseException as error:
        said = f"FAILED {type(error).__name__}: {error}"[:500]
    found[name] = [said, time.process_time() - start]
print(json.dumps(found))
"""


def sparse_tar(path: Path) -> None:
    """A member of 8 GB that is all hole, as GNU tar writes it."""
    text, image = tarfile.TarInfo("a.txt"), tarfile.TarInfo("a.png")
    text.size, image.type = 1, tarfile.GNUTYPE_SPARSE
    header = bytearray(image.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2
    header[483:495] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(text.tobuf() + b"x".ljust(512, b"\0") + bytes(header) + bytes(1024))


def tar_of(path: Path, **parts: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for extension, content in parts.items():
            member = tarfile.TarInfo(f"a.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(image: Image.Image, **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **more)
    return file.getvalue()


def many_scans(count: int) -> bytes:
    """A progressive JPEG of one grey whose first scan of details comes again and again.

    Each is one long run of blocks without any: few bytes, and time for every block.
    """
    file = io.BytesIO()
    Image.new("L", (4000, 4000), 128).save(file, "JPEG", progressive=True)
    sound = file.getvalue()
    begin = next(at for at in find(sound, b"\xff\xda") if sound[at + 7])  # not the averages
    end = next(at for at in find(sound, b"\xff") if at > begin + 1 and sound[at + 1])
    return sound[:begin] + sound[begin:end] * count + sound[begin:]


def find(content: bytes, what: bytes) -> Iterator[int]:
    at = -1
    while (at := content.find(what, at + 1)) >= 0:
        yield at


def expected(folder: Path) -> dict[str, tuple[str, str]]:
    """What is read → how, and what is said of it."""

    def put(name: str, content: str | bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    secret = folder.parent / "secret.png"
    secret.write_bytes(png(Image.new("RGB", (8, 8))))
    (folder / "linked").mkdir(parents=True)
    (folder / "linked" / "a.png").symlink_to(secret)
    (folder / "beside").mkdir()
    put("beside/a.png", secret.read_bytes())
    put("beside/b.png", secret.read_bytes())
    put("beside/b.txt", "a dog")
    (folder / "beside" / "a.txt").symlink_to(put("../secret.txt", "password"))
    for name in ("one", "two"):
        put(f"classes/{name}/b.png", secret.read_bytes())
    (folder / "classes" / "two" / "a.png").symlink_to(secret)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.csv")
    os.mkfifo(folder / "pipe.pt")
    (folder / "zero.png").symlink_to("/dev/zero")
    rows = "image,caption\n"
    large = png(Image.new("1", (13_400, 13_400)))
    seen_through = Image.new("P", (13_377, 13_377))
    put("allowed.png", png(seen_through, transparency=0))
    put("large.png", large)
    sparse_tar(folder / "sparse.tar")
    tar_of(folder / "text.tar", txt=b"x" * (64 << 20), png=secret.read_bytes())
    tar_of(folder / "json.tar", json=b"[" * DEEP, png=secret.read_bytes())
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    put("bomb.yaml", "a0: &a0 x\n" + bomb)
    put("deep.yaml", "a: " + "[" * 3000)
    put("braces.yaml", "{a: " * 3000)
    put("date.yaml", "seed: 2026-13-45")
    put("long.yaml", "a: " + "x" * (2 << 20))
    put("model/open_clip_config.json", '{"model_cfg": ' * DEEP)
    put("model/open_clip_model.safetensors", "")
    with zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 << 20))
    deep_scores = put("scores.json", '{"before": ' * 9000)
    os.mkfifo(folder / "pipe.json")
    put("scans.jpg", many_scans(4000))
    zeros = {name: np.zeros((30_000, 512), "f4") for name in ("image", "text")}
    np.savez_compressed(folder / "zeros.npz", **zeros)
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)
    put("word.txt", "".join(letters))
    columns = ",".join(f"c{i}" for i in range(100_000))
    image_csv = "open_pairs({!r})"
    return {
        "link": (image_csv.format(str(put("l.csv", rows + "linked/a.png,x\n"))), "is a link out"),
        "link meant": (
            f"open_pairs({str(folder / 'l.csv')!r}, OUT)",
            "ok",
        ),
        "linked text": (image_csv.format(str(folder / "beside")), "a.txt: is a link out"),
        "linked class": (
            f"read_class_folders(Path({str(folder / 'classes')!r}), templates=('a {{}}',))",
            "is a link out of",
        ),
        "pipe": (image_csv.format(str(put("p.csv", rows + "pipe.png,x\n"))), "a pipe or a device"),
        "device": (
            f"open_pairs({str(put('d.csv', rows + 'zero.png,x'))!r}, OUT)",
            "a pipe or a device",
        ),
        "pipe as table": (image_csv.format(str(folder / "pipe.csv")), "a pipe or a device"),
        "pipe as weights": (
            f"load_weights_file(Path({str(folder / 'pipe.pt')!r}))",
            "a pipe or a device",
        ),
        "sparse tar": (image_csv.format(str(folder / "sparse.tar")), "is a sparse file"),
        "streamed sparse tar": (f"drain({str(folder / 'sparse.tar')!r})", "is a sparse file"),
        "text in a tar": (image_csv.format(str(folder / "text.tar")), "67,108,864 bytes, more"),
        "deep json in a tar": (image_csv.format(str(folder / "json.tar")), "nested too deeply"),
        "large image": (
            image_csv.format(str(put("g.csv", rows + "large.png,x\n"))),
            "more than the 178,956,970",
        ),
        "largest image": (f"open_image(Path({str(folder / 'allowed.png')!r}))", "ok"),
        "long line": (
            image_csv.format(str(put("t.tsv", "image\tcaption\na.png\t" + "x" * (64 << 20)))),
            "line 2 has more than the 1,048,576 letters",
        ),
        "long json line": (
            image_csv.format(str(put("t.jsonl", '{"image": "' + "x" * (65 << 20) + '"}'))),
            "line 1 has more than the 67,108,864 bytes",
        ),
        "pattern": ("open_pairs('{0..999999999}.tar')", "stands for more than 1,000,000 files"),
        "patterns": ("open_pairs('{0..9999}{0..9999}.tar')", "stands for more than 1,000,000"),
        "deep json": (
            image_csv.format(str(put("deep.json", '{"images": ' + "[" * DEEP))),
            "nested too deeply",
        ),
        "deep json line": (
            image_csv.format(str(put("deep.jsonl", '{"image": ' + "[" * DEEP))),
            "nested too deeply",
        ),
        "deep yaml": (f"load_config(RefineConfig, Path({str(folder / 'deep.yaml')!r}))", "deeply"),
        "deep suite": (f"load_suite({str(folder / 'braces.yaml')!r})", "nested too deeply"),
        "yaml that multiplies": (
            f"load_config(RefineConfig, Path({str(folder / 'bomb.yaml')!r}))",
            "stands for more than the 1,000,000 values",
        ),
        "no date": (f"load_config(RefineConfig, Path({str(folder / 'date.yaml')!r}))", "is none"),
        "long yaml": (f"load_config(RefineConfig, Path({str(folder / 'long.yaml')!r}))", "more"),
        "deep model settings": (
            f"load_open_clip('local-dir:{folder / 'model'}')",
            "nested too deeply",
        ),
        "packed weights": (
            f"load_weights_file(Path({str(folder / 'packed.pt')!r}))",
            "unpacks to far more than",
        ),
        "columns": (image_csv.format(str(put("c.csv", columns + "\n"))), "and 99980 others"),
        "columns of json": (
            image_csv.format(str(put("c.jsonl", json.dumps({f"c{i}": 1 for i in range(100_000)})))),
            "and 99980 others",
        ),
        "deep results": (
            f"read(RunScores, Path({str(deep_scores)!r}))",
            "is no scores.json",
        ),
        "pipe as results": (
            f"read(RunScores, Path({str(folder / 'pipe.json')!r}))",
            "a pipe, a device or a folder",
        ),
        "image of many scans": (
            f"open_image(Path({str(folder / 'scans.jpg')!r}))",
            "4,006 scans, more than the 100",
        ),
        "packed vectors": (f"read_pairs({str(folder / 'zeros.npz')!r})", "unpacks to far more"),
        "a word of a million letters": (
            f"tokenized(Path({str(folder / 'word.txt')!r}).read_text())",
            "ok",
        ),
        "deep log": (
            f"read_steps(Path({str(put('log.jsonl', '[' * DEEP))!r}))",
            "nested too deeply",
        ),
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return expected(tmp_path_factory.mktemp("hostile") / "data")


@pytest.fixture(scope="module")
def found(cases: dict[str, tuple[str, str]]) -> dict[str, list]:
    code = json.dumps({name: code for name, (code, _) in cases.items()})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, code], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_every_hostile_file_is_refused_soon_in_little_memory(
    cases: dict[str, tuple[str, str]], found: dict[str, list]
):
    wrong = {
        name: found[name]
        for name, (_, expected) in cases.items()
        if expected not in found[name][0] or found[name][1] > 10 or len(found[name][0]) > 5000
    }
    assert not wrong, json.dumps(wrong, indent=1)
