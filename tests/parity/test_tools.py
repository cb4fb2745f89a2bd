"""The model card's lines for other people's tools, as they stand in the card: `make parity`."""

import ast
import io
import json
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import clip_refine
from clip_refine import RefineConfig, refine
from clip_refine.evaluation.classify import class_vectors, zero_shot_scores
from clip_refine.models import load_open_clip
from clip_refine.roads.export import export
from clip_refine.toy import ToyClasses, ToyPairs
from tests.roads.test_export import code_blocks

for tool in ("clip_benchmark", "clip_retrieval", "mteb"):
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed; run make parity", allow_module_level=True)

SHAPES = ToyClasses("toy_shape", 64)


@pytest.fixture(scope="module")
def run(pairs: ToyPairs, held_out: ToyPairs, tmp_path_factory) -> Path:
    """The drawn world's model, refined for two steps."""
    config = RefineConfig.model_validate(
        {
            "model": {"name": "toy"},
            "train": {"batch_size": 32, "learning_rate": 3e-4, "steps": 2},
            "out": tmp_path_factory.mktemp("runs") / "a",
            "report": False,
        }
    )
    refine(config, train_pairs=pairs, held_out=held_out)
    return config.out


def shell(command: str, folder: Path) -> str:
    """Run a line in a folder with this environment's programs, offline."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    source = str(Path(clip_refine.__file__).parents[1])
    set_ = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": source,
        "HF_HUB_OFFLINE": "1",
        "MTEB_CACHE": str(folder),
    }
    ran = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=set_, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def features(folder: Path, names: list[str], template: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours of the drawn shapes, and of the classes."""
    model = load_open_clip(f"local-dir:{folder}")
    with torch.no_grad():
        prompts = model.encode_text(model.tokenizer([template.format(c=name) for name in names]))
        pixels = [model.preprocess(SHAPES.load_image(index)) for index in range(len(SHAPES))]
        return model.encode_image(torch.stack(pixels)), class_vectors(prompts.unsqueeze(1))


def test_clip_benchmark(run: Path):
    folder = run / "model"
    (folder / "pets" / "test").mkdir(parents=True)
    with tarfile.open(folder / "pets/test/0.tar", "w") as shard:
        for index in range(len(SHAPES)):
            picture = io.BytesIO()
            SHAPES.load_image(index).save(picture, "png")
            label = str(SHAPES.labels[index]).encode()
            for ending, content in (("png", picture.getvalue()), ("cls", label)):
                entry = tarfile.TarInfo(f"{index:03}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    names = list(SHAPES.class_names)
    for name, text in (
        ("test/nshards.txt", "1"),
        ("classnames.txt", "\n".join(names)),
        ("zeroshot_classification_templates.txt", "a {c}"),
    ):
        (folder / "pets" / name).write_text(text)
    (lines,) = code_blocks(folder, "bash")
    shell(next(line for line in lines.splitlines() if "clip_benchmark" in line), folder)
    theirs = json.loads((folder / "pets.json").read_text())["metrics"]
    image, classes = features(folder, names, "a {c}")
    ours = zero_shot_scores(image, classes, torch.tensor(SHAPES.labels))
    assert 0.2 < theirs["acc1"] < 1
    assert ours["top1"] == pytest.approx(theirs["acc1"])
    assert ours["top5"] == pytest.approx(theirs["acc5"])


@pytest.mark.timeout(900)  # imports everything in each of its four processes
def test_clip_retrieval(run: Path):
    folder = run / "model"
    (folder / "photos").mkdir()
    for index in range(4):
        SHAPES.load_image(index).save(folder / "photos" / f"{index}.png")
    (lines,) = code_blocks(folder, "bash")
    shell(next(line for line in lines.splitlines() if "clip-retrieval" in line), folder)
    stored = np.load(folder / "embeddings/img_emb/img_emb_0.npy")
    image, _ = features(folder, ["x"], "{c}")
    assert np.abs(stored - normalize(image[:4], dim=1).numpy()).max() < 1e-3  # float16


def test_mteb(run: Path, tmp_path: Path):
    folder = tmp_path / "exported"
    export(str(run), to="sentence-transformers", out=folder)
    lines = next(block for block in code_blocks(folder, "python") if "import mteb" in block)
    (folder / "run.py").write_text(LOCAL_DATA + lines)
    (theirs,) = ast.literal_eval(shell("python run.py", folder).splitlines()[-1])["test"]
    image, classes = features(run / "model", list(SHAPES.class_names), "a photo of a {c}.")
    ours = zero_shot_scores(image, classes, torch.tensor(SHAPES.labels))
    assert 0.2 < theirs["accuracy"] < 1
    assert ours["top1"] == pytest.approx(theirs["accuracy"])


LOCAL_DATA = """
import datasets
from clip_refine.toy import ToyClasses

shapes = ToyClasses("toy_shape", 64)
label = datasets.ClassLabel(names=list(shapes.class_names))
kinds = datasets.Features({"img": datasets.Image(), "label": label})
rows = [{"img": shapes.load_image(i), "label": shapes.labels[i]} for i in range(len(shapes))]
table = datasets.Dataset.from_list(rows, features=kinds)
datasets.load_dataset = lambda *_, **__: datasets.DatasetDict(test=table)
"""
