"""What is about to happen is said truly, and trying it leaves nothing behind."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_refine.config import RefineConfig, override
from clip_refine.data import CaptionedImages, PairStream, open_stream
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


@pytest.mark.parametrize(
    ("load", "busy", "kind", "needed"),
    [
        (0.01, 0.12, "cpu", 0),  # 12 times the model's rate by itself
        (0.01, 0.015, "cpu", 0),
        (0.01, 0.010, "cpu", 2),
        (0.01, 0.001, "cpu", 8),  # no more than cores
        (0.01, 0.12, "cuda", 1),  # a GPU does not wait even then
        (0.01, 0.003, "cuda", 5),
        (0.01, 0.0, "cuda", 8),
    ],
)
def test_as_many_processes_read_as_the_model_needs(
    load: float, busy: float, kind: str, needed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert build.workers_for(load, busy, torch.device(kind)) == needed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert build.workers_for(load, busy, torch.device(kind)) == min(needed, 2)


@pytest.mark.parametrize("asked", [None, 0, 3])
def test_processes_are_measured_unless_asked_for(
    asked: int | None,
    config: RefineConfig,
    tiny: OpenClipEncoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
):
    monkeypatch.setattr(plan, "_seconds", lambda *_: (1e-9, 2e-9))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    said = planned(override(config, train={"workers": asked}), tiny, capsys)
    expected = 2 if asked is None else asked
    decoded = f"decoded by {expected} more processes (--train.workers)"
    assert decoded in said if expected else "decoded by" not in said


def test_where_no_image_is_read_no_process_does(
    config: RefineConfig, tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(plan, "_seconds", lambda *_: (1e-9, 2e-9))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    heads = {"parameters": "projections", "epochs": 3}
    said = planned(override(config, train=heads), tiny, capsys)
    assert "computed once" in said
    assert "decoded by" not in said


def test_reading_is_timed_as_training_reads(
    config: RefineConfig, tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Else images that are decoded smaller, or cached, would get processes they do not need."""
    sides: list[int | None] = []
    load = build.PixelReader.load

    def noted(self: Any, images: Any, index: int) -> Any:
        sides.append(self.side)
        return load(self, images, index)

    monkeypatch.setattr(build.PixelReader, "load", noted)
    planned(config, tiny, capsys)
    assert sum(side is not None for side in sides) == 1 + 16


def test_a_stream_is_opened_once(config: RefineConfig, tiny: OpenClipEncoder, tmp_path: Path):
    """And before it is timed: what opening takes no process more would spare."""
    rows = [{"image": "a.png", "caption": f"a {n}"} for n in range(40)]
    TRAIN.load_image(0).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = override(config, train={"steps": 2})
    opened: list[int] = []

    class Counted(PairStream):
        def prefix(self, count: int) -> CaptionedImages:
            opened.append(count)
            return super().prefix(count)

    stream = open_stream(str(tmp_path / "rows.jsonl"))
    named = {f.name: getattr(stream, f.name) for f in fields(stream) if f.init}
    with pytest.raises(Planned):
        refine(config, model=tiny, train_pairs=Counted(**named), held_out=HELD_OUT)
    assert opened == [32]


def test_what_was_measured_is_not_kept(
    config: RefineConfig, tiny: OpenClipEncoder, monkeypatch: pytest.MonkeyPatch
):
    """It is used, but another machine measures its own."""
    monkeypatch.setattr("clip_refine.roads.refine.say_plan", lambda *_: 1)
    used: list[int] = []
    loader = build.PairLoader

    def noted(*args: Any, **settings: Any) -> Any:
        used.append(settings["workers"])
        return loader(*args, **{**settings, "workers": 0})

    monkeypatch.setattr(build, "PairLoader", noted)
    quick = {"dry_run": False, "report": False, "train": {"steps": 1, "save_every": "never"}}
    scores = refine(override(config, **quick), model=tiny, train_pairs=TRAIN, held_out=HELD_OUT)
    assert used[-1] == 1
    assert scores.recipe["train"]["workers"] is None


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
