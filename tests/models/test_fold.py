"""The mean of a tower's features folded out of its weights, and the scale that fits then."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clip_refine.models import OpenClipEncoder, load_open_clip
from clip_refine.models.weights import (
    fitted_logit_scale,
    fold_matrix,
    fold_towers,
    set_logit_scale,
)
from clip_refine.support.errors import ModelError
from tests.conftest import TINY, write_model

SAMPLE = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def texts_of(model: OpenClipEncoder) -> Tensor:
    return model.tokenizer(["a red circle", "two small squares on green"])


def maps(dim: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, dim, generator=generator)
    return fold_matrix(image, share), fold_matrix(text, share)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.01, 1.0), st.floats(1e-3, 1e3))
def test_it_takes_the_means_direction_off_and_no_other(seed, dim, share, factor):
    generator = torch.Generator().manual_seed(seed)
    mean = factor * torch.randn(dim, generator=generator, dtype=torch.float64)
    other = torch.randn(dim, generator=generator, dtype=torch.float64)
    other -= mean * (other @ mean) / (mean @ mean)
    fold = fold_matrix(mean, share)
    torch.testing.assert_close(fold @ mean, (1 - share) * mean, rtol=1e-9, atol=1e-9 * factor)
    torch.testing.assert_close(fold @ other, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fold, fold.T)
    whole = fold_matrix(mean)
    torch.testing.assert_close(whole @ whole, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole, fold_matrix(7 * mean), rtol=0, atol=1e-12)


def test_a_mean_without_a_direction_is_refused():
    with pytest.raises(ValueError, match="has no direction"):
        fold_matrix(torch.zeros(3))


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_folded_model_gives_the_mapped_features(tiny: OpenClipEncoder, share: float):
    tokens = texts_of(tiny)
    with torch.no_grad():
        image, text = tiny.encode_image(SAMPLE), tiny.encode_text(tokens)
        image_fold, text_fold = maps(image.shape[1], share)
        fold_towers(tiny, SAMPLE, tokens, image_fold, text_fold)
        for before, after, fold in (
            (image, tiny.encode_image(SAMPLE), image_fold),
            (text, tiny.encode_text(tokens), text_fold),
        ):
            expected = before.double() @ fold
            assert (after - expected).norm() <= 1e-6 * expected.norm()


def test_it_is_still_folded_when_saved_and_loaded(tiny: OpenClipEncoder, tmp_path: Path):
    tokens = texts_of(tiny)
    fold_towers(tiny, SAMPLE, tokens, *maps(16))
    set_logit_scale(tiny, 31.5)
    tiny.save(tmp_path / "folded")
    again = load_open_clip(f"local-dir:{tmp_path / 'folded'}")
    with torch.no_grad():
        assert torch.equal(again.encode_image(SAMPLE), tiny.encode_image(SAMPLE))
        assert torch.equal(again.encode_text(tokens), tiny.encode_text(tokens))
        assert float(again.logit_scale) == pytest.approx(31.5, rel=1e-6)


def test_as_wide_as_it_is_deep(tmp_path: Path):
    """Where a projection is square, which side the features are on is found by trying."""
    square = {**TINY, "embed_dim": 32, "text_cfg": {**TINY["text_cfg"], "width": 32}}
    model = load_open_clip(write_model(tmp_path / "square", square))
    tokens = texts_of(model)
    with torch.no_grad():
        image = model.encode_image(SAMPLE)
        image_fold, text_fold = maps(32)
        fold_towers(model, SAMPLE, tokens, image_fold, text_fold)
        expected = image.double() @ image_fold
        assert (model.encode_image(SAMPLE) - expected).norm() <= 1e-6 * expected.norm()


def test_a_tower_without_a_linear_end_is_refused_and_left_as_it_was(tiny: OpenClipEncoder):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny
            self.norm = nn.LayerNorm(16)

        def encode_image(self, pixels: Tensor) -> Tensor:
            return self.norm(tiny.encode_image(pixels))

        def encode_text(self, tokens: Tensor) -> Tensor:
            return tiny.encode_text(tokens)

    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match="image tower.s last layer, .* does not take the map"):
        fold_towers(model, SAMPLE, texts_of(tiny), *maps(16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_fitted_scale_is_where_the_cross_entropy_is_least():
    generator = torch.Generator().manual_seed(3)
    teacher = tuple(torch.randn(64, 8, generator=generator, dtype=torch.float64) for _ in "it")
    student = tuple(side + 0.5 * torch.randn(64, 8, generator=generator) for side in teacher)
    found = fitted_logit_scale(student, teacher, 20.0)
    own = normalize(student[0], dim=1) @ normalize(student[1], dim=1).T
    known = 20 * normalize(teacher[0], dim=1) @ normalize(teacher[1], dim=1).T

    def naive(scale: float) -> float:
        return sum(
            float(cross_entropy(scale * logits, targets.softmax(dim=1)))
            for logits, targets in ((own, known), (own.T, known.T))
        )

    grid = [math.exp(step / 200) for step in range(1382)]  # half a per cent apart
    assert found == pytest.approx(min(grid, key=naive), rel=0.01)
    assert fitted_logit_scale(teacher, teacher, 20.0) == pytest.approx(20.0, rel=0.01)


def test_the_logit_scale_is_kept_as_the_model_stores_it(tiny: OpenClipEncoder):
    set_logit_scale(tiny, 25.0)
    assert float(tiny.logit_scale.detach()) == pytest.approx(25.0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(50.0))

        @property
        def logit_scale(self) -> Tensor:
            return self.factor

    plain = Plain()
    set_logit_scale(plain, 30.0)
    assert float(plain.factor.detach()) == 30.0

    class Fixed(nn.Module):
        logit_scale = torch.tensor(10.0)

    with pytest.raises(ModelError, match="no parameter from which its logit_scale 10 follows"):
        set_logit_scale(Fixed(), 5.0)
