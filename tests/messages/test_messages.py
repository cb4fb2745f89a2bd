"""What a user reads after a mistake: `errors.txt` has whole messages, `templates.txt` all of them.

After a deliberate change run this file with `UPDATE_SNAPSHOTS=1` and read the difference.
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_refine.roads.suites  # whose kind of error is known only then
from clip_refine.cli import VERBS, main
from clip_refine.support.errors import ClipRefineError
from clip_refine.vectors.files import save_peer
from clip_refine.vectors.transforms import fit_peer

RECORD = Path(__file__).parent / "errors.txt"
TEMPLATES = Path(__file__).parent / "templates.txt"
SOURCE = Path(clip_refine.__file__).parent
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
        return ["refine", "--model.name", model, "--data.train", data, "--out", out, *more]

    def spoilt(text: str, name: str = "open_clip_config.json") -> str:
        inner = folder / f"spoilt{len([*folder.glob('spoilt*')])}"
        inner.mkdir()
        (inner / name).write_text(text)
        return str(inner)

    def array(name: str, dim: int = 3, **dims: int) -> str:
        rows = (
            np.random.default_rng(0).standard_normal((8, max([dim, *dims.values()]))).astype("f4")
        )
        if dims:
            np.savez(folder / name, **{side: rows[:, :dim] for side, dim in dims.items()})
        else:
            np.save(folder / name, rows[:, :dim])
        return str(folder / name)

    def cut(name: str) -> str:
        with open(name, "r+b") as file:
            file.truncate(150)
        return name

    out = str(folder / "run")
    maps = str(folder / "maps")
    features = array("features.npz", image_features=3, text_features=3)
    save_peer(fit_peer("mean-centring", torch.eye(3), torch.eye(3).flip(0)), folder / "maps")
    torch.save({"weight": Path("x")}, folder / "pickled.pt")

    def apply(stored: str, *more: str) -> list[str]:
        to = ["--side", "image", "--out", str(folder / f"new{Path(stored).suffix}")]
        return ["vectors", "apply", maps, stored, *to, *more]

    def compare(*more: str) -> list[str]:
        given = ["--model.name", model, "--data.train", good, "--data.val", "toy", "--out", out]
        return ["compare", *given, *more]

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
        "unknown kind of source": refine(table("pairs.xlsx", "")),
        "json of another layout": refine(table("j.json", '{"data": []}')),
        "folder without captions": refine(str(folder / "exists")),
        "unknown kind": refine(f"{good}#kind=coc"),
        "shard cut off": refine(table("k.tar", "no tar file")),
        "stream without held-out pairs": refine(
            table("l.jsonl", ""), "--data.streaming", "--train.steps", "2"
        ),
        "stream without steps": refine(table("l.jsonl", ""), "--data.streaming", *val),
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
        "missing class folder": [*on_toy, "--evaluation.zero-shot", str(folder / "no")],
        "no such device": [*ready, "--train.device", "nowhere:0"],
        "nothing to evaluate on": ["evaluate", "--model.name", model],
        "unknown suite": ["evaluate", "--suite", "papers"],
        "suite's images are not there": [
            *("evaluate", "--suite", "quick", "--data-root", str(folder), "--model.name", model)
        ],
        "bad suite": ["evaluate", "--suite", table("g.yaml", BAD_SUITE)],
        "models without a suite": ["evaluate", "--models", model],
        # settings
        "flag without a value": ["refine", "--config"],
        "no training pairs": ["refine", "--model.name", model],
        "no YAML": ["refine", "--config", table("l.yaml", "train: [\n")],
        "no settings": ["refine", "--config", table("m.yaml", "3\n")],
        "unknown recipe": [*ready, "--recipe", "clip-refined"],
        "factory of a file": ["evaluate", "--data.val", "toy", "--model.name", "factory:mine:make"],
        "factory without a module": [*on_toy, "--model.factory", "no_such:build"],
        "weights of a folder": [*on_toy, "--model.pretrained", "openai"],
        "nothing to go on with": [*ready, "--resume", str(folder / "nowhere")],
        "nothing to hold out of a stream": [
            *refine(table("n.jsonl", ""), "--data.streaming", "--data.val", "toy"),
            *("--guard", "--train.steps", "2"),
        ],
        "control characters": ["refine", "\x1b[2J"],
        # sources
        "no such split": refine(f"{good}#split=test"),
        "no such folder of images": refine(good, "--data.image-folder", str(folder / "no")),
        "empty split file": refine(good, "--data.split-file", table("a.txt", "")),
        "other split file": refine(good, "--data.split-file", table("b.txt", "gone.png\n")),
        "compressed": refine(table("o.csv.gz", "")),
        "pattern for nothing": refine(str(folder / "none-{0..3}.tar")),
        "too many files": refine(str(folder / "none-{0..9999999}.tar")),
        "table elsewhere": refine("https://example.org/captions.xlsx"),
        "damaged JSON": refine(table("p.json", '{"images": [')),
        "damaged JSON lines": refine(table("q.jsonl", "{\n")),
        "two streams": refine(
            good,
            *("--data.train", *[table(f"{s}.jsonl", "") for s in "rs"], "--data.streaming", *val),
            *("--train.steps", "2"),
        ),
        "near beyond its range": ["data", "check", good, "--near", "20"],
        "check of a training source": ["data", "check", good, "--data.train", good],
        # models
        "folder of a damaged model": ["evaluate", "--data.val", "toy", "--model.name", spoilt("{")],
        "folder of half a model": ["evaluate", "--data.val", "toy", "--model.name", spoilt("{}")],
        "weights that run code": [
            "evaluate",
            "--data.val",
            "toy",
            "--model.name",
            str(folder / "pickled.pt"),
        ],
        "weight beyond the line": ["interpolate", model, model, "--weight", "2", "--out", out],
        "two architectures": ["interpolate", model, "toy", "--out", out],
        "fold of nothing": ["fold", model, "--out", out],
        "fold of more than all": [
            "fold",
            model,
            "--share",
            "2",
            "--data.train",
            good,
            "--out",
            out,
        ],
        "exploration of nothing": ["explore", str(folder / "exists")],
        # comparisons
        "a recipe twice": compare("--recipes", "hycd", "hycd"),
        "sweep of nothing": compare("--sweep", "loss.alpha"),
        "sweep of an unknown setting": compare("--sweep", "loss.alpa=1"),
        "too few to compare on": compare("--sweep", "train.batch_size=32,64"),
        "sweep of no number": compare("--sweep", "loss.alpha=x"),
        "combination with another": compare("--combine", "hycd+nnn", "--recipes", "rafa"),
        "unknown training-free peer": compare("--peers", "mean-centered"),
        "stream to compare on": compare("--data.train", table("t.jsonl", ""), "--data.streaming"),
        "report of a damaged run": ["report", spoilt("{}", "scores.json")],
        # features
        "unknown peer to fit": ["posthoc", "fit", "nn", features, "--out", out],
        "peer without such a setting": [
            *("posthoc", "fit", "mean-centring", features, "--neighbours", "3", "--out", out)
        ],
        "features of another kind": ["posthoc", "fit", "nnn", good, "--out", out],
        "features to nowhere": [
            "posthoc",
            "apply",
            maps,
            features,
            "--out",
            "new.npz",
        ],
        "no peer": [
            "posthoc",
            "apply",
            str(folder / "exists"),
            features,
            "--out",
            f"{out}.safetensors",
        ],
        "vectors without sides": ["vectors", "evaluate", array("a.npz", image=3)],
        "vectors of two lengths": [
            *("vectors", "evaluate", array("b.npz", image_features=3, text_features=4))
        ],
        "too few vectors": ["vectors", "refine", features, "--out", out],
        "owner of arrays": ["vectors", "evaluate", features, "--owner", "id"],
        "another dimension": apply(array("a.npy", 4)),
        "a column of an array": apply(array("b.npy", 3), "--column", "image"),
        "another layout": apply(array("c.npy", 3), "--out", str(folder / "d.parquet")),
        "stored as text": apply(good),
        "stored to the end": apply(cut(array("e.npy", 3))),
        "two lists of other items": ["vectors", "align", array("f.npy"), features, "--out", out],
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
        message = message.replace(str(Path.cwd()), "HERE").replace(tiny_name, "MODEL")
        seen.append(f"# {mistake}\n{message}\n")
        assert sorted(path.name for path in tmp_path.glob("*run*")) == []
    check_record(RECORD, "\n".join(seen))


def check_record(record: Path, written: str) -> None:
    if os.environ.get("UPDATE_SNAPSHOTS"):
        record.write_text(written, encoding="utf-8")
    assert written == record.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# All of them, by the source: what is raised, the status it ends with, the text around its values.


STATUS = {
    "ClipRefineError": 2,
    "ConfigError": 2,
    "DataError": 2,
    "ModelError": 2,
    "OutputError": 2,
    "FailedError": 1,
    "EndedError": 1,
    "NotThereError": 2,  # of a source, which a suite collects
    "TrainingError": 1,
    "Planned": 0,
}


def kinds(kind: type[ClipRefineError] = ClipRefineError) -> Iterator[type[ClipRefineError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from kinds(inner)


def test_every_kind_of_error_ends_with_its_status(monkeypatch, capsys):
    defined = {
        node.name
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & {*STATUS}
    }
    assert {kind.__name__ for kind in kinds()} == STATUS.keys() == defined | {"ClipRefineError"}
    for kind in kinds():

        def fail(arguments: list[str], kind: type[ClipRefineError] = kind) -> None:
            raise kind("so it is.")

        monkeypatch.setitem(VERBS, "demo", fail)
        with pytest.raises(SystemExit) as stop:
            main(["demo"])
        assert stop.value.code == STATUS[kind.__name__]
        assert capsys.readouterr().err == "clip-refine demo: so it is.\n"
        with pytest.raises(kind):
            main(["demo", "--debug"])


def template(message: ast.expr) -> str:
    """Its text as it stands in the source, with what is put in in braces."""
    match message:
        case ast.Constant(value):
            return str(value)
        case ast.JoinedStr(parts):
            return "".join(map(template, parts))
        case ast.FormattedValue(value):
            message = value
    # Python 3.12 and later choose other quotes within quotes
    return f"{{{ast.unparse(message)}}}".replace('"', "'")


def test_every_error_is_on_record():
    ours, seen = {kind.__name__ for kind in kinds()}, []
    for file in sorted(SOURCE.rglob("*.py")):
        found = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Name("foreign"), [ast.Name(name), before, *after]):
                    text = f"{template(before)} (REASON).{''.join(map(template, after))}"
                case ast.Call(ast.Name(name), [text]) if name in ours:
                    text = template(text)
                case ast.Raise(ast.Call(ast.Name("ValueError"), [text])) if "config" in file.parts:
                    name, text = "ConfigError", f"SETTING: {template(text)}."  # `explain`
                case _:
                    continue
            assert text[-1] in ".})" or ". " in text, f"{file}: {text}"
            found.append((node.lineno, f"{STATUS[name]} {name}: {text}"))
        if found:
            seen.append(f"# {file.relative_to(SOURCE)}")
            seen += [text for _, text in sorted(found)]
    check_record(TEMPLATES, "\n".join(seen) + "\n")
