"""What is about to happen is said truly, and trying it leaves nothing behind."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_refine.config import RefineConfig, override
from clip_refine.models import OpenClipEncoder
from clip_refine.roads import build, plan
from clip_refine.roads.refine import refine
from clip_refine.support.errors import Planned
from clip_refine.train import StudentTowers, TowerPrecision
from tests.roads.test_compare import HELD_OUT, TRAIN


@pytest.fixture
def config(tmp_path: Path) -> RefineConfig:
    train = {"batch_size": 16, "precision": "fp32", "device": "cpu"}
    return RefineConfig.model_validate({"train": train, "out": tmp_path / "run", "dry_run": True})


def planned(config: RefineConfig, model: Any, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(Planned):
        refine(config, model=model, train_pairs=TRAIN, held_out=HELD_OUT)
    return " ".join(capsys.readouterr().err.split())


def test_the_quickest_round_counts(tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch):
    """A machine that was busy once does not make the plan ten times as long."""
    clock = iter([0.0, 8.0, 20.0, 20.0, 20.5, 21.0])
    monkeypatch.setattr(plan, "_now", lambda device: next(clock))
    pixels, tokens = build.sample_pairs(tiny, TRAIN, 2)
    towers = StudentTowers(tiny, TowerPrecision.from_name("fp32"))
    assert plan._seconds(towers, pixels, tokens) == (0.25, 0.5)  # pyright: ignore


def test_no_more_is_tried_than_training_would_encode(
    config: RefineConfig, tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch, capsys
):
    """As if only four pairs fitted, which the settings know."""
    encode = OpenClipEncoder.encode_image

    def limited(self: OpenClipEncoder, pixels: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(pixels) > 4:
            raise torch.OutOfMemoryError("a lot")
        return encode(self, pixels)

    monkeypatch.setattr(OpenClipEncoder, "encode_image", limited)
    said = planned(override(config, train={"micro_batch": 4}), tiny, capsys)
    assert "from 4 pairs that were tried" in said


def test_wrong_captions_take_memory_too(
    config: RefineConfig, tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch, capsys
):
    found: list[float] = []

    def fitting(model: Any, per_pair: float, memory: int, copies: float) -> int:
        found.append(per_pair)
        return 4

    monkeypatch.setattr("clip_refine.roads.plan.fitting_size", fitting)
    for negatives in ("in-batch", "swapped-words"):
        loss = {"contrastive_weight": 1.0, "negatives": negatives}
        planned(override(config, loss=loss), tiny, capsys)
    assert found[1] > 1.2 * found[0]


def test_weights_that_are_shared_out_take_less(
    config: RefineConfig, tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch, capsys
):
    sizes = []
    for sharing in (1, 8):
        monkeypatch.setattr(build, "sharing_processes", lambda _, by=sharing: by)
        said = planned(override(config, train={"micro_batch": 1}), tiny, capsys)
        sizes.append(float(re.findall(r"optimiser and graph: ([\d.]+) MB", said)[0]))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.2)  # 2.5 of 5 copies, and a pair's graph


def test_images_are_counted_as_they_are_scored(config: RefineConfig, tiny: OpenClipEncoder, capsys):
    assert f"scored on {len(HELD_OUT)} held-out images." in planned(config, tiny, capsys)


def test_pairs_that_no_step_comes_to_are_not_promised(
    config: RefineConfig, tiny: OpenClipEncoder, capsys
):
    said = planned(override(config, train={"steps": 2}), tiny, capsys)
    assert f"32 of {len(TRAIN)} pairs of {TRAIN.name} in 2 steps of 16;" in said


@pytest.mark.parametrize("parameters", ["all", "lora", "last-blocks"])
def test_weights_and_generators_stay_as_they_are(
    parameters: str, config: RefineConfig, tiny: OpenClipEncoder, capsys
):
    weights = {name: value.clone() for name, value in tiny.state_dict().items()}
    random = torch.get_rng_state()
    planned(override(config, train={"parameters": parameters, "blocks": 1}), tiny, capsys)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.state_dict().items())
    assert all(weight.grad is None for weight in tiny.parameters())
    assert not any(module.training for module in tiny.modules())


def test_what_guard_and_interpolation_keep_is_counted(
    config: RefineConfig, tiny: OpenClipEncoder, capsys
):
    """The weights once more each."""

    def megabytes(**more: Any) -> float:
        said = planned(override(config, **more), tiny, capsys)
        return float(re.findall(r"optimiser and graph: ([\d.]+) MB", said)[0])

    weights = 4e-6 * sum(weight.numel() for weight in tiny.state_dict().values())
    plain, both = megabytes(), megabytes(guard={"every": 2, "pairs": "toy"}, interpolate=0.5)
    assert both - plain == pytest.approx(2 * weights, abs=1.1)  # MB are said whole
