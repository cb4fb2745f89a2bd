"""Defaults are the paper's; what does not fit is refused where it is made."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from clip_refine.config import (
    ModelConfig,
    RefineConfig,
    TrainConfig,
    demo_config,
    dump_config,
    load_config,
    override,
)
from clip_refine.config.runs import CompareConfig, TuneConfig
from clip_refine.support.errors import ConfigError


def test_defaults_are_the_papers():
    config = RefineConfig()
    assert (config.train.epochs, config.train.batch_size) == (1, 512)
    assert (config.train.learning_rate, config.train.weight_decay) == (1e-6, 0.1)
    assert (config.train.schedule, config.train.decay) == ("constant", "all")
    assert (config.loss.rafa_weight, config.loss.hycd_weight) == (1, 1)
    assert (config.loss.contrastive_weight, config.loss.alpha) == (0, 0.5)
    assert (config.loss.temperature, config.loss.normalize) == (1, False)
    assert (config.prior.kind, config.prior.scale) == ("standard_normal", 1)
    assert config.seed == 42


@pytest.mark.parametrize(
    ("group", "setting", "value"),
    [
        ("train", "batch_size", 1),
        ("train", "learning_rate", 0),
        ("train", "learning_rate", float("nan")),
        ("train", "epochs", 0),
        ("train", "precision", "fp8"),
        ("loss", "alpha", 1.5),
        ("loss", "temperature", 0),
        ("loss", "rafa_weight", -1),
        ("prior", "scale", -1),
        ("data", "val_fraction", 1),
        ("evaluation", "template", "a photo"),
        ("train", "no_such_setting", 1),
    ],
)
def test_out_of_range_is_refused(group: str, setting: str, value: object):
    with pytest.raises(ValidationError, match=setting):
        RefineConfig.model_validate({group: {setting: value}})


def test_what_is_wrong_in_python_is_named_as_in_a_file():
    with pytest.raises(ConfigError) as told:
        TrainConfig(batch_size=1, epoch=2)
    assert str(told.value).splitlines() == [
        "train.batch_size: Input should be greater than or equal to 2, got 1.",
        "train.epoch: there is no such setting. `--help` lists them.",
    ]
    with pytest.raises(ConfigError, match="^seed: Input should be greater than or equal to 0"):
        RefineConfig(seed=-1)


def test_settings_that_a_verb_would_not_use_are_refused():
    with pytest.raises(ValidationError, match="compare has --learning-rates auto"):
        CompareConfig.model_validate({"train": {"learning_rate": "auto"}})
    with pytest.raises(ValidationError, match="a comparison keeps each training"):
        CompareConfig.model_validate({"train": {"save_every": "3"}})
    for name, value in {"seeds": 5, "sweep": ("loss.alpha=0,1",), "save_models": True}.items():
        CompareConfig.model_validate({name: value})
        with pytest.raises(ValidationError, match=f"{name} belongs to compare"):
            TuneConfig.model_validate({name: value})


def test_nothing_to_minimise_is_refused():
    with pytest.raises(ValidationError, match="nothing to minimise"):
        RefineConfig.model_validate({"loss": {"rafa_weight": 0, "hycd_weight": 0}})


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        RefineConfig().train.epochs = 2  # pyright: ignore


def test_yaml_round_trip(tmp_path: Path):
    config = demo_config(out=tmp_path / "x", seed=3, overwrite=False)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(RefineConfig, path) == config
    assert list(yaml.safe_load(path.read_text())) == list(RefineConfig.model_fields)


def test_what_the_shell_pipes_in_is_read():
    read, write = os.pipe()  # as `--config <(echo "seed: 7")` has it
    os.write(write, b"seed: 7")
    os.close(write)
    assert load_config(RefineConfig, Path(f"/dev/fd/{read}")).seed == 7
    os.close(read)


@pytest.mark.parametrize(
    ("name", "is_now"),
    [
        ("ViT-B-32@openai", ("ViT-B-32", "openai")),
        ("ViT-B-32@runs/weights@2.pt", ("ViT-B-32", "runs/weights@2.pt")),
        ("ViT-B-32@" + 300 * "x", ("ViT-B-32", 300 * "x")),
        *(
            (name, (name, None))
            for name in ("local-dir:/home/me@here/m", "ViT-B-32@", "@openai", 300 * "x")
        ),
    ],
)
def test_weights_may_be_named_with_their_architecture(name: str, is_now: tuple[str, str | None]):
    config = ModelConfig(name=name)
    assert (config.name, config.pretrained) == is_now
    assert ModelConfig(name=config.title) == config


def test_override_replaces_only_what_is_named():
    config = override(RefineConfig(), seed=7, train={"epochs": 2})
    assert (config.seed, config.train.epochs, config.train.batch_size) == (7, 2, 512)
    with pytest.raises(ConfigError, match="train.epochs"):
        override(config, train={"epochs": -1})


def test_every_setting_is_explained():
    for name, field in RefineConfig.model_fields.items():
        group = field.annotation
        if hasattr(group, "model_fields"):
            for setting, inner in group.model_fields.items():
                assert inner.description, f"{name}.{setting} has no help text"
        else:
            assert field.description, f"{name} has no help text"
            assert "\n" not in field.description, (
                f"the help of {name} is not wrapped as it is shown"
            )
