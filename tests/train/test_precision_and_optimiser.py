"""Which precision, which weights decay, which learning rate."""

from typing import Any

import pytest
import torch
from torch import nn

from clip_refine.models import OpenClipEncoder
from clip_refine.roads import build
from clip_refine.train import (
    TowerPrecision,
    faster_precision,
    make_optimiser,
    make_schedule,
    towers,
)
from clip_refine.train.towers import (
    encode_pairs,
    prepare_student,
    training_mode,
)


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-image", "bf16-text"])
def test_precision_names_round_trip(name):
    assert TowerPrecision.from_name(name).name == name


@pytest.mark.parametrize(
    ("has_units", "image", "text", "expected"),
    [
        (True, 512, 512, "bf16"),
        (True, 64, 512, "bf16-text"),
        (True, 512, 64, "bf16-image"),
        (True, 64, 64, "fp32"),
        (False, 512, 512, "fp32"),
    ],
)
def test_each_tower_gets_the_precision_that_suits_it(
    has_units: bool, image: int, text: int, expected: str, monkeypatch: pytest.MonkeyPatch
):
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(image, image), nn.Linear(text, text)
            self.table = nn.Embedding(2**12, text)  # is looked up, not multiplied

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.image(pixels)

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.text(self.table(tokens))

    monkeypatch.setattr(towers, "multiplies_bf16", lambda device: has_units)
    model: Any = Towers()
    tokens = torch.ones(2, dtype=torch.int64)
    cpu = torch.device("cpu")
    assert faster_precision(model, torch.randn(2, image), tokens, cpu).name == expected
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("groups", "expected"), [(1, "bf16"), (4, "bf16-text")])
def test_towers_of_grouped_convolutions_stay_in_float32(
    groups: int, expected: str, monkeypatch: pytest.MonkeyPatch
):
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convolutions = nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 2**16, 1)
            self.image, self.text = nn.Sequential(*convolutions), nn.Linear(512, 512)
            self.encode_image, self.encode_text = self.image, self.text

    monkeypatch.setattr(towers, "multiplies_bf16", lambda _: True)
    chosen = faster_precision(
        Towers(),  # pyright: ignore[reportArgumentType]
        torch.randn(1, 8, 3, 3),
        torch.randn(1, 512),
        torch.device("cpu"),
    )
    assert chosen.name == expected


def test_bf16_is_used_where_asked_for_and_features_are_float32(tiny: OpenClipEncoder):
    pixels, tokens = torch.randn(2, 3, 48, 48), tiny.tokenizer(["a red circle", "a dog"])
    exact = encode_pairs(tiny, pixels, tokens, TowerPrecision.from_name("fp32"))
    mixed = encode_pairs(tiny, pixels, tokens, TowerPrecision.from_name("bf16-text"))
    assert torch.equal(exact.image_features, mixed.image_features)
    assert not torch.equal(exact.text_features, mixed.text_features)
    assert mixed.text_features.dtype == torch.float32


@pytest.mark.parametrize(("decay", "spared"), [("all", 0), ("matrices", 3)])
def test_which_weights_decay(decay, spared: int):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2, 2), requires_grad=False))
    optimiser = make_optimiser(
        model.named_parameters(),
        learning_rate=0.1,
        weight_decay=0.5,
        decay=decay,
        device=torch.device("cpu"),
    )
    by_decay = {group["weight_decay"]: len(group["params"]) for group in optimiser.param_groups}
    assert by_decay.get(0.0, 0) == spared
    assert by_decay[0.5] == 4 - spared


def test_learning_rate_of_every_step():
    optimiser = make_optimiser(
        nn.Linear(1, 1).named_parameters(),
        learning_rate=1.0,
        weight_decay=0.0,
        decay="all",
        device=torch.device("cpu"),
    )
    schedule = make_schedule(optimiser, schedule="cosine", warmup_steps=2, steps=6)
    rates = []
    for _ in range(6):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.854, 0.5, 0.146], abs=1e-3)


@pytest.mark.parametrize("trained", [False, True])
def test_logit_scale_is_trained_by_choice(tiny: OpenClipEncoder, trained):
    prepare_student(tiny, logit_scale=trained, logit_bias=False)
    assert tiny.clip.logit_scale.requires_grad == trained
    assert tiny.clip.text_projection.requires_grad


def test_batch_norm_statistics_and_dropout():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.LayerNorm(3)).train()
    prepare_student(model, logit_scale=False, logit_bias=False)
    before = model[0].running_mean.clone()
    rows = torch.randn(8, 3)
    model(rows)
    assert torch.equal(model[0].running_mean, before)
    with training_mode(model, statistics=True, dropout=False):
        assert torch.equal(model[1](rows), rows)
        model(rows)
    assert not torch.equal(model[0].running_mean, before)
    assert not any(module.training for module in model)
    before = model[0].running_mean.clone()
    with training_mode(model, statistics=False, dropout=True):
        assert not torch.equal(model[1](rows), rows)
        model(rows)
    assert torch.equal(model[0].running_mean, before)
    assert not any(module.training for module in model)


def test_the_optimiser_is_one_kernel():
    one = [("weight", nn.Parameter(torch.ones(2, 2)))]
    more = {"learning_rate": 0.1, "weight_decay": 0.1, "device": torch.device("cpu")}
    optimiser = make_optimiser(one, decay="all", **more)
    assert [group["fused"] for group in optimiser.param_groups] == [True]


def test_float32_is_float32_on_every_device(monkeypatch: pytest.MonkeyPatch):
    """Whatever was set before: PyTorch lets convolutions have TF32 unasked."""
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    build.build_accelerator("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
