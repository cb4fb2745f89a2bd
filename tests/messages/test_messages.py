"""What a user reads after a mistake, as a whole: `errors.txt` is the record.

After a deliberate change run this file with `UPDATE_SNAPSHOTS=1` and read the difference.
"""

import os
from pathlib import Path

import pytest

from clip_refine.cli import main

RECORD = Path(__file__).parent / "errors.txt"
IMAGES = ("ok.png", "fine.png")

BAD_SUITE = """\
sources:
  here: {at: {kind: folder, path: somewhere}}
tasks:
  - {kind: retrieval, source: here}
"""


def arguments_of_mistakes(folder: Path, model: str) -> dict[str, list[str]]:
    def table(name: str, text: str) -> str:
        (folder / name).write_text(text, encoding="utf-8")
        return str(folder / name)

    def refine(data: str, *more: str) -> list[str]:
        out = ["--out", str(folder / "run")]
        return ["refine", "--model.name", model, "--data.train", data, *out, *more]

    (folder / "broken.png").write_bytes(b"no image")
    (folder / "exists").mkdir()
    rows = "".join(f"{image},a red circle\n" for image in IMAGES)
    good = table("good.csv", f"image,caption\n{rows}")
    val = ("--data.val", good)
    on_toy = refine("toy", "--data.val", "toy")
    ready = refine(good, *val, "--train.batch-size", "2")
    return {
        "unknown verb": ["refin"],
        "unknown action of data": ["data", "chek"],
        "report of nothing": ["report"],
        "report of no run": ["report", str(folder / "nowhere")],
        "nothing to check": ["data", "check", str(folder / "nowhere.csv")],
        "missing image file": refine(table("a.csv", "image,caption\ngone.png,a dog\n")),
        "unreadable image": refine(table("b.csv", "image,caption\nbroken.png,a dog\n")),
        "empty caption": refine(table("c.csv", f"image,caption\n{IMAGES[0]},\n")),
        "absolute path": refine(table("g.csv", f"image,caption\n/{IMAGES[0]},a dog\n")),
        "twelve bad rows": refine(table("h.csv", "image,caption\n" + "gone.png,a dog\n" * 12)),
        "too many bad rows": refine(
            table("i.csv", f"image,caption\n{rows}gone.png,a dog\n"), "--data.skip-bad"
        ),
        "missing column": refine(table("d.csv", f"image,words\n{IMAGES[0]},a dog\n")),
        "wrong column": refine(good, "--data.caption-column", "captions"),
        "missing file": refine(str(folder / "nowhere.csv")),
        "unknown kind of source": refine(str(folder / "pairs.xlsx")),
        "json of another layout": refine(table("j.json", '{"data": []}')),
        "folder without captions": refine(str(folder / "exists")),
        "unknown kind": refine(f"{good}#kind=coc"),
        "shard cut off": refine(table("k.tar", "no tar file")),
        "stream without held-out pairs": refine(table("l.jsonl", ""), "--data.streaming"),
        "stream of a table": refine(good, "--data.streaming", *val),
        "weights for other sources": refine(good, "--data.weights", "2", "1"),
        "too few to hold out": refine(good),
        "fewer pairs than a batch": refine(good, *val),
        "output exists": [*ready, "--out", str(folder / "exists")],
        "unknown model": [*on_toy, "--model.name", "ViT-B-33"],
        "unknown tag": [
            *on_toy,
            *("--model.name", "ViT-B-32", "--model.pretrained", "opnai"),
        ],
        "folder without a model": [*on_toy, "--model.name", str(folder / "exists")],
        "file without weights": [*on_toy, "--model.name", good],
        "factory without a function": [*on_toy, "--model.factory", "my_models"],
        "no model folder": [*on_toy, "--model.name", f"local-dir:{folder}"],
        "unknown setting in a file": [
            *("refine", "--config", table("e.yaml", "train: {batchsize: 3}\n"))
        ],
        "bad setting in a file": [*("refine", "--config", table("f.yaml", "loss: {alpha: 3}\n"))],
        "missing configuration": ["refine", "--config", str(folder / "nowhere.yaml")],
        "missing class folder": [*ready, "--evaluation.zero-shot", str(folder / "no")],
        "no such device": [*ready, "--train.device", "nowhere:0"],
        "nothing to evaluate on": ["evaluate", "--model.name", model],
        "unknown suite": ["evaluate", "--suite", "papers"],
        "suite's images are not there": [
            *("evaluate", "--suite", "quick", "--data-root", str(folder), "--model.name", model)
        ],
        "bad suite": ["evaluate", "--suite", table("g.yaml", BAD_SUITE)],
        "models without a suite": ["evaluate", "--models", model],
    }


def test_messages(
    tmp_path: Path, tiny_name: str, pairs, capsys: pytest.CaptureFixture[str], monkeypatch
):
    for index, image in enumerate(IMAGES):
        pairs.load_image(index).save(tmp_path / image)
    seen = []
    for mistake, arguments in arguments_of_mistakes(tmp_path, tiny_name).items():
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2, mistake
        message = capsys.readouterr().err.replace(str(tmp_path), "DIR").strip()
        seen.append(f"# {mistake}\n{message}\n")
        assert sorted(path.name for path in tmp_path.glob("*run*")) == []
    written = "\n".join(seen)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        RECORD.write_text(written, encoding="utf-8")
    assert written == RECORD.read_text(encoding="utf-8")
