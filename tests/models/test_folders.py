"""What a folder is taken for."""

import json
from pathlib import Path

import pytest

from clip_refine.config import ModelConfig
from clip_refine.models import OpenClipEncoder
from clip_refine.models.checkpoints import recognise_folder
from clip_refine.models.transformers import SentenceFolder
from clip_refine.roads import build
from clip_refine.roads.build import build_model
from clip_refine.support.errors import DataError, ModelError
from clip_refine.support.folder import seal
from tests.conftest import TINY, write_model

MODELS = "sentence_transformers.models"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "kind", "remark"),
    [
        (["open_clip_config.json", "config.json"], "open_clip", "an open_clip model"),
        (["config.json", "model.safetensors"], "transformers", "a Transformers model"),
        (["modules.json", "0_CLIPModel/config.json"], "sentence-transformers", "a sentence-tr"),
        (
            ["scores.json", "config.yaml", "model/open_clip_config.json"],
            "open_clip",
            "a run, whose model is an open_clip model",
        ),
    ],
)
def test_kinds(tmp_path: Path, names: list[str], kind: str, remark: str):
    found = recognise_folder(touch(tmp_path, *names))
    assert found.kind == kind
    assert found.remark.startswith(remark)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["captions.csv"], "holds no model. Allowed: an open_clip folder"),
        (["config.json"], "config.json without weights"),
        (["model.safetensors"], "--model.factory"),
        (["scores.json", "config.yaml"], "a run without its model"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, names: list[str], message: str):
    with pytest.raises(ModelError, match=message):
        recognise_folder(touch(tmp_path, *names))


def test_an_open_clip_folder_by_its_bare_path(tiny_name: str, capsys: pytest.CaptureFixture[str]):
    folder = tiny_name.removeprefix("local-dir:")
    assert isinstance(build.build_model(ModelConfig(name=folder)), OpenClipEncoder)
    assert "an open_clip model" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ModelError, match="does not go with"):
        build.build_model(ModelConfig(name=folder, pretrained="openai"))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("0_CLIPModel", f"{MODELS}.CLIPModel"), ("1", f"{MODELS}.Dense")], "CLIPModel, Dense"),
        ([("0_Bert", f"{MODELS}.WordEmbeddings")], "Only CLIP-type models"),
        ([("../0_CLIPModel", f"{MODELS}.CLIPModel")], "outside the folder"),
        ([("0_CLIPModel", "evil.CLIPModel")], "names evil.CLIPModel, and code of elsewhere"),
    ],
)
def test_sentence_transformers_folders_that_are_refused(tmp_path: Path, modules, message: str):
    listing = [{"path": path, "type": kind} for path, kind in modules]
    (tmp_path / "modules.json").write_text(json.dumps(listing), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        SentenceFolder.find(str(tmp_path))


def test_weights_that_rotted_are_not_used(tmp_path: Path):
    name = write_model(tmp_path / "model", TINY)
    weights = tmp_path / "model" / "open_clip_model.safetensors"
    seal(tmp_path / "model")
    build_model(ModelConfig(name=name))
    content = bytearray(weights.read_bytes())
    content[-7] ^= 2
    weights.write_bytes(content)
    for given in (name, str(tmp_path / "model")):
        with pytest.raises(DataError, match="is not what was written there, by its checksum"):
            build_model(ModelConfig(name=given))
