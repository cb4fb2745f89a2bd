"""Zero-shot tasks alone, with one prompt or several."""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_refine.cli import main
from clip_refine.config import (
    DataConfig,
    EvaluateConfig,
    EvaluationConfig,
    RefineConfig,
    dump_config,
)
from clip_refine.data import open_pairs
from clip_refine.results import FitProbability, Scores, read
from clip_refine.roads.build import build_held_out
from clip_refine.roads.evaluate import _trained_on, evaluate
from clip_refine.saving import refinement
from clip_refine.support.errors import ConfigError, DataError
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
    with pytest.raises(ConfigError, match="'a photo' has no {} for the class name"):
        EvaluationConfig(template=("a {}", "a photo"))
    with pytest.raises(ConfigError, match="there is none"):
        EvaluationConfig(template=())


def test_pairs_that_a_run_was_trained_on_are_no_held_out_ones(
    tiny_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = ["file_name,caption"]
    for index in range(210):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,number {index}")
    (tmp_path / "own.csv").write_text("\n".join(lines))
    own = str(tmp_path / "own.csv")
    run, moved = tmp_path / "run", tmp_path / "moved"
    for folder in (run / "model", moved):
        shutil.copytree(tiny_name.removeprefix("local-dir:"), folder)
    refined = RefineConfig(data=DataConfig(train=own), out=run)
    (run / "config.yaml").write_text(dump_config(refined))
    (run / "scores.json").write_text("{}")
    main(["evaluate", "--model.name", str(run), "--data.val", own])
    said = " ".join(capsys.readouterr().err.split())
    assert f"Beware: {run} was trained on 110 of these 210 images" in said

    def trained_on(model: Path, **data: str) -> int:
        config = EvaluateConfig.model_validate({"model": {"name": str(model)}, "data": data})
        return len(_trained_on(model, config, build_held_out(config.data, seed=config.seed)))

    assert trained_on(run / "model", val=own) == 110
    assert trained_on(run, train=own) == 0  # the part that was held out
    assert trained_on(moved, val=own) == 0
    # which knows no source, but what was in it
    facts = refinement(refined, open_pairs(own), open_pairs(own), steps=1)
    facts.write(moved / "provenance.json")
    assert trained_on(moved, val=own) == 210


def test_pairs_of_python_are_measured_as_those_of_a_file(
    tiny_name: str, table: Path, pairs: ToyPairs, tmp_path: Path
):
    given = [(pairs.load_image(index), pairs.captions[index]) for index in range(len(pairs))]
    settings: dict[str, Any] = {"model": {"name": tiny_name}, "device": "cpu"}
    of_file = EvaluateConfig.model_validate({**settings, "data": {"val": str(table)}})
    out = tmp_path / "scores.json"
    scores = evaluate(EvaluateConfig.model_validate({**settings, "out": out}), held_out=given)
    assert scores == evaluate(of_file)
    assert read(Scores, out) == scores
    found = scores.to_pandas().set_index("score")["value"]
    assert found["retrieval.image_to_text_recall@1"] == scores.retrieval["image_to_text_recall@1"]
    assert found["geometry.centroid_distance"] == scores.geometry["centroid_distance"]
    assert len(found) == len(scores.geometry) + len(scores.retrieval)
    with pytest.raises(DataError, match="pairs: 5 held-out images are too few"):
        evaluate(EvaluateConfig.model_validate(settings), held_out=given[:5])


def test_a_threshold_is_saved_and_said(tiny_name: str, table: Path, tmp_path: Path, capsys):
    drawn = ["evaluate", "--model.name", tiny_name, "--data.val", str(table), "--device", "cpu"]
    path = tmp_path / "threshold.json"
    main([*drawn, "--save-threshold", str(path), "--precision", "0.6"])
    said = capsys.readouterr().out
    found = read(FitProbability, str(path))
    precise, rare = found.cutoffs["precision"], found.cutoffs["false_positive_rate"]
    if precise.cosine is None:
        assert "No cosine lets pairs through of which 60% fit." in said
    else:
        assert "So that 60% of what you take fits, take a pair as fitting from cosine" in said
    assert "To let at most 1% of the wrong pairs through, take a pair as fitting from cosine" in (
        said
    )
    assert "of 50 nonsense texts find an image." in said
    assert f"How probable: 1 / (1 + exp(−({found.slope:.1f} c" in said
    # lines to paste, which do what is said
    at = rare.cosine if precise.cosine is None else precise.cosine
    lines = said.partition("In code, of features of norm 1:\n")[2].splitlines()
    known: dict[str, Any] = {"cosine": at, "image_unit": torch.eye(3)}
    known["text_unit"] = torch.eye(3)[[0, 2, 1]]
    exec(textwrap.dedent("\n".join(lines[:3])), known)
    assert known["fits"].tolist() == [True, False, False]
    assert eval(lines[3].strip(), known) == found.probability(at or 0.0)
    with pytest.raises(SystemExit):
        main([*drawn, "--save-threshold", str(path)])
    assert "exists already" in capsys.readouterr().err


def test_columns_of_pairs_of_python_are_named(tiny_name: str, pairs: ToyPairs):
    given: Any = [
        {"photo": pairs.load_image(index), "words": pairs.captions[index][0]} for index in range(16)
    ]
    data = {"image_column": "photo", "caption_column": "words"}
    config = {"model": {"name": tiny_name}, "device": "cpu", "data": data}
    assert evaluate(EvaluateConfig.model_validate(config), held_out=given).retrieval
