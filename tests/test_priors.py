import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clip_refine.priors import Fixed, Gaussian, NormMatched, Prior, StandardNormal, Uniform
from tests.reference.draws import repeatable, seeds

MEAN, STD = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 0.0])
PRIORS: list[Prior] = [
    StandardNormal(),
    StandardNormal(scale=4.0),
    Uniform(),
    Uniform(low=0.0, high=1.0),
    Gaussian(mean=MEAN, std=STD),
    Fixed(vector=MEAN),
    NormMatched(norm=10.0),
]
every_prior = pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)


def drawn(prior: Prior, count: int, dim: int = 3, *, seed: int = 0, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return prior.sample(count, dim, generator=generator, device="cpu", **options)


@every_prior
def test_shape_dtype_and_no_gradient(prior: Prior):
    references = drawn(prior, 5)
    assert references.shape == (5, 3)
    assert references.dtype == torch.float32
    assert not references.requires_grad


@every_prior
@repeatable
@given(seed=seeds)
def test_one_seed_gives_the_same_numbers_in_every_precision(prior: Prior, seed: int):
    plain = drawn(prior, 4, seed=seed)
    assert torch.equal(drawn(prior, 4, seed=seed), plain)
    assert torch.equal(drawn(prior, 4, seed=seed, dtype=torch.float64), plain.double())
    assert torch.equal(drawn(prior, 4, seed=seed, dtype=torch.bfloat16), plain.bfloat16())


@every_prior
def test_numbers_come_from_the_generator_alone(prior: Prior):
    torch.manual_seed(1)
    first = drawn(prior, 4)
    state = torch.get_rng_state()
    assert torch.equal(drawn(prior, 4), first)
    assert torch.equal(torch.get_rng_state(), state)


@every_prior
def test_they_are_made_on_the_generators_device_and_then_moved(prior: Prior):
    references = prior.sample(2, 3, generator=torch.Generator().manual_seed(0), device="meta")
    assert references.device.type == "meta"


def test_two_draws_are_independent_references():
    generator = torch.Generator().manual_seed(0)
    draws = [StandardNormal().sample(1000, 8, generator=generator, device="cpu") for _ in range(2)]
    correlation = torch.corrcoef(torch.stack([side.flatten() for side in draws]))[0, 1]
    assert abs(correlation.item()) < 4 / math.sqrt(8000)


@pytest.mark.parametrize(
    ("prior", "mean", "std"),
    [
        (StandardNormal(), [0, 0, 0], [1, 1, 1]),
        (StandardNormal(scale=4.0), [0, 0, 0], [2, 2, 2]),
        (Uniform(), [0, 0, 0], [1, 1, 1]),
        (Uniform(low=1.0, high=3.0), [2, 2, 2], [1 / math.sqrt(3)] * 3),
        (Gaussian(mean=MEAN, std=STD), MEAN.tolist(), STD.tolist()),
        (Fixed(vector=MEAN), MEAN.tolist(), [0, 0, 0]),
    ],
)
def test_moments(prior: Prior, mean: list[float], std: list[float]):
    references = drawn(prior, 40_000, dtype=torch.float64)
    # four standard errors of the largest standard deviation, 2 / √40000
    assert references.mean(dim=0).tolist() == pytest.approx(mean, abs=0.04)
    assert references.std(dim=0).tolist() == pytest.approx(std, abs=0.04)


def test_scale_is_the_variance():
    assert torch.equal(drawn(StandardNormal(scale=9.0), 4), 3 * drawn(StandardNormal(), 4))
    assert not drawn(StandardNormal(scale=0.0), 4).any()


def test_uniform_stays_inside():
    references = drawn(Uniform(low=-0.5, high=2.0), 10_000)
    assert references.min() >= -0.5
    assert references.max() < 2
    assert references.max() - references.min() > 2.49


def naive_mean_chi(dim: int) -> float:
    """E‖N(0, I)‖ by the recursion of Γ at halves: E_{d+1} = d / E_d, from E_1 = √(2/π)."""
    mean = math.sqrt(2 / math.pi)
    for d in range(1, dim):
        mean = d / mean
    return mean


@repeatable
@given(dim=st.integers(1, 2000), norm=st.floats(0, 100))
def test_matched_deviation_equals_the_naive_recursion(dim: int, norm: float):
    expected = norm / naive_mean_chi(dim)
    assert NormMatched(norm=norm).standard_deviation(dim) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 3, 512])
def test_matched_norms_are_met_on_average(dim: int):
    norms = drawn(NormMatched(norm=10.0), 20_000, dim).norm(dim=1)
    standard_error = norms.std().item() / math.sqrt(20_000)
    assert norms.mean().item() == pytest.approx(10, abs=5 * standard_error)


def test_a_matched_norm_of_zero_is_the_origin():
    assert not drawn(NormMatched(norm=0.0), 4).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StandardNormal(scale=-1.0), "scale is a variance, finite and at least 0; got -1"),
        (lambda: StandardNormal(scale=math.nan), "scale is a variance"),
        (lambda: Uniform(low=1.0, high=1.0), "low must be below high"),
        (lambda: NormMatched(norm=math.inf), "norm must be finite"),
        (lambda: Gaussian(mean=MEAN, std=STD[:2]), r"both be \(dim,\), got \(3,\) and \(2,\)"),
        (lambda: Gaussian(mean=MEAN, std=-STD), "std at least 0"),
        (lambda: Fixed(vector=MEAN[None]), r"must be \(dim,\) and finite, got \(1, 3\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("prior", [Fixed(vector=MEAN), Gaussian(mean=MEAN, std=STD)])
def test_a_vector_of_another_dimension_is_refused(prior: Prior):
    with pytest.raises(ValueError, match="this prior has dimension 3, the features have 4"):
        drawn(prior, 2, 4)
