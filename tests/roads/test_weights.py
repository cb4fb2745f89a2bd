"""A model on the line between two saved ones."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from clip_refine.cli import main
from clip_refine.config import load_config
from clip_refine.config.runs import RefineConfig
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.roads.refine import refine
from clip_refine.roads.weights import interpolate
from clip_refine.support.errors import ModelError
from clip_refine.toy import ToyPairs
from tests.conftest import PREPROCESS, TINY


@pytest.fixture
def moved(tiny: OpenClipEncoder, tmp_path: Path) -> Path:
    with torch.no_grad():
        tiny.clip.visual.proj.add_(1.0)
    tiny.save(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_half_way_from_a_model_to_a_run(
    tiny_name: str, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "half"
    main(["interpolate", tiny_name, str(moved), "--weight", "0.25", "--out", str(out)])
    assert "0.25 of the way" in capsys.readouterr().out
    before, between = load_open_clip(tiny_name), load_open_clip(f"local-dir:{out}")
    shift = between.clip.visual.proj - before.clip.visual.proj
    assert torch.allclose(shift, torch.full_like(shift, 0.25), atol=1e-6)
    assert torch.equal(between.clip.text_projection, before.clip.text_projection)
    main(["interpolate", tiny_name, str(moved), "--out", str(out), "--overwrite"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weight", "2"], "weight: must be from 0 to 1"),
        (["--out", "."], "exists already"),
    ],
)
def test_what_is_refused(
    more: list[str],
    message: str,
    tiny_name: str,
    moved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        main(["interpolate", tiny_name, str(moved), "--out", str(tmp_path / "x"), *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quick_gelu": True}, "one has GELU and the other QuickGELU"),
        ({"mean": [0.1] * 3}, "prepare images differently"),
    ],
)
def test_models_of_two_functions_are_not_mixed(
    changes: dict, message: str, tiny_name: str, moved: Path, tmp_path: Path
):
    path = moved / "model" / "open_clip_config.json"
    config = json.loads(path.read_text())
    part = config["preprocess_cfg" if "mean" in changes else "model_cfg"]
    part.update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        interpolate(tiny_name, str(moved), weight=0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_with_its_tag(tiny_name: str, tmp_path: Path, monkeypatch):
    weights = Path(tiny_name.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", dict(TINY))
    tags = {"mine": {"url": "x", **PREPROCESS}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-arch", tags)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    interpolate("tiny-arch@mine", tiny_name, weight=0.5, out=tmp_path / "out")
    assert "tiny-arch (mine)" in (tmp_path / "out" / "provenance.json").read_text()


def refined(
    tiny_name: str, pairs: ToyPairs, held_out: ToyPairs, out: Path, interpolate: object
) -> tuple[OpenClipEncoder, RefineConfig, object]:
    config = RefineConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "train": {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"},
            "interpolate": interpolate,
            "report": False,
            "out": out,
        }
    )
    scores = refine(config, train_pairs=pairs, held_out=held_out)
    model = load_open_clip(f"local-dir:{out / 'model'}")
    return model, load_config(RefineConfig, out / "config.yaml"), scores.recipe["interpolation"]


def test_refine_keeps_part_of_the_way(
    tiny_name: str, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
):
    before = load_open_clip(tiny_name)
    whole, _, nothing = refined(tiny_name, pairs, held_out, tmp_path / "whole", None)
    part, _, record = refined(tiny_name, pairs, held_out, tmp_path / "part", 0.25)
    none, _, _ = refined(tiny_name, pairs, held_out, tmp_path / "none", 0)
    assert nothing is None
    assert record == {"weight": 0.25, "tried": {}}
    for name, weight in before.state_dict().items():
        expected = torch.lerp(weight, whole.state_dict()[name], 0.25)
        torch.testing.assert_close(part.state_dict()[name], expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(none.state_dict()[name], weight, atol=1e-6, rtol=1e-6)


def test_auto_takes_the_best_of_the_line_on_pairs_that_are_not_trained_on(
    tiny_name: str, held_out: ToyPairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pairs = ToyPairs("auto", size=200, captions_per_image=2)
    model, config, record = refined(tiny_name, pairs, held_out, tmp_path / "auto", "auto")
    assert isinstance(record, dict)
    tried = record["tried"]
    assert list(tried) == ["0", *(f"0.{tenth}" for tenth in range(1, 10)), "1"]
    best = max(tried.values())
    assert record["weight"] == float(next(at for at, score in tried.items() if score == best))
    assert config.interpolate == "auto"
    said = " ".join(capsys.readouterr().err.split())
    assert "chosen on 100 held-out training images" in said
    again, *_ = refined(tiny_name, pairs, held_out, tmp_path / "again", "auto")
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_fold_from_the_command_line(
    tiny_name: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "folded"
    main(["fold", tiny_name, "--data.train", str(table), "--out", str(out), "--json"])
    said = json.loads(capsys.readouterr().out)
    scale = float(load_open_clip(f"local-dir:{out}").logit_scale.detach())
    assert said.pop("logit_scale") == pytest.approx(scale)
    assert said.pop("gap_after") < said.pop("gap_before") / 2
    assert said == {"model": tiny_name, "out": str(out), "pairs": 16}
    gaps = []
    for model in (tiny_name, f"local-dir:{out}"):
        main(["evaluate", "--model.name", model, "--data.val", str(table), "--json"])
        gaps.append(json.loads(capsys.readouterr().out)["geometry"]["centroid_distance"])
    assert gaps[1] < gaps[0] / 2
