"""No setting is accepted, recorded and ignored: a changed value changes the run, is refused, or is
named as changing nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clip_refine.config import RefineConfig, override, with_recipe
from clip_refine.config.runs import unused_settings
from clip_refine.config.settings import SettingsGroup
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ClipRefineError
from tests.conftest import TINY, write_model

# What says where things come from or go, or how fast: the numbers are to stay as they are, and the
# tests of each of these are elsewhere.
PLACES = {
    "out", "overwrite", "report", "log",
    "resume", "dry_run", "train.save_every", "model.name", "model.pretrained", "model.factory",
    "data.train", "data.val", "data.kind", "data.subset", "data.image_folder",
    "data.allow_outside", "data.skip_bad", "data.streaming", "data.weights", "data.draft",
    "data.cache_images", "data.cache_folder", "train.workers", "train.device",
    "train.gradient_checkpointing", "train.compile",
    "train.precision", "train.micro_batch",
    "evaluation.batch_size", "evaluation.zero_shot", "evaluation.template",
    "data.split", "data.split_file", "data.val_split", "data.val_split_file",
    "data.image_column", "data.caption_column", "data.val_image_column", "data.val_caption_column",
    # of models that have such layers
    "train.dropout", "train.normalization_statistics",
}  # fmt: skip
CHANGED: dict[str, Any] = {
    "recipe": "contrastive",
    "interpolate": 0.5,
    "seed": 2,
    "data.captions": "all",
    "train.epochs": 2,
    "train.steps": 1,
    "train.batch_size": 16,
    "train.learning_rate": 1e-4,
    "train.image_learning_rate": 1e-4,
    "train.text_learning_rate": 1e-4,
    "train.layer_decay": 0.5,
    "train.schedule": "cosine",
    "train.warmup_steps": 3,
    "train.weight_decay": 0.9,
    "train.decay": "matrices",
    "train.clip_norm": 1e-3,
    "train.logit_scale": "trained",
    "train.parameters": "projections",
    "train.blocks": 1,
    "train.lora_rank": 4,
    "train.lora_alpha": 4.0,
    "loss.contrastive_form": "sigmoid",
    "loss.contrastive_normalize": False,
    "loss.alignment_normalize": True,
    "loss.normalize": True,
    "loss.positives": "same-caption",
    "loss.negatives": "swapped-words",
    "loss.false_negatives": "masked",
    "loss.rafa_reduction": "sum",
    "loss.rafa_decay": "linear",
    "loss.references": "independent",
    "loss.feature_scale": "canonical",
    "prior.kind": "uniform",
    "guard.then": "stop",
    "data.shuffle_buffer": 5,
    "data.val_fraction": 0.3,
    "data.max_bad": 0.2,
}


def leaves(group: type[SettingsGroup], prefix: str = "") -> list[str]:
    found = []
    for name, field in group.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, SettingsGroup):
            found += leaves(kind, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def changed(config: RefineConfig, name: str) -> RefineConfig:
    if name == "recipe":
        return with_recipe(config, CHANGED[name])
    group, _, setting = name.rpartition(".")
    value = CHANGED.get(name)
    if value is None:
        now = getattr(getattr(config, group), setting)
        value = 0.5 * now if now else 0.5
    return override(config, **({group: {setting: value}} if group else {name: value}))


def outcome(config: RefineConfig, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    refine(override(config, out=folder))
    log = (folder / "log.jsonl").read_text().splitlines()
    steps = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in log]
    return steps, load_file(folder / "model" / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pairs) -> RefineConfig:
    folder = tmp_path_factory.mktemp("settings")
    lines = ["file_name,caption"]
    for index in range(32):
        pairs.load_image(index).save(folder / f"{index:02}.png")
        lines += [f'{index:02}.png,"{caption}"' for caption in pairs.captions[index // 2]]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    held_out = ["file_name,caption", *lines[1:37:3]]
    (folder / "held_out.csv").write_text("\n".join(held_out) + "\n")
    return RefineConfig.model_validate(
        {
            "model": {"name": write_model(folder / "model", TINY)},
            "data": {
                "train": str(folder / "captions.csv"),
                "val": str(folder / "held_out.csv"),
            },
            "train": {"batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
            "report": False,
        }
    )


@pytest.fixture(scope="module")
def usual(base: RefineConfig, tmp_path_factory: pytest.TempPathFactory):
    return outcome(base, tmp_path_factory.mktemp("usual") / "run")


@pytest.mark.parametrize("name", [n for n in leaves(RefineConfig) if n not in PLACES])
def test_it_changes_the_run_is_refused_or_said_to_change_nothing(
    name: str, base: RefineConfig, usual, tmp_path: Path
):
    try:
        config = changed(base, name)
        if name in unused_settings(config):
            return
        steps, weights = outcome(config, tmp_path / "run")
    except ClipRefineError:
        return
    same = all(torch.equal(weights[key], value) for key, value in usual[1].items())
    assert steps != usual[0] or not same, f"{name} is accepted and changes nothing"


def test_every_place_is_a_setting():
    assert set(leaves(RefineConfig)) >= PLACES
