"""What a list of recipes and sweeps stands for, and what is refused."""

import pytest

from clip_refine.config import LossConfig, RefineConfig, override
from clip_refine.roads.plan import list_variants, parse_sweep, split_combination
from clip_refine.support.errors import ConfigError

BASE = RefineConfig()


def test_recipes_stand_under_their_names():
    plain = list_variants(BASE, recipes=["clip-refine", "self-kd"], sweeps=[])
    assert [variant.name for variant in plain] == ["clip-refine", "self-kd"]
    assert [variant.config.loss.alpha for variant in plain] == [0.5, 0.0]
    at = plain[1].at(seed=7, learning_rate=2e-5)
    assert (at.seed, at.train.learning_rate, at.loss) == (7, 2e-5, plain[1].config.loss)


def test_every_recipe_with_every_value_one_setting_at_a_time():
    found = list_variants(
        BASE,
        recipes=["clip-refine", "hycd"],
        sweeps=["loss.alpha=0, 1", "data.fraction=0.5", "train.learning_rate=1e-5"],
    )
    assert [variant.name for variant in found][:4] == [
        "clip-refine[loss.alpha=0]",
        "clip-refine[loss.alpha=1]",
        "clip-refine[data.fraction=0.5]",
        "clip-refine[train.learning_rate=1e-5]",
    ]
    assert len(found) == 8
    assert [variant.config.loss.alpha for variant in found[:3]] == [0.0, 1.0, 0.5]
    assert [variant.fraction for variant in found[:4]] == [1.0, 1.0, 0.5, 1.0]
    assert [variant.fixed_rate for variant in found[:4]] == [None, None, None, 1e-5]
    assert found[4].config.loss.rafa_weight == 0.0  # hycd's own


def test_values_of_every_kind():
    found = parse_sweep("loss.temperature=null,0.01,2")
    assert [value for _, value in found.values] == [None, 0.01, 2]
    found = list_variants(BASE, recipes=["rafa"], sweeps=["prior.kind=uniform,fixed"])
    assert [variant.config.prior.kind for variant in found] == ["uniform", "fixed"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("loss.alpha", "expected a setting and its values"),
        ("loss.alpha=", "expected a setting and its values"),
        ("loss.alpha=0,,1", "expected a setting and its values"),
        ("alpha=0,1", "expected a setting and its values"),
        ("loss.alhpa=0,1", "Did you mean loss.alpha?"),
        ("model.name=a,b", "settings of train, loss, prior and data.fraction can be swept"),
        ("data.train=a.csv", "Did you mean data.fraction"),
        ("data.fraction=0,1", "above 0 and at most 1"),
        ("loss.alpha=0,2", r"clip-refine\[loss.alpha=2\]: loss.alpha: .* got 2"),
        ("loss.alpha=[", "a value cannot be read"),
        ("loss.alpha=0.5,0.5", "would be trained twice"),
        ("train.precision=fp32,bf16", "share one train.precision"),
        ("train.workers=0,1", "share one train.workers"),
        ("train.device=cpu,cuda", "share one train.device"),
        ("loss.anchor_shift=0,0.5", r"changes nothing in this recipe \(loss.anchor_weight is 0\)"),
        ("loss.own_weight=0,1", "the function that it weighs is given in Python"),
        ("train.lora_rank=2,4", r"changes nothing in this recipe \(train.parameters is all\)"),
    ],
)
def test_sweeps_that_are_refused(sweep: str, message: str):
    with pytest.raises(ConfigError, match=message):
        list_variants(BASE, recipes=["clip-refine"], sweeps=[sweep])


def test_a_rate_is_not_swept_where_it_is_searched_or_nothing_has_it():
    with pytest.raises(ConfigError, match="pass --learning-rates auto"):
        list_variants(BASE, recipes=["hycd"], sweeps=["train.learning_rate=1e-4,auto"])
    own = {"image_learning_rate": 1e-4, "text_learning_rate": 1e-5}
    sweeps = ["train.learning_rate=1e-4,1e-3"]
    with pytest.raises(ConfigError, match="what is trained has a rate of its own"):
        list_variants(override(BASE, train=own), recipes=["hycd"], sweeps=sweeps)
    scale = {**own, "logit_scale": "trained"}  # which has that rate
    assert list_variants(override(BASE, train=scale), recipes=["contrastive"], sweeps=sweeps)


