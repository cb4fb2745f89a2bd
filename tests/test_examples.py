"""The examples run as they stand, only shorter."""

import ast
import importlib.util
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from clip_refine import RefineConfig, load_open_clip, refine
from clip_refine.roads import build
from clip_refine.roads.export import export
from clip_refine.toy import ToyPairs
from clip_refine.vectors.files import save_peer
from clip_refine.vectors.transforms import Fold

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object, cwd: Path | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def run_here(name: str, *arguments: object) -> str:
    """The same in this process, which has imported already what takes longer than they do."""
    with pytest.MonkeyPatch().context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_stay_short(example: Path):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_say_what_is_to_be_installed(example: Path):
    """What is imported that does not come with clip-refine, or with an extra of it."""
    tree = ast.parse(example.read_text(encoding="utf-8"))
    names = [
        name.name if isinstance(node, ast.Import) else node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    ]
    beside = {"clip_refine", "torch", "numpy", "open_clip", *sys.stdlib_module_names}
    needs = {name.partition(".")[0] for name in names} - beside
    said = re.findall("Needs `pip install ([^`]+)`", ast.get_docstring(tree) or "")
    assert bool(needs) == bool(said), needs


@pytest.mark.parametrize("name", ["02_ray_data.py", "03_hf_trainer.py"])
def test_without_arguments_they_say_which(name: str):
    package = {"02_ray_data.py": "ray", "03_hf_trainer.py": "transformers"}[name]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    with pytest.raises(SystemExit, match=re.escape(f"python {name} ")):
        run_here(name)


def test_by_hand():
    said = run_here("01_by_hand.py", 2)
    assert "before: gap" in said
    assert "after: gap" in said


def test_by_hand_makes_the_tools_weights(
    tiny_name: str, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path, monkeypatch
):
    # a teacher that is asked once for all pairs has them in other batches, and so other rounding;
    # tests/roads/test_refine.py holds that to one that is asked in every step, as by hand
    monkeypatch.setattr("clip_refine.roads.refine.keeps_teacher", lambda *_: False)
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "train": {"batch_size": 32, "learning_rate": 1e-3, "precision": "fp32", "epochs": 2},
            "loss": {"feature_scale": "canonical"},
            "out": tmp_path / "run",
            "report": False,
        }
    )
    refine(config, train_pairs=pairs, held_out=held_out)
    theirs = load_open_clip(f"local-dir:{config.out / 'model'}").clip.state_dict()

    spec = importlib.util.spec_from_file_location("by_hand", EXAMPLES / "01_by_hand.py")
    by_hand = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_hand)
    model = load_open_clip(tiny_name)
    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    batches = build.build_batches(config, pairs, model, Accelerator(cpu=True))
    pixels = torch.stack([model.preprocess(pairs.load_image(i)) for i in range(len(pairs))])
    tokens = model.full_length_tokenizer([texts[0] for texts in pairs.captions])
    steps = by_hand.refine_by_hand(
        model.clip,
        [(batch.pixels, pad(batch.tokens, (0, 32 - batch.tokens.shape[1]))) for batch in batches],
        by_hand.raw_norms(model.clip, pixels, tokens),
        learning_rate=1e-3,
        generator=build.seeded_generator(config.seed, "references"),
    )
    assert len(list(steps)) == 4
    for name, ours in model.clip.state_dict().items():
        expected, was = theirs[name], before[name]
        if name.endswith("in_proj_bias"):
            # a key's bias changes no softmax: its gradient is rounding, which AdamW enlarges
            expected, was, ours = (torch.cat(b.chunk(3)[::2]) for b in (expected, was, ours))
        assert (ours - expected).abs().max() <= 1e-5, name
    assert any((theirs[name] != before[name]).any() for name in before)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch, capsys):
    """Its cells as a kernel runs them: one after another, with the same names."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert said.count("image to text R@1") >= 2
    assert "a red star finds ['" in said
    assert (tmp_path / "runs/quickstart/report.html").is_file()


def test_the_page_for_python_runs_from_top_to_bottom(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (EXAMPLES.parent / "docs" / "python.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(lines, names)
    said = capsys.readouterr().out
    assert said.count("retrieval.text_to_image_recall@10") == 2
    assert "untouched" in said
    assert names["mapped"].shape == (120, names["maps"].dim)


def test_hugging_faces_trainer(tmp_path: Path):
    export("toy", to="transformers", out=tmp_path / "toy")
    run_here("03_hf_trainer.py", tmp_path / "toy", tmp_path / "out", 2)
    assert_moved(tmp_path / "toy" / "model.safetensors", tmp_path / "out" / "model.safetensors")


@pytest.mark.skipif(
    find_spec("lightning") is None, reason="lightning is not installed; make parity"
)
def test_lightning(tmp_path: Path):
    run("04_lightning.py", 2, cwd=tmp_path)
    name = "open_clip_model.safetensors"
    from clip_refine.toy import model_directory

    assert_moved(model_directory() / name, tmp_path / "refined" / name)


@pytest.mark.skipif(
    find_spec("webdataset") is None, reason="open_clip's script needs webdataset; make parity"
)
def test_open_clips_own_script(tiny_name: str, table: Path, tmp_path: Path):
    files = ("--train-data", table, "--dataset-type", "csv", "--csv-separator", ",")
    columns = ("--csv-img-key", "file_name", "--csv-caption-key", "caption")
    models = ("--model", tiny_name, "--distill-model", tiny_name, "--distill-pretrained", "it")
    short = ("--epochs", 1, "--batch-size", 32, "--warmup", 0, "--lr", 1e-3, "--workers", 0)
    where = ("--device", "cpu", "--precision", "fp32", "--logs", tmp_path / "logs", "--name", "a")
    said = run("05_open_clip_train.py", *files, *columns, *models, *short, *where, cwd=table.parent)
    assert "Rafa_loss" in said
    assert "Hycd_loss" in said
    saved = tmp_path / "logs" / "a" / "checkpoints" / "epoch_1.pt"
    after = open_clip.factory.load_state_dict(str(saved))
    before = load_open_clip(tiny_name).clip.state_dict()
    assert any((after[name] != before[name]).any() for name in before)


def assert_moved(before: Path, after: Path) -> None:
    from safetensors.torch import load_file

    was, now = load_file(before), load_file(after)
    moved = max(float((now[name].float() - was[name].float()).abs().max()) for name in was)
    assert 1e-5 < moved < 1


@pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: pip install 'ray[data]'"
)
def test_ray_data(tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    (tmp_path / "in").mkdir()
    table = pa.table({"id": list(range(50)), "image_embedding": list(rows)})
    pq.write_table(table, tmp_path / "in/a.parquet")
    fold = Fold.fit(torch.from_numpy(rows), torch.from_numpy(rows))
    save_peer(fold, tmp_path / "maps")
    example = EXAMPLES / "02_ray_data.py"
    paths = [str(tmp_path / name) for name in ("maps", "in", "out")]
    subprocess.run([sys.executable, str(example), *paths], check=True, timeout=200)
    found = pq.read_table(tmp_path / "out").sort_by("id")
    mapped = np.stack([np.asarray(row) for row in found["image_embedding"].to_pylist()])
    expected = fold.transform_image(torch.from_numpy(rows)).numpy()
    assert np.abs(mapped - expected).max() < 1e-6
