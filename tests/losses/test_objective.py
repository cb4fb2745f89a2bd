import math
from typing import Any

import pytest
import torch

from clip_refine import losses
from clip_refine.config import LossConfig
from clip_refine.losses import LossTerms, Objective, PairFeatures, sigmoid_contrastive_loss
from clip_refine.support.errors import ConfigError
from tests.losses.cases import Inputs, judged, made_inputs

NOTHING: dict[str, Any] = {
    "rafa_weight": 0.0,
    "hycd_weight": 0.0,
    "alpha": 0.4,
    "temperature": 0.8,
    "normalize": False,
    "rafa_reduction": "mean",
}
SCALE = torch.tensor(20.0, dtype=torch.float64)
MIX = torch.tensor(0.3, dtype=torch.float64)
X = made_inputs(seed=0)


def terms_of(inputs: Inputs = X, **settings: Any) -> LossTerms:
    objective = Objective(LossConfig(**NOTHING | settings))
    return objective(
        PairFeatures(inputs.image, inputs.text),
        PairFeatures(inputs.teacher_image, inputs.teacher_text),
        inputs.references,
        logit_scale=SCALE,
        mix=MIX,
    )


EXPECTED = {
    "rafa": lambda: losses.rafa_loss(X.image, X.text, X.references),
    "hycd": lambda: losses.hycd_loss(*X[:4], alpha=0.4, temperature=0.8),
    "contrastive": lambda: losses.contrastive_loss(X.image, X.text, logit_scale=20.0),
    "alignment": lambda: losses.alignment_loss(X.image, X.text),
    "centroid_uniformity": lambda: losses.centroid_uniformity_loss(X.image, X.text),
    "covariance": lambda: losses.covariance_loss(X.image, X.text),
    "anchor": lambda: losses.feature_distillation_loss(*X[:4]),
    "m2_mix": lambda: losses.m2_mix_loss(X.image, X.text, logit_scale=20.0, mix=MIX),
    "logit_distillation": lambda: losses.logit_distillation_loss(*X[:4], temperature=0.8),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_term_alone_is_its_weighted_loss_and_no_other_is_computed(name: str):
    terms = terms_of(**{f"{name}_weight": 3.0})
    assert terms.as_floats().keys() == {name, "total"}
    torch.testing.assert_close(getattr(terms, name), 3 * EXPECTED[name]())
    torch.testing.assert_close(terms.total, 3 * EXPECTED[name]())


def test_the_total_adds_all_terms():
    terms = terms_of(**{f"{name}_weight": 0.5 for name in EXPECTED})
    floats = terms.as_floats()
    assert floats.keys() == {*EXPECTED, "total"}
    assert floats["total"] == pytest.approx(sum(0.5 * loss().item() for loss in EXPECTED.values()))


def test_the_records_fields_are_the_terms():
    assert set(LossTerms.__dataclass_fields__) == {*EXPECTED, "own"}  # given from outside


def test_no_term_is_an_error():
    with pytest.raises(ValueError, match="no loss term is present"):
        _ = LossTerms().total


def test_as_floats_keeps_the_graph_of_the_total():
    image = X.image.clone().requires_grad_()
    terms = terms_of(X._replace(image=image), rafa_weight=1.0)
    terms.as_floats()
    terms.total.backward()
    assert image.grad is not None


def test_unit_features_and_the_models_own_scale():
    unit = terms_of(hycd_weight=1.0, normalize=True, temperature=None)
    expected = losses.hycd_loss(*X[:4], alpha=0.4, temperature=1 / 20, normalize=True)
    torch.testing.assert_close(unit.total, expected)
    aligned = terms_of(alignment_weight=1.0, normalize=True)  # raw all the same
    torch.testing.assert_close(aligned.total, losses.alignment_loss(X.image, X.text))
    aligned = terms_of(alignment_weight=1.0, alignment_normalize=True)
    expected = losses.alignment_loss(X.image, X.text, normalize=True)
    torch.testing.assert_close(aligned.total, expected)


def test_raw_contrastive_at_a_scale_of_its_own():
    raw = terms_of(contrastive_weight=1.0, contrastive_normalize=False, contrastive_scale=0.5)
    expected = losses.contrastive_loss(X.image, X.text, logit_scale=0.5, normalize=False)
    torch.testing.assert_close(raw.total, expected)


@pytest.mark.parametrize(("progress", "temperature"), [(0.0, 0.05), (0.25, 0.0875), (1.0, 0.2)])
def test_the_temperature_walks_evenly_from_the_models_own(progress: float, temperature: float):
    objective = Objective(
        LossConfig(**NOTHING | {"contrastive_weight": 1.0, "contrastive_scale_end": 5.0})
    )
    scale = SCALE.clone().requires_grad_()
    pairs = PairFeatures(X.image, X.text)
    found = objective(pairs, None, None, logit_scale=scale, progress=progress).total
    expected = losses.contrastive_loss(X.image, X.text, logit_scale=1 / temperature)
    torch.testing.assert_close(found, expected)
    assert not objective.uses_logit_scale
    assert not found.requires_grad  # also where a loss of one's own trains the scale


def test_the_temperature_may_begin_elsewhere_and_fall():
    settings = {"contrastive_scale": 5.0, "contrastive_scale_end": 50.0}
    objective = Objective(LossConfig(**NOTHING | {"m2_mix_weight": 1.0} | settings))
    pairs = PairFeatures(X.image, X.text)
    found = objective(pairs, None, None, logit_scale=SCALE, mix=MIX, progress=0.5).total
    expected = losses.m2_mix_loss(X.image, X.text, logit_scale=1 / 0.11, mix=MIX)
    torch.testing.assert_close(found, expected)


def learned_scale_gradient(**settings: Any) -> float | None:
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    pairs = PairFeatures(X.image.clone().requires_grad_(), X.text)
    teacher = PairFeatures(X.teacher_image, X.teacher_text)
    objective = Objective(LossConfig(**NOTHING | settings))
    objective(pairs, teacher, X.references, logit_scale=scale).total.backward()
    return None if scale.grad is None else scale.grad.item()


def test_only_the_contrastive_term_trains_the_logit_scale():
    assert learned_scale_gradient(contrastive_weight=1.0) not in (None, 0.0)
    assert learned_scale_gradient(hycd_weight=1.0, temperature=None, normalize=True) is None
    assert learned_scale_gradient(hycd_weight=1.0, rafa_weight=1.0) is None


def test_what_a_recipe_needs():
    rafa = Objective(LossConfig(**NOTHING | {"rafa_weight": 1.0}))
    hycd = Objective(LossConfig(**NOTHING | {"hycd_weight": 1.0}))
    mixed = Objective(LossConfig(**NOTHING | {"m2_mix_weight": 1.0}))
    assert (rafa.needs_references, rafa.needs_teacher, rafa.needs_mix) == (True, False, False)
    assert (hycd.needs_references, hycd.needs_teacher, hycd.needs_mix) == (False, True, False)
    assert (mixed.needs_references, mixed.needs_teacher, mixed.needs_mix) == (False, False, True)
    for weight in ("anchor_weight", "logit_distillation_weight"):
        assert Objective(LossConfig(**NOTHING | {weight: 1.0})).needs_teacher


@pytest.mark.parametrize(
    ("weight", "missing"),
    [("rafa_weight", "references"), ("hycd_weight", "teacher"), ("m2_mix_weight", "mix")],
)
def test_what_is_needed_must_be_given(weight: str, missing: str):
    objective = Objective(LossConfig(**NOTHING | {weight: 1.0}))
    with pytest.raises(ValueError, match=f"this objective needs {missing}, got None"):
        objective(PairFeatures(X.image, X.text), None, None, logit_scale=SCALE)


def test_the_anchor_moves_only_where_it_is_told_to():
    pairs = PairFeatures(X.image, X.text)
    still = Objective(LossConfig(**NOTHING | {"anchor_weight": 2.0}))
    moved = Objective(LossConfig(**NOTHING | {"anchor_weight": 2.0, "anchor_shift": 0.5}))
    gap = X.text.mean(dim=0) - X.image.mean(dim=0)
    assert (still.needs_centroid_gap, moved.needs_centroid_gap) == (False, True)
    assert still(pairs, pairs, None, logit_scale=SCALE).total.item() == 0
    expected = 2 * 2 * (gap / 4).square().mean()  # weight, towers, half of half the gap
    total = moved(pairs, pairs, None, logit_scale=SCALE, centroid_gap=gap).total
    torch.testing.assert_close(total, expected)
    with pytest.raises(ValueError, match="this objective needs centroid_gap, got None"):
        moved(pairs, pairs, None, logit_scale=SCALE)


def test_the_contrastive_term_may_be_siglips():
    pairs = PairFeatures(X.image, X.text)
    objective = Objective(
        LossConfig(**NOTHING | {"contrastive_weight": 2.0, "contrastive_form": "sigmoid"})
    )
    bias = torch.tensor(-10.0, dtype=torch.float64)
    terms = objective(pairs, None, None, logit_scale=SCALE, logit_bias=bias)
    expected = sigmoid_contrastive_loss(X.image, X.text, logit_scale=SCALE, logit_bias=bias)
    torch.testing.assert_close(terms.total, 2 * expected)
    with pytest.raises(ValueError, match="this objective needs logit_bias, got None"):
        objective(pairs, None, None, logit_scale=SCALE)


def test_the_teacher_masks_false_negatives_of_every_contrastive_term():
    weights = {"contrastive_weight": 1.0, "m2_mix_weight": 1.0, "false_negatives": "masked"}
    terms = terms_of(**weights)
    own = {"logit_scale": 20.0, "teacher_unit": judged(X)}
    assert terms.contrastive == losses.contrastive_loss(*X[:2], **own)
    assert terms.m2_mix == losses.m2_mix_loss(*X[:2], mix=MIX, **own)
    assert Objective(LossConfig(**NOTHING | weights)).needs_teacher
    idle = {"rafa_weight": 1.0, "false_negatives": "masked"}
    assert not Objective(LossConfig(**NOTHING | idle)).needs_teacher


def test_wrong_captions_go_to_the_contrastive_term():
    settings = {"contrastive_weight": 2.0, "negatives": "swapped-words"}
    objective, pairs = Objective(LossConfig(**NOTHING | settings)), PairFeatures(X.image, X.text)
    wrong = {"wrong_text_features": X.references}
    found = objective(pairs, None, None, logit_scale=SCALE, **wrong).total
    expected = losses.contrastive_loss(*X[:2], logit_scale=20.0, **wrong)
    torch.testing.assert_close(found, 2 * expected)
    with pytest.raises(ValueError, match="this objective needs wrong_text_features, got None"):
        objective(pairs, None, None, logit_scale=SCALE)
    with pytest.raises(ConfigError, match="does not go with contrastive_form sigmoid; use softmax"):
        LossConfig(**settings, contrastive_form="sigmoid")


MASKED = {"positives": "same-caption", "false_negatives": "masked"}


@pytest.mark.parametrize(
    "settings",
    [
        *({f"{name}_weight": 1.0} for name in EXPECTED),
        {**MASKED, "hycd_weight": 1.0, "m2_mix_weight": 1.0},
        {**MASKED, "contrastive_weight": 1.0, "negatives": "swapped-words"},
        {**MASKED, "contrastive_weight": 1.0, "contrastive_form": "sigmoid"},
        {"own_weight": 1.0},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_the_parts_of_several_processes_add_up(settings: dict[str, Any]):
    """Losses and gradients, of parts that need not be of one size."""
    teacher = PairFeatures(*X[2:4])
    leaves = [x.clone().requires_grad_() for x in (X.image, X.text, SCALE)]
    objective = Objective(
        LossConfig(**NOTHING | settings), lambda student, *_: student.text_features.pow(3).sum()
    )

    def found(rows: slice) -> list[torch.Tensor]:
        total = objective(
            PairFeatures(leaves[0], leaves[1]),
            teacher,
            X.references,
            logit_scale=leaves[2],
            logit_bias=torch.tensor(-1.0),
            mix=torch.tensor([0.1, 0.4, 0.6, 0.7]),
            caption_ids=torch.tensor([0, 1, 0, 2]) if "positives" in settings else None,
            wrong_text_features=X.references.detach(),
            rows=rows,
        ).total
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return [total.detach(), *(x for x in gradients if x is not None)]

    whole = found(slice(None))
    parts = [found(rows) for rows in (slice(0, 1), slice(1, 2), slice(2, 4))]
    for one, *others in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(others), one, rtol=1e-12, atol=1e-12)


def test_what_is_not_needed_may_be_missing():
    objective = Objective(LossConfig(**NOTHING | {"contrastive_weight": 1.0}))
    terms = objective(PairFeatures(X.image, X.text), None, None, logit_scale=SCALE)
    assert terms.total.isfinite()


def test_no_weight_at_all_is_refused():
    with pytest.raises(ConfigError, match="every weight is 0, so there is nothing to minimise"):
        Objective(LossConfig(**NOTHING))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_no_weights_are_refused(weight: float):
    with pytest.raises(ConfigError, match="anchor_weight"):
        Objective(LossConfig(**NOTHING | {"rafa_weight": 1.0, "anchor_weight": weight}))
