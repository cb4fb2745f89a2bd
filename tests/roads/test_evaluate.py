"""Zero-shot tasks alone, with one prompt or several."""

import json
from pathlib import Path

import pytest

from clip_refine.cli import main
from clip_refine.config import EvaluateConfig, EvaluationConfig
from clip_refine.results import FitProbability, read
from clip_refine.roads.evaluate import evaluate
from clip_refine.support.errors import ConfigError
from clip_refine.toy import ToyPairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawn = ToyPairs("classes", size=12)
    for index in range(12):
        place = tmp_path / "kinds" / f"kind {index % 3}"
        place.mkdir(parents=True, exist_ok=True)
        drawn.load_image(index).save(place / f"{index}.png")
    return tmp_path / "kinds"


def test_zero_shot_tasks_need_no_pairs(folder: Path, tiny_name: str, tmp_path: Path, capsys):
    arguments = ["evaluate", "--model.name", tiny_name, "--evaluation.zero-shot", str(folder)]
    out = tmp_path / "scores.json"
    prompts = ["--evaluation.template", "a {}", "the {}"]
    main([*arguments, *prompts, "--device", "cpu", "--out", str(out)])
    assert "Zero-shot scores" in capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert (scores["pairs"], scores["geometry"], scores["retrieval"]) == (0, {}, {})
    assert set(scores["zero_shot"]) == {"kinds"}
    by_prompts = {
        template: evaluate(
            EvaluateConfig.model_validate(
                {
                    "model": {"name": tiny_name},
                    "evaluation": {"zero_shot": [str(folder)], "template": template},
                    "device": "cpu",
                }
            )
        )
        for template in ("a {}", ("a {}",), ("a {}", "the {}"))
    }
    assert by_prompts["a {}"] == by_prompts[("a {}",)]
    assert by_prompts[("a {}", "the {}")].zero_shot == scores["zero_shot"]
    assert by_prompts["a {}"].headline.keys() == {"zero_shot_top1"}


def test_features_of_no_pairs_are_not_saved(folder: Path, tiny_name: str, tmp_path: Path):
    config = EvaluateConfig.model_validate(
        {
            "model": {"name": tiny_name},
            "evaluation": {"zero_shot": [str(folder)]},
            "save_features": tmp_path / "x.safetensors",
        }
    )
    with pytest.raises(ConfigError, match="save_features: there are no pairs"):
        evaluate(config)


def test_every_prompt_has_a_place_for_the_name():
    with pytest.raises(ValueError, match="'a photo' has no {} for the class name"):
        EvaluationConfig(template=("a {}", "a photo"))
    with pytest.raises(ValueError, match="there is none"):
        EvaluationConfig(template=())


def test_a_threshold_is_saved_and_said(tiny_name: str, table: Path, tmp_path: Path, capsys):
    drawn = ["evaluate", "--model.name", tiny_name, "--data.val", str(table), "--device", "cpu"]
    path = tmp_path / "threshold.json"
    main([*drawn, "--save-threshold", str(path), "--precision", "0.6"])
    said = capsys.readouterr().out
    found = read(FitProbability, path)
    assert f"A pair of cosine c fits with probability 1 / (1 + exp(−({found.slope:.1f} c" in said
    assert "For precision 0.6: " in said
    assert "For false positive rate 0.01: cosine" in said
    assert "of 50 nonsense texts find an image." in said
    with pytest.raises(SystemExit):
        main([*drawn, "--save-threshold", str(path)])
    assert "exists already" in capsys.readouterr().err