def test_a_temperature_is_not_swept_where_canonical_scale_sets_it():
    with pytest.raises(ConfigError, match="does not go with feature_scale canonical"):
        list_variants(BASE, recipes=["balanced"], sweeps=["loss.temperature=0.05"])


def test_partners_are_swept_where_masks_look_at_them():
    sweeps = ["loss.positives=own,same-caption"]
    with pytest.raises(ConfigError, match="equal captions have equal features"):
        list_variants(BASE, recipes=["contrastive"], sweeps=sweeps)
    masked = override(BASE, loss={"false_negatives": "masked"})
    assert len(list_variants(masked, recipes=["contrastive"], sweeps=sweeps)) == 2


def test_given_settings_of_the_loss_reach_every_recipe_that_does_not_set_them(
    capsys: pytest.CaptureFixture[str],
):
    given = override(BASE, loss={"alpha": 0.25, "contrastive_scale": 5.0})
    recipes = ["hycd", "contrastive", "self-kd"]
    found = list_variants(given, recipes=recipes, sweeps=["loss.rafa_decay=none"])
    hycd, contrastive, self_kd = (variant.config.loss for variant in found)
    assert (hycd.alpha, hycd.rafa_weight, hycd.contrastive_scale) == (0.25, 0.0, 5.0)
    assert (contrastive.contrastive_scale, contrastive.contrastive_weight) == (5.0, 1.0)
    assert self_kd.alpha == 0.0
    said = " ".join(capsys.readouterr().err.split())
    assert "self-kd: loss.alpha stays 0.0, as this recipe has it" in said
    assert "hycd: loss.contrastive_scale changes nothing here: loss.contrastive_weight is 0" in said
    assert "contrastive: loss.alpha changes nothing here: loss.hycd_weight is 0" in said
    assert "contrastive: loss.contrastive_scale" not in said


def test_a_default_that_is_given_is_heeded_or_refused(capsys: pytest.CaptureFixture[str]):
    """RaFA's weight is 1 by default, and a recipe's own is 0."""
    base = RefineConfig(loss=LossConfig(rafa_weight=1.0))
    with pytest.raises(ConfigError, match=r"loss.rafa_weight 1.0: every .*\(centred 0.0, hycd 0.0"):
        list_variants(base, recipes=["centred", "hycd"], sweeps=[])
    found = list_variants(base, recipes=["centred", "clip-refine"], sweeps=[])
    assert [variant.config.loss.rafa_weight for variant in found] == [0.0, 1.0]
    assert "centred: loss.rafa_weight stays 0.0" in " ".join(capsys.readouterr().err.split())
    # a comparison's own file has all settings, which nobody gave
    whole = override(base, loss={"rafa_weight": 2.0})
    assert list_variants(whole, recipes=["centred"], sweeps=[])


def test_recipes_that_are_refused():
    with pytest.raises(ConfigError, match="Did you mean contrastive?"):
        list_variants(BASE, recipes=["contrastiv"], sweeps=[])
    with pytest.raises(ConfigError, match="hycd would be trained twice"):
        list_variants(BASE, recipes=["hycd", "hycd"], sweeps=[])


def test_combinations_with_a_plus_in_either_name():
    recipes = ["hycd", "hycd+align", "contrastive+anchor"]
    assert split_combination("hycd+nnn", recipes) == ("hycd", "nnn")
    assert split_combination("hycd+align+mean-centring+nnn", recipes) == (
        "hycd+align",
        "mean-centring+nnn",
    )
    with pytest.raises(ConfigError, match="does not begin with a recipe that is compared"):
        split_combination("rafa+nnn", recipes)
