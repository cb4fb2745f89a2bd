"""The losses on the golden inputs, in float64."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_refine.config import LossConfig
from clip_refine.losses import (
    LossTerms,
    Objective,
    PairFeatures,
    alignment_loss,
    contrastive_loss,
    feature_distillation_loss,
    hycd_loss,
    logit_distillation_loss,
    rafa_loss,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/losses.json").read_text())
VALUES = GOLDEN["losses"]


def golden_input(name: str) -> Tensor:
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.float64)


IMAGE, TEXT = golden_input("image"), golden_input("text")
TEACHER_IMAGE, TEACHER_TEXT = golden_input("teacher_image"), golden_input("teacher_text")
REFERENCES = golden_input("reference")


def exactly(value: float):
    return pytest.approx(value, abs=1e-9, rel=0)


def test_rafa():
    mean = rafa_loss(IMAGE, TEXT, REFERENCES).item()
    paper = rafa_loss(IMAGE, TEXT, REFERENCES, reduction="sum").item()
    assert mean == exactly(VALUES["rafa"]["mean_over_batch_and_dim"])
    assert paper == exactly(VALUES["rafa"]["paper_half_sum_over_dim"])


@pytest.mark.parametrize("row", VALUES["hycd"], ids=lambda row: f"{row['alpha']}-{row['features']}")
def test_hycd(row: dict):
    loss = hycd_loss(
        IMAGE,
        TEXT,
        TEACHER_IMAGE,
        TEACHER_TEXT,
        alpha=row["alpha"],
        temperature=row["temperature"],
        normalize=row["features"] == "unit",
    )
    assert loss.item() == exactly(row["mean"])


@pytest.mark.parametrize("row", VALUES["contrastive"], ids=lambda row: row["features"])
def test_contrastive(row: dict):
    loss = contrastive_loss(
        IMAGE, TEXT, logit_scale=row["scale"], normalize=row["features"] == "unit"
    )
    assert loss.item() == exactly(row["value"])


def test_distillation():
    four = (IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT)
    features, logits = VALUES["feature_distillation"], VALUES["logit_distillation"]
    assert feature_distillation_loss(*four).item() == exactly(features["value"])
    assert logit_distillation_loss(*four).item() == exactly(logits["value"])


def test_alignment():
    raw, unit = alignment_loss(IMAGE, TEXT), alignment_loss(IMAGE, TEXT, normalize=True)
    assert raw.item() == exactly(VALUES["alignment_loss"]["mean_squared_distance_raw"])
    assert unit.item() == exactly(VALUES["alignment_loss"]["mean_squared_distance_unit"])


def default_terms(image: Tensor, text: Tensor) -> LossTerms:
    objective = Objective(LossConfig())
    return objective(
        PairFeatures(image, text),
        PairFeatures(TEACHER_IMAGE, TEACHER_TEXT),
        REFERENCES,
        logit_scale=torch.tensor(100.0),
    )


def test_default_objective_value_and_gradients():
    expected = GOLDEN["default_objective"]
    image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
    total = default_terms(image, text).total
    total.backward()
    assert total.item() == exactly(expected["value"])
    for side, name in ((image, "grad_image"), (text, "grad_text")):
        assert side.grad is not None
        written = torch.tensor(expected[name], dtype=torch.float64)
        tolerance = expected["grad_tolerance"]
        torch.testing.assert_close(side.grad, written, atol=tolerance, rtol=0)


def test_default_objective_gradients_to_nine_digits_by_differences():
    # the file prints its gradients to seven digits; central differences of the value say more
    image = IMAGE.clone().requires_grad_()
    default_terms(image, TEXT).total.backward()
    assert image.grad is not None
    step = 1e-4

    def numeric(row: int, column: int) -> float:
        # five points, so that the error is of order step⁴
        shift = torch.zeros_like(IMAGE)
        shift[row, column] = step
        value = [default_terms(IMAGE + n * shift, TEXT).total.item() for n in (-2, -1, 1, 2)]
        return (value[0] - 8 * value[1] + 8 * value[2] - value[3]) / (12 * step)

    for row, column in ((0, 0), (2, 7), (5, 15)):
        assert image.grad[row, column].item() == pytest.approx(numeric(row, column), abs=1e-9)
