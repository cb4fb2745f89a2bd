"""Every named objective runs, and computes the terms that it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from clip_refine.cli import main
from clip_refine.config import load_config, override, with_recipe
from clip_refine.config.runs import CompareConfig, RefineConfig, VectorsConfig
from clip_refine.config.settings import RECIPES, LossConfig, TrainConfig
from clip_refine.losses import PairFeatures, hycd_loss
from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.roads.compare import compare
from clip_refine.roads.plan import list_variants
from clip_refine.roads.refine import refine
from clip_refine.roads.vector_maps import recipe_loss
from clip_refine.support.errors import ClipRefineError, ConfigError
from clip_refine.toy import ToyPairs
from tests.conftest import TINY, write_model

TERMS = {
    "clip-refine": {"rafa", "hycd"},
    "clip-refine-paper": {"rafa", "hycd"},
    "balanced": {"hycd", "anchor"},
    "centred": {"hycd"},
    "hycd": {"hycd"},
    "self-kd": {"hycd"},
    "hycd+align": {"hycd", "alignment"},
    "rafa": {"rafa"},
    "contrastive": {"contrastive"},
    "contrastive-raw": {"contrastive"},
    "rising-temperature": {"contrastive"},
    "contrastive+anchor": {"contrastive", "anchor"},
    "modgap": {"contrastive", "alignment", "centroid_uniformity"},
    "contrastive+covariance": {"contrastive", "covariance"},
    "centred-contrastive": {"contrastive"},
    "m2-mix": {"contrastive", "m2_mix"},
    "feature-distillation": {"anchor"},
    "logit-distillation": {"logit_distillation"},
}
assert {*TERMS, "own"} == {*RECIPES}
SETTINGS = {"train": {"batch_size": 16, "learning_rate": 1e-4, "precision": "fp32"}}


def first_step(config: RefineConfig, *parts: object) -> dict[str, float]:
    model, pairs, held_out = parts
    refine(config, model=model, train_pairs=pairs, held_out=held_out)  # pyright: ignore
    return json.loads((config.out / "log.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("name", TERMS)
def test_every_recipe_runs_with_its_terms(
    name: str, tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
):
    config = RefineConfig.model_validate({**SETTINGS, "recipe": name, "out": tmp_path / "run"})
    record = first_step(config, tiny, pairs, held_out)
    terms = {key.removeprefix("loss_") for key in record if key.startswith("loss_")}
    assert terms == TERMS[name] | {"total"}
    written = load_config(RefineConfig, config.out / "config.yaml")
    assert (written.recipe, written.loss.feature_scale != "auto") == (name, True)


@pytest.mark.parametrize(
    "kind",
    ["uniform", "gaussian_image", "gaussian_text", "gaussian_both", "fixed", "norm_matched"],
)
def test_every_prior_runs(
    kind: str, tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
):
    config = RefineConfig.model_validate(
        {**SETTINGS, "prior": {"kind": kind}, "out": tmp_path / "run"}
    )
    assert first_step(config, tiny, pairs, held_out)["loss_rafa"] > 0


def test_independent_references_and_decay(
    tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
):
    config = RefineConfig.model_validate(
        {
            "train": {**SETTINGS["train"], "learning_rate": 1e-12},
            "loss": {"references": "independent", "rafa_decay": "linear", "hycd_weight": 0},
            "prior": {"scale": 100},
            "out": tmp_path / "run",
        }
    )
    first_step(config, tiny, pairs, held_out)
    lines = (config.out / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss_rafa"] for line in lines]
    # noise of variance 100 dominates, so the loss follows the weight: 1, 3/4, 1/2, 1/4
    assert [loss / losses[0] for loss in losses] == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.1)


def test_a_recipe_sets_only_what_is_not_given():
    assert RefineConfig(recipe="contrastive").loss.contrastive_weight == 1
    assert RefineConfig.model_validate(
        {"recipe": "contrastive", "loss": {"contrastive_weight": 3}}
    ).loss.model_dump(include={"contrastive_weight", "hycd_weight"}) == {
        "contrastive_weight": 3,
        "hycd_weight": 0,
    }
    changed = with_recipe(override(RefineConfig(), seed=3), "self-kd")
    assert (changed.seed, changed.loss.alpha, changed.recipe) == (3, 0, "self-kd")


def test_centred_has_rafa_where_only_linear_maps_are_trained():
    found = {
        part: RefineConfig.model_validate(
            {"recipe": "centred", "train": {"parameters": part}}
        ).loss.rafa_weight
        for part in ("all", "last-blocks", "lora", "projections")
    }
    assert found == {"all": 0, "last-blocks": 0, "lora": 0, "projections": 1}
    given = RefineConfig(
        recipe="centred",
        train=TrainConfig(parameters="projections"),
        loss=LossConfig(rafa_weight=0.5),
    )
    assert given.loss.rafa_weight == 0.5
    swept = list_variants(
        RefineConfig(), recipes=["centred"], sweeps=["train.parameters=all,projections"]
    )
    assert [variant.config.loss.rafa_weight for variant in swept] == [0, 1]
    assert recipe_loss(VectorsConfig(), "centred").rafa_weight == 1


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        (["--recipe", "centred"], 0.0),
        (["--recipe", "centred", "--train.parameters", "projections"], 1.0),
        (["--recipe", "centred-contrastive", "--train.parameters=projections"], 1.0),
        (["--recipe", "centred", "--train.parameters", "projections", "--loss.rafa-weight=2"], 2.0),
        (["--train.parameters", "projections"], 1.0),
        (["--recipe", "hycd", "--train.parameters", "projections"], 0.0),
        (["--config", "projections"], 1.0),
        (["--config", "projections", "--train.parameters", "all"], 0.0),
        (["--config", "own", "--train.parameters", "all"], 3.0),
    ],
)
def test_and_so_it_is_from_flags(
    flags: list[str], weight: float, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text = "recipe: centred\ntrain: {parameters: projections}\n"
    Path("projections").write_text(text)
    Path("own").write_text(text + "loss: {rafa_weight: 3}\n")
    main(["refine", *flags, "--print-config"])
    assert f"rafa_weight: {weight}" in capsys.readouterr().out


def test_unknown_recipes_name_near_ones():
    with pytest.raises(ConfigError, match="Did you mean contrastive"):
        RefineConfig(recipe="contrastiv")
    with pytest.raises(ConfigError, match="There are: clip-refine"):
        with_recipe(RefineConfig(), "zzz")


def test_recipe_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    main(["refine", "--recipe", "self-kd", "--loss.hycd-weight", "2", "--print-config"])
    shown = capsys.readouterr().out
    assert "recipe: self-kd" in shown
    assert "alpha: 0.0" in shown
    assert "hycd_weight: 2.0" in shown
    assert "rafa_weight: 0.0" in shown


class TestOwnObjective:
    def test_a_function_that_is_hycd_trains_as_hycd_does(
        self, tiny_name: str, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
    ):
        def hycd(student: PairFeatures, teacher: PairFeatures, logit_scale: torch.Tensor):
            units = (normalize(side, dim=1) for side in (*student, *teacher))
            return hycd_loss(*units, temperature=1 / logit_scale.detach())

        weights = []
        for recipe, more in (("hycd", {}), ("own", {"objective": hycd})):
            config = RefineConfig.model_validate(
                {
                    **SETTINGS,
                    "recipe": recipe,
                    "loss": {"feature_scale": "canonical"},
                    "out": tmp_path / recipe,
                    "report": False,
                }
            )
            model = load_open_clip(tiny_name)
            refine(config, model=model, train_pairs=pairs, held_out=held_out, **more)
            weights.append(model.state_dict())
        for name, ours in weights[0].items():
            torch.testing.assert_close(weights[1][name], ours, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            (lambda *_: 1.0, "expected a 0-d tensor .* got float"),
            (lambda *_: torch.ones(3), r"got a tensor of shape \(3,\) without a gradient"),
            (None, "given in Python"),
        ],
    )
    def test_what_is_no_loss_is_said(
        self, objective: Any, message: str, tiny: OpenClipEncoder, pairs, held_out, tmp_path: Path
    ):
        config = RefineConfig.model_validate(
            {**SETTINGS, "recipe": "own", "out": tmp_path / "run", "report": False}
        )
        with pytest.raises(ClipRefineError, match=message):
            refine(
                *(config,), model=tiny, train_pairs=pairs, held_out=held_out, objective=objective
            )

    def test_a_function_without_a_weight_and_a_weight_without_a_function(self):
        with pytest.raises(ConfigError, match="objective: its weight is 0"):
            refine(RefineConfig(), objective=lambda student, *_: student.image_features.mean())
        with pytest.raises(ConfigError, match="takes another --recipe"):
            compare(CompareConfig(recipes=("own",)))
        with pytest.raises(SystemExit):
            main(["refine", "--recipe", "own", "--data.train", "x.csv"])


def test_siglips_own_loss_for_models_with_a_bias(
    pairs: ToyPairs, held_out: ToyPairs, tiny: OpenClipEncoder, tmp_path: Path
):
    siglip = load_open_clip(write_model(tmp_path, {**TINY, "init_logit_bias": -10}))
    bias = siglip.logit_bias
    assert bias is not None
    before = bias.item()
    settings = {
        "train": {**SETTINGS["train"], "logit_scale": "trained"},
        "recipe": "contrastive",
        "loss": {"contrastive_form": "sigmoid"},
        "out": tmp_path / "run",
    }
    config = RefineConfig.model_validate(settings)
    assert first_step(config, siglip, pairs, held_out)["loss_contrastive"] > 0
    assert siglip.clip.logit_bias.item() != before
    with pytest.raises(ConfigError, match=r"needs a model with a logit bias.*Use softmax"):
        refine(
            override(config, out=tmp_path / "other"),
            model=tiny,
            train_pairs=pairs,
            held_out=held_out,
        )
