"""The student of stored vectors: a dual encoder, its start, and the scale that fits."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from clip_refine.config import LossConfig
from clip_refine.losses import Objective, PairFeatures, hycd_loss
from clip_refine.models import check_dual_encoder
from clip_refine.models.weights import fitted_logit_scale
from clip_refine.vectors.transforms import VectorStudent
from tests.vectors.cases import DIM, drawn, rotation


def student(**settings) -> VectorStudent:
    return VectorStudent(rotation(0), rotation(1), logit_scale=100.0, **settings)


@pytest.mark.parametrize("rank", [None, 2])
def test_it_is_a_dual_encoder_that_begins_at_its_start(rank: int | None):
    made = student(rank=rank, generator=torch.Generator().manual_seed(0))
    assert check_dual_encoder(made) is made
    image, text = drawn(0, 4, 4, torch.float32)
    assert_close(made.encode_image(image), image @ rotation(0).float().T)
    assert_close(made.encode_text(text), text @ rotation(1).float().T)


def test_only_the_change_is_trained():
    assert sum(p.numel() for p in student().parameters()) == 2 * DIM * DIM
    assert sum(p.numel() for p in student(rank=1).parameters()) == 4 * DIM


@pytest.mark.parametrize("rank", [None, 2])
def test_the_maps_are_what_the_layers_do(rank: int | None):
    made = student(rank=rank)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    maps = made.maps(8, 9, logit_scale=30.0)
    image, text = drawn(0, 4, 4, torch.float32)
    assert_close(maps.transform_image(image), normalize(made.encode_image(image), dim=1))
    assert_close(maps.transform_text(text), normalize(made.encode_text(text), dim=1))
    assert (maps.fitted_on, maps.logit_scale) == ((8, 9), 30.0)
    change = maps.image_map - made.image_start
    assert torch.linalg.matrix_rank(change, rtol=1e-5) == (rank or DIM)


def test_the_scaled_objective_has_a_temperature_on_either_side():
    """By the definition, with logits of the student at 30 and of the teacher at 100."""
    given = PairFeatures(*(10 * side for side in drawn(0, 6, 6)))
    teacher = PairFeatures(*drawn(1, 6, 6))
    image, text = (normalize(side, dim=1) for side in given)
    expected = 0.0
    for turned in (False, True):
        logits = 30 * image @ text.T
        target = 100 * normalize(teacher[0], dim=1) @ normalize(teacher[1], dim=1).T
        if turned:
            logits, target = logits.T, target.T
        mixed = torch.eye(6) / 2 + target.softmax(1) / 2
        expected += (mixed * (mixed.log() - logits.log_softmax(1))).sum(1).mean() / 2
    objective = Objective(LossConfig(temperature=None, normalize=True))
    references = drawn(2, 6, 6)[0]
    scale = torch.tensor(30.0).double()
    terms = objective(given, teacher, references, logit_scale=scale, teacher_scale=100.0)
    assert_close(terms.hycd, expected)
    plain = Objective(LossConfig())(given, teacher, references, logit_scale=torch.tensor(100.0))
    assert_close(terms.rafa, plain.rafa)


def test_at_the_teachers_scale_it_is_the_plain_loss():
    given, teacher = PairFeatures(*drawn(0, 6, 6)), PairFeatures(*drawn(1, 6, 6))
    objective = Objective(LossConfig(rafa_weight=0, temperature=None, normalize=True))
    found = objective(given, teacher, None, logit_scale=torch.tensor(20.0), teacher_scale=20.0)
    expected = hycd_loss(*given, *teacher, temperature=1 / 20, normalize=True)
    assert_close(found.hycd, expected)


@pytest.mark.parametrize("teacher_scale", [14.3, 100.0])
def test_the_scale_is_the_best_of_a_grid(teacher_scale: float):
    teacher, given = PairFeatures(*drawn(0, 40, 40)), PairFeatures(*drawn(0, 40, 40))
    noise = drawn(1, 40, 40)
    given = PairFeatures(*(a + 0.3 * b for a, b in zip(given, noise, strict=True)))
    found = fitted_logit_scale(given, teacher, teacher_scale)
    image, text = (normalize(side, dim=1) for side in given)
    target = normalize(teacher[0], dim=1) @ normalize(teacher[1], dim=1).T * teacher_scale

    def loss(scale: float) -> float:
        logits = scale * image @ text.T
        rows = (target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return -float(rows + (target.T.softmax(1) * logits.T.log_softmax(1)).sum(1).mean())

    grid = [math.exp(step / 100) for step in range(-100, 600)]
    assert found == pytest.approx(min(grid, key=loss), rel=0.02)


def test_halved_cosines_need_twice_the_scale():
    """Texts leaned half-way out of the images' plane have cosines of cos 60° times the old."""
    flat = torch.cat([torch.randn(30, 4, generator=torch.Generator().manual_seed(0))] * 2)[:30]
    image = torch.cat([flat, torch.zeros(30, 1)], dim=1)
    text = torch.cat([normalize(flat, dim=1), torch.full((30, 1), math.sqrt(3))], dim=1)
    found = fitted_logit_scale((image, text), (image, image), 10.0)
    assert found == pytest.approx(20.0, rel=0.01)
