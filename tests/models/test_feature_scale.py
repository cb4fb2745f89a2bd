"""Canonical norms: found by trying, undone exactly enough, and blind to a tower's own scale."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from clip_refine.config.runs import RefineConfig
from clip_refine.models import FeatureScale, OpenClipEncoder, RawNorms, load_open_clip
from clip_refine.models.weights import output_layer
from clip_refine.roads.refine import refine
from clip_refine.support.errors import ModelError
from clip_refine.toy import ToyPairs
from tests.conftest import TINY, write_model

TEXTS = ["a red circle", "a dog"]


def probe(model: OpenClipEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 48, 48), model.tokenizer(TEXTS)


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("proj_bias", [False, True])
def test_the_output_layers_of_both_towers_are_found(
    tmp_path: Path, custom_text: bool, proj_bias: bool
):
    text = {**TINY["text_cfg"], "proj_bias": proj_bias}
    config = {**TINY, "text_cfg": text, **({"custom_text": True} if custom_text else {})}
    model = load_open_clip(write_model(tmp_path, config))
    before = copy.deepcopy(model.state_dict())
    pixels, tokens = probe(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    image = output_layer(model, lambda: model.encode_image(pixels), "image")
    text_layer = output_layer(model, lambda: model.encode_text(tokens), "text")
    assert [names[id(p)] for p in image] == ["clip.visual.proj"]
    root = "clip.text.text_projection" if custom_text else "clip.text_projection"
    expected = [f"{root}.weight", f"{root}.bias"] if proj_bias else [root]
    assert [names[id(p)] for p in text_layer] == expected
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_canonical_norms_are_the_root_of_the_logit_scale_and_can_be_undone(tiny: OpenClipEncoder):
    pixels, tokens = probe(tiny)
    with torch.no_grad():
        image, text = tiny.encode_image(pixels), tiny.encode_text(tokens)
        norms = RawNorms(
            float(image.norm(dim=-1).mean()), float(text.norm(dim=-1).mean()), logit_scale=49.0
        )
        scale = FeatureScale.canonical(tiny, pixels, tokens, norms)
        scaled = tiny.encode_image(pixels), tiny.encode_text(tokens)
        assert float(scaled[0].norm(dim=-1).mean()) == pytest.approx(7, rel=1e-5)
        assert float(scaled[1].norm(dim=-1).mean()) == pytest.approx(7, rel=1e-5)
        assert torch.allclose(scaled[0], scale.image_factor * image, rtol=1e-4)
        assert torch.allclose(normalize(scaled[1]), normalize(text), atol=1e-6)
        scale.undo()
        assert torch.allclose(tiny.encode_image(pixels), image, rtol=1e-5, atol=1e-6)
        scale.undo()  # does nothing a second time
        assert torch.allclose(tiny.encode_text(tokens), text, rtol=1e-5, atol=1e-6)


def test_a_tower_without_an_output_layer_says_what_to_pass():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

    model = Pooled()
    with pytest.raises(ModelError, match=r"image tower.*--loss.feature-scale as-is"):
        output_layer(model, lambda: model.layer(torch.ones(1, 3)).tanh(), "image")


class SharedProjection(nn.Module):
    """Two towers of different norms that end in one and the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.projection = nn.Linear(4, 5, bias=False)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projection(self.image(pixels))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.projection(self.text(3 * tokens))


@torch.no_grad()
def test_a_projection_of_both_towers_is_not_scaled_twice():
    torch.manual_seed(0)
    model = SharedProjection()
    pixels, tokens = torch.randn(4, 3), torch.randn(4, 3)

    def norms() -> list[float]:
        features = model.encode_image(pixels), model.encode_text(tokens)
        return [float(each.norm(dim=-1).mean()) for each in features]

    before = norms()
    scale = FeatureScale.canonical(model, pixels, tokens, RawNorms(*before, logit_scale=100.0))
    assert norms() == pytest.approx([10, 10], rel=1e-5)
    scale.undo()
    assert norms() == pytest.approx(before, rel=1e-5)
    model.text = model.image  # now nothing scales one side alone
    with pytest.raises(ModelError, match="image tower does not end in a layer of its own"):
        FeatureScale.canonical(model, pixels, tokens, RawNorms(*before, logit_scale=100.0))


@pytest.mark.parametrize(
    ("image", "text", "near"), [(10, 10, True), (7, 14, True), (16.2, 24, False), (10, 5, False)]
)
def test_what_counts_as_near_the_papers_norms(image: float, text: float, near: bool):
    assert RawNorms(image, text, 100.0).near_the_papers is near


def refined(
    model: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs, out: Path, scale: str
) -> torch.Tensor:
    config = RefineConfig.model_validate(
        {
            "train": {"batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "decay": "all"},
            "loss": {"feature_scale": scale},
            "out": out,
        }
    )
    refine(config, model=model, train_pairs=pairs, held_out=held_out)
    with torch.no_grad():
        pixels, tokens = probe(model)
        return normalize(torch.cat([model.encode_image(pixels), model.encode_text(tokens)]), dim=-1)


def test_the_scale_is_explained_as_it_came_about(
    tiny: OpenClipEncoder,
    pairs: ToyPairs,
    held_out: ToyPairs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    refined(copy.deepcopy(tiny), pairs, held_out, tmp_path / "asked", "canonical")
    asked = " ".join(capsys.readouterr().err.split())
    assert "Training runs, as asked for, at that scale" in asked
    assert "--recipe" not in asked
    with torch.no_grad():
        tiny.clip.visual.proj.mul_(5.0)
    refined(copy.deepcopy(tiny), pairs, held_out, tmp_path / "auto", "auto")
    auto = " ".join(capsys.readouterr().err.split())
    assert "Training therefore runs at that scale" in auto
    assert "--recipe clip-refine-paper" in auto


def test_a_towers_own_scale_does_not_change_the_refined_model(
    tiny: OpenClipEncoder, pairs: ToyPairs, held_out: ToyPairs, tmp_path: Path
):
    louder = copy.deepcopy(tiny)
    with torch.no_grad():
        louder.clip.visual.proj.mul_(5.0)
        louder.clip.text_projection.mul_(0.3)
    with torch.no_grad():
        pixels, tokens = probe(tiny)
        untouched = normalize(
            torch.cat([tiny.encode_image(pixels), tiny.encode_text(tokens)]), dim=-1
        )
    twin = copy.deepcopy(tiny), copy.deepcopy(louder)
    unit = [
        refined(model, pairs, held_out, tmp_path / name, "canonical")
        for name, model in (("tiny", tiny), ("louder", louder))
    ]
    as_is = [
        refined(model, pairs, held_out, tmp_path / f"{name}-as-is", "as-is")
        for name, model in zip(("tiny", "louder"), twin, strict=True)
    ]
    moved = (unit[0] - untouched).norm()
    assert (unit[0] - unit[1]).norm() < 0.02 * moved
    assert (as_is[0] - as_is[1]).norm() > 0.2 * moved
