import pytest
import torch
from hypothesis import given

from clip_refine.losses import rafa_loss
from tests.losses.cases import made_inputs
from tests.reference.draws import gradient, normals, repeatable, seeds


def test_by_hand():
    image = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    text = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    references = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    # squared distances: image 4 and 0, text 1 and 25, together 30, over B·d = 4 or 2·B = 4
    assert rafa_loss(image, text, references).item() == 7.5
    assert rafa_loss(image, text, references, reduction="sum").item() == 7.5


@repeatable
@given(seed=seeds)
def test_the_papers_sum_is_half_the_dimension_times_the_mean(seed: int):
    image, text, *_, references = made_inputs(4, 6, seed=seed)
    mean = rafa_loss(image, text, references)
    torch.testing.assert_close(rafa_loss(image, text, references, reduction="sum"), mean * 6 / 2)


@repeatable
@given(seed=seeds)
def test_a_common_shift_does_not_matter(seed: int):
    image, text, *_, references = made_inputs(seed=seed)
    shift = normals(5, seed=seed + 1)
    shifted = rafa_loss(image + shift, text + shift, references + shift)
    torch.testing.assert_close(shifted, rafa_loss(image, text, references))


def test_pairs_at_their_reference_cost_nothing():
    references = normals(3, 4, seed=0)
    assert rafa_loss(references, references, references).item() == 0


def test_expected_gradient_is_shrinkage_toward_the_priors_mean():
    image, text, *_, noise = made_inputs(4, 5, seed=1)
    mean = normals(5, seed=2)
    # references come in mirrored pairs around the prior's mean, so their average is exact
    slopes = [
        gradient(lambda x, r=reference: rafa_loss(x, text, r), at=image)
        for reference in (mean + noise, mean - noise)
    ]
    torch.testing.assert_close((slopes[0] + slopes[1]) / 2, 2 * (image - mean) / (4 * 5))


def test_both_sides_of_a_pair_get_the_same_noise():
    image, text, *_, references = made_inputs(4, 5, seed=3)
    nothing = torch.zeros_like(references)

    def noise_of(side: str) -> torch.Tensor:
        def loss(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            return rafa_loss(x, text, r) if side == "image" else rafa_loss(image, x, r)

        at = image if side == "image" else text
        with_noise = gradient(lambda x: loss(x, references), at=at)
        return with_noise - gradient(lambda x: loss(x, nothing), at=at)

    torch.testing.assert_close(noise_of("image"), noise_of("text"))


def test_on_unit_features_the_expected_gradient_vanishes():
    raw, text, *_, noise = made_inputs(4, 5, seed=4)

    def on_unit(x: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return rafa_loss(torch.nn.functional.normalize(x, dim=1), text, references)

    slopes = [gradient(lambda x, r=r: on_unit(x, r), at=raw) for r in (noise, -noise)]
    assert slopes[0].abs().max() > 1e-3
    torch.testing.assert_close(slopes[0] + slopes[1], torch.zeros_like(raw))


def test_references_of_another_shape_are_refused():
    image, text, *_ = made_inputs(4, 5, seed=5)
    with pytest.raises(ValueError, match=r"references must have .* \(4, 5\), got \(5,\)"):
        rafa_loss(image, text, torch.zeros(5))


def test_an_unknown_reduction_is_refused():
    image, text, *_, references = made_inputs(4, 5, seed=5)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        rafa_loss(image, text, references, reduction="none")  # pyright: ignore[reportArgumentType]
